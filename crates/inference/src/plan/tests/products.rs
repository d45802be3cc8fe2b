//! Products with constants of the plan, and rows that go through several of them.

use super::*;
use crate::kernels::tests::Random;

fn values(random: &mut Random, dims: &[i64]) -> Vec<f32> {
    random.values(dims.iter().product::<i64>() as usize)
}

/// x times a matrix, with what follows, in float64.
fn layer(x: &[f32], k: usize, w: &[f32], n: usize, bias: &[f32], relu: bool) -> Vec<f32> {
    let row = |row: &[f32]| {
        let sum = |column: usize| {
            row.iter().enumerate().map(|(at, &x)| f64::from(x) * f64::from(w[at * n + column])).sum::<f64>()
        };
        let ended = |column: usize| sum(column) + f64::from(*bias.get(column).unwrap_or(&0.0));
        (0..n).map(|column| if relu { ended(column).max(0.0) as f32 } else { ended(column) as f32 }).collect::<Vec<_>>()
    };
    x.chunks(k).flat_map(row).collect()
}

fn softmax(x: &[f32], n: usize) -> Vec<f32> {
    let row = |row: &[f32]| {
        let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
        row.iter().map(|&x| (f64::from(x).exp() / sum) as f32).collect::<Vec<_>>()
    };
    x.chunks(n).flat_map(row).collect()
}

/// A net 28-H-N with softmax, its second matrix given transposed.
fn net(random: &mut Random, hidden: i64, n: i64, dims: &[D]) -> (Plan, [Vec<f32>; 4]) {
    let (w1, b1) = (values(random, &[28, hidden]), values(random, &[hidden]));
    let (w2, b2) = (values(random, &[hidden, n]), values(random, &[n]));
    let turned: Vec<f32> =
        (0..n).flat_map(|column| (0..hidden).map(move |row| (row * n + column) as usize)).map(|at| w2[at]).collect();
    let mut shape = dims.to_vec();
    shape.push(S(28));
    let mut last = dims.to_vec();
    last.push(S(n));
    let flat = dims.len() == 1;
    let second = if flat { floats("w2", &[n, hidden], &turned) } else { floats("w2", &[hidden, n], &w2) };
    let nodes = if flat {
        vec![
            node("Gemm", &["x", "w1", "b1"], &["h"]),
            node("Relu", &["h"], &["r"]),
            node("Gemm", &["r", "w2", "b2"], &["s"]).int("transB", 1),
            node("Softmax", &["s"], &["y"]),
        ]
    } else {
        vec![
            node("MatMul", &["x", "w1"], &["m1"]),
            node("Add", &["m1", "b1"], &["h"]),
            node("Relu", &["h"], &["r"]),
            node("MatMul", &["r", "w2"], &["m2"]),
            node("Add", &["b2", "m2"], &["s"]),
            node("Softmax", &["s"], &["y"]).int("axis", -1),
        ]
    };
    let weights = vec![floats("w1", &[28, hidden], &w1), floats("b1", &[hidden], &b1), second, floats("b2", &[n], &b2)];
    let plan = compile(graph(vec![info("x", FLOAT, &shape)], vec![info("y", FLOAT, &last)], nodes, weights)).unwrap();
    (plan, [w1, b1, w2, b2])
}

fn result(plan: &Plan, shape: &[usize], x: &[f32]) -> Vec<f32> {
    let made = run(plan, &[("x", HostTensor::from_f32(shape, x).unwrap())]).unwrap();
    assert_eq!(made[0].1.shape[..shape.len() - 1], shape[..shape.len() - 1]);
    made[0].1.to_f32().unwrap()
}

#[test]
fn a_small_net_is_one_operator_and_gives_each_row_the_same_bits_in_any_batch() {
    let mut random = Random::new(1);
    for (hidden, n) in [(256, 2), (64, 1), (7, 10), (300, 5), (16, 300)] {
        let (plan, [w1, b1, w2, b2]) = net(&mut random, hidden, n, &[N("batch")]);
        assert!(plan.general.as_ref().unwrap().direct.is_some());
        let (hidden, n) = (hidden as usize, n as usize);
        for m in (0..=40).chain([1024]) {
            let x = random.values(m * 28);
            let made = result(&plan, &[m, 28], &x);
            let expected = softmax(&layer(&layer(&x, 28, &w1, hidden, &b1, true), hidden, &w2, n, &b2, false), n);
            crate::kernels::tests::close(&made, &expected, 1e-5, &format!("{m} rows, {hidden}, {n}"));
            for row in 0..m {
                let alone = result(&plan, &[1, 28], &x[row * 28..][..28]);
                let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&alone), bits(&made[row * n..][..n]), "row {row} of {m}, {hidden}, {n}");
            }
        }
    }
}

#[test]
fn rows_may_be_counted_along_several_axes() {
    let mut random = Random::new(2);
    let (plan, [w1, b1, w2, b2]) = net(&mut random, 32, 6, &[N("batch"), N("time")]);
    assert!(plan.general.as_ref().unwrap().direct.is_some());
    let x = random.values(3 * 5 * 28);
    let expected = softmax(&layer(&layer(&x, 28, &w1, 32, &b1, true), 32, &w2, 6, &b2, false), 6);
    crate::kernels::tests::close(&result(&plan, &[3, 5, 28], &x), &expected, 1e-5, "3 x 5 rows");
}

#[test]
fn values_that_others_use_are_not_lost_in_a_chain() {
    let mut random = Random::new(3);
    let (w1, w2) = (random.values(28 * 8), random.values(8 * 3));
    let nodes = vec![
        node("MatMul", &["x", "w1"], &["h"]),
        node("Relu", &["h"], &["r"]),
        node("MatMul", &["r", "w2"], &["y"]),
        node("Softmax", &["y"], &["p"]).int("axis", 0),
    ];
    let outputs =
        vec![info("h", FLOAT, &[N("n"), S(8)]), info("y", FLOAT, &[N("n"), S(3)]), info("p", FLOAT, &[N("n"), S(3)])];
    let weights = vec![floats("w1", &[28, 8], &w1), floats("w2", &[8, 3], &w2)];
    let plan = compile(graph(vec![info("x", FLOAT, &[N("n"), S(28)])], outputs, nodes, weights)).unwrap();
    let x = random.values(5 * 28);
    let made = run(&plan, &[("x", HostTensor::from_f32(&[5, 28], &x).unwrap())]).unwrap();
    let hidden = layer(&x, 28, &w1, 8, &[], false);
    let relu: Vec<f32> = hidden.iter().map(|x| x.max(0.0)).collect();
    crate::kernels::tests::close(&made[0].1.to_f32().unwrap(), &hidden, 1e-5, "h");
    crate::kernels::tests::close(&made[1].1.to_f32().unwrap(), &layer(&relu, 8, &w2, 3, &[], false), 1e-5, "y");
}

#[test]
fn a_chain_beyond_the_memory_limit_or_cancelled_does_not_run() {
    let (plan, _) = net(&mut Random::new(4), 16, 2, &[N("batch")]);
    let inputs = || vec![("x".to_owned(), HostTensor::from_f32(&[4, 28], &[0.5; 4 * 28]).unwrap())];
    assert_eq!(plan.run(inputs(), &AtomicBool::new(true)).unwrap_err().kind, Cancelled);
    let options = CompileOptions { memory_limit: 16 << 10, ..CompileOptions::default() };
    let weights = vec![floats("w", &[28, 4], &[0.1; 28 * 4])];
    let nodes = vec![node("MatMul", &["x", "w"], &["y"])];
    let made = graph(vec![info("x", FLOAT, &[N("n"), S(28)])], vec![info("y", FLOAT, &[N("n"), S(4)])], nodes, weights);
    let plan = compile_with(model(made), &options).unwrap();
    assert!(run(&plan, &[("x", HostTensor::from_f32(&[50, 28], &[0.5; 50 * 28]).unwrap())]).is_ok());
    let refused = run(&plan, &[("x", HostTensor::from_f32(&[2000, 28], &[0.5; 2000 * 28]).unwrap())]);
    assert_eq!(refused.unwrap_err().kind, TooLarge);
}
