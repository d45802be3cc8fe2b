//! Runs test folders of the ONNX project: each has `model.onnx` and `test_data_set_*` with `input_*.pb` and
//! `output_*.pb`. Prints one line per test and the totals.
//!
//! `node_tests FOLDER...` uses tract alone, in the obvious way; `node_tests --plan FOLDER...` uses this crate.
//! A FOLDER is a test, or a folder of tests. With `--only WORD`, tests whose name contains it.

use inference::error::{ErrorKind, ModelError};
use inference::onnx::{NoExternalData, strip};
use inference::plan::{CompileOptions, Plan};
use inference::signature::{PortType, Signature};
use inference::tensor::{HostTensor, TensorData};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use tensor_blocks::DType;
use tract_onnx::prelude::*;

enum Outcome {
    Pass,
    Unsupported(String),
    Wrong(String),
    Error(String),
    NoTensor,
}

fn main() {
    let mut plan = false;
    let mut only = String::new();
    let mut tests = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--plan" => plan = true,
            "--only" => only = arguments.next().unwrap_or_default(),
            folder => collect(Path::new(folder), &mut tests),
        }
    }
    tests.sort();
    std::panic::set_hook(Box::new(|_| {}));
    let mut totals: BTreeMap<&str, usize> = BTreeMap::new();
    for test in tests.iter().filter(|test| test.to_string_lossy().contains(&only)) {
        let name = test.file_name().unwrap_or_default().to_string_lossy();
        let outcome = catch_unwind(AssertUnwindSafe(|| if plan { with_plan(test) } else { with_tract(test) }))
            .unwrap_or_else(|panic| {
                let text = panic.downcast_ref::<String>().cloned().unwrap_or_default();
                Outcome::Error(format!("panic: {text}"))
            });
        let (word, text) = match outcome {
            Outcome::Pass => ("pass", String::new()),
            Outcome::Unsupported(text) => ("unsupported", text),
            Outcome::Wrong(text) => ("wrong", text),
            Outcome::Error(text) => ("error", text),
            Outcome::NoTensor => ("no-tensor", String::new()),
        };
        *totals.entry(word).or_default() += 1;
        let line: String = text.replace('\n', " ").chars().take(300).collect();
        println!("{word} {name} {line}");
    }
    println!("total {} {totals:?}", totals.values().sum::<usize>());
}

fn collect(folder: &Path, tests: &mut Vec<PathBuf>) {
    if folder.join("model.onnx").is_file() {
        tests.push(folder.to_owned());
    } else if let Ok(entries) = std::fs::read_dir(folder) {
        for entry in entries.flatten() {
            if entry.path().join("model.onnx").is_file() {
                tests.push(entry.path());
            }
        }
    }
}

/// The tensors `stem_0.pb`, `stem_1.pb`, ... of a data set; none if one is no tensor.
fn tensors(folder: &Path, stem: &str) -> Option<Vec<HostTensor>> {
    let mut tensors = Vec::new();
    for index in 0.. {
        let Ok(bytes) = std::fs::read(folder.join(format!("{stem}_{index}.pb"))) else { break };
        tensors.push(tensor(&bytes)?);
    }
    Some(tensors)
}

fn tensor(bytes: &[u8]) -> Option<HostTensor> {
    let proto = tract_onnx::tensor::proto_from_reader(bytes).ok()?;
    let dtype = PortType::from_onnx(proto.data_type)?;
    let shape: Vec<usize> = proto.dims.iter().map(|&size| size as usize).collect();
    let data = match dtype {
        PortType::String => TensorData::Strings(
            proto.string_data.iter().map(|text| String::from_utf8_lossy(text).into_owned()).collect(),
        ),
        PortType::Fixed(_) if !proto.raw_data.is_empty() => TensorData::Raw(proto.raw_data),
        PortType::Fixed(dtype) => {
            let width = dtype.byte_width().unwrap_or(1).min(4);
            let mut raw: Vec<u8> = proto.float_data.iter().flat_map(|x| x.to_le_bytes()).collect();
            raw.extend(proto.double_data.iter().flat_map(|x| x.to_le_bytes()));
            raw.extend(proto.int64_data.iter().flat_map(|x| x.to_le_bytes()));
            raw.extend(proto.int32_data.iter().flat_map(|x| x.to_le_bytes().into_iter().take(width)));
            match dtype {
                DType::UInt32 => raw.extend(proto.uint64_data.iter().flat_map(|x| (*x as u32).to_le_bytes())),
                _ => raw.extend(proto.uint64_data.iter().flat_map(|x| x.to_le_bytes())),
            }
            TensorData::Raw(raw)
        }
    };
    HostTensor::new(dtype, shape, data).ok()
}

fn data_sets(test: &Path) -> Vec<PathBuf> {
    (0..).map(|set| test.join(format!("test_data_set_{set}"))).take_while(|folder| folder.is_dir()).collect()
}

fn with_plan(test: &Path) -> Outcome {
    let sort = |error: ModelError| match error.kind {
        ErrorKind::UnsupportedOperator | ErrorKind::UnsupportedOpset | ErrorKind::UnsupportedType => {
            Outcome::Unsupported(error.to_string())
        }
        _ => Outcome::Error(error.to_string()),
    };
    let bytes = std::fs::read(test.join("model.onnx")).unwrap_or_default();
    let plan = strip(&bytes, &mut NoExternalData, &mut || Ok(())).and_then(|stripped| {
        let mut fetch = |ordinal: u32, out: &mut Vec<u8>| {
            out.extend_from_slice(&stripped.tensors[ordinal as usize].data);
            Ok(())
        };
        Plan::compile(&stripped.graph, &mut fetch, &CompileOptions::default())
    });
    let plan = match plan {
        Ok(plan) => plan,
        Err(error) => return sort(error),
    };
    for set in data_sets(test) {
        let (Some(inputs), Some(expected)) = (tensors(&set, "input"), tensors(&set, "output")) else {
            return Outcome::NoTensor;
        };
        let names = plan.signature().inputs.iter().map(|port| port.name.clone());
        match plan.run(names.zip(inputs).collect(), &AtomicBool::new(false)) {
            Err(error) => return sort(error),
            Ok(outputs) => {
                let outputs: Vec<HostTensor> = outputs.into_iter().map(|(_, tensor)| tensor).collect();
                if let Some(text) = difference(&outputs, &expected) {
                    return Outcome::Wrong(text);
                }
            }
        }
    }
    Outcome::Pass
}

fn with_tract(test: &Path) -> Outcome {
    let bytes = std::fs::read(test.join("model.onnx")).unwrap_or_default();
    for set in data_sets(test) {
        let (Some(inputs), Some(expected)) = (tensors(&set, "input"), tensors(&set, "output")) else {
            return Outcome::NoTensor;
        };
        match run_tract(test, &bytes, &inputs) {
            Ok(outputs) => {
                if let Some(text) = difference(&outputs, &expected) {
                    return Outcome::Wrong(text);
                }
            }
            Err(error) => {
                let text = format!("{error:#}");
                return if text.contains("Unimplemented") || text.contains("can not be made a TypedOp") {
                    Outcome::Unsupported(text)
                } else {
                    Outcome::Error(text)
                };
            }
        }
    }
    Outcome::Pass
}

fn run_tract(test: &Path, bytes: &[u8], inputs: &[HostTensor]) -> TractResult<Vec<HostTensor>> {
    let mut model = onnx().model_for_path(test.join("model.onnx"))?;
    let values = inputs.iter().map(to_tract).collect::<TractResult<Vec<_>>>()?;
    for (index, value) in values.iter().enumerate() {
        model.set_input_fact(index, InferenceFact::dt_shape(value.datum_type(), value.shape()))?;
    }
    let runnable = model.into_optimized()?.into_runnable()?;
    let outputs = runnable.run(values.into_iter().map(|value| value.into_tvalue()).collect())?;
    let _ = Signature::of_graph(bytes);
    outputs.iter().map(|value| from_tract(value)).collect()
}

macro_rules! each_type {
    ($visit:ident) => {
        $visit! {
            Float32 f32 F32 4, Float64 f64 F64 8, Int8 i8 I8 1, Int16 i16 I16 2, Int32 i32 I32 4, Int64 i64 I64 8,
            UInt8 u8 U8 1, UInt16 u16 U16 2, UInt32 u32 U32 4, UInt64 u64 U64 8
        }
    };
}

fn to_tract(tensor: &HostTensor) -> TractResult<Tensor> {
    use tract_onnx::prelude::tract_ndarray::ArrayD;
    use tract_onnx::tract_core::internal::{bail, f16};
    let shape = tensor.shape.clone();
    let raw = match &tensor.data {
        TensorData::Strings(strings) => return Ok(ArrayD::from_shape_vec(shape, strings.clone())?.into_tensor()),
        TensorData::Raw(raw) => raw,
    };
    macro_rules! visit {
        ($($dtype:ident $native:ident $datum:ident $width:literal),*) => {
            match tensor.dtype {
                $(PortType::Fixed(DType::$dtype) => ArrayD::from_shape_vec(
                    shape, raw.as_chunks::<$width>().0.iter().map(|b| $native::from_le_bytes(*b)).collect::<Vec<_>>())?
                    .into_tensor(),)*
                PortType::Fixed(DType::Float16) => ArrayD::from_shape_vec(
                    shape, raw.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b)).collect::<Vec<_>>())?
                    .into_tensor(),
                PortType::Fixed(DType::Bool) => {
                    ArrayD::from_shape_vec(shape, raw.iter().map(|b| *b != 0).collect::<Vec<_>>())?.into_tensor()
                }
                _ => bail!("tract has no such type"),
            }
        };
    }
    Ok(each_type!(visit))
}

fn from_tract(value: &Tensor) -> TractResult<HostTensor> {
    use tract_onnx::tract_core::internal::bail;
    let value =
        if value.datum_type() == DatumType::TDim { value.cast_to::<i64>()?.into_owned() } else { value.clone() };
    let view = value.try_as_plain_ram()?;
    let shape = value.shape().to_vec();
    macro_rules! visit {
        ($($dtype:ident $native:ident $datum:ident $width:literal),*) => {
            match value.datum_type().unquantized() {
                $(DatumType::$datum => DType::$dtype,)*
                DatumType::F16 => DType::Float16,
                DatumType::Bool => DType::Bool,
                DatumType::String => {
                    let strings = TensorData::Strings(view.as_slice::<String>()?.to_vec());
                    return Ok(HostTensor { dtype: PortType::String, shape, data: strings });
                }
                other => bail!("output of type {other:?}"),
            }
        };
    }
    let dtype: DType = each_type!(visit);
    Ok(HostTensor { dtype: dtype.into(), shape, data: TensorData::Raw(view.as_bytes().to_vec()) })
}

/// What is wrong with the outputs. Floats may differ by 1e-4 relative and 1e-5 of the largest absolute, for float16
/// twenty times that.
fn difference(outputs: &[HostTensor], expected: &[HostTensor]) -> Option<String> {
    if outputs.len() != expected.len() {
        return Some(format!("{} outputs, expected {}", outputs.len(), expected.len()));
    }
    for (index, (output, wanted)) in outputs.iter().zip(expected).enumerate() {
        if output.dtype != wanted.dtype || output.shape != wanted.shape {
            return Some(format!(
                "output {index}: {} {:?}, expected {} {:?}",
                output.dtype, output.shape, wanted.dtype, wanted.shape
            ));
        }
        if output.data == wanted.data {
            continue;
        }
        let rows = 1;
        let (Ok((_, left)), Ok((_, right))) =
            (inference::array::to_rows_f64(output, rows), inference::array::to_rows_f64(wanted, rows))
        else {
            return Some(format!("output {index}: strings differ"));
        };
        let largest = right.iter().filter(|x| x.is_finite()).fold(1.0f64, |largest, x| largest.max(x.abs()));
        let relative = if wanted.dtype == PortType::Fixed(DType::Float16) { 2e-3 } else { 1e-4 };
        for (place, (a, b)) in left.iter().zip(&right).enumerate() {
            let near = (a - b).abs() <= relative * (0.1 * largest + b.abs());
            // The bounds of ONNX's own runner: some expected values are written with few digits.
            let near = near || (a - b).abs() <= 1e-7 + 1e-3 * b.abs();
            let near = near || a == b || (a.is_nan() && b.is_nan());
            let near = if wanted.dtype.is_float() { near } else { a == b };
            if !near {
                return Some(format!("output {index}[{place}]: {a}, expected {b}"));
            }
        }
    }
    None
}
