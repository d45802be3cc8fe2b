//! Time of one row of a small feed-forward net whose tensors come from outside: `net_bench [MEMBERS]`.
//!
//! The net is 5-48-48-48-1 with Relu. Prints, for each form of its layers and 1, 4 and 32 rows a call, the nanoseconds of a row:
//! of one member, which stays in a near cache; of MEMBERS (default 5,000, 100 MB) in random order, which come from memory; and
//! of the compiled plan of one member. Then, for training such a net, the nanoseconds of a row in an epoch. Each figure is the
//! best of some rounds of CPU time.

#![allow(unsafe_code)] // The clock of CPU time, which the standard library lacks.

use inference::net::{FeedForward, Scratch, TrainOptions, train};
use inference::onnx::{NoExternalData, strip};
use inference::plan::{CompileOptions, Plan};
use inference::tensor::HostTensor;
use prost::Message;
use std::hint::black_box;
use std::sync::atomic::AtomicBool;
use tract_onnx::pb::tensor_shape_proto::{Dimension, dimension};
use tract_onnx::pb::*;

const WIDTHS: [usize; 5] = [5, 48, 48, 48, 1];
/// Calls of one figure of a warm member.
const CALLS: usize = 20_000;
const ROUNDS: usize = 7;

type Failure = Box<dyn std::error::Error>;

fn main() {
    let members = std::env::args().nth(1).map_or(Ok(5000), |argument| argument.parse());
    let done = members.map_err(Failure::from).and_then(bench).and_then(|()| bench_training());
    if let Err(error) = done {
        eprintln!("{error}");
        std::process::exit(1);
    }
}

fn bench(members: usize) -> Result<(), Failure> {
    println!("| layers | rows a call | one member, ns a row | {members} members, ns a row | plan, ns a row |");
    println!("| --- | ---: | ---: | ---: | ---: |");
    for turned in [true, false] {
        let bytes = model(turned).encode_to_vec();
        let stripped = strip(&bytes, &mut NoExternalData, &mut || Ok(()))?;
        let net = FeedForward::of_graph(&stripped.graph).ok_or("the net is not recognised")?;
        let mut fetch = |ordinal: u32, out: &mut Vec<u8>| {
            out.extend_from_slice(&stripped.tensors[ordinal as usize].data);
            Ok(())
        };
        let plan = Plan::compile(&stripped.graph, &mut fetch, &CompileOptions::default())?;
        // Members one behind the other, each with its own values.
        let sizes: Vec<usize> = stripped.tensors.iter().map(|tensor| tensor.data.len() / 4).collect();
        let size: usize = sizes.iter().sum();
        let mut random = Random(7);
        let values: Vec<f32> = (0..size * members).map(|_| random.value() * 0.2).collect();
        let params = |member: usize| {
            let mut rest = &values[member * size..(member + 1) * size];
            std::array::from_fn::<&[f32], 8, _>(|tensor| {
                let (first, others) = rest.split_at(sizes[tensor]);
                rest = others;
                first
            })
        };
        let order: Vec<usize> = (0..members).map(|_| random.below(members)).collect();
        for m in [1, 4, 32] {
            let x: Vec<f32> = (0..5 * m).map(|_| random.value()).collect();
            let (mut out, mut scratch) = (vec![0.0; m], Scratch::default());
            let one = params(0);
            let warm = best(CALLS * m, || {
                for _ in 0..CALLS {
                    net.run(&one, black_box(&x), m, &mut out, &mut scratch);
                }
                Ok(())
            })?;
            let cold = best(members * m, || {
                for &member in &order {
                    net.run(&params(member), black_box(&x), m, &mut out, &mut scratch);
                }
                Ok(())
            })?;
            let input = HostTensor::from_f32(&[m, 5], &x)?;
            let cancel = AtomicBool::new(false);
            let planned = best(CALLS / 4 * m, || {
                for _ in 0..CALLS / 4 {
                    black_box(plan.run(vec![("x".into(), input.clone())], &cancel)?);
                }
                Ok(())
            })?;
            let form = if turned { "Gemm, transB = 1" } else { "MatMul, Add" };
            println!("| {form} | {m} | {warm:.0} | {cold:.0} | {planned:.0} |");
        }
    }
    Ok(())
}

fn bench_training() -> Result<(), Failure> {
    const ROWS: usize = 5000;
    println!("\n| rows of a step | layers trained | training, ns a row and epoch |");
    println!("| ---: | ---: | ---: |");
    let bytes = model(true).encode_to_vec();
    let stripped = strip(&bytes, &mut NoExternalData, &mut || Ok(()))?;
    let net = FeedForward::of_graph(&stripped.graph).ok_or("the net is not recognised")?;
    let floats = |data: &[u8]| data.as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word)).collect();
    let start: Vec<Vec<f32>> = stripped.tensors.iter().map(|tensor| floats(&tensor.data)).collect();
    let mut random = Random(3);
    let x: Vec<f32> = (0..ROWS * 5).map(|_| random.value()).collect();
    let y: Vec<f32> = x.chunks(5).map(|row| row[0] * row[1] + row[2]).collect();
    for (batch, layers) in [(32, 4), (256, 4), (32, 1)] {
        let timed = |epochs: u32| {
            let options = TrainOptions { epochs, batch, layers: Some(layers), ..TrainOptions::default() };
            best(ROWS, || {
                train(&net, &mut start.clone(), &x, &y, ROWS, &options, &mut || Ok(()))?;
                Ok(())
            })
        };
        // Without the losses before and after.
        let epoch = (timed(3)? - timed(1)?) / 2.0;
        println!("| {batch} | {layers} | {epoch:.0} |");
    }
    Ok(())
}

/// The best nanoseconds of CPU time of a row.
fn best(rows: usize, mut run: impl FnMut() -> Result<(), Failure>) -> Result<f64, Failure> {
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        let before = cpu();
        run()?;
        best = best.min(cpu() - before);
    }
    Ok(best / rows as f64)
}

/// Nanoseconds of CPU time that this process has taken.
fn cpu() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the clock exists on every Linux, and the result has a place.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn below(&mut self, bound: usize) -> usize {
        self.next() as usize % bound
    }

    fn value(&mut self) -> f32 {
        self.next() as f32 / (1u64 << 30) as f32 - 1.0
    }
}

fn model(turned: bool) -> ModelProto {
    let (mut nodes, mut tensors, mut current) = (vec![], vec![], "x".to_owned());
    let mut random = Random(1);
    for (place, pair) in WIDTHS.windows(2).enumerate() {
        let (k, n) = (pair[0], pair[1]);
        let last = place + 2 == WIDTHS.len();
        let (w, b, s) = (format!("w{place}"), format!("b{place}"), format!("s{place}"));
        let dims = if turned { [n, k] } else { [k, n] };
        tensors.push(tensor(&w, &dims, &mut random));
        tensors.push(tensor(&b, &[n], &mut random));
        let sum = if last { "y".to_owned() } else { s };
        if turned {
            let mut gemm = node("Gemm", &[&current, &w, &b], &sum);
            gemm.attribute.push(AttributeProto { name: "transB".into(), r#type: 2, i: 1, ..Default::default() });
            nodes.push(gemm);
        } else {
            let product = format!("p{place}");
            nodes.push(node("MatMul", &[&current, &w], &product));
            nodes.push(node("Add", &[&product, &b], &sum));
        }
        current = sum;
        if !last {
            let output = format!("a{place}");
            nodes.push(node("Relu", &[&current], &output));
            current = output;
        }
    }
    let graph = GraphProto {
        name: "battery".into(),
        input: vec![port("x", 5)],
        output: vec![port("y", 1)],
        node: nodes,
        initializer: tensors,
        ..Default::default()
    };
    let opset_import = vec![OperatorSetIdProto { domain: String::new(), version: 17 }];
    ModelProto { ir_version: 8, opset_import, graph: Some(graph), ..Default::default() }
}

fn node(op_type: &str, inputs: &[&str], output: &str) -> NodeProto {
    let input = inputs.iter().map(|&name| name.to_owned()).collect();
    NodeProto { op_type: op_type.into(), input, output: vec![output.into()], ..Default::default() }
}

fn tensor(name: &str, dims: &[usize], random: &mut Random) -> TensorProto {
    let count: usize = dims.iter().product();
    let raw_data = (0..count).flat_map(|_| (random.value() * 0.2).to_le_bytes()).collect();
    let dims = dims.iter().map(|&dim| dim as i64).collect();
    TensorProto { name: name.into(), dims, data_type: 1, raw_data, ..Default::default() }
}

fn port(name: &str, width: i64) -> ValueInfoProto {
    let dim = |value| Dimension { denotation: String::new(), value: Some(value) };
    let dim = vec![dim(dimension::Value::DimParam("batch".into())), dim(dimension::Value::DimValue(width))];
    let tensor = type_proto::Tensor { elem_type: 1, shape: Some(TensorShapeProto { dim }) };
    let r#type = TypeProto { denotation: String::new(), value: Some(type_proto::Value::TensorType(tensor)) };
    ValueInfoProto { name: name.into(), r#type: Some(r#type), doc_string: String::new() }
}
