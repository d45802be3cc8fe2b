//! Tests of stripping and merging on models that are built here; the oracle is prost's decoder with tract's structs.

use super::wire::{write_bytes, write_varint};
use super::*;
use crate::error::ErrorKind::*;
use prost::Message;
use tract_onnx::pb::*;

/// External data that must not be asked for.
pub(super) struct Never;

impl ExternalData for Never {
    fn read(&mut self, location: &str, _: u64, _: Option<u64>) -> Result<Vec<u8>, ModelError> {
        Err(ModelError::external_data_missing(format!("asked for {location}")))
    }
}

pub(super) fn strip_all(model: &[u8]) -> Result<Stripped<'_>, ModelError> {
    strip(model, &mut Never, &mut || Ok(()))
}

pub(super) fn merge_all(stripped: &Stripped) -> Vec<u8> {
    let mut out = Vec::new();
    let mut fetch = |ordinal: u32, data: &mut Vec<u8>| {
        data.extend_from_slice(&stripped.tensors[ordinal as usize].data);
        Ok(())
    };
    merge(&stripped.graph, &mut fetch, &mut out).unwrap();
    assert_eq!(merged_len(&stripped.graph).unwrap(), out.len() as u64);
    out
}

pub(super) fn le(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

pub(super) fn raw(name: &str, code: i32, dims: &[i64], data: Vec<u8>) -> TensorProto {
    TensorProto { name: name.into(), data_type: code, dims: dims.into(), raw_data: data, ..Default::default() }
}

pub(super) fn floats(name: &str, dims: &[i64], first: f32) -> TensorProto {
    let n = dims.iter().product::<i64>();
    raw(name, 1, dims, le(&(0..n).map(|i| first + i as f32).collect::<Vec<_>>()))
}

pub(super) fn node(op: &str, inputs: &[&str], output: &str, attribute: Vec<AttributeProto>) -> NodeProto {
    NodeProto {
        op_type: op.into(),
        input: inputs.iter().map(|name| name.to_string()).collect(),
        output: vec![output.into()],
        attribute,
        ..Default::default()
    }
}

pub(super) fn tensor_attribute(name: &str, t: TensorProto) -> AttributeProto {
    AttributeProto { name: name.into(), r#type: 4, t: Some(t), ..Default::default() }
}

pub(super) fn graph_attribute(name: &str, g: GraphProto) -> AttributeProto {
    AttributeProto { name: name.into(), r#type: 5, g: Some(g), ..Default::default() }
}

pub(super) fn graph(node: Vec<NodeProto>, initializer: Vec<TensorProto>) -> GraphProto {
    let output = vec![ValueInfoProto { name: "y".into(), ..Default::default() }];
    GraphProto { name: "g".into(), node, initializer, output, ..Default::default() }
}

pub(super) fn model(graph: GraphProto) -> ModelProto {
    let opset_import = vec![OperatorSetIdProto { domain: String::new(), version: 17 }];
    ModelProto { ir_version: 8, producer_name: "test".into(), opset_import, graph: Some(graph), ..Default::default() }
}

/// A model with a tensor in every place that is walked.
pub(super) fn rich_model(first: f32) -> ModelProto {
    let branch = |first: f32| {
        let constant = node("Constant", &[], "c", vec![tensor_attribute("value", floats("", &[20], first))]);
        graph(vec![constant, node("Add", &["c", "w"], "y", vec![])], vec![floats("w", &[20], first + 50.0)])
    };
    let mut if_node = node("If", &["cond"], "z", vec![]);
    if_node.attribute = vec![
        graph_attribute("then_branch", branch(first + 100.0)),
        graph_attribute("else_branch", branch(first + 200.0)),
    ];
    let mut named = node("Constant", &[], "k", vec![tensor_attribute("value", floats("", &[17], first))]);
    named.name = "named".into();
    let small = node("Constant", &[], "s", vec![tensor_attribute("value", floats("", &[16], 7.0))]);
    let fill = node("ConstantOfShape", &["s"], "f", vec![tensor_attribute("value", floats("", &[30], 7.0))]);
    let nodes = vec![
        named,
        small,
        fill,
        node("MatMul", &["x", "w"], "h", vec![]),
        if_node,
        node("Add", &["h", "b"], "y", vec![]),
    ];
    let strings = TensorProto {
        name: "words".into(),
        data_type: 8,
        dims: vec![2],
        string_data: vec![b"one".into(), b"".into()],
        ..Default::default()
    };
    let documented = TensorProto { doc_string: "weights".into(), ..floats("w", &[3, 5], first) };
    let tensors = vec![documented, floats("b", &[], first), strings, raw("empty", 1, &[0, 3], vec![])];
    let mut model = model(graph(nodes, tensors));
    let inner = node("Constant", &[], "fc", vec![tensor_attribute("value", floats("", &[18], first))]);
    model.functions = vec![FunctionProto { name: Some("F".into()), node: vec![inner], ..Default::default() }];
    model.metadata_props = vec![StringStringEntryProto { key: "author".into(), value: "nobody".into() }];
    model
}

#[test]
fn takes_out_the_tensors_and_puts_them_back() {
    let original = rich_model(1.0);
    let bytes = original.encode_to_vec();
    let stripped = strip_all(&bytes).unwrap();
    let names: Vec<&str> = stripped.tensors.iter().map(|tensor| &tensor.name[..]).collect();
    let expected = ["named/value", "c/value", "w", "c/value#2", "w#2", "w#3", "b", "empty", "fc/value"];
    assert_eq!(names, expected);
    assert!(stripped.tensors.iter().enumerate().all(|(i, tensor)| tensor.ordinal == i as u32));
    let lens: Vec<usize> = stripped.tensors.iter().map(|tensor| tensor.data.len()).collect();
    assert_eq!(lens, [68, 80, 80, 80, 80, 60, 4, 0, 72]);
    assert_eq!(stripped.tensors[5].dims, [3, 5]);
    assert_eq!(stripped.tensors[6].dims, [0u64; 0]);
    assert!(stripped.tensors.iter().all(|tensor| matches!(tensor.data, Cow::Borrowed(_))));

    // The stored graph is the original but for the tensors, to a reader that is not ours.
    let stored = ModelProto::decode(&stripped.graph[..]).unwrap();
    assert_eq!(stored.encode_to_vec(), stripped.graph, "fields are in the order of writers");
    let graph = stored.graph.as_ref().unwrap();
    let w = &graph.initializer[0];
    assert_eq!((&w.name[..], &w.dims[..], w.data_type, w.data_location), ("w", &[3i64, 5][..], 1, Some(1)));
    let entries: Vec<_> = w.external_data.iter().map(|entry| (&entry.key[..], &entry.value[..])).collect();
    assert_eq!(entries, [("location", "tessera"), ("offset", "5")]);
    assert!(w.raw_data.is_empty());
    let whole = original.graph.as_ref().unwrap();
    assert_eq!(graph.initializer[2], whole.initializer[2], "strings stay");
    assert_eq!(graph.node[1..4], whole.node[1..4], "small constants and ConstantOfShape stay");
    assert_eq!(stored.metadata_props, original.metadata_props);

    assert_eq!(ModelProto::decode(&merge_all(&stripped)[..]).unwrap(), original);
    let found = stored_tensors(&stripped.graph).unwrap();
    let of_tensor = |tensor: &StoredTensor| StoredRef {
        ordinal: tensor.ordinal,
        dtype: tensor.dtype,
        dims: tensor.dims.clone(),
        bytes: tensor.data.len() as u64,
    };
    assert_eq!(found, stripped.tensors.iter().map(of_tensor).collect::<Vec<_>>());
}

#[test]
fn raw_models_come_back_byte_for_byte() {
    let mut original = rich_model(1.0);
    // prost writes no empty raw_data; other writers do, and so does merge.
    original.graph.as_mut().unwrap().initializer.pop();
    let bytes = original.encode_to_vec();
    assert_eq!(merge_all(&strip_all(&bytes).unwrap()), bytes);
}

#[test]
fn the_graph_depends_on_no_weight_and_no_form() {
    let of = |model: &ModelProto| strip_all(&model.encode_to_vec()).unwrap().graph;
    let reference = of(&rich_model(1.0));
    assert_eq!(of(&rich_model(-3.5)), reference);
    let mut typed = rich_model(1.0);
    let tensors = &mut typed.graph.as_mut().unwrap().initializer;
    for tensor in tensors.iter_mut().filter(|tensor| tensor.data_type == 1) {
        let raw = std::mem::take(&mut tensor.raw_data);
        tensor.float_data = raw.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        tensor.data_location = Some(0);
    }
    assert_eq!(of(&typed), reference);
}

/// `model` with `extra` appended inside its first initializer, its graph and itself.
fn with_unknown_fields(model: &ModelProto, extra: &[u8]) -> Vec<u8> {
    let graph = model.graph.as_ref().unwrap();
    let mut tensor = graph.initializer[0].encode_to_vec();
    tensor.extend_from_slice(extra);
    let mut node = graph.node[0].encode_to_vec();
    node.extend_from_slice(extra);
    let mut body = Vec::new();
    write_bytes(&mut body, 1, &node);
    write_bytes(&mut body, 2, b"g");
    write_bytes(&mut body, 5, &tensor);
    write_bytes(&mut body, 12, &graph.output[0].encode_to_vec());
    body.extend_from_slice(extra);
    let mut out = vec![8, 8];
    write_bytes(&mut out, 7, &body);
    write_bytes(&mut out, 8, &model.opset_import[0].encode_to_vec());
    out.extend_from_slice(extra);
    out
}

#[test]
fn unknown_fields_are_kept_byte_for_byte() {
    // Field 16 (metadata_props of newer versions) and field 1000, a varint written in more bytes than it needs.
    let mut extra = Vec::new();
    write_bytes(&mut extra, 16, b"\x0a\x03key");
    write_varint(&mut extra, 1000 << 3);
    extra.extend_from_slice(&[0x85, 0x80, 0x00]);
    let constant = node("Constant", &[], "c", vec![tensor_attribute("value", floats("", &[64], 1.0))]);
    let model = model(graph(vec![constant], vec![floats("w", &[6], 0.0)]));
    let bytes = with_unknown_fields(&model, &extra);
    let stripped = strip_all(&bytes).unwrap();
    assert_eq!(stripped.tensors.len(), 2);
    let kept = stripped.graph.windows(extra.len()).filter(|window| *window == extra).count();
    assert_eq!(kept, 4, "tensor, node, graph, model");
    assert_eq!(merge_all(&stripped), bytes);
}

/// A model with one initializer of these bytes.
pub(super) fn model_with(tensor: &[u8]) -> Vec<u8> {
    let mut body = graph(vec![node("Identity", &["w"], "y", vec![])], vec![]).encode_to_vec();
    write_bytes(&mut body, 5, tensor);
    let mut out = ModelProto { graph: None, ..model(Default::default()) }.encode_to_vec();
    write_bytes(&mut out, 7, &body);
    out
}

#[test]
fn views_follow_the_consumers() {
    let trans_b = |i| AttributeProto { name: "transB".into(), r#type: 2, i, ..Default::default() };
    let names = ["conv", "up", "gemm_t", "gemm", "mat", "tied", "vector_t", "unused"];
    let dims = |name: &str| {
        if name == "vector_t" { vec![4] } else { vec![2, 2] }
    };
    let initializer = names.iter().map(|name| floats(name, &dims(name), 0.0)).collect();
    let mut foreign = node("Conv", &["x", "mat"], "i", vec![]);
    foreign.domain = "elsewhere".into();
    let nodes = vec![
        node("Constant", &[], "k", vec![tensor_attribute("value", floats("", &[40], 1.0))]),
        node("Conv", &["x", "k"], "a0", vec![]),
        node("Conv", &["x", "conv"], "a", vec![]),
        node("ConvTranspose", &["x", "up"], "b", vec![]),
        node("Gemm", &["x", "gemm_t", "bias"], "c", vec![trans_b(1)]),
        node("Gemm", &["x", "gemm"], "d", vec![trans_b(0)]),
        node("MatMul", &["x", "mat"], "e", vec![]),
        node("Gather", &["tied", "ids"], "f", vec![]),
        node("Gemm", &["x", "tied"], "h", vec![trans_b(1)]),
        node("Gemm", &["x", "vector_t"], "y", vec![trans_b(1)]),
        foreign,
    ];
    let bytes = model(graph(nodes, initializer)).encode_to_vec();
    let stripped = strip_all(&bytes).unwrap();
    let views: Vec<_> = stripped.tensors.iter().map(|tensor| (&tensor.name[..], tensor.view)).collect();
    let expected = [
        ("k/value", View::RowsByFirst),
        ("conv", View::RowsByFirst),
        ("up", View::RowsByFirst),
        ("gemm_t", View::Transposed),
        ("gemm", View::RowsByLast),
        ("mat", View::RowsByLast),
        ("tied", View::RowsByLast),
        ("vector_t", View::RowsByLast),
        ("unused", View::RowsByLast),
    ];
    assert_eq!(views, expected);
    // Whatever the view, the tensor can be tiled in it.
    for tensor in &stripped.tensors {
        tensor_blocks::Tiling::new(&tensor.dims, tensor.view, tensor.dtype, 1 << 16).unwrap();
    }
}

#[test]
fn merge_reports_what_fails() {
    let bytes = rich_model(1.0).encode_to_vec();
    let stripped = strip_all(&bytes).unwrap();
    let mut none = |_: u32, _: &mut Vec<u8>| Ok(());
    let error = merge(&stripped.graph, &mut none, &mut Vec::new()).unwrap_err();
    assert_eq!((error.kind, error.message.contains("tensor 0")), (Internal, true));
    let mut cancelled = |_: u32, _: &mut Vec<u8>| Err(ModelError::cancelled("stopped"));
    assert_eq!(merge(&stripped.graph, &mut cancelled, &mut Vec::new()).unwrap_err().kind, Cancelled);

    struct Full;
    impl std::io::Write for Full {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::Error::other(ModelError::too_large("full")))
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    assert_eq!(merge(&stripped.graph, &mut none, &mut Full).unwrap_err().kind, TooLarge);
}

#[test]
fn lengths_above_4_gib_are_known() {
    let dims = [1 << 31, 4];
    let entries = [("location", LOCATION), ("offset", "0")];
    let stored =
        model(graph(vec![node("Identity", &["w"], "y", vec![])], vec![data_tests::external("w", &dims, &entries)]));
    let len = merged_len(&stored.encode_to_vec()).unwrap();
    assert!((32 << 30..(32 << 30) + 200).contains(&len), "{len}");
}
