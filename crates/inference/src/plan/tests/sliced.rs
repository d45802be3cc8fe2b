//! Large batches are run in slices, where that changes nothing.

use super::*;
use crate::kernels::tests::{Random, close};

const SIDE: usize = 16;

/// A small network of pictures of 16 x 16, with `last` between its convolutions and its product.
fn network(last: Vec<NodeProto>, features: i64) -> GraphProto {
    let mut random = Random::new(71);
    let mut values = |dims: &[i64]| random.values(dims.iter().product::<i64>() as usize);
    let (first, second, dense) = (values(&[16, 3, 3, 3]), values(&[16, 16, 3, 3]), values(&[features, 5]));
    let mut nodes = vec![
        node("Conv", &["x", "k"], &["a"]).ints("pads", &[1; 4]),
        node("Relu", &["a"], &["b"]),
        node("Conv", &["b", "l"], &["c"]).ints("pads", &[1; 4]),
        node("Add", &["c", "b"], &["d"]),
        node("MaxPool", &["d"], &["e"]).ints("kernel_shape", &[2, 2]).ints("strides", &[2, 2]),
    ];
    nodes.extend(last);
    nodes.push(node("MatMul", &["f", "m"], &["g"]));
    nodes.push(node("Softmax", &["g"], &["y"]).int("axis", 1));
    graph(
        vec![info("x", FLOAT, &[N("batch"), S(3), S(SIDE as i64), S(SIDE as i64)])],
        vec![info("y", FLOAT, &[N("batch"), S(5)])],
        nodes,
        vec![
            floats("k", &[16, 3, 3, 3], &first),
            floats("l", &[16, 16, 3, 3], &second),
            floats("m", &[features, 5], &dense),
            ints("flat", &[2], &[-1, features]),
        ],
    )
}

fn pictures(rows: usize) -> Vec<f32> {
    Random::new(72).values(rows * 3 * SIDE * SIDE)
}

fn run_rows(plan: &Plan, x: &[f32]) -> Vec<f32> {
    let rows = x.len() / (3 * SIDE * SIDE);
    let outputs = run(plan, &[("x", f32s(&[rows, 3, SIDE, SIDE], x))]).unwrap();
    assert_eq!(outputs[0].1.shape, [rows, 5]);
    outputs[0].1.to_f32().unwrap().to_vec()
}

#[test]
fn rows_of_a_large_batch_are_what_they_are_alone() {
    let means = || vec![node("GlobalAveragePool", &["e"], &["p"]), node("Flatten", &["p"], &["f"])];
    let all = || vec![node("Reshape", &["e", "flat"], &["f"])];
    for (last, features) in [(means(), 16), (all(), 16 * 64)] {
        let plan = compile(network(last, features)).unwrap();
        let runnable = plan.general.clone().unwrap();
        assert!(runnable.rows_are_independent, "{features} features");
        // Values of 16 kB a row: slices of some hundreds, the last one shorter.
        let rows = 1001;
        let shapes = vec![vec![rows, 3, SIDE, SIDE]];
        let piece = slices::rows_at_a_time(rows, runnable.demand(&shapes).unwrap().largest, plan.weights());
        assert!((100..500).contains(&piece), "{piece}");
        let x = pictures(rows);
        let whole = run_rows(&plan, &x);
        for row in [0, piece - 1, piece, 500, rows - 1] {
            let alone = run_rows(&plan, &x[row * 3 * SIDE * SIDE..][..3 * SIDE * SIDE]);
            close(&whole[row * 5..][..5], &alone, 1e-5, &format!("row {row}"));
        }
        assert_eq!(run_rows(&plan, &[]), [0f32; 0]);
    }
}

#[test]
fn a_batch_whose_rows_meet_is_not_cut() {
    let flat = |name: &'static str| node("Reshape", &[name, "flat"], &["f"]);
    let mean = node("ReduceMean", &["e"], &["p"]).ints("axes", &[0]).int("keepdims", 1);
    let cases = [
        // Less their mean.
        vec![mean, node("Sub", &["e", "p"], &["q"]), flat("q")],
        // By the number of rows.
        vec![
            node("Shape", &["e"], &["s"]).int("start", 0).int("end", 1),
            node("Cast", &["s"], &["t"]).int("to", FLOAT.into()),
            node("Div", &["e", "t"], &["q"]),
            flat("q"),
        ],
        // Functions along the batch.
        vec![node("Softmax", &["e"], &["q"]).int("axis", 0), flat("q")],
    ];
    for last in cases {
        let operator = last[1].op_type.clone();
        let plan = compile(network(last, 16 * 64)).unwrap();
        let cut = plan.general.as_ref().is_some_and(|runnable| runnable.rows_are_independent);
        assert!(!cut, "{operator}");
    }
}

/// Values of the second input were cut with the pictures.
#[test]
fn an_input_without_the_batch_is_not_cut() {
    let mut made =
        network(vec![node("Mul", &["e", "scale"], &["s"]), node("Reshape", &["s", "flat"], &["f"])], 16 * 64);
    made.input.push(info("scale", FLOAT, &[S(1), S(16), S(1), S(1)]));
    let mut reverse = made.clone();
    reverse.input.reverse();
    for graph in [made, reverse] {
        let plan = compile(graph).unwrap();
        let rows = 1001;
        let (x, scale) = (pictures(rows), Random::new(5).values(16));
        let predict = |rows: usize, x: &[f32]| {
            let inputs = [("x", f32s(&[rows, 3, SIDE, SIDE], x)), ("scale", f32s(&[1, 16, 1, 1], &scale))];
            let order: Vec<_> = plan
                .signature()
                .inputs
                .iter()
                .flat_map(|port| inputs.iter().filter(|(name, _)| *name == port.name).cloned())
                .collect();
            run(&plan, &order).unwrap()[0].1.to_f32().unwrap()
        };
        let whole = predict(rows, &x);
        for row in [0, 500, rows - 1] {
            let alone = predict(1, &x[row * 3 * SIDE * SIDE..][..3 * SIDE * SIDE]);
            close(&whole[row * 5..][..5], &alone, 1e-5, &format!("row {row}"));
        }
    }
}

/// Attention over the words of each row, whose free length is a second dimension.
#[test]
fn sentences_are_cut_by_what_was_proven_of_rows() {
    let (width, words, rows) = (64, 24, 700);
    let mut random = Random::new(6);
    let mut matrix = || random.values(width * width).iter().map(|value| value / 8.0).collect::<Vec<f32>>();
    let (q, k, v) = (matrix(), matrix(), matrix());
    let shape = [width as i64; 2];
    let axes = || vec![N("batch"), N("words"), S(width as i64)];
    let made = graph(
        vec![info("x", FLOAT, &axes())],
        vec![info("y", FLOAT, &axes())],
        vec![
            node("MatMul", &["x", "wq"], &["q"]),
            node("MatMul", &["x", "wk"], &["k"]),
            node("MatMul", &["x", "wv"], &["v"]),
            node("Transpose", &["k"], &["kt"]).ints("perm", &[0, 2, 1]),
            node("MatMul", &["q", "kt"], &["s"]),
            node("Softmax", &["s"], &["p"]).int("axis", -1),
            node("MatMul", &["p", "v"], &["a"]),
            node("Add", &["a", "x"], &["y"]),
        ],
        vec![floats("wq", &shape, &q), floats("wk", &shape, &k), floats("wv", &shape, &v)],
    );
    let plan = compile(made).unwrap();
    let runnable = plan.general.clone().unwrap();
    assert!(runnable.rows_are_independent);
    let shapes = vec![vec![rows, words, width]];
    assert!(slices::rows_at_a_time(rows, runnable.demand(&shapes).unwrap().largest, plan.weights()) < rows);
    let x = random.values(rows * words * width);
    let predict = |x: &[f32]| {
        let made = run(&plan, &[("x", f32s(&[x.len() / words / width, words, width], x))]).unwrap();
        made[0].1.to_f32().unwrap().to_vec()
    };
    let whole = predict(&x);
    for row in [0, 350, rows - 1] {
        let place = row * words * width..(row + 1) * words * width;
        assert_eq!(whole[place.clone()], predict(&x[place]), "row {row}");
    }
}
