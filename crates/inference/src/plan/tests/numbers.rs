//! Right numbers where tract alone is wrong or stops.

use super::*;

fn one(graph: GraphProto, inputs: &[(&str, HostTensor)]) -> HostTensor {
    run(&compile(graph).unwrap(), inputs).unwrap().remove(0).1
}

fn unary(operator: NodeProto, input: &[f32]) -> Vec<f32> {
    let graph = graph(vec![info("x", FLOAT, &[N("n")])], vec![info("y", FLOAT, &[N("n")])], vec![operator], vec![]);
    one(graph, &[("x", f32s(&[input.len()], input))]).to_f32().unwrap()
}

fn near(left: &[f32], right: &[f32]) {
    assert_eq!(left.len(), right.len());
    for (left, right) in left.iter().zip(right) {
        assert!((left - right).abs() <= 1e-5 * right.abs().max(1.0), "{left} is not {right}");
    }
}

#[test]
fn activations_with_alpha() {
    let alpha = 2.0f32;
    let celu = unary(node("Celu", &["x"], &["y"]).float("alpha", alpha), &[-3., 0., 1.]);
    near(&celu, &[alpha * ((-3.0f32 / alpha).exp() - 1.), 0., 1.]);
    let mut swish = model(graph(
        vec![info("x", FLOAT, &[S(1)])],
        vec![info("y", FLOAT, &[S(1)])],
        vec![node("Swish", &["x"], &["y"]).float("alpha", 0.5)],
        vec![],
    ));
    swish.opset_import[0].version = 24;
    let plan = compile_with(swish, &CompileOptions::default()).unwrap();
    let output = run(&plan, &[("x", f32s(&[1], &[2.]))]).unwrap().remove(0).1;
    near(&output.to_f32().unwrap(), &[2. / (1. + (-1.0f32).exp())]);
}

#[test]
fn the_largest_of_infinities_is_infinite() {
    let reduce = |operator: &str, input: &[f32]| {
        let graph = graph(
            vec![info("x", FLOAT, &[N("n"), S(2)])],
            vec![info("y", FLOAT, &[N("n")])],
            vec![node(operator, &["x"], &["y"]).ints("axes", &[1]).int("keepdims", 0)],
            vec![],
        );
        one(graph, &[("x", f32s(&[input.len() / 2, 2], input))]).to_f32().unwrap()
    };
    let (low, high) = (f32::NEG_INFINITY, f32::INFINITY);
    assert_eq!(reduce("ReduceMax", &[low, low, f32::MIN, low, 1., 2.]), [low, f32::MIN, 2.]);
    assert_eq!(reduce("ReduceMin", &[high, high, f32::MAX, high, 1., 2.]), [high, f32::MAX, 1.]);
}

#[test]
fn a_logarithm_of_softmax_does_not_underflow() {
    let graph = graph(
        vec![info("x", FLOAT, &[N("n"), S(2), S(2)])],
        vec![info("y", FLOAT, &[N("n"), S(2), S(2)])],
        vec![node("LogSoftmax", &["x"], &["y"]).int("axis", 1)],
        vec![],
    );
    let output = one(graph, &[("x", f32s(&[1, 2, 2], &[0., 1., -1000., 1.]))]);
    let half = -2.0f32.ln();
    near(&output.to_f32().unwrap(), &[0., half, -1000., half]);
}

#[test]
fn constants_are_folded_right() {
    // Nothing depends on the input: tract computes it all while it compiles.
    let graph = graph(
        vec![info("x", FLOAT, &[N("n")])],
        vec![info("y", FLOAT, &[S(1)])],
        vec![node("ReduceMax", &["low"], &["y"]).ints("axes", &[0])],
        vec![floats("low", &[2], &[f32::NEG_INFINITY; 2])],
    );
    assert_eq!(one(graph, &[("x", f32s(&[1], &[1.]))]), f32s(&[1], &[f32::NEG_INFINITY]));
}

#[test]
fn a_reverse_recurrence_runs_backwards() {
    // h = tanh(x + h / 2), one unit.
    let rnn = |direction: &str| {
        let recurrence =
            node("RNN", &["x", "w", "r"], &["y", "last"]).int("hidden_size", 1).text("direction", direction);
        let graph = graph(
            vec![info("x", FLOAT, &[S(3), S(1), S(1)])],
            vec![info("y", FLOAT, &[S(3), S(1), S(1), S(1)]), info("last", FLOAT, &[S(1), S(1), S(1)])],
            vec![recurrence],
            vec![floats("w", &[1, 1, 1], &[1.]), floats("r", &[1, 1, 1], &[0.5])],
        );
        let outputs = run(&compile(graph).unwrap(), &[("x", f32s(&[3, 1, 1], &[1., 2., 3.]))]).unwrap();
        (outputs[0].1.to_f32().unwrap(), outputs[1].1.to_f32().unwrap())
    };
    let third = 3.0f32.tanh();
    let second = (2. + third / 2.).tanh();
    let first = (1. + second / 2.).tanh();
    let (sequence, last) = rnn("reverse");
    near(&sequence, &[first, second, third]);
    near(&last, &[first]);
    near(&rnn("forward").0[..1], &[1.0f32.tanh()]);
}

#[test]
fn quantization_rounds_the_quotient() {
    let scale = 0.1f32;
    let inputs: Vec<f32> = (0..4000).map(|value| value as f32 * 0.005).collect();
    let graph = graph(
        vec![info("x", FLOAT, &[N("n")])],
        vec![info("y", 2, &[N("n")])],
        vec![node("QuantizeLinear", &["x", "s"], &["y"])],
        vec![floats("s", &[], &[scale])],
    );
    let output = one(graph, &[("x", f32s(&[inputs.len()], &inputs))]);
    let wanted = inputs.iter().map(|x| (x / scale).round_ties_even().clamp(0., 255.) as u8).collect();
    assert_eq!(output.data, TensorData::Raw(wanted));
}

#[test]
fn if_takes_the_branch_that_shapes_decide() {
    // The branch that is not taken does not fit the shapes.
    let branch = |operator: NodeProto| graph(vec![], vec![info("out", FLOAT, &[])], vec![operator], vec![]);
    let graph = graph(
        vec![info("x", FLOAT, &[N("n"), N("m")])],
        vec![info("y", FLOAT, &[N("a")])],
        vec![
            node("Shape", &["x"], &["shape"]),
            node("Gather", &["shape", "one"], &["m"]).int("axis", 0),
            node("Equal", &["m", "one"], &["single"]),
            node("If", &["single"], &["y"])
                .graph("then_branch", branch(node("Squeeze", &["x", "axes"], &["out"])))
                .graph("else_branch", branch(node("Identity", &["x"], &["out"]))),
        ],
        vec![ints("one", &[], &[1]), ints("axes", &[1], &[1])],
    );
    let plan = compile(graph).unwrap();
    assert_eq!(run(&plan, &[("x", f32s(&[2, 1], &[1., 2.]))]).unwrap()[0].1.shape, [2]);
    assert_eq!(run(&plan, &[("x", f32s(&[2, 2], &[0.; 4]))]).unwrap()[0].1.shape, [2, 2]);
}

#[test]
fn shifts_push_everything_out() {
    let shift = |direction: &str, values: &[i64], amounts: &[i64]| {
        let count = values.len();
        let graph = graph(
            vec![info("x", INT64, &[N("n")]), info("s", INT64, &[N("n")])],
            vec![info("y", INT64, &[N("n")])],
            vec![node("BitShift", &["x", "s"], &["y"]).text("direction", direction)],
            vec![],
        );
        one(graph, &[("x", i64s(&[count], values)), ("s", i64s(&[count], amounts))])
    };
    assert_eq!(shift("LEFT", &[1, 1, 1], &[3, 64, -1]), i64s(&[3], &[8, 0, 0]));
    assert_eq!(shift("RIGHT", &[-8, -8, 8], &[1, 99, -1]), i64s(&[3], &[-4, -1, 0]));
}

fn tree(operator: &str, outputs: &[&str]) -> NodeProto {
    let mut tree = node(operator, &["x"], outputs);
    tree.domain = "ai.onnx.ml".into();
    // x[1] <= 0.5 ? leaf 1 : leaf 2.
    tree.ints("nodes_treeids", &[0, 0, 0])
        .ints("nodes_nodeids", &[0, 1, 2])
        .ints("nodes_featureids", &[1, 0, 0])
        .texts("nodes_modes", &["BRANCH_LEQ", "LEAF", "LEAF"])
        .floats("nodes_values", &[0.5, 0., 0.])
        .ints("nodes_truenodeids", &[1, 0, 0])
        .ints("nodes_falsenodeids", &[2, 0, 0])
}

fn classifier() -> NodeProto {
    tree("TreeEnsembleClassifier", &["label", "scores"])
        .ints("class_treeids", &[0, 0])
        .ints("class_nodeids", &[1, 2])
        .ints("class_ids", &[0, 0])
        .floats("class_weights", &[0.25, 0.75])
        .texts("classlabels_strings", &["no", "yes"])
}

fn classifier_graph(classifier: NodeProto) -> GraphProto {
    graph(
        vec![info("x", FLOAT, &[N("n"), S(2)])],
        vec![info("label", STRING, &[N("n")]), info("scores", FLOAT, &[N("n"), S(2)])],
        vec![classifier],
        vec![],
    )
}

#[test]
fn trees_of_two_classes() {
    let plan = compile(classifier_graph(classifier())).unwrap();
    let outputs = run(&plan, &[("x", f32s(&[2, 2], &[9., 0.5, 9., 0.6]))]).unwrap();
    assert_eq!(outputs[0].1.data, TensorData::Strings(vec!["no".into(), "yes".into()]));
    assert_eq!(outputs[1].1.to_f32().unwrap(), [0.75, 0.25, 0.25, 0.75]);
}

#[test]
fn trees_that_are_none_are_refused() {
    let broken = |name: &str, ints: &[i64]| {
        let mut tree = classifier();
        tree.attribute.retain(|attribute| attribute.name != name);
        compile(classifier_graph(tree.ints(name, ints))).map(|_| ()).expect_err(name).kind
    };
    // A cycle, a child that is not there, two parents, a vote for nobody, a negative feature, lists of two lengths.
    for (name, ints) in [
        ("nodes_truenodeids", &[0i64, 0, 0][..]),
        ("nodes_truenodeids", &[7, 0, 0]),
        ("nodes_truenodeids", &[2, 0, 0]),
        ("class_ids", &[0, 5]),
        ("nodes_featureids", &[-1, 0, 0]),
        ("nodes_featureids", &[i64::MAX, 0, 0]),
        ("nodes_nodeids", &[0, 1]),
    ] {
        let kind = broken(name, ints);
        assert!(matches!(kind, InvalidModel | UnsupportedOperator), "{name} {ints:?} {kind:?}");
    }
}

#[test]
fn large_integers_stay_whole() {
    let values = [1i64 << 40, i64::MAX, i64::MIN, -1, u32::MAX as i64 + 1];
    let graph = graph(
        vec![info("x", INT64, &[N("n")])],
        vec![info("y", INT64, &[N("n")]), info("c", INT64, &[S(5)])],
        vec![node("Identity", &["x"], &["y"]), node("Identity", &["k"], &["c"])],
        vec![ints("k", &[5], &values)],
    );
    let outputs = run(&compile(graph).unwrap(), &[("x", i64s(&[5], &values))]).unwrap();
    assert_eq!(outputs[0].1, i64s(&[5], &values));
    assert_eq!(outputs[1].1, i64s(&[5], &values));
}

#[test]
fn casts_to_int64_are_whole() {
    let graph = graph(
        vec![info("x", 11, &[N("n")])],
        vec![info("y", INT64, &[N("n")])],
        vec![node("Cast", &["x"], &["y"]).int("to", 7)],
        vec![],
    );
    let raw = [3e9f64, -5e12, 1.9].iter().flat_map(|value| value.to_le_bytes()).collect();
    let input = HostTensor::new(DType::Float64.into(), vec![3], TensorData::Raw(raw)).unwrap();
    assert_eq!(one(graph, &[("x", input)]), i64s(&[3], &[3_000_000_000, -5_000_000_000_000, 1]));
}

#[test]
fn large_integers_meet_shapes() {
    // x + number of rows.
    let graph = graph(
        vec![info("x", INT64, &[N("n")])],
        vec![info("y", INT64, &[N("n")])],
        vec![node("Size", &["x"], &["rows"]), node("Add", &["x", "rows"], &["y"])],
        vec![],
    );
    assert_eq!(one(graph, &[("x", i64s(&[2], &[1 << 40, -1]))]), i64s(&[2], &[(1 << 40) + 2, 1]));
}

#[test]
fn a_constant_of_shape_is_float32() {
    let graph = graph(
        vec![info("x", FLOAT, &[N("n")])],
        vec![info("y", FLOAT, &[N("n")])],
        vec![node("Shape", &["x"], &["s"]), node("ConstantOfShape", &["s"], &["y"])],
        vec![],
    );
    assert_eq!(one(graph, &[("x", f32s(&[3], &[1.; 3]))]), f32s(&[3], &[0.; 3]));
}

/// Compiling this did not end.
#[test]
fn a_letter_of_one_operand_that_the_output_lacks_is_summed() {
    let weights: Vec<f32> = (0..5 * 3 * 2).map(|n| (n % 7) as f32 - 2.0).collect();
    let x: Vec<f32> = (0..2 * 4 * 5).map(|n| (n % 5) as f32 * 0.5).collect();
    let einsum = node("Einsum", &["x", "w"], &["y"]).text("equation", "bsd, dhe -> bse");
    let made = graph(
        vec![info("x", FLOAT, &[N("batch"), S(4), S(5)])],
        vec![info("y", FLOAT, &[N("batch"), S(4), S(2)])],
        vec![einsum],
        vec![floats("w", &[5, 3, 2], &weights)],
    );
    let plan = compile(made).unwrap();
    let y = run(&plan, &[("x", f32s(&[2, 4, 5], &x))]).unwrap()[0].1.to_f32().unwrap();
    for (place, value) in y.iter().enumerate() {
        let (row, e) = (place / 2, place % 2);
        let sum = |d: usize| (0..3).map(|h| weights[(d * 3 + h) * 2 + e]).sum::<f32>();
        let expected: f32 = (0..5).map(|d| x[row * 5 + d] * sum(d)).sum();
        assert!((value - expected).abs() < 1e-4, "{value} is not {expected}");
    }
}

#[test]
fn shapes_that_go_through_int32_stay_symbolic() {
    let int32 = 6;
    let plan = compile(graph(
        vec![info("x", FLOAT, &[N("batch"), S(2), N("width")])],
        vec![info("y", FLOAT, &[N("batch"), N("all")]), info("count", int32, &[S(1)])],
        vec![
            node("Shape", &["x"], &["s"]),
            node("Cast", &["s"], &["t"]).int("to", int32.into()),
            node("Slice", &["t", "zero", "one", "zero"], &["rows"]),
            node("Cast", &["two"], &["small"]).int("to", int32.into()),
            node("Gather", &["t", "last"], &["width"]),
            node("Mul", &["width", "small"], &["count"]),
            node("Concat", &["rows", "count"], &["u"]).int("axis", 0),
            node("Cast", &["u"], &["v"]).int("to", 7),
            node("Reshape", &["x", "v"], &["y"]),
        ],
        vec![ints("zero", &[1], &[0]), ints("one", &[1], &[1]), ints("two", &[1], &[2]), ints("last", &[1], &[2])],
    ))
    .unwrap();
    assert!(plan.is_general(), "{:?}", plan.doubt());
    for (rows, width) in [(1, 3), (4, 1), (2, 5)] {
        let x: Vec<f32> = (0..rows * 2 * width).map(|value| value as f32).collect();
        let outputs = run(&plan, &[("x", f32s(&[rows, 2, width], &x))]).unwrap();
        assert_eq!(outputs[0].1.shape, [rows, 2 * width]);
        assert_eq!(outputs[0].1.to_f32().unwrap(), x);
        assert_eq!(outputs[1].1.data, TensorData::Raw((2 * width as i32).to_le_bytes().to_vec()));
    }
}

/// tract took "has 50 rows" for never true.
#[test]
fn a_comparison_of_a_size_with_a_number() {
    for (factor, number) in [(1, 50), (3, 75)] {
        let nodes = vec![
            node("Shape", &["x"], &["shape"]),
            node("Gather", &["shape", "first"], &["n"]).int("axis", 0),
            node("Mul", &["n", "factor"], &["rows"]),
            node("Equal", &["rows", "number"], &["e"]),
            node("Cast", &["e"], &["f"]).int("to", 1),
            node("Add", &["x", "f"], &["y"]),
        ];
        let scalars = vec![ints("first", &[], &[0]), ints("factor", &[], &[factor]), ints("number", &[], &[number])];
        let made = graph(
            vec![info("x", FLOAT, &[N("batch"), S(1)])],
            vec![info("y", FLOAT, &[N("batch"), S(1)])],
            nodes,
            scalars,
        );
        let plan = compile(made).unwrap();
        for rows in [1, 25, 49, 50, 51, 75] {
            let y = run(&plan, &[("x", f32s(&[rows, 1], &vec![0.0; rows]))]).unwrap()[0].1.to_f32().unwrap();
            let expected = f32::from(u8::from(rows as i64 * factor == number));
            assert_eq!(y, vec![expected; rows], "{rows} rows");
        }
    }
}
