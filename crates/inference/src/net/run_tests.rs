//! Runs compared with compiled plans of the same models, bit by bit.

use super::models::*;
use super::*;
use crate::kernels::tests::Random;
use crate::plan::{CompileOptions, Plan};
use crate::tensor::HostTensor;
use std::sync::atomic::AtomicBool;
use tract_onnx::pb::ModelProto;

fn planned(plan: &Plan, x: &[f32], m: usize, k: usize) -> Vec<u32> {
    let input = vec![("x".to_owned(), HostTensor::from_f32(&[m, k], x).unwrap())];
    let made = plan.run(input, &AtomicBool::new(false)).unwrap();
    made[0].1.to_f32().unwrap().iter().map(|value| value.to_bits()).collect()
}

fn compile(model: &ModelProto) -> Plan {
    let (graph, tensors) = stripped(model);
    let mut fetch = |ordinal: u32, out: &mut Vec<u8>| {
        out.extend(tensors[ordinal as usize].iter().flat_map(|value| value.to_le_bytes()));
        Ok(())
    };
    Plan::compile(&graph, &mut fetch, &CompileOptions::default()).unwrap()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Runs the net and the plan of a model with the same rows.
fn compare(random: &mut Random, model: &ModelProto, batches: &[usize], scratch: &mut Scratch, what: &str) {
    let net = recognised(model).unwrap_or_else(|| panic!("not recognised: {what}"));
    let (_, tensors) = stripped(model);
    let params: Vec<&[f32]> = tensors.iter().map(Vec::as_slice).collect();
    assert_eq!(net.tensors(), params.len());
    let plan = compile(model);
    let (k, n) = net.widths();
    for &m in batches {
        let mut x = random.values(m * k);
        // Zeros of both signs, and what is no number in a row of its own.
        x.iter_mut().step_by(7).for_each(|value| *value = -0.0);
        if m > 4 {
            x[k..2 * k].fill(0.0);
            x[2 * k] = f32::INFINITY;
            x[3 * k] = f32::NAN;
        }
        let mut out = vec![7.0; m * n];
        net.run(&params, &x, m, &mut out, scratch);
        let (made, expected) = (bits(&out), planned(&plan, &x, m, k));
        for (place, (made, expected)) in made.iter().zip(&expected).enumerate() {
            let nan = f32::from_bits(*made).is_nan() && f32::from_bits(*expected).is_nan();
            let (a, b) = (f32::from_bits(*made), f32::from_bits(*expected));
            assert!(made == expected || nan, "{what}, {m} rows: {a} instead of {b} at {place}, {net:?}");
        }
    }
}

#[test]
fn random_nets_give_the_bits_of_their_plans() {
    let mut random = Random::new(11);
    let mut scratch = Scratch::default();
    for round in 0..60 {
        let mut width = || match random.below(4) {
            0 => random.between(1, 6),
            _ => random.between(1, 100),
        };
        let (inputs, widths) = (width(), [width(), width(), width()]);
        let count = random.between(1, 3);
        let layers: Vec<_> = widths[..count]
            .iter()
            .map(|&n| (FORMS[random.below(4)], random.below(5) > 0, FUNCTIONS[random.below(6)], n))
            .collect();
        let slope = random.values(1)[0];
        let model = net(&mut random, -1, inputs, &layers, |node| {
            if node.op_type == "LeakyRelu" { float(node, "alpha", slope) } else { node }
        });
        compare(&mut random, &model, &[1, 2, 3, 4, 5, 7, 12, 13, 40], &mut scratch, &format!("round {round}"));
    }
}

#[test]
fn each_function_and_form_gives_the_bits_of_its_plan_at_all_edges() {
    let mut random = Random::new(5);
    let mut scratch = Scratch::default();
    for form in [Form::Turned, Form::MatMul] {
        for (place, function) in FUNCTIONS.iter().enumerate() {
            for (k, n) in [(1, 1), (1, 3), (1, 5), (5, 4), (48, 1), (3, 17), (2, 258), (7, 257), (1, 259), (300, 300)] {
                let bias = (k + n + place) % 3 > 0;
                let layers = [(form, bias, *function, n), (Form::Turned, true, "", 3)];
                let count = 1 + (k + place) % 2;
                let model = net(&mut random, -1, k, &layers[..count], |node| node);
                compare(&mut random, &model, &[1, 3, 30], &mut scratch, &format!("{form:?} {function} {k} x {n}"));
            }
        }
    }
}

#[test]
fn a_fixed_batch_of_one_and_nodes_that_do_nothing_give_the_bits_of_their_plans() {
    let mut random = Random::new(6);
    let mut scratch = Scratch::default();
    let layers = [(Form::Turned, true, "Relu", 48), (Form::MatMul, true, "Tanh", 9), (Form::Gemm, true, "Softmax", 6)];
    let fixed = net(&mut random, 1, 5, &layers, |node| node);
    compare(&mut random, &fixed, &[1], &mut scratch, "a fixed batch");
    let (w, v, b) = (random.values(35), random.values(28), random.values(7));
    let tensors =
        vec![floats("w", &[5, 7], &w), floats("b", &[7], &b), floats("v", &[4, 7], &v), floats("r", &[], &[0.5])];
    for softmax in ["Softmax", "LeakyRelu"] {
        let nodes = vec![
            shape("same", &[0, 5]),
            shape("rows", &[-1, 7]),
            int(node("Flatten", &["x"], "f"), "axis", 1),
            node("Reshape", &["f", "same"], "g"),
            node("MatMul", &["g", "w"], "p"),
            node("Identity", &["p"], "i"),
            node("Add", &["i", "b"], "s"),
            node("Dropout", &["s", "r"], "d"),
            node("Relu", &["d"], "a"),
            node("Reshape", &["a", "rows"], "c"),
            node("Identity", &["c"], "e"),
            int(node("Gemm", &["e", "v"], "t"), "transB", 1),
            node("Dropout", &["t"], "u"),
            node(softmax, &["u"], "z"),
            node("Flatten", &["z"], "y"),
        ];
        let made = model((&[-1, 5], &[-1, 4]), nodes, tensors.clone());
        compare(&mut random, &made, &[1, 2, 9], &mut scratch, "nodes that do nothing");
    }
}

#[test]
fn softmax_of_older_operator_sets_gives_the_bits_of_its_plan() {
    let mut random = Random::new(8);
    for opset in [7, 9, 11, 12, 13, 21] {
        let layers = [(Form::Turned, true, "Relu", 20), (Form::MatMul, true, "Softmax", 10)];
        let mut made = net(&mut random, -1, 6, &layers, |node| node);
        made.opset_import[0].version = opset;
        compare(&mut random, &made, &[1, 2, 20], &mut Scratch::default(), &format!("opset {opset}"));
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_batch() {
    let mut random = Random::new(20);
    for (k, hidden, n) in [(5, 48, 1), (3, 5, 2), (33, 100, 7), (1, 257, 300)] {
        let layers = [(Form::Turned, true, "Relu", hidden), (Form::MatMul, true, "Sigmoid", n)];
        let model = net(&mut random, -1, k, &layers, |node| node);
        let (net, tensors) = (recognised(&model).unwrap(), stripped(&model).1);
        let params: Vec<&[f32]> = tensors.iter().map(Vec::as_slice).collect();
        let (m, mut scratch) = (1000, Scratch::default());
        let x = random.values(m * k);
        let mut out = vec![0.0; m * n];
        net.run(&params, &x, m, &mut out, &mut scratch);
        for row in [0, 1, 5, 640, 999] {
            let mut alone = vec![0.0; n];
            net.run(&params, &x[row * k..][..k], 1, &mut alone, &mut scratch);
            assert_eq!(bits(&alone), bits(&out[row * n..][..n]), "row {row} of {k}-{hidden}-{n}");
        }
        net.run(&params, &[], 0, &mut [], &mut scratch);
    }
}

#[test]
#[should_panic(expected = "another size")]
fn a_short_tensor_is_noticed() {
    let made = net(&mut Random::new(1), -1, 3, &[(Form::Gemm, true, "", 2)], |node| node);
    let net = recognised(&made).unwrap();
    net.run(&[&[0.0; 5], &[0.0; 2]], &[0.0; 3], 1, &mut [0.0; 2], &mut Scratch::default());
}
