//! Attention and layer normalisation, which are made of many operators and run as one.

use super::*;
use crate::kernels::tests::{Random, close};

const HEADS: usize = 3;
const WIDTH: usize = 8;
const ALL: usize = HEADS * WIDTH;

/// How a graph has its mask.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mask {
    None,
    /// batch x 1 x 1 x keys.
    Keys,
    /// 1 x 1 x queries x keys.
    Causal,
}

fn operators(plan: &Plan) -> Vec<String> {
    let model = plan.general.as_ref().unwrap().plan.model().clone();
    model.nodes.iter().map(|node| node.op.name().to_string()).collect()
}

fn at(name: &str, perm: &[i64], from: &str, to: &str) -> Vec<NodeProto> {
    let split = format!("{name}_split");
    vec![node("Reshape", &[from, "heads"], &[&split]), node("Transpose", &[&split], &[to]).ints("perm", perm)]
}

/// Self-attention of three inputs, as exporters write it.
fn attention(mask: Mask, scaled: bool) -> Plan {
    let mut nodes = vec![];
    nodes.extend(at("q", &[0, 2, 1, 3], "q", "qt"));
    nodes.extend(at("k", &[0, 2, 3, 1], "k", "kt"));
    nodes.extend(at("v", &[0, 2, 1, 3], "v", "vt"));
    nodes.push(node("MatMul", &["qt", "kt"], &["s0"]));
    nodes.push(if scaled { node("Div", &["s0", "root"], &["s1"]) } else { node("Identity", &["s0"], &["s1"]) });
    nodes.push(if mask == Mask::None {
        node("Identity", &["s1"], &["s2"])
    } else {
        node("Add", &["s1", "mask"], &["s2"])
    });
    nodes.push(node("Softmax", &["s2"], &["p"]).int("axis", -1));
    nodes.push(node("MatMul", &["p", "vt"], &["c"]));
    nodes.push(node("Transpose", &["c"], &["ct"]).ints("perm", &[0, 2, 1, 3]));
    nodes.push(node("Reshape", &["ct", "together"], &["y"]));
    let shape = [N("batch"), N("time"), S(ALL as i64)];
    let mut inputs: Vec<_> = ["q", "k", "v"].iter().map(|name| info(name, FLOAT, &shape)).collect();
    match mask {
        Mask::None => {}
        Mask::Keys => inputs.push(info("mask", FLOAT, &[N("batch"), S(1), S(1), N("time")])),
        Mask::Causal => inputs.push(info("mask", FLOAT, &[S(1), S(1), N("time"), N("time")])),
    }
    let constants = vec![
        ints("heads", &[4], &[0, 0, HEADS as i64, WIDTH as i64]),
        ints("together", &[3], &[0, 0, ALL as i64]),
        floats("root", &[], &[(WIDTH as f32).sqrt()]),
    ];
    compile(graph(inputs, vec![info("y", FLOAT, &shape)], nodes, constants)).unwrap()
}

fn reference(time: usize, [q, k, v]: [&[f32]; 3], scale: f64, mask: impl Fn(usize, usize, usize) -> f64) -> Vec<f32> {
    let rows = q.len().checked_div(time * ALL).unwrap_or(0);
    let mut out = vec![0.0; q.len()];
    for (row, head, query) in
        (0..rows).flat_map(|row| (0..HEADS).flat_map(move |head| (0..time).map(move |query| (row, head, query))))
    {
        let place = |at: usize| (row * time + at) * ALL + head * WIDTH;
        let dot =
            |key: usize| (0..WIDTH).map(|d| f64::from(q[place(query) + d]) * f64::from(k[place(key) + d])).sum::<f64>();
        let powers: Vec<f64> = (0..time).map(|key| (dot(key) * scale + mask(row, query, key)).exp()).collect();
        let total: f64 = powers.iter().sum();
        for d in 0..WIDTH {
            let sum: f64 = (0..time).map(|key| powers[key] / total * f64::from(v[place(key) + d])).sum();
            out[place(query) + d] = sum as f32;
        }
    }
    out
}

#[test]
fn attention_is_one_operator_and_right_with_every_mask() {
    let mut random = Random::new(7);
    for (mask, scaled) in [(Mask::None, true), (Mask::Keys, true), (Mask::Causal, false), (Mask::Causal, true)] {
        let plan = attention(mask, scaled);
        let names = operators(&plan);
        assert!(names.iter().any(|name| name == "Attention"), "{mask:?}, {scaled}: {names:?}");
        for (rows, time) in [(1, 1), (2, 5), (3, 1), (1, 40), (4, 17), (1, 3000), (0, 4), (2, 0)] {
            let values: Vec<Vec<f32>> = (0..3).map(|_| random.values(rows * time * ALL)).collect();
            // The first key is never hidden.
            let hidden = |row: usize, query: usize, key: usize| match mask {
                Mask::None => false,
                Mask::Keys => key > row + 2,
                Mask::Causal => key > query,
            };
            let cost = |row, query, key| if hidden(row, query, key) { -1e9 } else { 0.0 };
            let mut inputs: Vec<_> = ["q", "k", "v"]
                .iter()
                .zip(&values)
                .map(|(name, values)| (*name, HostTensor::from_f32(&[rows, time, ALL], values).unwrap()))
                .collect();
            let (shape, given): (_, Vec<f32>) = match mask {
                Mask::Causal => {
                    ([1, 1, time, time], (0..time * time).map(|at| cost(0, at / time, at % time) as f32).collect())
                }
                _ => ([rows, 1, 1, time], (0..rows * time).map(|at| cost(at / time, 0, at % time) as f32).collect()),
            };
            if mask != Mask::None {
                inputs.push(("mask", HostTensor::from_f32(&shape, &given).unwrap()));
            }
            let made = run(&plan, &inputs).unwrap();
            let scale = if scaled { 1.0 / (WIDTH as f64).sqrt() } else { 1.0 };
            if time > 1000 {
                assert!(made[0].1.to_f32().unwrap().iter().all(|value| value.is_finite()));
                continue;
            }
            let expected = reference(time, [&values[0], &values[1], &values[2]], scale, cost);
            let made = made[0].1.to_f32().unwrap();
            close(&made, &expected, 1e-5, &format!("{mask:?}, {rows} x {time}"));
            for row in 0..rows {
                let alone: Vec<_> = inputs
                    .iter()
                    .map(|(name, tensor)| {
                        let values = tensor.to_f32().unwrap();
                        let part = if tensor.shape[0] == rows && *name != "mask" || mask == Mask::Keys {
                            values[row * values.len() / rows..(row + 1) * values.len() / rows].to_vec()
                        } else {
                            values
                        };
                        let mut shape = tensor.shape.clone();
                        shape[0] = 1;
                        (*name, HostTensor::from_f32(&shape, &part).unwrap())
                    })
                    .collect();
                let alone = run(&plan, &alone).unwrap()[0].1.to_f32().unwrap();
                let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&alone), bits(&made[row * time * ALL..][..time * ALL]), "row {row} of {rows} x {time}");
            }
        }
    }
}

#[test]
fn heads_and_rows_that_go_to_files_are_those_in_memory() {
    let mut random = Random::new(12);
    for (plan, names, shape) in [
        (attention(Mask::Keys, true), &["q", "k", "v", "mask"][..], [4, 17, ALL]),
        (norm(true, false, true), &["a", "b"], [4, 17, 21]),
    ] {
        let inputs = || names.iter().map(|name| name.to_string());
        let values: Vec<HostTensor> = names
            .iter()
            .map(|&name| {
                let shape = if name == "mask" { vec![4, 1, 1, 17] } else { shape.to_vec() };
                HostTensor::from_f32(&shape, &random.values(shape.iter().product())).unwrap()
            })
            .collect();
        let given = || inputs().zip(values.clone()).collect::<Vec<_>>();
        let cancel = Arc::new(AtomicBool::new(false));
        let expected = plan.run(given(), &cancel).unwrap()[0].1.to_f32().unwrap();
        for operator_memory in [500, 3000] {
            let made = plan.run_on_blocks(given(), super::spilled::files(operator_memory), &cancel).unwrap();
            assert_eq!(made[0].1.to_f32().unwrap(), expected, "{names:?} with {operator_memory} bytes");
        }
    }
}

#[test]
fn scores_that_are_an_output_stay_one() {
    let nodes = vec![
        node("MatMul", &["q", "k"], &["s"]),
        node("Softmax", &["s"], &["p"]).int("axis", -1),
        node("MatMul", &["p", "v"], &["y"]),
    ];
    let inputs =
        vec![info("q", FLOAT, &[N("n"), S(4)]), info("k", FLOAT, &[S(4), N("m")]), info("v", FLOAT, &[N("m"), S(5)])];
    let outputs = vec![info("p", FLOAT, &[N("n"), N("m")]), info("y", FLOAT, &[N("n"), S(5)])];
    let plan = compile(graph(inputs, outputs, nodes, vec![])).unwrap();
    assert!(operators(&plan).iter().any(|name| name == "RowSoftmax"));
    let mut random = Random::new(8);
    let (q, k, v) = (random.values(3 * 4), random.values(4 * 6), random.values(6 * 5));
    let tensor = |shape: [usize; 2], values: &[f32]| HostTensor::from_f32(&shape, values).unwrap();
    let made = run(&plan, &[("q", tensor([3, 4], &q)), ("k", tensor([4, 6], &k)), ("v", tensor([6, 5], &v))]).unwrap();
    let sums = made[0].1.to_f32().unwrap();
    assert!(sums.chunks(6).all(|row| (row.iter().sum::<f32>() - 1.0).abs() < 1e-6));
    assert_eq!(made[1].1.shape, [3, 5]);
}

/// y = LayerNorm(a [+ b]), also written as a graph of its parts.
fn norm(residual: bool, parts: bool, affine: bool) -> Plan {
    let mut nodes = vec![if residual { node("Add", &["a", "b"], &["x"]) } else { node("Identity", &["a"], &["x"]) }];
    if parts {
        nodes.push(node("ReduceMean", &["x"], &["mean"]).ints("axes", &[-1]));
        nodes.push(node("Sub", &["x", "mean"], &["d"]));
        nodes.push(node("Pow", &["d", "two"], &["dd"]));
        nodes.push(node("ReduceMean", &["dd"], &["variance"]).ints("axes", &[-1]));
        nodes.push(node("Add", &["variance", "epsilon"], &["more"]));
        nodes.push(node("Sqrt", &["more"], &["deviation"]));
        nodes.push(node("Div", &["d", "deviation"], &["even"]));
        nodes.push(if affine {
            node("Mul", &["even", "scale"], &["scaled"])
        } else {
            node("Identity", &["even"], &["scaled"])
        });
        nodes.push(if affine {
            node("Add", &["scaled", "bias"], &["y"])
        } else {
            node("Identity", &["scaled"], &["y"])
        });
    } else {
        let inputs: &[&str] = if affine { &["x", "scale", "bias"] } else { &["x", "scale"] };
        nodes.push(node("LayerNormalization", inputs, &["y"]).int("axis", -1).float("epsilon", 1e-5));
    }
    let shape = [N("batch"), N("time"), S(21)];
    let mut inputs = vec![info("a", FLOAT, &shape)];
    if residual {
        inputs.push(info("b", FLOAT, &shape));
    }
    let (scale, bias) = rows();
    let constants = vec![
        floats("two", &[], &[2.0]),
        floats("epsilon", &[], &[1e-5]),
        floats("scale", &[21], &scale),
        floats("bias", &[21], &bias),
    ];
    compile(graph(inputs, vec![info("y", FLOAT, &shape)], nodes, constants)).unwrap()
}

fn rows() -> (Vec<f32>, Vec<f32>) {
    let mut random = Random::new(11);
    (random.values(21), random.values(21))
}

#[test]
fn normalisations_are_one_operator_and_right() {
    let mut random = Random::new(9);
    let (scale, bias) = rows();
    for (residual, parts, affine) in (0..8).map(|n| (n & 1 > 0, n & 2 > 0, n & 4 > 0)) {
        let plan = norm(residual, parts, affine);
        let names = operators(&plan);
        assert!(names.iter().any(|name| name == "LayerNorm"), "{residual} {parts} {affine}: {names:?}");
        assert!(!names.iter().any(|name| name.contains("Add") || name.contains("Bin")), "{names:?}");
        let (a, b) = (random.values(6 * 21), random.values(6 * 21));
        let tensor = |values: &[f32]| HostTensor::from_f32(&[2, 3, 21], values).unwrap();
        let mut inputs = vec![("a", tensor(&a))];
        if residual {
            inputs.push(("b", tensor(&b)));
        }
        let x: Vec<f64> =
            (0..6 * 21).map(|at| f64::from(a[at]) + if residual { f64::from(b[at]) } else { 0.0 }).collect();
        let expected: Vec<f32> = x
            .chunks(21)
            .flat_map(|row| {
                let mean = row.iter().sum::<f64>() / 21.0;
                let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 21.0;
                let (scale, bias) = (&scale, &bias);
                row.iter().enumerate().map(move |(at, x)| {
                    let even = (x - mean) / (variance + 1e-5).sqrt();
                    let scaled = if affine || !parts { even * f64::from(scale[at]) } else { even };
                    (if affine { scaled + f64::from(bias[at]) } else { scaled }) as f32
                })
            })
            .collect();
        let made = run(&plan, &inputs).unwrap()[0].1.to_f32().unwrap();
        close(&made, &expected, 1e-5, &format!("{residual} {parts} {affine}"));
    }
}
