//! CPU time of one model: `op_bench WAY MILLISECONDS MODEL.onnx NAME=INPUT.npy...`.
//!
//! WAY is `plan` (this crate, weights in the plan), `blocks` (this crate, weights in blocks), or `tract` (tract alone,
//! compiled for these shapes). Prints the best CPU time of a run in milliseconds. `benches/operators.py` calls it in turn with ONNX Runtime.

#![allow(unsafe_code)] // The clock of CPU time, which the standard library lacks.

use inference::onnx::{NoExternalData, strip};
use inference::plan::{CompileOptions, Plan};
use inference::tensor::{HostTensor, TensorData};
use inference::weights::{BlockSource, PrivateBlocks};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use tensor_blocks::{DType, Tiling};
use tract_onnx::prelude::*;

const BLOCK_BYTES: usize = 65_536;

type Failure = Box<dyn std::error::Error>;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [way, milliseconds, model, inputs @ ..] = arguments.as_slice() else {
        eprintln!("usage: op_bench plan|blocks|tract MILLISECONDS MODEL.onnx NAME=INPUT.npy...");
        std::process::exit(2);
    };
    match bench(way, milliseconds, model, inputs) {
        Ok(best) => println!("{best:.4}"),
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(1);
        }
    }
}

fn bench(way: &str, milliseconds: &str, model: &str, inputs: &[String]) -> Result<f64, Failure> {
    let limit: f64 = milliseconds.parse()?;
    let bytes = std::fs::read(model)?;
    let given = inputs
        .iter()
        .map(|argument| {
            let (name, path) = argument.split_once('=').ok_or("an input is NAME=FILE")?;
            Ok((name.to_owned(), read_npy(path)?))
        })
        .collect::<Result<Vec<_>, Failure>>()?;
    if way == "tract" { with_tract(&bytes, given, limit) } else { with_plan(&bytes, given, limit, way == "blocks") }
}

fn with_plan(bytes: &[u8], given: Vec<(String, HostTensor)>, limit: f64, on_blocks: bool) -> Result<f64, Failure> {
    let stripped = strip(bytes, &mut NoExternalData, &mut || Ok(()))?;
    let mut fetch = |ordinal: u32, out: &mut Vec<u8>| {
        out.extend_from_slice(&stripped.tensors[ordinal as usize].data);
        Ok(())
    };
    let tilings = stripped
        .tensors
        .iter()
        .filter(|_| on_blocks)
        .map(|tensor| Tiling::new(&tensor.dims, tensor.view, tensor.dtype, BLOCK_BYTES).map(Some))
        .collect::<Result<Vec<_>, _>>()?;
    let options = CompileOptions::default();
    let plan = Plan::compile_on_blocks(&stripped.graph, &mut fetch, &tilings, &options, &mut || false)?;
    let mut blocks = PrivateBlocks::new();
    for tensor in plan.stored_tensors() {
        blocks.add(tensor, &stripped.tensors[tensor.ordinal as usize].data)?;
    }
    let source: Arc<dyn BlockSource> = Arc::new(blocks);
    let cancel = Arc::new(AtomicBool::new(false));
    best(limit, || {
        plan.run_on_blocks(given.clone(), source.clone(), &cancel)?;
        Ok(())
    })
}

fn with_tract(bytes: &[u8], given: Vec<(String, HostTensor)>, limit: f64) -> Result<f64, Failure> {
    let mut framework = tract_onnx::onnx().with_ignore_value_info(true);
    framework = framework.with_ignore_output_shapes(true);
    let mut model = framework.model_for_read(&mut &*bytes)?;
    let mut values: TVec<TValue> = tvec!();
    for place in 0..model.input_outlets()?.len() {
        let outlet = model.input_outlets()?[place];
        let name = model.node(outlet.node).name.clone();
        let (_, tensor) = given.iter().find(|(given, _)| *given == name).ok_or("an input is missing")?;
        let TensorData::Raw(raw) = &tensor.data else { return Err("strings are not supported".into()) };
        let datum = match tensor.dtype.to_string().as_str() {
            "float32" | "real" => f32::datum_type(),
            "int64" | "bigint" => i64::datum_type(),
            _ => i32::datum_type(),
        };
        let mut value = Tensor::zero_dt(datum, &tensor.shape)?;
        {
            let mut plain = value.try_as_plain_ram_mut()?;
            match datum {
                DatumType::F32 => bytemuck::cast_slice_mut::<f32, u8>(plain.as_slice_mut()?).copy_from_slice(raw),
                DatumType::I64 => bytemuck::cast_slice_mut::<i64, u8>(plain.as_slice_mut()?).copy_from_slice(raw),
                _ => bytemuck::cast_slice_mut::<i32, u8>(plain.as_slice_mut()?).copy_from_slice(raw),
            }
        }
        model.set_input_fact(place, InferenceFact::dt_shape(datum, &tensor.shape))?;
        values.push(value.into_tvalue());
    }
    let plan = model.into_optimized()?.into_runnable()?;
    best(limit, || {
        plan.run(values.clone())?;
        Ok(())
    })
}

/// The best CPU time of a run in milliseconds, of at least three runs that take this many milliseconds together.
fn best(limit: f64, mut run: impl FnMut() -> Result<(), Failure>) -> Result<f64, Failure> {
    run()?;
    run()?;
    let (mut best, mut total, mut rounds) = (f64::INFINITY, 0.0, 0);
    while rounds < 3 || total < limit {
        let before = cpu();
        run()?;
        let time = cpu() - before;
        best = best.min(time);
        total += time;
        rounds += 1;
    }
    Ok(best)
}

/// Milliseconds of CPU time that this process has taken.
fn cpu() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the clock exists on every Linux, and the result has a place.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    time.tv_sec as f64 * 1e3 + time.tv_nsec as f64 / 1e6
}

/// Reads a NumPy file of format 1.0 in C order.
fn read_npy(path: &str) -> Result<HostTensor, Failure> {
    let bytes = std::fs::read(path)?;
    let length = usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let header = std::str::from_utf8(&bytes[10..10 + length])?;
    let types = [("<f4", DType::Float32), ("<i8", DType::Int64), ("<i4", DType::Int32)];
    let (_, dtype) = types.iter().find(|(text, _)| header.contains(text)).ok_or("unknown type of a NumPy file")?;
    let shape = header.split_once("'shape': (").and_then(|(_, rest)| rest.split_once(')')).ok_or("no shape")?.0;
    let sizes = shape.split(',').map(str::trim).filter(|size| !size.is_empty());
    let shape = sizes.map(str::parse).collect::<Result<Vec<usize>, _>>()?;
    Ok(HostTensor::new((*dtype).into(), shape, TensorData::Raw(bytes[10 + length..].to_vec()))?)
}
