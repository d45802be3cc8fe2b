//! One run: inputs checked, executed operator by operator, outputs named.

use super::Shapes;
use super::blocks::RowChain;
use super::build::Runnable;
use super::pool::{keep, with_pool};
use super::runnable::check_dynamic;
use super::slices::rows_at_a_time;
use super::spill::Spills;
use super::{Bindings, CompileOptions};
use crate::error::ModelError;
use crate::signature::{Dim, Port, PortType, Signature};
use crate::tensor::{HostTensor, TensorData};
use crate::weights;
use crate::worker::cancelled;
use std::sync::atomic::{AtomicBool, Ordering};
use tensor_blocks::DType;
use tract_onnx::tract_core::plan::eval;
use tract_onnx::tract_hir::internal::*;

/// The way out when a run fails inside the engine.
pub(super) const INPUT_HINT: &str = "Check the shapes and values of the inputs against what the model was trained on.";

/// The inputs in the signature's order, each checked against its port.
///
/// # Errors
/// `UnknownInput`, `MissingInput`, `InvalidInput`.
pub(super) fn order_inputs(
    signature: &Signature,
    given: Vec<(String, HostTensor)>,
) -> Result<Vec<HostTensor>, ModelError> {
    let mut slots: Vec<Option<HostTensor>> = vec![None; signature.inputs.len()];
    for (name, tensor) in given {
        let place = signature
            .inputs
            .iter()
            .position(|port| port.name == name)
            .ok_or_else(|| crate::json::unknown_input(signature, &name))?;
        if slots[place].replace(tensor).is_some() {
            return Err(ModelError::invalid_input(format!("input \"{name}\" is given twice")));
        }
    }
    let mut bindings = Bindings::new();
    let mut inputs = Vec::with_capacity(slots.len());
    for (slot, port) in slots.into_iter().zip(&signature.inputs) {
        let tensor = slot.ok_or_else(|| {
            ModelError::missing_input(format!("input \"{}\" is missing", port.name))
                .hint(format!("The model needs {}.", signature.inputs_text()))
        })?;
        check_input(port, &tensor, &mut bindings)?;
        inputs.push(tensor);
    }
    Ok(inputs)
}

fn check_input<'a>(port: &'a Port, tensor: &HostTensor, bindings: &mut Bindings<'a>) -> Result<(), ModelError> {
    let wrong = |message: String| {
        ModelError::invalid_input(message).detail(format!(
            "The input is {}; the given tensor is {} of shape {:?}.",
            port.type_text(),
            tensor.dtype,
            tensor.shape
        ))
    };
    let name = &port.name;
    if tensor.dtype != port.dtype {
        return Err(wrong(format!("input \"{name}\" takes {}, not {}", port.dtype, tensor.dtype)));
    }
    if !port.ranked {
        return Ok(());
    }
    if tensor.shape.len() != port.shape.len() {
        return Err(wrong(format!("input \"{name}\" has {} dimensions, not {}", port.shape.len(), tensor.shape.len())));
    }
    for (axis, (&size, dim)) in tensor.shape.iter().zip(&port.shape).enumerate() {
        match dim {
            Dim::Fixed(wanted) if *wanted != size as u64 => {
                return Err(wrong(format!("dimension {axis} of input \"{name}\" must be {wanted}, not {size}")));
            }
            Dim::Symbol(symbol) => {
                let held = bindings.iter().find(|(name, _)| name == symbol).map(|&(_, size)| size);
                let bound = held.unwrap_or_else(|| {
                    bindings.push((symbol, size));
                    size
                });
                if bound != size {
                    return Err(wrong(format!("dimension {axis} of input \"{name}\" must be {bound}, not {size}"))
                        .hint(format!("The dimension \"{symbol}\" has one size for all inputs of a run.")));
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// Executes a compiled form; a large batch in slices, where its rows do not influence each other. `weights` are the bytes
/// of the model's tensors.
pub(super) fn run(
    runnable: &Runnable,
    signature: &Signature,
    inputs: Vec<HostTensor>,
    shapes: &Shapes,
    options: &CompileOptions,
    weights: u64,
    cancel: &AtomicBool,
) -> Result<Vec<(String, HostTensor)>, ModelError> {
    let demand = runnable.demand(shapes)?;
    if let (Some(chain), [input]) = (&runnable.direct, &*inputs)
        && let Some(done) = run_directly(chain, input, signature, cancel)
    {
        return done;
    }
    let values = inputs
        .iter()
        .enumerate()
        .filter(|(input, _)| !runnable.bound.contains(input))
        .map(|(_, tensor)| Ok(tensor.to_engine()?.into_tvalue()))
        .collect::<Result<TVec<TValue>, ModelError>>()?;
    drop(inputs);
    let rows = shapes.first().and_then(|shape| shape.first()).copied().unwrap_or(0);
    let piece = rows_at_a_time(rows, demand.largest, weights);
    let sliced = runnable.rows_are_independent && rows > piece;
    // Of values that come once, the C library makes better use.
    let room = if sliced { options.memory_limit.saturating_sub(demand.peak) } else { 0 };
    let outputs = with_pool(room, || {
        if !sliced {
            return turn(runnable, values, shapes, options, cancel);
        }
        let mut whole: Vec<HostTensor> = vec![];
        for start in (0..rows).step_by(piece) {
            let end = rows.min(start + piece);
            let slice = |value: &TValue| value.slice(0, start, end).map(IntoTValue::into_tvalue);
            let slices = values.iter().map(slice).collect::<TractResult<_>>().map_err(|error| failed(&error))?;
            let mut shapes = shapes.clone();
            shapes.iter_mut().for_each(|shape| shape[0] = end - start);
            let made = turn(runnable, slices, &shapes, options, cancel)?;
            if whole.is_empty() {
                whole = made;
                continue;
            }
            for (whole, piece) in whole.iter_mut().zip(made) {
                whole.append_rows(piece)?;
            }
        }
        Ok(whole)
    })?;
    let named = outputs.into_iter().zip(&signature.outputs);
    named
        .map(|(tensor, port)| {
            if tensor.dtype != port.dtype {
                return Err(ModelError::invalid_model(format!(
                    "output \"{}\" is declared as {} but computed as {}",
                    port.name, port.dtype, tensor.dtype
                )));
            }
            Ok((port.name.clone(), tensor))
        })
        .collect()
}

/// Executes a compiled form once.
fn turn(
    runnable: &Runnable,
    values: TVec<TValue>,
    shapes: &Shapes,
    options: &CompileOptions,
    cancel: &AtomicBool,
) -> Result<Vec<HostTensor>, ModelError> {
    let mut stopped: Option<ModelError> = None;
    let mut spills = weights::source().map(|source| Spills::new(source, options.memory_limit));
    let model = runnable.plan.model();
    let mut state = runnable.plan.spawn().map_err(|error| failed(&error))?;
    let result = state.run_plan_with_eval(values, |context, op_state, node: &TypedNode, inputs| -> TractResult<_> {
        if cancel.load(Ordering::Relaxed) {
            stopped = Some(cancelled());
            bail!("stopped");
        }
        // What it is asked with are the values themselves: one that lies in a file has been read.
        let mut check = |inputs: &[TValue]| {
            if runnable.dynamic[node.id] {
                stopped = check_dynamic(node, inputs, context.symbols, options.memory_limit).err();
            }
            ensure!(stopped.is_none(), "stopped");
            Ok(())
        };
        let made = match &mut spills {
            Some(spills) => spills.run(model, context, op_state, node, inputs, check),
            None => {
                check(&inputs)?;
                eval(context, op_state, node, inputs)
            }
        }?;
        if runnable.only_read[node.id] {
            made.iter().for_each(keep);
        }
        Ok(made)
    });
    let outputs = match (result, stopped) {
        (_, Some(stop)) => return Err(stop),
        (Err(error), None) => return Err(super::blocks::carried(&error).unwrap_or_else(|| failed(&error))),
        (Ok(outputs), None) => outputs,
    };
    let sizes = runnable.symbols(shapes);
    outputs.iter().map(|value| HostTensor::from_engine(value, &sizes)).collect()
}

/// Runs a graph that is one operator on rows where they lie, without the engine. None where it has to be in the way.
fn run_directly(
    chain: &RowChain,
    input: &HostTensor,
    signature: &Signature,
    cancel: &AtomicBool,
) -> Option<Result<Vec<(String, HostTensor)>, ModelError>> {
    let ([port], TensorData::Raw(bytes)) = (&*signature.outputs, &input.data) else { return None };
    let float32 = PortType::Fixed(DType::Float32);
    if input.dtype != float32 || port.dtype != float32 || input.len().checked_mul(size_of::<f32>()) != Some(bytes.len())
    {
        return None;
    }
    let x: &[f32] = bytemuck::try_cast_slice(bytes).ok()?;
    let (k, n) = chain.widths();
    let m = x.len() / k;
    let shape = chain.output_shape::<usize>(&input.shape).to_vec();
    if m * k != x.len() || shape.iter().product::<usize>() != m * n {
        return None;
    }
    let mut raw = vec![0u8; m * n * size_of::<f32>()];
    let out: &mut [f32] = bytemuck::try_cast_slice_mut(&mut raw).ok()?;
    if cancel.load(Ordering::Relaxed) {
        return Some(Err(cancelled()));
    }
    let done = chain.run(x, m, out).map_err(|error| super::blocks::carried(&error).unwrap_or_else(|| failed(&error)));
    let output = HostTensor { dtype: float32, shape, data: TensorData::Raw(raw) };
    Some(done.map(|()| vec![(port.name.clone(), output)]))
}

fn failed(error: &TractError) -> ModelError {
    ModelError::invalid_input("the model cannot compute with these inputs")
        .detail(format!("{error:#}"))
        .hint(INPUT_HINT)
}
