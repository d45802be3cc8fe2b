//! Graphs that are better compiled for concrete shapes than once for all.

use super::names::Names;
use tract_onnx::tract_core::ops::binary::TypedBinOp;
use tract_onnx::tract_hir::internal::*;

/// True where pictures of free sizes are multiplied with one number for each channel: tract walks them element by element
/// where it does not know how many pixels take the same number, and the algebra of their sizes takes long to compile.
pub(super) fn scales_free_pictures(model: &TypedModel, names: &Names) -> bool {
    let pictures = |symbol: &Symbol| names.batch() != Some(symbol);
    let convolutions = model.nodes.iter().any(|node| node.op_is::<super::conv::Convolution>());
    convolutions
        && model.nodes.iter().filter(|node| node.op_is::<TypedBinOp>()).any(|node| {
            let Ok(facts) = model.node_input_facts(node.id) else { return false };
            let free = |dim: &TDim| dim.symbols().iter().any(pictures);
            let whole = facts.iter().any(|fact| fact.rank() > 2 && fact.shape.iter().skip(2).any(free));
            let scale = |fact: &&TypedFact| {
                let ones = fact.rank() > 2 && fact.shape.iter().skip(2).all(|dim| dim.is_one());
                ones && !fact.shape[0].is_one()
            };
            whole && facts.iter().any(scale)
        })
}

/// True where tract is several times slower with a free dimension than without: those convolutions that are not ours.
pub(super) fn wants_concrete_shapes(model: &TypedModel) -> bool {
    model.nodes.iter().any(|node| matches!(&*node.op.name(), "Conv" | "Deconv"))
}
