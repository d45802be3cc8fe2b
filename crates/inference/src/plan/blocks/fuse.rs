//! Bias and activation as a part of the product before them.
//!
//! Responsible for: taking an addition of a constant row, and a function of one value, into the [`BlockProduct`] whose
//! only user they are: they cost a pass over memory each where they stand alone.

use super::product::BlockProduct;
use crate::kernels::epilogue::Activation;
use tract_onnx::tract_core::ops::binary::TypedBinOp;
use tract_onnx::tract_core::ops::element_wise::ElementWiseOp;
use tract_onnx::tract_hir::internal::*;

/// Takes up what follows the products of a graph.
pub(super) fn fuse(model: &mut TypedModel) -> TractResult<()> {
    let mut id = 0;
    while id < model.nodes.len() {
        if let Some((user, op)) = fused(model, id)? {
            let node = &model.nodes[id];
            let (name, input) = (model.nodes[user].name.clone(), node.inputs[0]);
            let mut patch = TypedModelPatch::default();
            let tap = patch.tap_model(model, input)?;
            let wires = patch.wire_node(name, op, &[tap])?;
            patch.shunt_outside(model, OutletId::new(user, 0), wires[0])?;
            patch.apply(model)?;
            // The new node comes last, so it is looked at again.
        }
        id += 1;
    }
    Ok(())
}

/// The product of this node with what its only user does, and the user.
fn fused(model: &TypedModel, id: usize) -> TractResult<Option<(usize, BlockProduct)>> {
    let node = &model.nodes[id];
    let Some(product) = node.op_as::<BlockProduct>() else { return Ok(None) };
    let outlet = OutletId::new(id, 0);
    let &[inlet] = &*node.outputs[0].successors else { return Ok(None) };
    if model.outputs.contains(&outlet) {
        return Ok(None);
    }
    let user = &model.nodes[inlet.node];
    if user.outputs.len() != 1 || user.outputs[0].fact.shape != node.outputs[0].fact.shape {
        return Ok(None);
    }
    let mut op = product.clone();
    if let Some(binary) = user.op_as::<TypedBinOp>() {
        let constant = model.outlet_fact(user.inputs[1 - inlet.slot])?.konst.clone();
        let Some(constant) = constant.filter(|it| it.datum_type() == f32::datum_type()) else { return Ok(None) };
        let fits = match binary.0.name() {
            "Add" if op.bias.is_none() && op.activation == Activation::Identity => {
                op.bias = row_of(&op, &constant)?;
                op.bias.is_some()
            }
            // What is not a number stays so, as ONNX's Relu has it.
            "Max" if op.activation == Activation::Identity && constant.len() == 1 => {
                op.activation = Activation::Relu;
                *constant.try_as_plain_ram()?.as_slice::<f32>()?.first().unwrap_or(&1.0) == 0.0
            }
            _ => false,
        };
        return Ok(fits.then_some((inlet.node, op)));
    }
    let Some(function) = user.op_as::<ElementWiseOp>() else { return Ok(None) };
    if op.activation != Activation::Identity {
        return Ok(None);
    }
    op.activation = match &*function.0.name() {
        "Sigmoid" => Activation::Sigmoid,
        "Tanh" => Activation::Tanh,
        "GeluExact" => Activation::Gelu,
        "Silu" => Activation::Silu,
        _ => return Ok(None),
    };
    Ok(Some((inlet.node, op)))
}

/// The N values that this constant adds to each row of the product's output, if it does so.
fn row_of(product: &BlockProduct, constant: &Arc<Tensor>) -> TractResult<Option<Arc<Tensor>>> {
    let n = match &*product.columns {
        // One column is no axis of the matrix.
        [] if constant.len() == 1 => return one_row((**constant).clone(), 1),
        &[n] => n,
        _ => return Ok(None),
    };
    let last = product.output_order.last() == Some(&Some(product.leading));
    let (size, outer) = match constant.shape().split_last() {
        Some((&size, outer)) => (size, outer),
        None => (1, &[][..]),
    };
    if !last || !product.output_lies_right() || outer.iter().any(|&dim| dim != 1) || (size != n && size != 1) {
        return Ok(None);
    }
    if size == n {
        return one_row((**constant).clone(), n);
    }
    let value =
        constant.try_as_plain_ram()?.as_slice::<f32>()?.first().copied().context("a constant without elements")?;
    one_row(tensor1(&vec![value; n]), n)
}

fn one_row(mut row: Tensor, n: usize) -> TractResult<Option<Arc<Tensor>>> {
    row.set_shape(&[n])?;
    Ok(Some(row.into_arc_tensor()))
}
