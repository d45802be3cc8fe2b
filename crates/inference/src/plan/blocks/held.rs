//! Products with constants of the plan, in the places of tract's.
//!
//! Responsible for: the [`BlockProduct`] that holds its matrix, where one side of an EinSum is a float32 constant and rows are
//! contiguous on both sides; other products stay tract's.

use super::product::{BlockProduct, Matrix, product};
use super::view::StoredView;
use crate::kernels::dense::Dense;
use crate::kernels::gemm::Operand;
use std::collections::HashMap;
use tract_onnx::tract_core::ops::einsum::EinSum;
use tract_onnx::tract_hir::internal::*;

/// Matrices that are made, by the constant's address, where its axes are split, and whether it is transposed. They keep the
/// constants, so that an address stays that of one.
type Made = HashMap<(*const Tensor, usize, bool), (Arc<Tensor>, Arc<Dense>)>;

/// Exchanges the products of a graph. A constant that several have is held once.
pub(super) fn replace(model: &mut TypedModel) -> TractResult<()> {
    let mut made = Made::new();
    for id in 0..model.nodes.len() {
        let Some((op, input)) = held(model, &model.nodes[id], &mut made)? else { continue };
        let node = &model.nodes[id];
        let wanted = node.outputs[0].fact.without_value();
        let mut patch = TypedModelPatch::default();
        let tap = patch.tap_model(model, input)?;
        let wires = patch.wire_node(node.name.clone(), op, &[tap])?;
        let made = patch.outlet_fact(wires[0])?;
        if made.datum_type != wanted.datum_type || made.shape != wanted.shape {
            continue;
        }
        patch.shunt_outside(model, id.into(), wires[0])?;
        patch.apply(model)?;
    }
    Ok(())
}

/// The operator for a node, and which of its inputs it takes.
fn held(model: &TypedModel, node: &TypedNode, made: &mut Made) -> TractResult<Option<(BlockProduct, OutletId)>> {
    let (Some(einsum), &[_, _]) = (node.op_as::<EinSum>(), &*node.inputs) else { return Ok(None) };
    for slot in [1, 0] {
        let (constant, input) = (model.outlet_fact(node.inputs[slot])?, model.outlet_fact(node.inputs[1 - slot])?);
        let Some(tensor) = constant.konst.as_ref().filter(|_| input.konst.is_none()) else { continue };
        if tensor.datum_type() != f32::datum_type() || tensor.len() == 0 {
            continue;
        }
        let Ok(plain) = tensor.try_as_plain_ram() else { continue };
        let values = plain.as_slice::<f32>()?;
        let dims = tensor.shape();
        let view = StoredView::of(dims);
        for split in (0..=dims.len()).rev() {
            let axes = ((0..split).collect(), (split..dims.len()).collect());
            let (rows, cols): (usize, usize) = (dims[..split].iter().product(), dims[split..].iter().product());
            let matrix = |transposed: bool| {
                let (k, n, from) = match transposed {
                    true => (cols, rows, Operand::transposed(values, cols)),
                    false => (rows, cols, Operand::row_major(values, cols)),
                };
                let known = made.entry((Arc::as_ptr(tensor), split, transposed));
                let (_, dense) = known.or_insert_with(|| (tensor.clone(), Arc::new(Dense::new(k, n, from))));
                Matrix::Held(dense.clone())
            };
            let op = product(einsum, slot, input, &view, axes, matrix);
            if let Some(op) = op {
                return Ok(op.is_row_by_row().then(|| (op, node.inputs[1 - slot])));
            }
        }
    }
    Ok(None)
}
