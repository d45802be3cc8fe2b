//! Prints whether rows of models are independent: `batch_axis MODEL.onnx...`. One line a model: the verdict, the axes or the reason,
//! the floating-point operations of a row, and how long compiling took.

use inference::onnx::{NoExternalData, strip};
use inference::plan::rows::Rows;
use inference::plan::{CompileOptions, Plan};
use std::path::Path;
use std::time::Instant;

type Failure = Box<dyn std::error::Error>;

fn main() {
    for path in std::env::args().skip(1) {
        let name = Path::new(&path).file_stem().map_or(path.clone(), |name| name.to_string_lossy().into_owned());
        match describe(&path) {
            Ok(line) => println!("{name:20} {line}"),
            Err(error) => println!("{name:20} error: {error}"),
        }
    }
}

fn describe(path: &str) -> Result<String, Failure> {
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
            format!("independent along \"{dimension}\": inputs {inputs:?}, outputs {outputs:?}, others {others:?}{}", if *every_size { "" } else { ", at likely sizes" })
        }
        Rows::Dependent { reason } => format!("dependent: {reason}"),
    };
    let work = plan.flops_per_row(128).map_or("unknown".into(), |flops| format!("{flops:.3e}"));
    Ok(format!("{verdict}; {work} flops a row; compiled in {time:.0} ms"))
}
