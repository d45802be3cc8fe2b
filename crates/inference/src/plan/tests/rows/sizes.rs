//! Graphs that are not known before the sizes of their inputs.

use super::*;

/// Removes an axis whose size is 1 for up to 48 steps.
fn squeezed() -> GraphProto {
    let nodes = vec![
        node("MaxPool", &["x"], &["p"]).ints("kernel_shape", &[1]).ints("strides", &[48]),
        node("Squeeze", &["p", "last"], &["s"]),
        node("MatMul", &["s", "w"], &["y"]),
    ];
    of(&[N("n"), S(2), N("t")], nodes, vec![ints("last", &[1], &[2]), floats("w", &[2, 2], &[1., 2., 3., 4.])])
}

#[test]
fn a_verdict_for_likely_sizes_is_proven_anew_for_others() {
    let plan = compile(squeezed()).unwrap();
    let Rows::Independent { inputs, outputs, others, every_size, .. } = plan.rows() else {
        panic!("{:?}", plan.rows());
    };
    assert_eq!((&inputs[..], &outputs[..], &others[..], *every_size), (&[0][..], &[0][..], &[(0, 2)][..], false));
    compare(&plan, &mut Random::new(1), "squeezed");
    let cancel = AtomicBool::new(false);
    for _ in 0..2 {
        assert!(plan.rows_at(&[vec![7, 2, 48]], &cancel).are_independent());
        assert!(!plan.rows_at(&[vec![7, 2, 49]], &cancel).are_independent());
    }
}

/// Shapes in int32, as TensorFlow writes them, with ends of slices that mean all.
#[test]
fn shapes_in_int32() {
    let nodes = |end: i64| {
        let nodes = vec![
            node("Shape", &["x"], &["s"]),
            node("Cast", &["s"], &["narrow"]).int("to", 6),
            node("Slice", &["narrow", "from", "one", "from"], &["n"]),
            node("Concat", &["n", "half"], &["c"]).int("axis", 0),
            node("Cast", &["c"], &["wide"]).int("to", 7),
            node("Reshape", &["x", "wide"], &["r"]),
            node("Slice", &["r", "from", "end", "from"], &["y"]),
        ];
        let one = |name: &str, value: i64| ints(name, &[1], &[value]);
        let half = TensorProto { data_type: 6, int32_data: vec![2, 2], int64_data: vec![], ..ints("half", &[2], &[]) };
        of_rows(nodes, vec![one("from", 0), one("one", 1), one("end", end), half])
    };
    independent("ends behind all", nodes(1_000_000_000), &[0], &[0]);
    let plan = compile(nodes(5)).unwrap();
    assert!(!plan.rows().are_independent(), "an end within the rows");
}

/// Where the number of rows is compared, the graph that was followed need not be that of another number.
#[test]
fn a_comparison_with_the_number_of_rows() {
    let mut made = squeezed();
    let cast = |from: &str, to: &str, code| node("Cast", &[from], &[to]).int("to", code);
    made.node[2] = node("MatMul", &["s", "w"], &["m"]);
    made.node.extend([
        node("Shape", &["x"], &["shape"]),
        node("Gather", &["shape", "first"], &["rows"]).int("axis", 0),
        node("Equal", &["rows", "fifty"], &["e"]),
        cast("e", "f", 1),
        node("Add", &["m", "f"], &["y"]),
    ]);
    made.initializer.extend([ints("first", &[], &[0]), ints("fifty", &[], &[50])]);
    dependent("fifty rows", made, "depends on the size of a free dimension");
}
