//! Tests of stripping what is no model, is cut off, contradicts itself, or was damaged at random.

use super::tests::*;
use super::wire::write_bytes;
use super::*;
use crate::error::ErrorKind::{self, *};
use prost::Message;
use tract_onnx::pb::*;

fn kind(model: &[u8]) -> ErrorKind {
    let error = strip_all(model).unwrap_err();
    assert!(error.message.starts_with(|first: char| first.is_lowercase() || error.message.starts_with("ONNX")));
    error.kind
}

#[test]
fn strangers_are_told_apart() {
    let hint = |bytes: &[u8]| {
        let error = strip_all(bytes).unwrap_err();
        assert_eq!(error.kind, NotOnnx, "{error}");
        error.hint.unwrap()
    };
    for bytes in [&b""[..], b"hello world", b"\0", b"\x08", b"\xff\xff\xff\xff", b"{\"a\": 1}", &[0; 100]] {
        assert!(hint(bytes).contains(".onnx"), "{bytes:?}");
    }
    assert!(hint(b"version https://git-lfs.github.com/spec/v1\noid sha256:1").contains("git lfs pull"));
    assert!(hint(b"PK\x03\x04rest of an archive").contains("export"));
    assert!(hint(b"\x18\x00\x00\x00ORTM").contains("ONNX Runtime"));
    // A TensorProto, a GraphProto, and a ModelProto without graph or ir_version are valid protobuf.
    hint(&floats("w", &[2], 0.0).encode_to_vec());
    hint(&graph(vec![node("Add", &[], "y", vec![])], vec![]).encode_to_vec());
    hint(&ModelProto { graph: None, ..rich_model(0.0) }.encode_to_vec());
    hint(&ModelProto { ir_version: 0, ..rich_model(0.0) }.encode_to_vec());
    hint(&ModelProto { ir_version: -1, ..rich_model(0.0) }.encode_to_vec());
}

#[test]
fn models_that_lack_something_are_refused() {
    assert_eq!(kind(&ModelProto { opset_import: vec![], ..rich_model(0.0) }.encode_to_vec()), InvalidModel);
    assert_eq!(kind(&ModelProto { ir_version: 2, ..rich_model(0.0) }.encode_to_vec()), UnsupportedOpset);
    assert_eq!(kind(&model(graph(vec![], vec![floats("y", &[1], 0.0)])).encode_to_vec()), InvalidModel);
    let mut twice = rich_model(0.0).encode_to_vec();
    write_bytes(&mut twice, 7, &graph(vec![], vec![]).encode_to_vec());
    assert_eq!(kind(&twice), InvalidModel);
    let nameless = floats("", &[1], 0.0);
    assert_eq!(kind(&model_with(&nameless.encode_to_vec())), InvalidModel);
    let nul = floats("a\0b", &[1], 0.0);
    assert_eq!(kind(&model_with(&nul.encode_to_vec())), InvalidModel);
    let mut latin = vec![8, 1, 0x10, 1, 0x4a, 4, 0, 0, 0, 0];
    write_bytes(&mut latin, 8, b"caf\xe9");
    assert_eq!(kind(&model_with(&latin)), InvalidModel);
}

#[test]
fn tensors_that_contradict_themselves_are_refused() {
    let of = |code, dims: &[i64], bytes| kind(&model_with(&raw("w", code, dims, vec![1; bytes]).encode_to_vec()));
    assert_eq!(of(1, &[2, 3], 23), InvalidModel);
    assert_eq!(of(1, &[2, 3], 25), InvalidModel);
    assert_eq!(of(1, &[2, 3], 0), InvalidModel);
    assert_eq!(of(1, &[0, 3], 4), InvalidModel);
    assert_eq!(of(1, &[], 0), InvalidModel);
    assert_eq!(of(1, &[-1], 4), InvalidModel);
    assert_eq!(of(1, &[i64::MIN], 4), InvalidModel);
    assert_eq!(of(0, &[1], 4), InvalidModel);
    assert_eq!(of(27, &[1], 4), UnsupportedType);
    assert_eq!(of(-1, &[1], 4), UnsupportedType);
    assert_eq!(of(8, &[1], 4), InvalidModel);
    assert_eq!(of(1, &[1 << 32, 1 << 32], 4), TooLarge);
    assert_eq!(of(1, &[i64::MAX], 4), TooLarge);
    assert_eq!(of(1, &[i64::MAX / 4], 4), InvalidModel);
    assert_eq!(of(1, &[0, i64::MAX, i64::MAX], 0), TooLarge);
    assert_eq!(of(1, &[1; 65], 4), TooLarge);
    assert_eq!(of(22, &[3], 1), InvalidModel);
    let boolean = raw("w", 9, &[3], vec![0, 1, 2]);
    assert_eq!(kind(&model_with(&boolean.encode_to_vec())), InvalidModel);
    let two = TensorProto { float_data: vec![1.0], ..floats("w", &[1], 0.0) };
    assert_eq!(kind(&model_with(&two.encode_to_vec())), InvalidModel);
    let two = TensorProto { float_data: vec![1.0], int32_data: vec![1], ..raw("w", 1, &[1], vec![]) };
    assert_eq!(kind(&model_with(&two.encode_to_vec())), InvalidModel);
    let segment = TensorProto { segment: Some(Default::default()), ..floats("w", &[1], 0.0) };
    assert_eq!(kind(&model_with(&segment.encode_to_vec())), InvalidModel);
    let strings = TensorProto { dims: vec![3], string_data: vec![vec![]; 2], ..raw("w", 8, &[], vec![]) };
    assert_eq!(kind(&model_with(&strings.encode_to_vec())), InvalidModel);
    // A tensor in an attribute that stays in the graph is checked as well.
    let fill = node("ConstantOfShape", &["s"], "y", vec![tensor_attribute("value", raw("", 1, &[2], vec![0; 4]))]);
    assert_eq!(kind(&model(graph(vec![fill], vec![])).encode_to_vec()), InvalidModel);
}

#[test]
fn a_huge_claim_allocates_nothing() {
    // 2^60 elements said to stand in 4 bytes, in each kind of field.
    for (code, number) in [(1, 4), (6, 5), (7, 7), (11, 10), (13, 11), (2, 9)] {
        let mut tensor = raw("w", code, &[1 << 58], vec![]).encode_to_vec();
        write_bytes(&mut tensor, number, &[0; 8]);
        assert_eq!(kind(&model_with(&tensor)), InvalidModel, "field {number}");
    }
}

/// `depth` graphs within the graph of a model.
fn nested(depth: usize) -> Vec<u8> {
    let mut inner = graph(vec![node("Identity", &["w"], "y", vec![])], vec![floats("w", &[2], 0.0)]);
    for _ in 0..depth {
        inner = graph(vec![node("If", &["c"], "y", vec![graph_attribute("then_branch", inner)])], vec![]);
    }
    model(inner).encode_to_vec()
}

#[test]
fn depth_is_bounded() {
    let deepest = nested(29);
    let stripped = strip_all(&deepest).unwrap();
    assert_eq!(stripped.tensors.len(), 1);
    assert_eq!(merge_all(&stripped), deepest);
    ModelProto::decode(&stripped.graph[..]).expect("what we accept, readers of protobuf accept");
    assert_eq!(kind(&nested(30)), InvalidModel);

    // Deeper than any stack: graphs that are nothing but an attribute of a node.
    let mut body = Vec::new();
    for _ in 0..5000 {
        let (mut attribute, mut node) = (Vec::new(), Vec::new());
        write_bytes(&mut attribute, 6, &body);
        write_bytes(&mut node, 5, &attribute);
        body.clear();
        write_bytes(&mut body, 1, &node);
    }
    write_bytes(&mut body, 12, b"");
    let mut deep = vec![8, 8];
    write_bytes(&mut deep, 8, &[0x10, 17]);
    write_bytes(&mut deep, 7, &body);
    assert_eq!(kind(&deep), InvalidModel);
}

#[test]
fn check_is_called_and_stops_the_work() {
    let big = |code, dims: &[i64]| {
        let bytes = raw("w", code, dims, vec![1; dims.iter().product::<i64>() as usize]).encode_to_vec();
        model_with(&bytes)
    };
    let small_fields = {
        // 20 MB of values in unpacked fields of two bytes.
        let mut tensor = raw("w", 2, &[10 << 20], vec![]).encode_to_vec();
        for _ in 0..10 << 20 {
            tensor.extend_from_slice(&[5 << 3, 1]);
        }
        model_with(&tensor)
    };
    // Unpacked values; a check of 40 million bools; graph fields that mean nothing.
    let mut nothing = rich_model(0.0).encode_to_vec();
    nothing.extend_from_slice(&[100 << 3 & 0x7f | 0x80, 100 >> 4, 0].repeat(5 << 20));
    for model in [small_fields, big(9, &[40 << 20]), nothing] {
        let mut calls = 0;
        strip(&model, &mut Never, &mut || {
            calls += 1;
            Ok(())
        })
        .unwrap();
        assert!(calls >= 9, "{calls}");
        let stop = strip(&model, &mut Never, &mut || Err(ModelError::cancelled("stopped")));
        assert_eq!(stop.unwrap_err().kind, Cancelled);
    }
}

#[test]
fn every_truncation_is_an_error_or_a_model() {
    let bytes = rich_model(1.0).encode_to_vec();
    let graph_end = bytes.len() - 200;
    let (mut truncated, mut accepted) = (0, 0);
    for len in 0..bytes.len() {
        match strip_all(&bytes[..len]) {
            Ok(stripped) => {
                accepted += 1;
                merge_all(&stripped);
                assert!(len > graph_end, "{len} of {}", bytes.len());
            }
            Err(error) => {
                truncated += usize::from(error.kind == Truncated);
                assert!(matches!(error.kind, NotOnnx | Truncated | InvalidModel), "{len}: {error}");
                assert!(error.hint.is_some(), "{len}: {error}");
            }
        }
    }
    // All but those that end between two fields of the model, of which there are six.
    assert!(truncated >= bytes.len() - 8, "{truncated} of {}", bytes.len());
    assert!(accepted <= 3, "{accepted}");
}

#[test]
fn random_damage_never_panics() {
    let mut state = 0x5eed_u64;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let models = [rich_model(1.0).encode_to_vec(), nested(3)];
    let (mut accepted, mut refused) = (0, 0);
    for _ in 0..40_000 {
        let mut bytes = models[random(2)].clone();
        for _ in 0..1 + random(4) {
            let at = random(bytes.len());
            match random(4) {
                0 => bytes[at] ^= 1 << random(8),
                1 => bytes[at] = random(256) as u8,
                2 => bytes.insert(at, [0, 0x7f, 0x80, 0xff][random(4)]),
                _ => {
                    bytes.remove(at);
                }
            }
        }
        match strip_all(&bytes) {
            Ok(stripped) => {
                accepted += 1;
                let merged = merge_all(&stripped);
                let again = strip_all(&merged).unwrap();
                assert_eq!(again.tensors, stripped.tensors);
                assert_eq!(again.graph, stripped.graph);
            }
            Err(error) => {
                refused += 1;
                assert_ne!(error.kind, Internal, "{error}");
            }
        }
        // A stored graph that was damaged, as a disk might: an error or a model, no panic.
        let _ = merged_len(&bytes);
    }
    assert!(accepted > 1000 && refused > 1000, "{accepted} {refused}");
    for _ in 0..20_000 {
        let bytes: Vec<u8> = (0..random(200)).map(|_| random(256) as u8).collect();
        assert!(strip_all(&bytes).is_err());
        // As a tensor, and as a graph, of a model that is otherwise sound.
        let _ = strip_all(&model_with(&bytes));
        let mut graph = vec![0x0a, 0, 0x62, 0];
        graph.extend_from_slice(&bytes);
        let mut model = vec![8, 8, 0x42, 2, 0x10, 17];
        write_bytes(&mut model, 7, &graph);
        let _ = strip_all(&model);
    }
}
