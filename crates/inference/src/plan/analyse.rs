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
    let (in_facts, out_facts, _) = op
        .infer_facts(known_in.iter().collect(), known_out.iter().collect(), known_seen.iter().collect())
        .map_err(wrong)?;
    if in_facts.iter().all(|fact| fact.value.is_concrete()) {
        let bytes = out_facts.iter().map(bytes_of).fold(Some(0u64), |sum, bytes| sum?.checked_add(bytes?));
        if bytes.is_none_or(|bytes| bytes > limit) {
            return Err(ModelError::too_large(format!("node \"{name}\" computes a constant beyond the memory limit"))
                .detail(format!("The limit is {limit} bytes.")));
        }
    }
    let (in_facts, out_facts, seen_facts) = op
        .infer(known_in.iter().collect(), known_out.iter().collect(), known_seen.iter().collect())
        .map_err(wrong)?;
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

/// Bytes of a value of this fact; 0 where type or shape is not known, none where they do not fit.
fn bytes_of(fact: &InferenceFact) -> Option<u64> {
    let (Some(datum_type), Some(shape)) = (fact.datum_type.concretize(), fact.shape.concretize()) else { return Some(0) };
    let mut bytes = datum_type.size_of() as u64;
    for dim in shape {
        match dim.to_i64() {
            Ok(size) => bytes = bytes.checked_mul(u64::try_from(size).ok()?)?,
            Err(_) => return Some(0),
        }
    }
    Some(bytes)
}
