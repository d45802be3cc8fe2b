//! Layers of our own: the same numbers with weights in the plan and in blocks, and those of the definition.

use super::*;
use crate::kernels::tests::{Random, close};
use crate::onnx::{NoExternalData, strip};
use crate::weights::PrivateBlocks;
use prost::Message;
use tensor_blocks::Tiling;

/// Runs a model on constants and on blocks of 16 kB; returns the outputs, which have to agree, and how many tensors lay in
/// blocks.
pub(super) fn both_ways(graph: GraphProto, inputs: &[(&str, HostTensor)]) -> (Vec<Vec<f32>>, usize) {
    let bytes = model(graph).encode_to_vec();
    let stripped = strip(&bytes, &mut NoExternalData, &mut || Ok(())).unwrap();
    let mut fetch = |ordinal: u32, out: &mut Vec<u8>| {
        out.extend_from_slice(&stripped.tensors[ordinal as usize].data);
        Ok(())
    };
    let tiling = |tensor: &crate::onnx::StoredTensor| Tiling::new(&tensor.dims, tensor.view, tensor.dtype, 16 << 10);
    let tilings: Vec<_> = stripped.tensors.iter().map(|tensor| Some(tiling(tensor).unwrap())).collect();
    let options = CompileOptions { inline_tensor_bytes: 8 << 10, ..CompileOptions::default() };
    let inline = Plan::compile(&stripped.graph, &mut fetch, &options).unwrap();
    assert!(inline.is_general(), "{:?}", inline.doubt());
    let plan = Plan::compile_on_blocks(&stripped.graph, &mut fetch, &tilings, &options, &mut || false).unwrap();
    assert!(plan.is_general(), "{:?}", plan.doubt());
    let mut blocks = PrivateBlocks::new();
    for tensor in plan.stored_tensors() {
        blocks.add(tensor, &stripped.tensors[tensor.ordinal as usize].data).unwrap();
    }
    let given: Vec<_> = inputs.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.clone())).collect();
    let stored = plan.run_on_blocks(given, Arc::new(blocks), &Arc::new(AtomicBool::new(false))).unwrap();
    let values = |outputs: Vec<(String, HostTensor)>| -> Vec<Vec<f32>> {
        outputs.into_iter().map(|(_, tensor)| tensor.to_f32().unwrap().to_vec()).collect()
    };
    let (direct, stored) = (values(run(&inline, inputs).unwrap()), values(stored));
    for (direct, stored) in direct.iter().zip(&stored) {
        close(stored, direct, 2e-4, "in blocks");
    }
    (stored, plan.stored_tensors().len())
}

#[test]
fn convolutions_with_what_follows_them() {
    let mut random = Random::new(31);
    // Groups, channels, filters, and a second convolution of what the first gives, with a shortcut.
    for (groups, channels, filters) in [(1, 24, 40), (4, 32, 64), (32, 32, 32)] {
        let values = random.values(filters * channels / groups * 9);
        let second = random.values(filters * filters * 9);
        let bias = random.values(filters);
        let plan = graph(
            vec![info("x", FLOAT, &[N("batch"), S(channels as i64), N("height"), S(9)])],
            vec![info("y", FLOAT, &[N("batch"), S(filters as i64), N("height"), S(9)])],
            vec![
                node("Conv", &["x", "w", "b"], &["c"]).int("group", groups as i64).ints("pads", &[1; 4]),
                // HardSwish as older exporters write it: x min(max(x + 3, 0), 6) / 6.
                node("Add", &["c", "three"], &["p"]),
                node("Clip", &["p", "zero", "six"], &["q"]),
                node("Mul", &["c", "q"], &["m"]),
                node("Div", &["m", "six"], &["h"]),
                node("Conv", &["h", "v"], &["d"]).ints("pads", &[1; 4]),
                node("Add", &["h", "d"], &["s"]),
                node("Relu", &["s"], &["y"]),
            ],
            vec![
                floats("w", &[filters as i64, (channels / groups) as i64, 3, 3], &values),
                floats("b", &[filters as i64], &bias),
                floats("v", &[filters as i64, filters as i64, 3, 3], &second),
                floats("zero", &[], &[0.0]),
                floats("three", &[], &[3.0]),
                floats("six", &[], &[6.0]),
            ],
        );
        let (images, height) = (2, 7);
        let x = random.values(images * channels * height * 9);
        let (outputs, stored) = both_ways(plan, &[("x", f32s(&[images, channels, height, 9], &x))]);
        assert!(stored >= 1, "{groups} groups");
        let hard_swish = |x: f32| x * (x / 6.0 + 0.5).clamp(0.0, 1.0);
        let first = convolve(&x, channels, &values, filters, groups, height);
        let plane = height * 9;
        let first: Vec<f32> =
            first.iter().enumerate().map(|(at, x)| hard_swish(x + bias[at / plane % filters])).collect();
        let expected = convolve(&first, filters, &second, filters, 1, height);
        let expected: Vec<f32> = expected.iter().zip(&first).map(|(d, h)| (d + h).max(0.0)).collect();
        close(&outputs[0], &expected, 1e-3, &format!("{groups} groups"));
    }
}

/// Rows of 9, kernels of 3 x 3 with padding of 1.
fn convolve(x: &[f32], channels: usize, weights: &[f32], filters: usize, groups: usize, height: usize) -> Vec<f32> {
    let (plane, depth) = (height * 9, channels / groups);
    let mut out = Vec::new();
    for image in x.chunks_exact(channels * plane) {
        for filter in 0..filters {
            for y in 0..height as isize {
                for x in 0..9isize {
                    let mut sum = 0.0;
                    for channel in 0..depth {
                        let picture = &image[(filter / (filters / groups) * depth + channel) * plane..][..plane];
                        for tap in 0..9isize {
                            let (row, col) = (y + tap / 3 - 1, x + tap % 3 - 1);
                            if (0..height as isize).contains(&row) && (0..9).contains(&col) {
                                let weight = weights[(filter * depth + channel) * 9 + tap as usize];
                                sum += weight * picture[(row * 9 + col) as usize];
                            }
                        }
                    }
                    out.push(sum);
                }
            }
        }
    }
    out
}

#[test]
fn recurrent_layers_go_through_sequences_in_both_directions() {
    let mut random = Random::new(32);
    for (operator, gates, reset) in [("LSTM", 4, 0), ("GRU", 3, 0), ("GRU", 3, 1)] {
        let (directions, features, size, steps, batch) = (2, 40, 48, 5, 3);
        let rows = gates * size;
        let scaled = |random: &mut Random, count: usize| -> Vec<f32> {
            random.values(count).iter().map(|value| value * 0.2).collect()
        };
        let w = scaled(&mut random, directions * rows * features);
        let r = scaled(&mut random, directions * rows * size);
        let b = scaled(&mut random, directions * 2 * rows);
        let mut layer = node(operator, &["x", "w", "r", "b"], &["y", "last"])
            .text("direction", "bidirectional")
            .int("hidden_size", size as i64);
        if operator == "GRU" {
            layer = layer.int("linear_before_reset", reset);
        }
        let sizes = [directions as i64, rows as i64];
        let plan = graph(
            vec![info("x", FLOAT, &[N("time"), N("batch"), S(features as i64)])],
            vec![
                info("y", FLOAT, &[N("time"), S(2), N("batch"), S(size as i64)]),
                info("last", FLOAT, &[S(2), N("batch"), S(size as i64)]),
            ],
            vec![layer],
            vec![
                floats("w", &[sizes[0], sizes[1], features as i64], &w),
                floats("r", &[sizes[0], sizes[1], size as i64], &r),
                floats("b", &[sizes[0], 2 * sizes[1]], &b),
            ],
        );
        let x = random.values(steps * batch * features);
        let (outputs, stored) = both_ways(plan, &[("x", f32s(&[steps, batch, features], &x))]);
        assert_eq!(stored, 2, "{operator}");

        let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
        let dot = |weights: &[f32], x: &[f32]| weights.iter().zip(x).map(|(weight, x)| weight * x).sum::<f32>();
        let mut expected = vec![0.0; steps * directions * batch * size];
        let mut last = vec![0.0; directions * batch * size];
        for direction in 0..directions {
            let w = &w[direction * rows * features..];
            let r = &r[direction * rows * size..];
            let b = &b[direction * 2 * rows..];
            for row in 0..batch {
                let (mut h, mut c) = (vec![0.0; size], vec![0.0; size]);
                for step in 0..steps {
                    let step = if direction == 1 { steps - 1 - step } else { step };
                    let x = &x[(step * batch + row) * features..][..features];
                    let input = |gate: usize, at: usize| {
                        let line = gate * size + at;
                        dot(&w[line * features..][..features], x) + b[line]
                    };
                    let recurrent = |gate: usize, at: usize, h: &[f32]| {
                        let line = gate * size + at;
                        dot(&r[line * size..][..size], h) + b[rows + line]
                    };
                    let sum = |gate: usize, at: usize| input(gate, at) + recurrent(gate, at, &h);
                    let next: Vec<f32> = if operator == "LSTM" {
                        (0..size)
                            .map(|at| {
                                c[at] = sigmoid(sum(2, at)) * c[at] + sigmoid(sum(0, at)) * sum(3, at).tanh();
                                sigmoid(sum(1, at)) * c[at].tanh()
                            })
                            .collect()
                    } else {
                        let reset_h: Vec<f32> = (0..size).map(|at| sigmoid(sum(1, at)) * h[at]).collect();
                        (0..size)
                            .map(|at| {
                                let candidate = if reset == 1 {
                                    input(2, at) + sigmoid(sum(1, at)) * recurrent(2, at, &h)
                                } else {
                                    input(2, at) + recurrent(2, at, &reset_h)
                                };
                                let update = sigmoid(sum(0, at));
                                (1.0 - update) * candidate.tanh() + update * h[at]
                            })
                            .collect()
                    };
                    h = next;
                    expected[((step * directions + direction) * batch + row) * size..][..size].copy_from_slice(&h);
                }
                last[(direction * batch + row) * size..][..size].copy_from_slice(&h);
            }
        }
        close(&outputs[0], &expected, 1e-5, &format!("{operator} {reset}"));
        close(&outputs[1], &last, 1e-5, &format!("{operator} {reset}"));
    }
}

#[test]
fn a_free_dimension_that_does_not_fit_a_stored_matrix_is_refused() {
    let mut random = Random::new(33);
    let weights = random.values(128 * 64);
    let graph = graph(
        vec![info("x", FLOAT, &[N("batch"), N("width")])],
        vec![info("y", FLOAT, &[N("batch"), S(64)])],
        vec![node("MatMul", &["x", "w"], &["y"])],
        vec![floats("w", &[128, 64], &weights)],
    );
    let bytes = model(graph).encode_to_vec();
    let stripped = strip(&bytes, &mut NoExternalData, &mut || Ok(())).unwrap();
    let mut fetch = |ordinal: u32, out: &mut Vec<u8>| {
        out.extend_from_slice(&stripped.tensors[ordinal as usize].data);
        Ok(())
    };
    let tensor = &stripped.tensors[0];
    let tilings = [Some(Tiling::new(&tensor.dims, tensor.view, tensor.dtype, 16 << 10).unwrap())];
    let options = CompileOptions { inline_tensor_bytes: 8 << 10, ..CompileOptions::default() };
    let plan = Plan::compile_on_blocks(&stripped.graph, &mut fetch, &tilings, &options, &mut || false).unwrap();
    assert_eq!(plan.stored_tensors().len(), 1);
    let mut blocks = PrivateBlocks::new();
    blocks.add(&plan.stored_tensors()[0], &tensor.data).unwrap();
    let blocks = Arc::new(blocks);
    for (rows, width) in [(128, 1), (2, 64), (1, 256), (64, 4)] {
        let x = f32s(&[rows, width], &vec![1.0; rows * width]);
        let made = plan.run_on_blocks(vec![("x".into(), x)], blocks.clone(), &Arc::new(AtomicBool::new(false)));
        assert!(made.is_err(), "{rows} x {width}: {:?}", made.map(|made| made[0].1.shape.clone()));
    }
}
