//! Operators of a typed graph that tract computes wrongly for some values.
//!
//! Responsible for: putting corrected operators in the places of those that tract wires by itself. What a graph asks
//! for by name is corrected where it is read: constants are folded long before this.

use super::cast::ToDim;
use super::reduce::Extreme;
use tract_onnx::tract_core::ops::cast::Cast;
use tract_onnx::tract_core::ops::nn::{Reduce, Reducer};
use tract_onnx::tract_hir::internal::*;

/// Replaces operators in place.
pub(super) fn repair(model: &mut TypedModel) {
    for id in 0..model.nodes.len() {
        let exact = model.nodes[id].op_as::<Cast>().and_then(|op| {
            let from = model.outlet_fact(model.nodes[id].inputs[0]).ok()?.datum_type;
            ToDim::instead_of(op, from)
        });
        let node = &mut model.nodes[id];
        if let Some(exact) = exact {
            node.op = Box::new(exact);
            continue;
        }
        if let Some(reduce) = node.op_as::<Reduce>()
            && matches!(reduce.reducer, Reducer::Max | Reducer::Min)
            && node.outputs.iter().all(|outlet| outlet.fact.datum_type.is_float())
        {
            node.op = Box::new(Extreme(reduce.clone()));
        }
    }
}
