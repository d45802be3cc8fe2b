//! What is refused at compile, and what a stranger's model cannot do.

use super::*;

fn refusal(graph: GraphProto) -> ModelError {
    let text = format!("{:?} {:?}", graph.node.first().map(|node| &node.op_type), graph.initializer);
    compile(graph).map(|_| ()).expect_err(&text)
}

fn through(operators: Vec<NodeProto>, constants: Vec<TensorProto>) -> GraphProto {
    graph(vec![info("x", FLOAT, &[N("n")])], vec![info("y", FLOAT, &[N("m")])], operators, constants)
}

#[test]
fn operators_are_named_with_domain_and_opset() {
    let error = refusal(through(vec![node("Det", &["x"], &["y"])], vec![]));
    assert_eq!(error.kind, UnsupportedOperator);
    assert_eq!(error.message, "operator Det is not supported (domain ai.onnx, opset 17)");
    assert!(error.hint.is_some() && error.detail.unwrap().contains("\"y\""));
    // The name of a known operator in another domain is another operator.
    let mut foreign = node("Add", &["x", "x"], &["y"]);
    foreign.domain = "com.example".into();
    assert_eq!(refusal(through(vec![foreign], vec![])).message, "operator Add is not supported (domain com.example)");
    let inner = graph(vec![], vec![info("o", FLOAT, &[])], vec![node("Det", &["x"], &["o"])], vec![]);
    let branches = node("If", &["c"], &["y"]).graph("then_branch", inner.clone()).graph("else_branch", inner);
    assert_eq!(refusal(through(vec![branches], vec![])).kind, UnsupportedOperator);
}

#[test]
fn what_tract_ignores_is_refused() {
    let lstm = || node("LSTM", &["x", "w", "r"], &["y"]).int("hidden_size", 1);
    for node in [
        lstm().texts("activations", &["Sigmoid", "Relu", "Tanh"]),
        lstm().float("clip", 1.0),
        lstm().int("input_forget", 1),
        node("BatchNormalization", &["x", "a", "b", "c", "d"], &["y"]).int("training_mode", 1),
        node("SpaceToDepth", &["x"], &["y"]).int("blocksize", 2).text("mode", "CRD"),
        node("QuantizeLinear", &["x", "s"], &["y"]).int("output_dtype", 3),
        node("QuantizeLinear", &["x", "s"], &["y"]).int("block_size", 2),
        node("Pad", &["x", "p"], &["y"]).text("mode", "wrap"),
    ] {
        let error = refusal(through(vec![node.clone()], vec![floats("s", &[], &[1.]), ints("p", &[2], &[1, 1])]));
        assert_eq!(error.kind, UnsupportedOperator, "{node:?}: {error:?}");
        assert!(error.message.contains(&node.op_type) && error.message.contains("opset 17"), "{}", error.message);
    }
    let usual = lstm().texts("activations", &["sigmoid", "TANH", "Tanh"]);
    assert!(refusals::check(&model(through(vec![usual], vec![]))).is_ok());
}

#[test]
fn opsets_beyond_what_is_known_are_refused() {
    let with = |domain: &str, version: i64| {
        let mut model = model(product());
        model.opset_import = vec![OperatorSetIdProto { domain: domain.into(), version }];
        compile_with(model, &CompileOptions::default()).map(|_| ()).map_err(|error| error.kind)
    };
    assert_eq!(with("", refusals::NEWEST_OPSET), Ok(()));
    assert_eq!(with("ai.onnx", 13), Ok(()));
    for (domain, version) in [("", refusals::NEWEST_OPSET + 1), ("", 0), ("", -1), ("ai.onnx.ml", 99), ("other", 1)] {
        assert_eq!(with(domain, version), Err(UnsupportedOpset), "{domain} {version}");
    }
    let mut none = model(product());
    none.opset_import.clear();
    assert_eq!(compile_with(none, &CompileOptions::default()).unwrap_err().kind, UnsupportedOpset);
}

#[test]
fn types_that_cannot_be_computed_with_are_refused() {
    let (bfloat16, int4) = (16, 22);
    let graph_of = |elem_type| {
        graph(
            vec![info("x", elem_type, &[S(2)])],
            vec![info("y", elem_type, &[S(2)])],
            vec![node("Identity", &["x"], &["y"])],
            vec![],
        )
    };
    let error = refusal(graph_of(bfloat16));
    assert_eq!(error.kind, UnsupportedType);
    assert!(error.message.contains("\"x\"") && error.message.contains("bfloat16"), "{}", error.message);
    let mut tensor = floats("w", &[2], &[]);
    tensor.data_type = int4;
    tensor.int32_data = vec![0x21];
    let error = refusal(through(vec![node("Cast", &["w"], &["y"]).int("to", 1)], vec![tensor]));
    assert_eq!(error.kind, UnsupportedType);
    let mut sequence = product();
    sequence.input[0].r#type = Some(TypeProto { denotation: String::new(), value: None });
    assert_eq!(refusal(sequence).kind, UnsupportedType);
}

#[test]
fn contradictions_are_errors() {
    let plain = || vec![node("Identity", &["x"], &["y"])];
    let kind = |graph| refusal(graph).kind;
    assert_eq!(kind(through(vec![node("Identity", &["nobody"], &["y"])], vec![])), InvalidModel);
    assert_eq!(kind(through(vec![node("Identity", &["x"], &["z"])], vec![])), InvalidModel);
    assert_eq!(kind(through(vec![node("Add", &["x"], &["y"])], vec![])), InvalidModel, "however it is shaped");
    assert_eq!(kind(through(plain(), vec![floats("w", &[3], &[1.])])), InvalidModel);
    assert_eq!(kind(through(plain(), vec![floats("w", &[-1], &[])])), InvalidModel);
    assert_eq!(kind(through(plain(), vec![floats("", &[0], &[])])), InvalidModel);
    assert_eq!(kind(through(plain(), vec![floats("w", &[0], &[]), floats("w", &[0], &[])])), InvalidModel);
    assert_eq!(kind(through(plain(), vec![floats("w", &[i64::MAX, 4], &[])])), TooLarge);
    let cycle =
        vec![node("Add", &["x", "b"], &["a"]), node("Add", &["a", "x"], &["b"]), node("Identity", &["b"], &["y"])];
    assert_eq!(kind(through(cycle, vec![])), InvalidModel);
    assert_eq!(Plan::compile(b"", &mut |_, _| Ok(()), &CompileOptions::default()).unwrap_err().kind, NotOnnx);
    assert_eq!(Plan::compile(b"\xff\xff", &mut |_, _| Ok(()), &CompileOptions::default()).unwrap_err().kind, NotOnnx);
}

#[test]
fn a_small_model_cannot_make_a_large_constant() {
    let huge = 1i64 << 40;
    let constant = |shape: &[i64]| ints("s", &[shape.len() as i64], shape);
    for graph in [
        through(vec![node("ConstantOfShape", &["s"], &["y"])], vec![constant(&[huge])]),
        through(vec![node("ConstantOfShape", &["s"], &["y"])], vec![constant(&[1 << 31, 1 << 31, 1 << 31])]),
        through(vec![node("Expand", &["w", "s"], &["y"])], vec![floats("w", &[1], &[1.]), constant(&[huge])]),
        through(vec![node("Tile", &["w", "s"], &["y"])], vec![floats("w", &[1], &[1.]), constant(&[huge])]),
        through(
            vec![node("Range", &["a", "b", "c"], &["r"]), node("Cast", &["r"], &["y"]).int("to", 1)],
            vec![ints("a", &[], &[0]), ints("b", &[], &[huge]), ints("c", &[], &[1])],
        ),
        through(vec![node("Pad", &["w", "p"], &["y"])], vec![floats("w", &[1], &[1.]), ints("p", &[2], &[0, huge])]),
        through(
            vec![node("OneHot", &["i", "d", "v"], &["y"])],
            vec![ints("i", &[1], &[0]), ints("d", &[], &[huge]), floats("v", &[2], &[0., 1.])],
        ),
        // Two vectors that are small become a matrix that is not.
        through(
            vec![
                node("ConstantOfShape", &["s"], &["a"]),
                node("Reshape", &["a", "column"], &["c"]),
                node("Add", &["a", "c"], &["y"]),
            ],
            vec![constant(&[900_000]), ints("column", &[2], &[-1, 1])],
        ),
    ] {
        let (operator, constants) = (graph.node[0].op_type.clone(), graph.initializer.clone());
        let outcome = compile(graph);
        match outcome {
            // tract gives some of these no meaning before they run; then the run is refused.
            Ok(plan) => {
                let error = run(&plan, &[("x", f32s(&[1], &[1.]))]).unwrap_err();
                assert_eq!(error.kind, TooLarge, "{operator} {constants:?}: {error:?}");
            }
            Err(error) => {
                assert!(matches!(error.kind, TooLarge | InvalidModel | UnsupportedOperator), "{operator}: {error:?}");
            }
        }
    }
}

#[test]
fn a_run_beyond_the_limit_is_refused_before_it_starts() {
    let options = CompileOptions { memory_limit: 1 << 20, ..Default::default() };
    let outer = graph(
        vec![info("x", FLOAT, &[N("n"), S(1)]), info("z", FLOAT, &[S(1), N("m")])],
        vec![info("y", FLOAT, &[N("n"), N("m")])],
        vec![node("Add", &["x", "z"], &["y"])],
        vec![],
    );
    let plan = compile_with(model(outer), &options).unwrap();
    let inputs = |size: usize| [("x", f32s(&[size, 1], &vec![1.; size])), ("z", f32s(&[1, size], &vec![1.; size]))];
    assert!(run(&plan, &inputs(100)).is_ok());
    let error = run(&plan, &inputs(1000)).unwrap_err();
    assert_eq!(error.kind, TooLarge);
    assert!(error.detail.unwrap().contains("1048576") && error.hint.is_some());
    // A size that the data decide.
    let range = graph(
        vec![info("end", INT64, &[])],
        vec![info("y", INT64, &[N("m")])],
        vec![node("Range", &["a", "end", "c"], &["y"])],
        vec![ints("a", &[], &[0]), ints("c", &[], &[1])],
    );
    let plan = compile_with(model(range), &options).unwrap();
    assert_eq!(run(&plan, &[("end", i64s(&[], &[3]))]).unwrap()[0].1, i64s(&[3], &[0, 1, 2]));
    for end in [1 << 40, i64::MAX] {
        assert_eq!(run(&plan, &[("end", i64s(&[], &[end]))]).unwrap_err().kind, TooLarge);
    }
}

#[test]
fn a_panic_of_the_engine_is_an_error() {
    // An index out of range makes tract's OneHot panic.
    let plan = compile(graph(
        vec![info("i", INT64, &[N("n")])],
        vec![info("y", FLOAT, &[N("n"), S(3)])],
        vec![node("OneHot", &["i", "d", "v"], &["y"])],
        vec![ints("d", &[], &[3]), floats("v", &[2], &[0., 1.])],
    ))
    .unwrap();
    assert!(run(&plan, &[("i", i64s(&[1], &[2]))]).is_ok());
    let error = run(&plan, &[("i", i64s(&[1], &[99]))]).unwrap_err();
    assert_eq!(error.kind, InvalidInput);
    assert!(error.hint.is_some());
    assert!(run(&plan, &[("i", i64s(&[1], &[2]))]).is_ok(), "the plan lives on");
}

#[test]
fn a_deep_graph_does_not_exhaust_the_stack() {
    let count = 3000;
    let names: Vec<String> =
        (0..=count).map(|place| if place == 0 { "x".into() } else { format!("v{place}") }).collect();
    let mut nodes: Vec<NodeProto> =
        (0..count).map(|place| node("Abs", &[&names[place]], &[&names[place + 1]])).collect();
    nodes.push(node("Neg", &[&names[count]], &["y"]));
    let plan = compile(through(nodes, vec![])).unwrap();
    assert_eq!(run(&plan, &[("x", f32s(&[2], &[-1., 2.]))]).unwrap()[0].1.to_f32().unwrap(), [-1., -2.]);
}

#[test]
fn absurd_attributes_are_refused_before_they_are_used() {
    let huge = 1i64 << 40;
    for node in [
        node("Transpose", &["x"], &["y"]).ints("perm", &[1, 1]),
        node("LayerNormalization", &["x", "x"], &["y"]).int("axis", huge),
        node("ReduceSum", &["x"], &["y"]).ints("axes", &[huge]),
        node("MaxPool", &["x"], &["y"]).ints("kernel_shape", &[huge, 1]),
        node("AveragePool", &["x"], &["y"]).ints("kernel_shape", &[1 << 20, 1 << 20]),
        node("Conv", &["x", "x"], &["y"]).int("group", huge),
        node("Scan", &["x"], &["y"]).int("num_scan_inputs", huge),
    ] {
        let kind = refusals::check(&model(through(vec![node.clone()], vec![]))).unwrap_err().kind;
        assert!(matches!(kind, TooLarge | InvalidModel), "{node:?}");
    }
}

#[test]
fn more_than_there_are_cannot_be_taken() {
    let plan = compile(graph(
        vec![info("x", FLOAT, &[N("n")]), info("k", INT64, &[S(1)])],
        vec![info("v", FLOAT, &[N("m")]), info("i", INT64, &[N("m")])],
        vec![node("TopK", &["x", "k"], &["v", "i"])],
        vec![],
    ))
    .unwrap();
    let top = |count: i64| run(&plan, &[("x", f32s(&[3], &[1., 3., 2.])), ("k", i64s(&[1], &[count]))]);
    assert_eq!(top(2).unwrap()[0].1.to_f32().unwrap(), [3., 2.]);
    for count in [4, i64::from(i32::MAX), i64::MAX, -1] {
        assert!(top(count).is_err(), "{count}");
    }
}

#[test]
fn failing_leaves_nothing_behind() {
    let resident = || {
        let status = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
        status.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0) * 4096
    };
    let plan = compile(product()).unwrap();
    let fail = |times: usize| {
        for _ in 0..times {
            assert!(run(&plan, &[("x", f32s(&[1, 3], &[0.; 3]))]).is_err());
            assert!(compile(through(vec![node("Add", &["x"], &["y"])], vec![])).is_err());
            assert!(compile(through(vec![node("Det", &["x"], &["y"])], vec![])).is_err());
        }
    };
    fail(50);
    let before = resident();
    fail(400);
    let grown = resident().saturating_sub(before);
    assert!(grown < 16 << 20, "{grown} bytes more after 400 failures");
}

#[test]
fn a_convolution_that_reaches_far_is_refused_before_it_takes_memory() {
    let far = 1 << 20;
    let graph = graph(
        vec![info("x", FLOAT, &[S(1), S(3), N("height"), S(8)])],
        vec![info("y", FLOAT, &[S(1), S(2), N("height"), S(8)])],
        vec![node("Conv", &["x", "w"], &["y"]).ints("dilations", &[far; 2]).ints("pads", &[far, far, 0, 0])],
        vec![floats("w", &[2, 3, 2, 2], &[0.5; 24])],
    );
    let made = run(&compile(graph).unwrap(), &[("x", f32s(&[1, 3, 8, 8], &[1.0; 192]))]);
    assert_eq!(made.unwrap_err().kind, TooLarge);
}
