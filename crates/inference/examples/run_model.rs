//! Runs one model: `run_model [--blocks] MODEL.onnx OUTPUT_FOLDER NAME=INPUT.npy...`, with `--blocks` on blocks instead of
//! on constants of the plan. Writes `NAME.npy` for each output and
//! prints what was done and how long it took. Inputs and outputs are NumPy files; strings are not supported.

use inference::onnx::{NoExternalData, strip};
use inference::plan::{CompileOptions, Plan};
use inference::signature::PortType;
use inference::tensor::{HostTensor, TensorData};
use inference::weights::{BlockSource, PrivateBlocks};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;
use tensor_blocks::{DType, Tiling};

/// Bytes of a whole block.
const BLOCK_BYTES: usize = 65_536;

type Failure = Box<dyn std::error::Error>;

fn main() {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let on_blocks = arguments.first().is_some_and(|first| first == "--blocks");
    if on_blocks {
        arguments.remove(0);
    }
    let [model, folder, inputs @ ..] = arguments.as_slice() else {
        eprintln!("usage: run_model [--blocks] MODEL.onnx OUTPUT_FOLDER NAME=INPUT.npy...");
        std::process::exit(2);
    };
    if let Err(error) = run(model, folder, inputs, on_blocks) {
        println!("error: {error}");
        std::process::exit(1);
    }
}

fn run(model: &str, folder: &str, inputs: &[String], on_blocks: bool) -> Result<(), Failure> {
    let bytes = std::fs::read(model)?;
    let begin = Instant::now();
    let stripped = strip(&bytes, &mut NoExternalData, &mut || Ok(()))?;
    let strip_time = begin.elapsed();
    let begin = Instant::now();
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
    let compile_time = begin.elapsed();
    let mut blocks = PrivateBlocks::new();
    for tensor in plan.stored_tensors() {
        blocks.add(tensor, &stripped.tensors[tensor.ordinal as usize].data)?;
    }
    let source: Arc<dyn BlockSource> = Arc::new(blocks);
    let mut given = Vec::new();
    for argument in inputs {
        let (name, path) = argument.split_once('=').ok_or("an input is NAME=FILE")?;
        given.push((name.to_owned(), read_npy(Path::new(path))?));
    }
    let cancel = Arc::new(AtomicBool::new(false));
    let begin = Instant::now();
    let heavy = plan.is_heavy(&given);
    let outputs = plan.run_on_blocks(given.clone(), source.clone(), &cancel)?;
    let first = begin.elapsed();
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        let begin = Instant::now();
        plan.run_on_blocks(given.clone(), source.clone(), &cancel)?;
        best = best.min(begin.elapsed().as_secs_f64());
    }
    for (name, tensor) in &outputs {
        write_npy(&Path::new(folder).join(format!("{}.npy", name.replace('/', "_"))), tensor)?;
    }
    println!(
        "strip {:.1} ms, compile {:.1} ms, first run {:.1} ms, run {:.2} ms, general {}, heavy {heavy}, {} kB, {} tensors in blocks, {:?}",
        strip_time.as_secs_f64() * 1e3,
        compile_time.as_secs_f64() * 1e3,
        first.as_secs_f64() * 1e3,
        best * 1e3,
        plan.is_general(),
        plan.memory_bytes() >> 10,
        plan.stored_tensors().len(),
        outputs.iter().map(|(name, tensor)| format!("{name} {:?}", tensor.shape)).collect::<Vec<_>>()
    );
    Ok(())
}

const TYPES: &[(&str, DType)] = &[
    ("<f4", DType::Float32),
    ("<f8", DType::Float64),
    ("<f2", DType::Float16),
    ("<i8", DType::Int64),
    ("<i4", DType::Int32),
    ("<i2", DType::Int16),
    ("|i1", DType::Int8),
    ("|u1", DType::UInt8),
    ("<u2", DType::UInt16),
    ("<u4", DType::UInt32),
    ("<u8", DType::UInt64),
    ("|b1", DType::Bool),
];

/// Reads a NumPy file of format 1.0 in C order.
fn read_npy(path: &Path) -> Result<HostTensor, Failure> {
    let bytes = std::fs::read(path)?;
    let length = usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let header = std::str::from_utf8(&bytes[10..10 + length])?;
    let (_, dtype) = TYPES.iter().find(|(text, _)| header.contains(text)).ok_or("unknown type of a NumPy file")?;
    let shape = header.split_once("'shape': (").and_then(|(_, rest)| rest.split_once(')')).ok_or("no shape")?.0;
    let shape = shape
        .split(',')
        .map(str::trim)
        .filter(|size| !size.is_empty())
        .map(str::parse)
        .collect::<Result<Vec<usize>, _>>()?;
    Ok(HostTensor::new((*dtype).into(), shape, TensorData::Raw(bytes[10 + length..].to_vec()))?)
}

fn write_npy(path: &Path, tensor: &HostTensor) -> Result<(), Failure> {
    let (PortType::Fixed(dtype), TensorData::Raw(raw)) = (tensor.dtype, &tensor.data) else {
        return Err("strings are not supported".into());
    };
    let (text, _) = TYPES.iter().find(|(_, known)| *known == dtype).ok_or("unknown type")?;
    let shape: String = tensor.shape.iter().map(|size| format!("{size},")).collect();
    let mut header = format!("{{'descr': '{text}', 'fortran_order': False, 'shape': ({shape}), }}");
    while (header.len() + 11) % 64 != 0 {
        header.push(' ');
    }
    header.push('\n');
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(raw);
    Ok(std::fs::write(path, bytes)?)
}
