//! What is recognised, and what is not.

use super::models::*;
use super::*;
use crate::kernels::tests::Random;
use tract_onnx::pb::*;

fn battery(random: &mut Random) -> ModelProto {
    let hidden = (Form::Turned, true, "Relu", 48);
    net(random, -1, 5, &[hidden, hidden, hidden, (Form::Turned, true, "", 1)], |node| node)
}

#[test]
fn a_net_of_linear_layers_is_recognised() {
    let made = recognised(&battery(&mut Random::new(1))).unwrap();
    assert_eq!((made.widths(), made.tensors(), made.layers().len()), ((5, 1), 8, 4));
    let layer = |weights, inputs, outputs, function| Layer {
        weights,
        transposed: true,
        inputs,
        outputs,
        bias: Some(weights + 1),
        function,
    };
    assert_eq!(made.layers()[0], layer(0, 5, 48, Function::Relu));
    assert_eq!(made.layers()[3], layer(6, 48, 1, Function::Identity));
    assert_eq!(made.largest_weights(), 48 * 48 * 4);
}

/// `x W + b`, with a change.
fn changed(change: impl FnOnce(&mut GraphProto)) -> Option<FeedForward> {
    let nodes = vec![node("Gemm", &["x", "w", "b"], "s"), node("Relu", &["s"], "y")];
    let tensors = vec![floats("w", &[3, 2], &[1.0; 6]), floats("b", &[2], &[1.0; 2])];
    let mut made = model((&[-1, 3], &[-1, 2]), nodes, tensors);
    change(made.graph.as_mut().unwrap());
    recognised(&made)
}

#[test]
fn what_a_net_does_not_compute_is_not_recognised() {
    assert!(changed(|_| ()).is_some());
    assert!(changed(|g| g.output[0] = port("y", &[-1, -1])).is_some());
    type Change = fn(&mut GraphProto);
    let changes: [(&str, Change); 35] = [
        ("alpha", |g| g.node[0] = float(g.node[0].clone(), "alpha", 0.5)),
        ("beta", |g| g.node[0] = float(g.node[0].clone(), "beta", 2.0)),
        ("transA", |g| g.node[0] = int(g.node[0].clone(), "transA", 1)),
        ("transB that does not fit", |g| g.node[0] = int(g.node[0].clone(), "transB", 1)),
        ("transB of 2", |g| g.node[0] = int(g.node[0].clone(), "transB", 2)),
        ("an unknown attribute", |g| g.node[0] = int(g.node[0].clone(), "other", 1)),
        ("an attribute of another type", |g| g.node[0] = float(g.node[0].clone(), "transB", 0.0)),
        ("an attribute twice", |g| {
            g.node[0] = int(int(g.node[0].clone(), "transB", 0), "transB", 0);
        }),
        ("another domain", |g| g.node[1].domain = "com.microsoft".into()),
        ("another function", |g| g.node[1].op_type = "Erf".into()),
        ("a function twice", |g| g.node.insert(1, node("Relu", &["s"], "t"))),
        ("a value that is used twice", |g| g.node[1] = node("Mul", &["s", "s"], "y")),
        ("a shortcut", |g| g.node[1] = node("Add", &["s", "x"], "y")),
        ("the sum of itself", |g| g.node[1] = node("Add", &["s", "s"], "y")),
        ("a second bias", |g| g.node[1] = node("Add", &["s", "b"], "y")),
        ("a bias of one value", |g| g.initializer[1] = floats("b", &[1], &[1.0])),
        ("a bias for each row", |g| g.initializer[1] = floats("b", &[2, 1], &[1.0; 2])),
        ("a bias of rank 3", |g| g.initializer[1] = floats("b", &[1, 1, 2], &[1.0; 2])),
        ("weights of rank 3", |g| g.initializer[0] = floats("w", &[1, 3, 2], &[1.0; 6])),
        ("weights that are too narrow", |g| g.initializer[0] = floats("w", &[2, 2], &[1.0; 4])),
        ("weights of no columns", |g| g.initializer[0] = floats("w", &[3, 0], &[])),
        ("weights that are not there", |g| g.node[0].input[1] = "q".into()),
        ("weights on the left", |g| g.node[0].input.swap(0, 1)),
        ("no bias where one is named", |g| g.node[0].input[2] = "q".into()),
        ("a fixed batch", |g| g.input[0] = port("x", &[4, 3])),
        ("a free width", |g| g.input[0] = port("x", &[1, -1])),
        ("another rank", |g| g.input[0] = port("x", &[-1, 1, 3])),
        ("two inputs", |g| g.input.push(port("z", &[-1, 3]))),
        ("two outputs", |g| g.output.push(port("s", &[-1, 2]))),
        ("an output of another width", |g| g.output[0] = port("y", &[-1, 3])),
        ("an output of another rank", |g| g.output[0] = port("y", &[-1, 1, 2])),
        ("an output in the middle", |g| g.output[0] = port("s", &[-1, 2])),
        ("a name that is defined twice", |g| g.node[1].output[0] = "b".into()),
        ("no layer", |g| g.node = vec![node("Identity", &["x"], "y")]),
        ("a reshape to another width", |g| {
            g.node.insert(0, shape("wide", &[-1, 1]));
            g.node[2] = node("Reshape", &["s", "wide"], "y");
        }),
    ];
    for (what, change) in changes {
        assert_eq!(changed(change), None, "{what}");
    }
}

#[test]
fn a_bias_behind_what_ends_a_layer_is_not_recognised() {
    let behind = |between: NodeProto| {
        changed(|graph| {
            graph.node[0].input.truncate(2);
            graph.node[1] = between;
            graph.node.push(node("Add", &["t", "b"], "y"));
        })
    };
    assert!(behind(node("Identity", &["s"], "t")).is_some());
    assert_eq!(behind(node("Relu", &["s"], "t")), None);
    assert_eq!(behind(node("Flatten", &["s"], "t")), None);
}

#[test]
fn older_operator_sets_and_other_types_are_not_recognised() {
    let mut random = Random::new(3);
    let mut old = battery(&mut random);
    old.opset_import[0].version = 6;
    assert_eq!(recognised(&old), None);
    let mut wide = battery(&mut random);
    let tensor = &mut wide.graph.as_mut().unwrap().initializer[7];
    (tensor.data_type, tensor.raw_data) = (11, vec![0; 8]);
    assert_eq!(recognised(&wide), None);
    for softmax in [0, 2, -2] {
        let layers = [(Form::Gemm, true, "Softmax", 4)];
        assert_eq!(recognised(&net(&mut random, -1, 3, &layers, |node| int(node, "axis", softmax))), None);
    }
}

#[test]
fn damaged_graphs_end_with_a_net_or_with_none() {
    let mut random = Random::new(9);
    let (graph, _) = stripped(&battery(&mut random));
    assert!(FeedForward::of_graph(&graph).is_some());
    assert_eq!(FeedForward::of_graph(&[]), None);
    let mut found = 0;
    for _ in 0..3000 {
        let mut bytes = graph.clone();
        match random.below(3) {
            0 => bytes.truncate(random.below(graph.len())),
            1 => bytes[random.below(graph.len())] = random.below(256) as u8,
            _ => {
                let at = random.below(graph.len() - 4);
                bytes[at..at + 4].iter_mut().for_each(|byte| *byte = [0, 1, 0x7f, 0xff][random.below(4)]);
            }
        }
        let Some(net) = FeedForward::of_graph(&bytes) else { continue };
        found += 1;
        // What is found holds together.
        let (mut width, _) = net.widths();
        for layer in net.layers() {
            assert!(layer.inputs == width && layer.weights < net.tensors());
            assert!(layer.bias.is_none_or(|bias| bias < net.tensors()));
            width = layer.outputs;
        }
    }
    // Names of nodes and of the producer do not matter.
    assert!(found > 10 && found < 2900, "{found} of 3000");
}
