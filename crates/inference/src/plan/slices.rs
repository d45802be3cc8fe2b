//! Large batches of pictures, in slices.
//!
//! Responsible for: finding that the rows of a batch do not influence each other ([`batch_of`]), and how many rows a run
//! should have at a time ([`rows_at_a_time`]). The values of a slice stay in the caches from one operator to the next, and their memory
//! serves the next slice ([`pool`](super::pool)).
//!
//! Invariant: a graph is cut only if every operator is known to map the batch, the first axis of every value that has it, one to
//! one. What is not known is not cut.

use super::conv::Convolution;
use super::names::Names;
use super::spill::sliced_inputs;
use tract_onnx::tract_core::ops::array::{Slice, TypedConcat};
use tract_onnx::tract_core::ops::cnn::{MaxPool, SumPool};
use tract_onnx::tract_core::ops::einsum::EinSum;
use tract_onnx::tract_core::ops::konst::Const;
use tract_onnx::tract_core::ops::source::TypedSource;
use tract_onnx::tract_hir::internal::*;

/// Bytes of the largest value of a slice, about: what the caches of a processor hold in part.
const LARGEST: u64 = 4 << 20;

/// The symbol of the batch, if the graph has convolutions and its rows do not influence each other. The graph is one that
/// tract has not yet chosen kernels for.
pub(super) fn batch_of(model: &TypedModel, names: &Names) -> Option<Symbol> {
    let first = names.batch()?.clone();
    if !model.nodes.iter().any(|node| node.op_is::<Convolution>()) {
        return None;
    }
    let order = model.eval_order().ok()?;
    let independent = order.iter().all(|&id| maps_rows(model, &model.nodes[id], &first).unwrap_or(false));
    // All inputs are cut, and all outputs put together.
    let mut ends = model.inputs.iter().chain(&model.outputs);
    let cut = ends.all(|outlet| has_batch(model.outlet_fact(*outlet).ok(), &first) == Some(true));
    (independent && cut).then_some(first)
}

/// Whether the first axis is the batch, and no other has to do with it; none for other values.
fn has_batch(fact: Option<&TypedFact>, batch: &Symbol) -> Option<bool> {
    let fact = fact?;
    let free = |dim: &TDim| !dim.symbols().contains(batch);
    // Sizes that are computed as values may count rows.
    if fact.datum_type == DatumType::TDim || fact.is_exotic() {
        return None;
    }
    let (head, rest): (Option<&TDim>, Vec<&TDim>) = {
        let mut dims = fact.shape.iter();
        (dims.next(), dims.collect())
    };
    if !rest.into_iter().all(free) {
        return None;
    }
    match head {
        Some(head) if *head == batch.to_dim() => Some(true),
        Some(head) if !free(head) => None,
        _ => Some(false),
    }
}

/// Whether a node maps rows one to one; none where that is not known.
fn maps_rows(model: &TypedModel, node: &TypedNode, batch: &Symbol) -> Option<bool> {
    let inputs = model.node_input_facts(node.id).ok()?;
    let made: Option<Vec<bool>> = node.outputs.iter().map(|output| has_batch(Some(&output.fact), batch)).collect();
    let (made, given) = (made?, inputs.iter().map(|fact| has_batch(Some(fact), batch)).collect::<Option<Vec<bool>>>()?);
    if node.op_is::<TypedSource>() || node.op_is::<Const>() {
        return Some(true);
    }
    if !given.contains(&true) {
        return Some(!made.contains(&true));
    }
    if made.contains(&false) {
        return Some(false);
    }
    let ranks: Vec<usize> = inputs.iter().map(|fact| fact.rank()).collect();
    let is_one = |input: usize, axis: usize| inputs[input].shape.get(axis).is_some_and(|dim| dim.is_one());
    if let Some(axes) = sliced_inputs(node, 0, &ranks, &is_one) {
        return Some(axes.iter().zip(&given).all(|(axis, &given)| *axis == given.then_some(0)));
    }
    // Pools tell nothing of their axes, but have images where they have channels first.
    let pool = node.op_as::<MaxPool>().map(|pool| &pool.pool_spec);
    let pool = pool.or_else(|| node.op_as::<SumPool>().map(|pool| &pool.pool_spec));
    if let Some(pool) = pool {
        return Some(pool.data_format.has_n());
    }
    let known =
        node.op_is::<AxisOp>() || node.op_is::<EinSum>() || node.op_is::<Slice>() || node.op_is::<TypedConcat>();
    if !known {
        return None;
    }
    let outputs: TVec<&TypedFact> = node.outputs.iter().map(|output| &output.fact).collect();
    let mapping = node.op.axes_mapping(&inputs, &outputs).ok()?;
    let axis = mapping.axis((InOut::Out(0), 0)).ok()?;
    let through = |input: usize, given: bool| match &*axis.inputs[input] {
        [] => !given,
        [0] => given,
        _ => false,
    };
    let inputs = given.iter().enumerate().all(|(input, &given)| through(input, given));
    Some(inputs && axis.outputs.iter().all(|places| **places == [0]))
}

/// Rows of a slice of a batch of `rows`, whose largest value has `largest` bytes; `weights` are read once a slice.
pub(super) fn rows_at_a_time(rows: usize, largest: u64, weights: u64) -> usize {
    let row = (largest / rows.max(1) as u64).max(1);
    // Reading the weights again costs what reading as many values does, so there should be more of these.
    let wanted = usize::try_from(LARGEST.max(weights / 2) / row).unwrap_or(usize::MAX).max(1);
    // As even as can be.
    rows.div_ceil(rows.div_ceil(wanted).max(1)).max(1)
}
