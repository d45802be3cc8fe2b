//! Graphs whose rows are independent and have to be proven so.

use super::*;

fn random(count: i64) -> Vec<f32> {
    Random::new(count as u64).values(count as usize)
}

fn weights(name: &str, dims: &[i64]) -> TensorProto {
    floats(name, dims, &random(dims.iter().product()))
}

#[test]
fn layers() {
    let dense = vec![
        node("Gemm", &["x", "w", "b"], &["g"]).int("transB", 1),
        node("Relu", &["g"], &["r"]),
        node("Softmax", &["r"], &["y"]).int("axis", -1),
    ];
    independent("dense", of_rows(dense, vec![weights("w", &[5, 4]), weights("b", &[5])]), &[0], &[0]);
    let turned =
        vec![node("Transpose", &["x"], &["t"]), node("Mul", &["t", "c"], &["m"]), node("Transpose", &["m"], &["y"])];
    independent("turned twice", of_rows(turned, vec![weights("c", &[4, 1])]), &[0], &[0]);
    let once = vec![node("Transpose", &["x"], &["t"]), node("Add", &["t", "c"], &["y"])];
    independent("turned", of_rows(once, vec![weights("c", &[4, 1])]), &[0], &[1]);
    let normal = vec![
        node("BatchNormalization", &["x", "a", "b", "b", "v"], &["n"]),
        node("ReduceMean", &["n"], &["m"]).ints("axes", &[1]),
        node("Sub", &["n", "m"], &["y"]),
    ];
    let constants = vec![weights("a", &[4]), weights("b", &[4]), floats("v", &[4], &[1., 2., 3., 4.])];
    independent("normalised", of_rows(normal, constants), &[0], &[0]);
    let layer = vec![node("LayerNormalization", &["x", "a"], &["n"]), node("Gelu", &["n"], &["y"])];
    let mut newer = model(of_rows(layer, vec![weights("a", &[4])]));
    newer.opset_import[0].version = 20;
    assert!(compile_with(newer, &CompileOptions::default()).unwrap().rows().are_independent());
    let picture = vec![
        node("Conv", &["x", "w"], &["c"]).ints("pads", &[1; 4]),
        node("InstanceNormalization", &["c", "one", "zero"], &["i"]),
        node("MaxPool", &["i"], &["m"]).ints("kernel_shape", &[2, 2]).ints("strides", &[2, 2]),
        node("GlobalAveragePool", &["m"], &["a"]),
        node("Flatten", &["a"], &["y"]),
    ];
    let constants = vec![weights("w", &[6, 2, 3, 3]), floats("one", &[6], &[1.; 6]), floats("zero", &[6], &[0.; 6])];
    independent("pictures", of(&[N("n"), S(2), S(8), S(8)], picture, constants), &[0], &[0]);
    let resized = vec![node("Resize", &["x", "", "scales"], &["y"]).text("mode", "linear")];
    let scales = vec![floats("scales", &[4], &[1., 1., 2., 2.])];
    independent("resized", of(&[N("n"), S(2), S(3), S(3)], resized, scales), &[0], &[0]);
}

/// Attention as exporters write it, with shapes that are computed.
#[test]
fn attention() {
    let (heads, width) = (2, 4);
    let mut nodes = vec![
        node("Shape", &["x"], &["shape"]),
        node("Gather", &["shape", "zero"], &["n"]).int("axis", 0),
        node("Gather", &["shape", "one"], &["t"]).int("axis", 0),
        node("Unsqueeze", &["n", "axis"], &["n1"]),
        node("Unsqueeze", &["t", "axis"], &["t1"]),
        node("Concat", &["n1", "t1", "heads", "size"], &["split"]).int("axis", 0),
        node("Concat", &["n1", "t1", "width"], &["joined"]).int("axis", 0),
    ];
    for part in ["q", "k", "v"] {
        let name = |suffix: &str| format!("{part}{suffix}");
        let (weights, product, parts, heads) = (name("w"), name("p"), name("s"), name("h"));
        nodes.push(node("MatMul", &["x", &weights], &[&product]));
        nodes.push(node("Reshape", &[&product, "split"], &[&parts]));
        let perm: &[i64] = if part == "k" { &[0, 2, 3, 1] } else { &[0, 2, 1, 3] };
        nodes.push(node("Transpose", &[&parts], &[&heads]).ints("perm", perm));
    }
    nodes.extend([
        node("MatMul", &["qh", "kh"], &["scores"]),
        node("Unsqueeze", &["mask", "axes"], &["m"]),
        node("Add", &["scores", "m"], &["masked"]),
        node("Softmax", &["masked"], &["probable"]).int("axis", -1),
        node("MatMul", &["probable", "vh"], &["context"]),
        node("Transpose", &["context"], &["c"]).ints("perm", &[0, 2, 1, 3]),
        node("Reshape", &["c", "joined"], &["j"]),
        node("Add", &["x", "j"], &["y"]),
    ]);
    let constants = vec![
        ints("zero", &[], &[0]),
        ints("one", &[], &[1]),
        ints("axis", &[1], &[0]),
        ints("axes", &[2], &[1, 2]),
        ints("heads", &[1], &[heads]),
        ints("size", &[1], &[width / heads]),
        ints("width", &[1], &[width]),
        weights("qw", &[width, width]),
        weights("kw", &[width, width]),
        weights("vw", &[width, width]),
    ];
    let shape = [N("batch"), N("sequence"), S(width)];
    let made = graph(
        vec![info("x", FLOAT, &shape), info("mask", FLOAT, &shape[..2])],
        vec![info("y", FLOAT, &shape)],
        nodes,
        constants,
    );
    independent("attention", made.clone(), &[0, 0], &[0]);
    let plan = compile(made).unwrap();
    let Rows::Independent { dimension, others, every_size, .. } = plan.rows() else { panic!() };
    assert_eq!((dimension.as_str(), &others[..], *every_size), ("batch", &[(0, 1), (1, 1)][..], true));
    // Three projections, and two products of heads: 2 t width (3 width + 2 t) and the softmax's divisions.
    let (narrow, wide) = (plan.flops_per_row(1).unwrap(), plan.flops_per_row(64).unwrap());
    assert!((110.0..200.0).contains(&narrow) && (70_000.0..110_000.0).contains(&wide), "{narrow} {wide}");
}

#[test]
fn sequences_and_embeddings() {
    for (operator, gates) in [("LSTM", 4), ("GRU", 3), ("RNN", 1)] {
        let recurrent = vec![node(operator, &["x", "w", "r", "", "", "h"], &["sequence", "y"]).int("hidden_size", 3)];
        let made = graph(
            vec![info("x", FLOAT, &[N("time"), N("batch"), S(4)]), info("h", FLOAT, &[S(1), N("batch"), S(3)])],
            vec![info("sequence", FLOAT, &[]), info("y", FLOAT, &[])],
            recurrent,
            vec![weights("w", &[1, 3 * gates, 4]), weights("r", &[1, 3 * gates, 3])],
        );
        independent(operator, made, &[1, 1], &[2, 1]);
    }
    let embedded = vec![
        node("Gather", &["table", "ids"], &["e"]).int("axis", 0),
        node("ReduceSum", &["e", "one"], &["y"]).int("keepdims", 0),
    ];
    let made = graph(
        vec![info("ids", INT64, &[N("n"), N("t")])],
        vec![info("y", FLOAT, &[])],
        embedded,
        vec![weights("table", &[4, 6]), ints("one", &[1], &[1])],
    );
    independent("embeddings", made, &[0], &[0]);
}

#[test]
fn columns_and_shapes() {
    let to = |name: &str, sizes: &[i64]| ints(name, &[sizes.len() as i64], sizes);
    let columns = vec![
        node("Slice", &["x", "from", "to", "axis"], &["s"]),
        node("Gather", &["x", "some"], &["g"]).int("axis", 1),
        node("Concat", &["s", "g", "x"], &["c"]).int("axis", -1),
        node("Pad", &["c", "pads"], &["p"]),
        node("CumSum", &["p", "last"], &["y"]),
    ];
    let constants = vec![
        to("from", &[1]),
        to("to", &[3]),
        to("axis", &[1]),
        to("some", &[3, 0]),
        to("pads", &[0, 1, 0, 1]),
        ints("last", &[], &[1]),
    ];
    independent("columns", of_rows(columns, constants), &[0], &[0]);
    let whole = vec![node("Slice", &["x", "from", "to", "axis"], &["y"])];
    let constants = vec![to("from", &[0, 0]), to("to", &[i64::MAX, 2]), to("axis", &[0, 1])];
    independent("whole rows", of_rows(whole, constants), &[0], &[0]);
    let spread = vec![
        node("Reshape", &["x", "flat"], &["f"]),
        node("MatMul", &["f", "w"], &["m"]),
        node("Reshape", &["m", "back"], &["b"]),
        node("Squeeze", &["b", "one"], &["y"]),
    ];
    let constants = vec![to("flat", &[-1, 4]), weights("w", &[4, 4]), to("back", &[-1, 1, 3, 4]), to("one", &[1])];
    independent("flat and back", of(&[N("n"), S(3), S(4)], spread, constants), &[0], &[0]);
    let filled = vec![
        node("Shape", &["x"], &["s"]),
        node("ConstantOfShape", &["s"], &["z"]),
        node("Greater", &["x", "zero"], &["positive"]),
        node("Where", &["positive", "x", "z"], &["y"]),
    ];
    independent("filled", of_rows(filled, vec![floats("zero", &[], &[0.])]), &[0], &[0]);
    let columns = |ranks: [&'static str; 2], operator: NodeProto| {
        let column = |name: &str, rank| info(name, FLOAT, &[N(rank), S(2)]);
        let inputs = vec![column("a", ranks[0]), column("b", ranks[1])];
        graph(inputs, vec![info("y", FLOAT, &[])], vec![operator], vec![])
    };
    // Each column has a dimension of its own, as exports of data frames have.
    independent(
        "columns of a frame",
        columns(["n", "m"], node("Concat", &["a", "b"], &["y"]).int("axis", 1)),
        &[0, 0],
        &[0],
    );
    let two = node("Einsum", &["a", "b"], &["y"]).text("equation", "nc,mc->nm");
    dependent("all pairs", columns(["n", "m"], two), "");
    let top = vec![node("TopK", &["x", "two"], &["y", "places"]), node("Cast", &["places"], &["p"]).int("to", 1)];
    let mut made = of_rows(top, vec![to("two", &[2])]);
    made.output.push(info("p", FLOAT, &[]));
    independent("top", made, &[0], &[0, 0]);
}
