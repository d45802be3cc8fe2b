//! Shape and type inference with bounded memory.
//!
//! Responsible for: bringing an inference model to the fixpoint that tract's own analysis would reach, while looking
//! at each constant before it is computed. tract evaluates an operator whose inputs are all known while it infers
//! shapes, and asks only afterwards how large the result was: a model of a hundred bytes could so take all memory,
//! and a failed allocation aborts the server.
//!
//! Invariant: after [`analyse`] every value that tract's analysis computes from constants is known to fit the limit.

use super::build::failure;
use crate::error::ModelError;
use crate::worker::cancelled;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use tract_onnx::tract_hir::internal::*;

/// Visits per node after which a graph whose facts keep changing is given up.
const VISITS_PER_NODE: usize = 200;

/// Infers the facts of every node.
///
/// # Errors
/// `TooLarge` for a constant beyond `limit` bytes, `Cancelled`, `InvalidModel` where types or shapes contradict.
pub(super) fn analyse(model: &mut InferenceModel, limit: u64, cancel: &AtomicBool) -> Result<(), ModelError> {
    let order = model.eval_order().map_err(|error| failure("ordering the graph", &error))?;
    let mut rank = vec![usize::MAX; model.nodes.len()];
    for (place, node) in order.iter().enumerate() {
        rank[*node] = place;
    }
    let mut waiting: BTreeSet<(usize, usize)> = order.iter().map(|&node| (rank[node], node)).collect();
    let mut visits = order.len() * VISITS_PER_NODE;
    while let Some((_, id)) = waiting.pop_first() {
        if cancel.load(Ordering::Acquire) {
            return Err(cancelled());
        }
        visits -= 1;
        if visits == 0 {
            return Err(ModelError::invalid_model("the shapes of the graph do not settle"));
        }
        for changed in visit(model, id, limit)? {
            let observers = model.nodes[changed.node].outputs[changed.slot].successors.iter().map(|inlet| inlet.node);
            for node in observers.chain([changed.node]) {
                if node != id && rank[node] != usize::MAX {
                    waiting.insert((rank[node], node));
                }
            }
        }
    }
    Ok(())
}

/// Infers what one node says about its edges, and returns the edges that are known better now.
fn visit(model: &mut InferenceModel, id: usize, limit: u64) -> Result<Vec<OutletId>, ModelError> {
    let name = model.nodes[id].name.clone();
    let wrong = |error: TractError| failure(&format!("inferring the shapes of node \"{name}\""), &error);
    let facts = |model: &InferenceModel, outlets: &[OutletId]| -> TractResult<TVec<InferenceFact>> {
        outlets.iter().map(|outlet| model.outlet_fact(*outlet).cloned()).collect()
    };
    let inputs: Vec<OutletId> = model.nodes[id].inputs.clone();
    let outputs: Vec<OutletId> = (0..model.nodes[id].outputs.len()).map(|slot| OutletId::new(id, slot)).collect();
    let observed = model.nodes[id].op.observe_outlets(model, &model.nodes[id]).map_err(wrong)?;
    let edges = [inputs, outputs, observed];
    let mut known = Vec::with_capacity(3);
    for outlets in &edges {
        known.push(facts(model, outlets).map_err(wrong)?);
    }
    let expected = model.nodes[id].op.nboutputs().map_err(wrong)?;
    if expected != edges[1].len() {
        return Err(ModelError::invalid_model(format!(
            "node \"{name}\" has {} outputs where its operator has {expected}",
            edges[1].len()
        )));
    }
    let op = &mut model.nodes[id].op;
    let (known_in, known_out, known_seen) = (&known[0], &known[1], &known[2]);
    // First without evaluating anything.
    let mut inferred = op
        .infer_facts(known_in.iter().collect(), known_out.iter().collect(), known_seen.iter().collect())
        .map_err(wrong)?;
    // tract computes what is known in whole; for the rest these facts are final.
    let computes = !inferred.0.is_empty() && inferred.0.iter().all(|fact| fact.value.is_concrete());
    if computes {
        let bytes = inferred.1.iter().map(bytes_of).try_fold(0u64, |sum, bytes| sum.checked_add(bytes?));
        if bytes.is_none_or(|bytes| bytes > limit) {
            return Err(ModelError::too_large(format!("node \"{name}\" computes a constant beyond the memory limit"))
                .detail(format!("The limit is {limit} bytes.")));
        }
    }
    beyond_dimensions(&name, &op.name(), &inferred.0)?;
    if computes {
        inferred = op
            .infer(known_in.iter().collect(), known_out.iter().collect(), known_seen.iter().collect())
            .map_err(wrong)?;
    }
    let (in_facts, out_facts, seen_facts) = inferred;
    if !holds_for_all_sizes(&**op, &in_facts, &out_facts) {
        return Err(ModelError::invalid_model(format!("node \"{name}\" depends on the size of a free dimension")));
    }
    let mut changed = Vec::new();
    for (outlets, inferred) in edges.iter().zip([in_facts, out_facts, seen_facts]) {
        for (&outlet, fact) in outlets.iter().zip(inferred) {
            // Read again: an outlet may be on several edges of the node.
            let old = model.outlet_fact(outlet).map_err(wrong)?;
            let unified = fact.unify(old).map_err(wrong)?;
            if unified != *old {
                model.set_outlet_fact(outlet, unified).map_err(wrong)?;
                changed.push(outlet);
            }
        }
    }
    Ok(changed)
}

/// Bytes of a value of this fact; none where it is not known or does not fit, 0 where it has a free dimension and is
/// not computed now.
fn bytes_of(fact: &InferenceFact) -> Option<u64> {
    let (datum_type, shape) = (fact.datum_type.concretize()?, fact.shape.concretize()?);
    let mut bytes = datum_type.size_of() as u64;
    for dim in shape {
        match dim.to_i64() {
            Ok(size) => bytes = bytes.checked_mul(u64::try_from(size).ok()?)?,
            Err(_) => return Some(0),
        }
    }
    Some(bytes)
}

/// Refuses shapes beyond 32 bits: tract would take them modulo 2^32.
fn beyond_dimensions(node: &str, operator: &str, inputs: &TVec<InferenceFact>) -> Result<(), ModelError> {
    const SIZED: &[&str] = &[
        "ConstantOfShape",
        "MultiBroadcastTo",
        "Reshape",
        "Tile",
        "OneHot",
        "Pad",
        "Range",
        "Resize",
        "Topk",
        "Stft",
        "STFT",
        "Dft",
        "MelWeightMatrix",
        "Split",
    ];
    if !SIZED.iter().any(|sized| operator.starts_with(sized)) {
        return Ok(());
    }
    for value in inputs.iter().filter_map(|fact| fact.value.concretize()) {
        let large = value.datum_type() == DatumType::I64
            && value
                .try_as_plain_ram()
                .and_then(|view| Ok(view.as_slice::<i64>()?.iter().any(|size| i32::try_from(*size).is_err())))
                .unwrap_or(false);
        if large && value.rank() <= 1 {
            return Err(ModelError::too_large(format!("node \"{node}\" has a dimension beyond 2^31"))
                .detail(format!("Operator {operator}.")));
        }
    }
    Ok(())
}

/// Sizes that stand for all: the smallest, equal ones, and different ones, small and large.
const SAMPLES: [fn(i64) -> i64; 4] = [|_| 1, |_| 2, |place| 3 + 4 * place, |place| 100_003 + 10 * place];

/// tract compares a free dimension with another value by how it is written: two that may be equal are called
/// different. This computes such a truth value for sample sizes; if it is not the same for all, the graph has to be
/// compiled for concrete shapes.
fn holds_for_all_sizes(op: &dyn InferenceOp, inputs: &TVec<InferenceFact>, outputs: &TVec<InferenceFact>) -> bool {
    let truths: Vec<Arc<Tensor>> = outputs.iter().filter_map(|fact| fact.value.concretize()).collect();
    if truths.len() != outputs.len() || truths.iter().any(|truth| truth.datum_type() != DatumType::Bool) {
        return true;
    }
    let Some(values) = inputs.iter().map(|fact| fact.value.concretize()).collect::<Option<Vec<_>>>() else {
        return true;
    };
    let mut symbols: Vec<Symbol> = Vec::new();
    for value in values.iter().filter(|value| value.datum_type() == DatumType::TDim) {
        let Ok(view) = value.try_as_plain_ram() else { continue };
        for symbol in view.as_slice::<TDim>().unwrap_or(&[]).iter().flat_map(|dim| dim.symbols()) {
            if !symbols.contains(&symbol) {
                symbols.push(symbol);
            }
        }
    }
    if symbols.is_empty() {
        return true;
    }
    let samples = SAMPLES.iter().map(|size| (0..symbols.len()).map(|place| size(place as i64)).collect());
    let samples: Vec<Vec<i64>> = samples.chain(turning_points(&values, &symbols)).collect();
    samples.iter().all(|sizes| {
        let mut of_symbols = SymbolValues::default();
        for (symbol, size) in symbols.iter().zip(sizes) {
            of_symbols.set(symbol, *size);
        }
        let sample = |value: &Arc<Tensor>| -> TractResult<TValue> {
            let mut value = (**value).clone();
            if value.datum_type() == DatumType::TDim {
                for dim in value.try_as_plain_ram_mut()?.as_slice_mut::<TDim>()? {
                    *dim = dim.eval(&of_symbols);
                }
            }
            Ok(value.into_tvalue())
        };
        let computed = values.iter().map(sample).collect::<TractResult<TVec<TValue>>>();
        match computed.and_then(|values| op.eval_out_of_plan(values)) {
            Ok(Some(computed)) => computed.iter().zip(&truths).all(|(computed, truth)| **computed == **truth),
            _ => false,
        }
    })
}

/// Sizes at which a comparison of these values may turn: where a size that grows evenly with one symbol comes to one of the
/// numbers among the values, and beside that.
fn turning_points(values: &[Arc<Tensor>], symbols: &[Symbol]) -> Vec<Vec<i64>> {
    let (mut numbers, mut free) = (Vec::new(), Vec::new());
    for value in values {
        let Ok(dims) = value.cast_to::<TDim>() else { continue };
        let Ok(view) = dims.try_as_plain_ram() else { continue };
        for dim in view.as_slice::<TDim>().unwrap_or(&[]) {
            match dim.to_i64() {
                Ok(number) => numbers.push(number),
                Err(_) => free.push(dim.clone()),
            }
        }
    }
    let usual: Vec<i64> = (0..symbols.len()).map(|place| SAMPLES[0](place as i64)).collect();
    let with = |place: usize, size: i64| {
        let mut sizes = usual.clone();
        sizes[place] = size;
        sizes
    };
    let at = |dim: &TDim, sizes: &[i64]| {
        let mut of_symbols = SymbolValues::default();
        for (symbol, size) in symbols.iter().zip(sizes) {
            of_symbols.set(symbol, *size);
        }
        dim.eval(&of_symbols).to_i64().ok()
    };
    let mut points = Vec::new();
    for dim in &free {
        for place in 0..symbols.len() {
            let (Some(one), Some(two)) = (at(dim, &with(place, 1)), at(dim, &with(place, 2))) else { continue };
            let slope = two.saturating_sub(one);
            for number in numbers.iter().filter(|_| slope != 0) {
                let size = number.saturating_sub(one).div_euclid(slope).saturating_add(1);
                points.extend([-1, 0, 1].map(|by| size.saturating_add(by)).into_iter().filter(|size| *size > 0));
            }
            points.sort_unstable();
            points.dedup();
        }
    }
    let sizes = points.into_iter().flat_map(|size| (0..symbols.len()).map(move |place| (place, size)));
    sizes.map(|(place, size)| with(place, size)).collect()
}
