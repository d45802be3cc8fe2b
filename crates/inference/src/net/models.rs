//! Nets that tests build, as ONNX.

use super::FeedForward;
use crate::kernels::tests::Random;
use crate::onnx::{NoExternalData, strip};
use prost::Message;
use tract_onnx::pb::tensor_shape_proto::{Dimension, dimension};
use tract_onnx::pb::*;

/// Opset that the models import unless a test says otherwise.
pub(super) const OPSET: i64 = 17;

pub(super) fn node(op_type: &str, inputs: &[&str], output: &str) -> NodeProto {
    NodeProto {
        op_type: op_type.into(),
        name: format!("node_{output}"),
        input: inputs.iter().map(|&name| name.to_owned()).collect(),
        output: vec![output.to_owned()],
        ..Default::default()
    }
}

pub(super) fn int(mut node: NodeProto, name: &str, i: i64) -> NodeProto {
    node.attribute.push(AttributeProto { name: name.into(), r#type: 2, i, ..Default::default() });
    node
}

pub(super) fn float(mut node: NodeProto, name: &str, f: f32) -> NodeProto {
    node.attribute.push(AttributeProto { name: name.into(), r#type: 1, f, ..Default::default() });
    node
}

pub(super) fn floats(name: &str, dims: &[i64], values: &[f32]) -> TensorProto {
    let raw_data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    TensorProto { name: name.into(), dims: dims.to_vec(), data_type: 1, raw_data, ..Default::default() }
}

/// A Constant node with integers.
pub(super) fn shape(name: &str, values: &[i64]) -> NodeProto {
    let int64_data = values.to_vec();
    let t = TensorProto { dims: vec![values.len() as i64], data_type: 7, int64_data, ..Default::default() };
    let mut made = node("Constant", &[], name);
    made.attribute.push(AttributeProto { name: "value".into(), r#type: 4, t: Some(t), ..Default::default() });
    made
}

/// A float32 port; a dimension of -1 is free.
pub(super) fn port(name: &str, dims: &[i64]) -> ValueInfoProto {
    let value = |&dim: &i64| match dim {
        -1 => dimension::Value::DimParam("batch".into()),
        size => dimension::Value::DimValue(size),
    };
    let dim = dims.iter().map(|dim| Dimension { denotation: String::new(), value: Some(value(dim)) }).collect();
    let tensor = type_proto::Tensor { elem_type: 1, shape: Some(TensorShapeProto { dim }) };
    let r#type = TypeProto { denotation: String::new(), value: Some(type_proto::Value::TensorType(tensor)) };
    ValueInfoProto { name: name.into(), r#type: Some(r#type), doc_string: String::new() }
}

/// A model from "x" to "y".
pub(super) fn model(ports: (&[i64], &[i64]), node: Vec<NodeProto>, initializer: Vec<TensorProto>) -> ModelProto {
    let opset_import = vec![OperatorSetIdProto { domain: String::new(), version: OPSET }];
    let graph = GraphProto {
        name: "g".into(),
        input: vec![port("x", ports.0)],
        output: vec![port("y", ports.1)],
        node,
        initializer,
        ..Default::default()
    };
    ModelProto { ir_version: 8, opset_import, graph: Some(graph), ..Default::default() }
}

/// How a layer is written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Form {
    /// transB = 1, as PyTorch writes it.
    Turned,
    Gemm,
    /// MatMul and Add.
    MatMul,
    /// MatMul and Add, the bias before the product.
    BiasFirst,
}

pub(super) const FORMS: [Form; 4] = [Form::Turned, Form::Gemm, Form::MatMul, Form::BiasFirst];
pub(super) const FUNCTIONS: [&str; 6] = ["", "Relu", "LeakyRelu", "Sigmoid", "Tanh", "Softmax"];

/// A net of these layers: form, whether with a bias, function, and the width that comes out.
pub(super) fn net(
    random: &mut Random,
    rows: i64,
    inputs: usize,
    layers: &[(Form, bool, &str, usize)],
    function: impl Fn(NodeProto) -> NodeProto,
) -> ModelProto {
    let (mut nodes, mut tensors, mut k, mut current) = (vec![], vec![], inputs as i64, "x".to_owned());
    for (place, &(form, bias, activation, n)) in layers.iter().enumerate() {
        let n = n as i64;
        let (w, b, sum) = (format!("w{place}"), format!("b{place}"), format!("s{place}"));
        let dims = if form == Form::Turned { [n, k] } else { [k, n] };
        let scale = (3.0 / k as f32).sqrt();
        let values: Vec<f32> = random.values((n * k) as usize).iter().map(|value| value * scale).collect();
        tensors.push(floats(&w, &dims, &values));
        if bias {
            let dims = if place % 2 == 0 { vec![n] } else { vec![1, n] };
            tensors.push(floats(&b, &dims, &random.values(n as usize)));
        }
        match form {
            Form::Turned | Form::Gemm => {
                let inputs = if bias { vec![&*current, &w, &b] } else { vec![&*current, &w] };
                nodes.push(int(node("Gemm", &inputs, &sum), "transB", i64::from(form == Form::Turned)));
            }
            _ if !bias => nodes.push(node("MatMul", &[&current, &w], &sum)),
            _ => {
                let product = format!("p{place}");
                nodes.push(node("MatMul", &[&current, &w], &product));
                let inputs = if form == Form::MatMul { [&*product, &*b] } else { [&*b, &*product] };
                nodes.push(node("Add", &inputs, &sum));
            }
        }
        current = sum;
        if !activation.is_empty() {
            let output = format!("a{place}");
            nodes.push(function(node(activation, &[&current], &output)));
            current = output;
        }
        k = n;
    }
    if let Some(last) = nodes.last_mut() {
        last.output = vec!["y".into()];
    }
    model((&[rows, inputs as i64], &[rows, k]), nodes, tensors)
}

/// The stored graph and the tensors of a model.
pub(super) fn stripped(model: &ModelProto) -> (Vec<u8>, Vec<Vec<f32>>) {
    let bytes = model.encode_to_vec();
    let stripped = strip(&bytes, &mut NoExternalData, &mut || Ok(())).expect("a model");
    let floats = |data: &[u8]| data.as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word)).collect();
    let tensors = stripped.tensors.iter().map(|tensor| floats(&tensor.data)).collect();
    (stripped.graph, tensors)
}

/// The net that a model is recognised as.
pub(super) fn recognised(model: &ModelProto) -> Option<FeedForward> {
    FeedForward::of_graph(&stripped(model).0)
}
