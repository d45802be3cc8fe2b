//! Plans of small models that are built here.

use super::*;
use crate::error::ErrorKind::*;
use crate::signature::PortType;
use crate::tensor::TensorData;
use tensor_blocks::DType;
use tract_onnx::pb::tensor_shape_proto::{Dimension, dimension};
use tract_onnx::pb::*;

mod attention;
mod company;
mod layers;
mod numbers;
mod products;
mod refused;
mod rows;
mod sliced;
mod spilled;
mod transposed;

/// A dimension: a size, or a name.
#[derive(Clone, Copy)]
enum D {
    S(i64),
    N(&'static str),
}
use D::{N, S};

const FLOAT: i32 = 1;
const INT64: i32 = 7;
const STRING: i32 = 8;
const BOOL: i32 = 9;

fn info(name: &str, elem_type: i32, dims: &[D]) -> ValueInfoProto {
    let value = |dim: &D| match dim {
        S(size) => dimension::Value::DimValue(*size),
        N(name) => dimension::Value::DimParam((*name).into()),
    };
    let dim = dims.iter().map(|dim| Dimension { denotation: String::new(), value: Some(value(dim)) }).collect();
    let tensor = type_proto::Tensor { elem_type, shape: Some(TensorShapeProto { dim }) };
    let r#type = TypeProto { denotation: String::new(), value: Some(type_proto::Value::TensorType(tensor)) };
    ValueInfoProto { name: name.into(), r#type: Some(r#type), doc_string: String::new() }
}

fn node(op_type: &str, inputs: &[&str], outputs: &[&str]) -> NodeProto {
    let strings = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
    NodeProto { op_type: op_type.into(), input: strings(inputs), output: strings(outputs), ..Default::default() }
}

trait With: Sized {
    fn with(self, attribute: AttributeProto) -> Self;

    fn int(self, name: &str, i: i64) -> Self {
        self.with(AttributeProto { name: name.into(), r#type: 2, i, ..Default::default() })
    }
    fn float(self, name: &str, f: f32) -> Self {
        self.with(AttributeProto { name: name.into(), r#type: 1, f, ..Default::default() })
    }
    fn text(self, name: &str, s: &str) -> Self {
        self.with(AttributeProto { name: name.into(), r#type: 3, s: s.into(), ..Default::default() })
    }
    fn ints(self, name: &str, ints: &[i64]) -> Self {
        self.with(AttributeProto { name: name.into(), r#type: 7, ints: ints.to_vec(), ..Default::default() })
    }
    fn floats(self, name: &str, floats: &[f32]) -> Self {
        self.with(AttributeProto { name: name.into(), r#type: 6, floats: floats.to_vec(), ..Default::default() })
    }
    fn texts(self, name: &str, texts: &[&str]) -> Self {
        let strings = texts.iter().map(|text| text.as_bytes().to_vec()).collect();
        self.with(AttributeProto { name: name.into(), r#type: 8, strings, ..Default::default() })
    }
    fn graph(self, name: &str, g: GraphProto) -> Self {
        self.with(AttributeProto { name: name.into(), r#type: 5, g: Some(g), ..Default::default() })
    }
}

impl With for NodeProto {
    fn with(mut self, attribute: AttributeProto) -> NodeProto {
        self.attribute.push(attribute);
        self
    }
}

fn floats(name: &str, dims: &[i64], values: &[f32]) -> TensorProto {
    let raw_data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    TensorProto { name: name.into(), dims: dims.to_vec(), data_type: FLOAT, raw_data, ..Default::default() }
}

fn ints(name: &str, dims: &[i64], values: &[i64]) -> TensorProto {
    // In the typed field, as small tensors often are.
    let int64_data = values.to_vec();
    TensorProto { name: name.into(), dims: dims.to_vec(), data_type: INT64, int64_data, ..Default::default() }
}

fn graph(
    inputs: Vec<ValueInfoProto>,
    outputs: Vec<ValueInfoProto>,
    node: Vec<NodeProto>,
    initializer: Vec<TensorProto>,
) -> GraphProto {
    GraphProto { name: "g".into(), input: inputs, output: outputs, node, initializer, ..Default::default() }
}

fn model(graph: GraphProto) -> ModelProto {
    let opset = |domain: &str, version| OperatorSetIdProto { domain: domain.into(), version };
    let opset_import = vec![opset("", 17), opset("ai.onnx.ml", 3), opset("com.microsoft", 1)];
    ModelProto { ir_version: 8, opset_import, graph: Some(graph), ..Default::default() }
}

/// Every tensor inline.
const NO_BLOCKS: prepare::Blocks<'static> = prepare::Blocks { tilings: &[], inline: &BTreeSet::new() };

fn compile_with(model: ModelProto, options: &CompileOptions) -> Result<Plan, ModelError> {
    let mut none = |_: u32, _: &mut Vec<u8>| Err(ModelError::internal("no tensor is stored"));
    Plan::compile_prepared(prepare::prepare_model(model, &mut none, NO_BLOCKS, options)?, options, &mut || false)
}

fn compile(graph: GraphProto) -> Result<Plan, ModelError> {
    compile_with(model(graph), &CompileOptions::default())
}

fn run(plan: &Plan, inputs: &[(&str, HostTensor)]) -> Result<Vec<(String, HostTensor)>, ModelError> {
    let inputs = inputs.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.clone())).collect();
    plan.run(inputs, &AtomicBool::new(false))
}

fn f32s(shape: &[usize], values: &[f32]) -> HostTensor {
    HostTensor::from_f32(shape, values).unwrap()
}

fn i64s(shape: &[usize], values: &[i64]) -> HostTensor {
    let raw = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    HostTensor::new(DType::Int64.into(), shape.to_vec(), TensorData::Raw(raw)).unwrap()
}

/// y = x W with W = [[1, 2, 3], [4, 5, 6]].
fn product() -> GraphProto {
    graph(
        vec![info("x", FLOAT, &[N("batch"), S(2)])],
        vec![info("y", FLOAT, &[N("batch"), S(3)])],
        vec![node("MatMul", &["x", "w"], &["y"])],
        vec![floats("w", &[2, 3], &[1., 2., 3., 4., 5., 6.])],
    )
}

#[test]
fn one_compiled_form_serves_every_batch() {
    let plan = compile(product()).unwrap();
    assert!(plan.is_general() && plan.batch_is_free() && plan.doubt().is_none());
    for rows in [1usize, 7, 64] {
        let input: Vec<f32> = (0..rows * 2).map(|value| value as f32).collect();
        let outputs = run(&plan, &[("x", f32s(&[rows, 2], &input))]).unwrap();
        assert_eq!(outputs[0].0, "y");
        assert_eq!(outputs[0].1.shape, [rows, 3]);
        let last = &outputs[0].1.to_f32().unwrap()[rows * 3 - 3..];
        let (a, b) = (input[rows * 2 - 2], input[rows * 2 - 1]);
        assert_eq!(last, [a + 4. * b, 2. * a + 5. * b, 3. * a + 6. * b]);
    }
    assert_eq!(run(&plan, &[("x", f32s(&[0, 2], &[]))]).unwrap()[0].1.shape, [0, 3]);
    assert_eq!(plan.flops_per_row(1), Some(12.0));
    assert!(plan.memory_bytes() >= 24);
    assert!(!plan.is_heavy(&[("x".into(), f32s(&[1, 2], &[0., 0.]))]));
}

#[test]
fn outputs_keep_the_order_of_the_graph() {
    let plan = compile(graph(
        vec![info("b", FLOAT, &[S(1)]), info("a", FLOAT, &[S(1)])],
        vec![info("second", FLOAT, &[S(1)]), info("first", FLOAT, &[S(1)]), info("a", FLOAT, &[S(1)])],
        vec![node("Add", &["a", "b"], &["first"]), node("Sub", &["a", "b"], &["second"])],
        vec![],
    ))
    .unwrap();
    let outputs = run(&plan, &[("a", f32s(&[1], &[5.])), ("b", f32s(&[1], &[2.]))]).unwrap();
    let got: Vec<_> = outputs.iter().map(|(name, tensor)| (name.as_str(), tensor.to_f32().unwrap()[0])).collect();
    assert_eq!(got, [("second", 3.), ("first", 7.), ("a", 5.)]);
}

#[test]
fn misfitting_inputs_are_named() {
    let plan = compile(graph(
        vec![info("x", FLOAT, &[N("n"), S(2)]), info("z", FLOAT, &[N("n"), S(2)])],
        vec![info("y", FLOAT, &[N("n"), S(2)])],
        vec![node("Add", &["x", "z"], &["y"])],
        vec![],
    ))
    .unwrap();
    let good = || f32s(&[1, 2], &[1., 2.]);
    let check = |inputs: &[(&str, HostTensor)], kind: ErrorKind, message: &str| {
        let error = run(&plan, inputs).unwrap_err();
        assert_eq!((error.kind, error.message.as_str()), (kind, message));
    };
    check(&[("x", good())], MissingInput, "input \"z\" is missing");
    check(&[("x", good()), ("z", good()), ("q", good())], UnknownInput, "the model has no input \"q\"");
    check(&[("x", good()), ("x", good())], InvalidInput, "input \"x\" is given twice");
    check(&[("x", good()), ("z", i64s(&[1, 2], &[1, 2]))], InvalidInput, "input \"z\" takes float32, not int64");
    let flat = f32s(&[2], &[1., 2.]);
    check(&[("x", good()), ("z", flat)], InvalidInput, "input \"z\" has 2 dimensions, not 1");
    let wide = f32s(&[1, 3], &[0.; 3]);
    check(&[("x", good()), ("z", wide)], InvalidInput, "dimension 1 of input \"z\" must be 2, not 3");
    let rows = f32s(&[2, 2], &[0.; 4]);
    check(&[("x", good()), ("z", rows)], InvalidInput, "dimension 0 of input \"z\" must be 1, not 2");
    let lying = HostTensor { dtype: DType::Float32.into(), shape: vec![1, 2], data: TensorData::Raw(vec![0; 7]) };
    assert_eq!(run(&plan, &[("x", good()), ("z", lying)]).unwrap_err().kind, InvalidInput);
    let hint = run(&plan, &[]).unwrap_err().hint.unwrap();
    assert!(hint.contains("\"x\" float32[n, 2]") && hint.contains("\"z\""), "{hint}");
}

#[test]
fn a_set_flag_cancels() {
    let plan = compile(product()).unwrap();
    let error = plan.run(vec![("x".into(), f32s(&[1, 2], &[1., 2.]))], &AtomicBool::new(true)).unwrap_err();
    assert_eq!(error.kind, Cancelled);
    let mut none = |_: u32, _: &mut Vec<u8>| Ok(());
    let prepared = prepare::prepare_model(model(product()), &mut none, NO_BLOCKS, &CompileOptions::default()).unwrap();
    let error = Plan::from_prepared(prepared, CompileOptions::default(), &AtomicBool::new(true)).unwrap_err();
    assert_eq!(error.kind, Cancelled);
}

#[test]
fn convolutions_of_three_dimensions_are_compiled_for_each_shape_and_the_cache_is_bounded() {
    let plan = compile(graph(
        vec![info("x", FLOAT, &[N("n"), S(1), N("h"), N("w"), S(1)])],
        vec![info("y", FLOAT, &[N("n"), S(1), N("h"), N("w"), S(1)])],
        vec![node("Conv", &["x", "k"], &["y"]).ints("pads", &[1, 1, 0, 1, 1, 0]).ints("kernel_shape", &[3, 3, 1])],
        vec![floats("k", &[1, 1, 3, 3, 1], &[0., 0., 0., 0., 2., 0., 0., 0., 0.])],
    ))
    .unwrap();
    assert!(!plan.is_general() && plan.doubt().is_none());
    let before = plan.memory_bytes();
    for size in 1..8usize {
        let input: Vec<f32> = (0..2 * size * 3).map(|value| value as f32).collect();
        let tensor = f32s(&[2, 1, size, 3, 1], &input);
        assert!(plan.is_heavy(&[("x".into(), tensor.clone())]), "it has to compile first");
        let outputs = run(&plan, &[("x", tensor.clone())]).unwrap();
        assert_eq!(outputs[0].1.to_f32().unwrap(), input.iter().map(|value| value * 2.).collect::<Vec<_>>());
        assert!(!plan.is_heavy(&[("x".into(), tensor)]));
    }
    assert_eq!(plan.specialised.lock().unwrap().len(), 4);
    assert!(plan.memory_bytes() > before && plan.memory_bytes() <= before + 4 * 36);
}

#[test]
fn inputs_that_must_be_constants_become_part_of_the_plan() {
    let plan = compile(graph(
        vec![info("x", FLOAT, &[N("n"), S(6)]), info("shape", INT64, &[S(2)])],
        vec![info("y", FLOAT, &[N("a"), N("b")])],
        vec![node("Reshape", &["x", "shape"], &["y"])],
        vec![],
    ))
    .unwrap();
    for shape in [[4, 3], [2, 6], [-1, 1]] {
        let inputs = [("x", f32s(&[2, 6], &[1.; 12])), ("shape", i64s(&[2], &shape))];
        let outputs = run(&plan, &inputs).unwrap();
        assert_eq!(outputs[0].1.shape[1], shape[1] as usize);
    }
    let wrong = [("x", f32s(&[2, 6], &[1.; 12])), ("shape", i64s(&[2], &[5, 5]))];
    assert_eq!(run(&plan, &wrong).unwrap_err().kind, InvalidModel);
}

#[test]
fn strings_bools_and_halves_go_through() {
    let half = 10;
    let plan = compile(graph(
        vec![info("s", STRING, &[N("n")]), info("b", BOOL, &[N("n")]), info("h", half, &[N("n")])],
        vec![info("t", STRING, &[N("n")]), info("c", BOOL, &[N("n")]), info("k", half, &[N("n")])],
        vec![node("Identity", &["s"], &["t"]), node("Not", &["b"], &["c"]), node("Neg", &["h"], &["k"])],
        vec![],
    ))
    .unwrap();
    let strings = TensorData::Strings(vec!["a".into(), "é".into()]);
    let raw = |dtype: DType, bytes: &[u8]| HostTensor::new(dtype.into(), vec![2], TensorData::Raw(bytes.to_vec()));
    let outputs = run(
        &plan,
        &[
            ("s", HostTensor::new(PortType::String, vec![2], strings.clone()).unwrap()),
            ("b", raw(DType::Bool, &[1, 0]).unwrap()),
            // 1.0 and NaN.
            ("h", raw(DType::Float16, &[0, 0x3c, 0, 0x7e]).unwrap()),
        ],
    )
    .unwrap();
    assert_eq!(outputs[0].1.data, strings);
    assert_eq!(outputs[1].1.data, TensorData::Raw(vec![0, 1]));
    assert_eq!(outputs[2].1.data, TensorData::Raw(vec![0, 0xbc, 0, 0xfe]));
}

#[test]
fn stored_tensors_are_fetched_and_no_file_is_opened() {
    let external = |location: &str, offset: &str| {
        let entry = |key: &str, value: &str| StringStringEntryProto { key: key.into(), value: value.into() };
        let mut tensor = floats("w", &[2, 3], &[]);
        tensor.data_location = Some(1);
        tensor.external_data = vec![entry("location", location), entry("offset", offset)];
        let mut graph = product();
        // Older exports repeat initializers among the inputs.
        graph.input.push(info("w", FLOAT, &[S(2), S(3)]));
        graph.initializer = vec![tensor];
        model(graph)
    };
    let compile = |model: ModelProto, bytes: usize| {
        let mut asked = vec![];
        let mut fetch = |ordinal: u32, out: &mut Vec<u8>| {
            asked.push(ordinal);
            out.resize(bytes, 0);
            Ok(())
        };
        let options = CompileOptions::default();
        let prepared = prepare::prepare_model(model, &mut fetch, NO_BLOCKS, &options)?;
        Ok((Plan::compile_prepared(prepared, &options, &mut || false)?, asked))
    };
    let (plan, asked): (Plan, Vec<u32>) = compile(external("tessera", "7"), 24).unwrap();
    assert_eq!(asked, [7]);
    assert_eq!(plan.signature().inputs.len(), 1);
    let kind = |made: Result<(Plan, Vec<u32>), ModelError>| made.map(|_| ()).unwrap_err().kind;
    assert_eq!(kind(compile(external("tessera", "7"), 23)), InvalidModel);
    for location in ["/etc/passwd", "../x", "model.bin", ""] {
        assert_eq!(kind(compile(external(location, "0"), 24)), ExternalDataOutside, "{location}");
    }
    assert_eq!(kind(compile(external("tessera", "-1"), 24)), ExternalDataOutside);
}

#[test]
fn a_plan_is_shared_by_threads() {
    fn shared<T: Send + Sync>(_: &T) {}
    let plan = compile(product()).unwrap();
    shared(&plan);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for rows in 1..20 {
                    let outputs = run(&plan, &[("x", f32s(&[rows, 2], &vec![1.; rows * 2]))]).unwrap();
                    assert_eq!(outputs[0].1.to_f32().unwrap()[..3], [5., 7., 9.]);
                }
            });
        }
    });
}
