//! Prints whether rows of models are independent: `batch_axis [--check] MODEL.onnx...`. One line a model: the verdict, the axes or
//! the reason, the floating-point operations of a row, and how long compiling took. With `--check`, independent ones are run
//! on a stack of random rows and on each row alone, and the largest difference is printed.

use inference::onnx::{NoExternalData, strip};
use inference::plan::rows::Rows;
use inference::plan::{CompileOptions, Plan};
use inference::signature::{Dim, PortType};
use inference::tensor::{HostTensor, TensorData};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Instant;
use tensor_blocks::DType;

type Failure = Box<dyn std::error::Error>;

/// Rows of the stack that `--check` runs.
const ROWS: usize = 3;

fn main() {
    let check = std::env::args().any(|argument| argument == "--check");
    for path in std::env::args().skip(1).filter(|argument| argument != "--check") {
        let name = Path::new(&path).file_stem().map_or(path.clone(), |name| name.to_string_lossy().into_owned());
        match describe(&path, check) {
            Ok(line) => println!("{name:20} {line}"),
            Err(error) => println!("{name:20} error: {error}"),
        }
    }
}

fn describe(path: &str, check: bool) -> Result<String, Failure> {
    let bytes = std::fs::read(path)?;
    let stripped = strip(&bytes, &mut NoExternalData, &mut || Ok(()))?;
    let mut fetch = |ordinal: u32, out: &mut Vec<u8>| {
        out.extend_from_slice(&stripped.tensors[ordinal as usize].data);
        Ok(())
    };
    let begin = Instant::now();
    let plan = Plan::compile(&stripped.graph, &mut fetch, &CompileOptions::default())?;
    let time = begin.elapsed().as_secs_f64() * 1e3;
    let verdict = match plan.rows() {
        Rows::Independent { inputs, outputs, dimension, others, every_size } => {
            format!(
                "independent along \"{dimension}\": inputs {inputs:?}, outputs {outputs:?}, others {others:?}{}",
                if *every_size { "" } else { ", at likely sizes" }
            )
        }
        Rows::Dependent { reason } => format!("dependent: {reason}"),
    };
    let work = plan.flops_per_row(128).map_or("unknown".into(), |flops| format!("{flops:.3e}"));
    let checked = if check { check_plan(&plan)? } else { String::new() };
    Ok(format!("{verdict}; {work} flops a row; compiled in {time:.0} ms{checked}"))
}

/// Runs rows together and alone, with the first of some sizes of the other dimensions that the model takes.
fn check_plan(plan: &Plan) -> Result<String, Failure> {
    let Rows::Independent { inputs, outputs, .. } = plan.rows() else { return Ok(String::new()) };
    let cancel = AtomicBool::new(false);
    for other in [8, 48, 64, 576] {
        let stacked = random_inputs(plan, inputs, other);
        let shapes: Vec<Vec<usize>> = stacked.iter().map(|(_, tensor)| tensor.shape.clone()).collect();
        let Ok(whole) = plan.run(stacked.clone(), &cancel) else { continue };
        if let Some(reason) = plan.rows_at(&shapes, &cancel).reason() {
            return Ok(format!("; at size {other} dependent: {reason}"));
        }
        let mut largest = 0f32;
        for row in 0..ROWS {
            let row_of =
                |((name, tensor), &axis): (&(String, HostTensor), &usize)| Ok((name.clone(), cut(tensor, axis, row)?));
            let given = stacked.iter().zip(inputs).map(row_of).collect::<Result<_, Failure>>()?;
            let alone = plan.run(given, &cancel)?;
            for (((_, whole), (_, alone)), &axis) in whole.iter().zip(&alone).zip(outputs) {
                let (TensorData::Raw(expected), TensorData::Raw(made)) = (&alone.data, &cut(whole, axis, row)?.data)
                else {
                    return Err("strings are not compared".into());
                };
                if expected.len() != made.len() {
                    return Err("a row of the stack has another shape than alone".into());
                }
                if alone.dtype != PortType::Fixed(DType::Float32) {
                    largest = if expected == made { largest } else { f32::INFINITY };
                    continue;
                }
                for (made, expected) in floats(made).zip(floats(expected)) {
                    largest = largest.max((made - expected).abs() / expected.abs().max(1.0));
                }
            }
        }
        return Ok(format!("; {ROWS} rows of size {other} differ by {largest:.1e} from each alone"));
    }
    Ok("; no size runs".into())
}

fn floats(bytes: &[u8]) -> impl Iterator<Item = f32> + '_ {
    bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

/// Numbers in -1..1, and 0 or 1 where they are integers.
fn random_inputs(plan: &Plan, axes: &[usize], other: usize) -> Vec<(String, HostTensor)> {
    let mut state = 88_172_645_463_325_252u64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 24) as f32
    };
    let mut made = Vec::new();
    for (port, &axis) in plan.signature().inputs.iter().zip(axes) {
        let size = |(at, dim): (usize, &Dim)| match dim {
            _ if at == axis => ROWS,
            Dim::Fixed(size) => *size as usize,
            _ => other,
        };
        let shape: Vec<usize> = port.shape.iter().enumerate().map(size).collect();
        let count = shape.iter().product::<usize>();
        let raw = match port.dtype {
            PortType::Fixed(DType::Int64) => (0..count).flat_map(|_| i64::from(next() > 0.3).to_le_bytes()).collect(),
            PortType::Fixed(DType::Int32) => (0..count).flat_map(|_| i32::from(next() > 0.3).to_le_bytes()).collect(),
            _ => (0..count).flat_map(|_| (next() * 2.0 - 1.0).to_le_bytes()).collect(),
        };
        if let Ok(tensor) = HostTensor::new(port.dtype, shape, TensorData::Raw(raw)) {
            made.push((port.name.clone(), tensor));
        }
    }
    made
}

/// One index of an axis.
fn cut(tensor: &HostTensor, axis: usize, index: usize) -> Result<HostTensor, Failure> {
    let TensorData::Raw(raw) = &tensor.data else { return Err("strings are not compared".into()) };
    let before: usize = tensor.shape[..axis].iter().product();
    let each = raw.len() / (before * tensor.shape[axis]).max(1);
    let first = |outer: usize| (outer * tensor.shape[axis] + index) * each;
    let kept = (0..before).flat_map(|outer| &raw[first(outer)..first(outer) + each]).copied().collect();
    let mut shape = tensor.shape.clone();
    shape[axis] = 1;
    Ok(HostTensor::new(tensor.dtype, shape, TensorData::Raw(kept))?)
}
