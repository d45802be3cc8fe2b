//! Graphs in which a row depends on others, or may.

use super::*;

#[test]
fn what_is_taken_over_the_rows() {
    dependent(
        "softmax",
        of_rows(vec![node("Softmax", &["x"], &["y"]).int("axis", 0)], vec![]),
        "is taken over axis 0, the rows",
    );
    let named = NodeProto { name: "sm".into(), ..node("Softmax", &["x"], &["y"]).int("axis", -2) };
    dependent("negative axis", of_rows(vec![named], vec![]), "Softmax \"sm\" is taken over axis 0, the rows");
    dependent(
        "log softmax",
        of_rows(vec![node("LogSoftmax", &["x"], &["y"]).int("axis", 0)], vec![]),
        "axis 0, the rows",
    );
    let mean = || node("ReduceMean", &["x"], &["m"]).ints("axes", &[0]);
    dependent("mean", of_rows(vec![mean(), node("Sub", &["x", "m"], &["y"])], vec![]), "ReduceMean \"m\"");
    dependent(
        "maximum",
        of_rows(vec![node("ReduceMax", &["x"], &["y"]).ints("axes", &[0])], vec![]),
        "ReduceMax \"y\"",
    );
    let all = || node("ReduceSum", &["x"], &["s"]);
    dependent("sum of all", of_rows(vec![all(), node("Div", &["x", "s"], &["y"])], vec![]), "ReduceSum \"s\"");
    let axis = || ints("axis", &[], &[0]);
    dependent("running sum", of_rows(vec![node("CumSum", &["x", "axis"], &["y"])], vec![axis()]), "CumSum \"y\"");
    dependent("argmax", of_rows(vec![node("ArgMax", &["x"], &["a"]).int("axis", 0), cast("a", "y")], vec![]), "ArgMax");
    let top = node("TopK", &["x", "k"], &["y", "places"]).int("axis", 0);
    dependent("top", of_rows(vec![top], vec![ints("k", &[1], &[1])]), "TopK");
    let normal = node("BatchNormalization", &["x", "o", "z", "z", "o"], &["y"]).int("training_mode", 1);
    let ones = || vec![floats("o", &[4], &[1.; 4]), floats("z", &[4], &[0.; 4])];
    assert!(compile(of_rows(vec![normal], ones())).is_err(), "training is refused");
}

fn cast(from: &str, to: &str) -> NodeProto {
    node("Cast", &[from], &[to]).int("to", 1)
}

/// Before opset 13, Softmax flattens what is before and behind its axis.
#[test]
fn a_softmax_of_an_old_operator_set() {
    let softmax = |axis| of(&[N("n"), S(3), S(4)], vec![node("Softmax", &["x"], &["y"]).int("axis", axis)], vec![]);
    for (axis, independent) in [(0, false), (1, true), (2, true), (-1, true), (-3, false)] {
        let mut old = model(softmax(axis));
        old.opset_import[0].version = 11;
        let plan = compile_with(old, &CompileOptions::default()).unwrap();
        assert_eq!(plan.rows().are_independent(), independent, "axis {axis}");
        compare(&plan, &mut Random::new(3), "an old softmax");
    }
}

#[test]
fn rows_that_meet_each_other() {
    let transposed = || node("Transpose", &["x"], &["t"]).ints("perm", &[1, 0]);
    dependent("x x^T", of_rows(vec![transposed(), node("MatMul", &["x", "t"], &["y"])], vec![]), "MatMul \"y\"");
    dependent("x^T x", of_rows(vec![transposed(), node("MatMul", &["t", "x"], &["y"])], vec![]), "sums over the rows");
    dependent("x x^T of Gemm", of_rows(vec![node("Gemm", &["x", "x"], &["y"]).int("transB", 1)], vec![]), "\"y\"");
    let outer = node("Einsum", &["x", "x"], &["y"]).text("equation", "nc,mc->nm");
    dependent("outer product", of_rows(vec![outer], vec![]), "Einsum \"y\"");
    let total = node("Einsum", &["x"], &["s"]).text("equation", "nc->c");
    dependent("sum by Einsum", of_rows(vec![total, node("Sub", &["x", "s"], &["y"])], vec![]), "sums over the rows");
    let first = || ints("first", &[1], &[0]);
    let gather = || node("Gather", &["x", "first"], &["g"]).int("axis", 0);
    dependent(
        "x minus the first",
        of_rows(vec![gather(), node("Sub", &["x", "g"], &["y"])], vec![first()]),
        "Gather \"g\"",
    );
    dependent(
        "beside itself",
        of_rows(vec![node("Concat", &["x", "x"], &["y"]).int("axis", 0)], vec![]),
        "Concat \"y\"",
    );
    let below = node("Concat", &["x", "c"], &["y"]).int("axis", 0);
    dependent("a constant below", of_rows(vec![below], vec![floats("c", &[1, 4], &[0.; 4])]), "Concat \"y\"");
    let slice = || vec![ints("from", &[1], &[1]), ints("to", &[1], &[i64::MAX]), ints("axis", &[1], &[0])];
    dependent(
        "without the first",
        of_rows(vec![node("Slice", &["x", "from", "to", "axis"], &["y"])], slice()),
        "Slice",
    );
    let back = vec![
        ints("from", &[1], &[-1]),
        ints("to", &[1], &[i64::MIN]),
        ints("axis", &[1], &[0]),
        ints("step", &[1], &[-1]),
    ];
    let backwards = node("Slice", &["x", "from", "to", "axis", "step"], &["y"]);
    dependent("backwards", of_rows(vec![backwards], back), "");
    let pads = ints("pads", &[4], &[1, 0, 0, 0]);
    dependent("padded", of_rows(vec![node("Pad", &["x", "pads"], &["y"])], vec![pads]), "Pad \"y\"");
    let twice = ints("twice", &[2], &[2, 1]);
    dependent("repeated", of_rows(vec![node("Tile", &["x", "twice"], &["y"])], vec![twice]), "Tile \"y\"");
    let turned = of_rows(vec![transposed(), node("Softmax", &["t"], &["y"]).int("axis", -1)], vec![]);
    dependent("turned", turned, "is taken over axis 1, the rows");
    let triangle = vec![node("Trilu", &["x"], &["y"])];
    dependent("a triangle", of_rows(triangle, vec![]), "Trilu \"y\"");
    let scales = vec![floats("scales", &[4], &[2., 1., 1., 1.])];
    let resize = node("Resize", &["x", "", "scales"], &["y"]).text("mode", "linear");
    dependent("resized", of(&[N("n"), S(1), S(4), S(4)], vec![resize], scales), "Resize \"y\"");
}

#[test]
fn the_number_of_rows_as_data() {
    let size =
        || vec![node("Shape", &["x"], &["s"]), node("Gather", &["s", "first"], &["r"]).int("axis", 0), cast("r", "f")];
    let first = || vec![ints("first", &[], &[0]), ints("zero", &[], &[0]), ints("one", &[], &[1])];
    let with = |more: Vec<NodeProto>| of_rows(size().into_iter().chain(more).collect(), first());
    dependent("divided", with(vec![node("Div", &["x", "f"], &["y"])]), "takes the number of rows as a value");
    let number = vec![
        node("Range", &["zero", "r", "one"], &["i"]),
        cast("i", "j"),
        node("Unsqueeze", &["j", "one_"], &["k"]),
        node("Add", &["x", "k"], &["y"]),
    ];
    let mut numbered = with(number);
    numbered.initializer.push(ints("one_", &[1], &[1]));
    dependent("numbered", numbered, "Range \"i\" takes the number of rows as a value");
    // The same for all sizes but one.
    let five = vec![
        node("Equal", &["r", "five"], &["e"]),
        cast("e", "g"),
        node("ReduceSum", &["x"], &["t"]),
        node("Mul", &["t", "g"], &["m"]),
        node("Add", &["x", "m"], &["y"]),
    ];
    let mut five = with(five);
    five.initializer.push(ints("five", &[], &[5]));
    dependent("if there are five", five, "");
    let count = node("Size", &["x"], &["c"]);
    dependent("counted", of_rows(vec![count, cast("c", "f"), node("Mul", &["x", "f"], &["y"])], vec![]), "");
}

#[test]
fn shapes_that_cut_rows_anew() {
    let to = |sizes: &[i64]| ints("to", &[sizes.len() as i64], sizes);
    let reshape = |sizes: &[i64]| of_rows(vec![node("Reshape", &["x", "to"], &["y"])], vec![to(sizes)]);
    dependent("columns first", reshape(&[4, -1]), "mixes rows");
    dependent("flat", reshape(&[-1]), "more indices than rows");
    dependent("twice as many", reshape(&[-1, 2]), "more indices than rows");
    dependent("one row", reshape(&[1, -1]), "");
    // Two halves of rows, of which each gets the sum of its own: the rows come back, but the halves do not mix.
    let halves = vec![
        node("Reshape", &["x", "half"], &["h"]),
        node("Softmax", &["h"], &["s"]).int("axis", 1),
        node("Reshape", &["s", "whole"], &["y"]),
    ];
    let sizes = || vec![ints("half", &[2], &[-1, 2]), ints("whole", &[2], &[-1, 4])];
    independent("halves and back", of_rows(halves, sizes()), &[0], &[0]);
    let halves = vec![
        node("Reshape", &["x", "half"], &["h"]),
        node("Softmax", &["h"], &["s"]).int("axis", 0),
        node("Reshape", &["s", "whole"], &["y"]),
    ];
    dependent("halves that mix", of_rows(halves, sizes()), "Softmax \"s\"");
    let turned =
        vec![node("Transpose", &["x"], &["t"]).ints("perm", &[1, 0]), node("Reshape", &["t", "whole"], &["y"])];
    dependent("turned and cut", of_rows(turned, sizes()), "mixes rows");
}

#[test]
fn what_is_not_the_same_for_one_row() {
    let quantized = vec![
        node("DynamicQuantizeLinear", &["x"], &["q", "s", "z"]),
        node("DequantizeLinear", &["q", "s", "z"], &["y"]),
    ];
    dependent("a scale of all rows", of_rows(quantized, vec![]), "DynamicQuantizeLinear \"q\"");
    let drawn = vec![node("RandomUniform", &[], &["r"]).ints("shape", &[4]), node("Add", &["x", "r"], &["y"])];
    dependent("random", of_rows(drawn, vec![]), "draws random numbers");
    let chosen = vec![node("NonZero", &["x"], &["i"]), cast("i", "y")];
    dependent("non-zero", of_rows(chosen, vec![]), "NonZero");
    dependent(
        "a constant",
        of_rows(vec![node("Identity", &["c"], &["y"])], vec![floats("c", &[4], &[1.; 4])]),
        "does not depend on the rows",
    );
}

#[test]
fn inputs_without_rows() {
    let add = || vec![node("Add", &["x", "z"], &["y"])];
    let two = |left: &[D], right: &[D]| {
        graph(vec![info("x", FLOAT, left), info("z", FLOAT, right)], vec![info("y", FLOAT, &[])], add(), vec![])
    };
    dependent("shared", two(&[N("n"), S(4)], &[S(4)]), "input \"z\" has no free dimension \"n\"");
    dependent("another axis", two(&[N("n"), S(4)], &[S(1), N("m")]), "input \"z\" has no free dimension \"n\"");
    dependent("always one", two(&[S(1), S(4)], &[S(1), S(4)]), "dimension 0 of input \"x\" is always 1");
    dependent(
        "twice",
        of(&[N("n"), N("n")], vec![node("Relu", &["x"], &["y"])], vec![]),
        "has one free dimension twice",
    );
    independent("both", two(&[N("n"), S(4)], &[N("n"), S(4)]), &[0, 0], &[0]);
}
