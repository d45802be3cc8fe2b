//! Operators that compute on blocks instead of on constants of the plan.
//!
//! Responsible for: [`StoredConst`], which stands for a stored tensor while a graph is compiled, and [`replace`], which
//! exchanges the operators that use one for block operators. Products with smaller constants become the same operators,
//! which then hold their matrix ([`held`]), and rows of such operators one ([`chain`]). A stored tensor with a use that no block operator has is
//! told by its ordinal, and the graph is compiled again with that tensor inline.
//!
//! Invariant: no [`StoredConst`] is left in a graph that runs.

mod chain;
mod fuse;
mod held;
mod lookup;
mod product;
mod view;

use crate::error::ModelError;
use crate::tensor::{engine_of_dtype, engine_tensor};
use crate::weights::{StoredTensor, for_each_block};
use std::collections::BTreeSet;
use tensor_blocks::DType;
use tract_onnx::tract_core::ops::array::Gather;
use tract_onnx::tract_core::ops::einsum::EinSum;
use tract_onnx::tract_core::ops::konst::Const;
use tract_onnx::tract_hir::internal::*;
use view::StoredView;

pub(super) use chain::RowChain;
pub(super) use product::{BlockProduct, Matrix};

pub(in crate::plan) use lookup::short_block;

/// A tensor that lies in blocks, as a node of a graph that is being compiled. It has no value of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct StoredConst {
    pub tensor: StoredTensor,
}

impl StoredConst {
    fn fact(&self) -> TractResult<TypedFact> {
        let datum_type =
            engine_of_dtype(self.tensor.dtype()).context("an element type that cannot be computed with")?;
        Ok(datum_type.fact(&*self.tensor.dims))
    }
}

impl Op for StoredConst {
    fn name(&self) -> StaticName {
        "StoredConst".into()
    }

    op_as_typed_op!();
}

impl EvalOp for StoredConst {
    not_out_of_plan!();
}

impl TypedOp for StoredConst {
    as_op!();

    fn output_facts(&self, _: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        Ok(tvec!(self.fact()?))
    }
}

impl Expansion for StoredConst {
    fn name(&self) -> StaticName {
        "StoredConst".into()
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        solver: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        check_input_arity(inputs, 0)?;
        check_output_arity(outputs, 1)?;
        let fact = self.fact()?;
        solver.equals(&outputs[0].datum_type, fact.datum_type)?;
        solver.equals(&outputs[0].shape, fact.shape.to_tvec())
    }

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        model.wire_node(prefix, self.clone(), inputs)
    }

    fn runs_out_of_plan(&self) -> bool {
        false
    }
}

/// Carries an error of ours through tract.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Carried(pub ModelError);

/// The error that a block operator met, if `error` carries one.
pub(super) fn carried(error: &TractError) -> Option<ModelError> {
    error.chain().find_map(|cause| cause.downcast_ref::<Carried>()).map(|carried| carried.0.clone())
}

pub(super) fn carry<T>(result: Result<T, ModelError>) -> TractResult<T> {
    result.map_err(|error| TractError::from(Carried(error)))
}

/// Exchanges the users of stored tensors for block operators. Returns the ordinals of the tensors that have to be inline.
pub(super) fn replace(model: &mut TypedModel) -> TractResult<BTreeSet<u32>> {
    let mut inline = BTreeSet::new();
    let stored: Vec<(usize, StoredTensor)> = model
        .nodes
        .iter()
        .filter_map(|node| node.op_as::<StoredConst>().map(|stored| (node.id, stored.tensor.clone())))
        .collect();
    for (id, tensor) in stored {
        let view = StoredView::of(&tensor.dims);
        if !replace_users(model, OutletId::new(id, 0), &tensor, &view)? {
            inline.insert(tensor.ordinal);
        }
    }
    if inline.is_empty() {
        held::replace(model)?;
        fuse::fuse(model)?;
        chain::place(model)?;
        model.compact()?;
        if let Some(node) = model.nodes.iter().find(|node| node.op_is::<StoredConst>()) {
            bail!("a stored tensor is left: {}", node.name);
        }
    }
    Ok(inline)
}

/// Makes these stored tensors constants, put together from their blocks.
///
/// # Errors
/// `TooLarge` beyond `limit` bytes, and what the source of blocks gives.
pub(super) fn put_inline(model: &mut TypedModel, ordinals: &BTreeSet<u32>, limit: u64) -> Result<(), ModelError> {
    for node in &mut model.nodes {
        let Some(tensor) = node.op_as::<StoredConst>().map(|stored| stored.tensor.clone()) else { continue };
        if !ordinals.contains(&tensor.ordinal) {
            continue;
        }
        let tiling = &tensor.tiling;
        if tiling.byte_len() as u64 > limit {
            return Err(ModelError::too_large("a tensor is larger than a run may be"));
        }
        let tiles: Vec<_> = tiling.tiles().collect();
        let numbers: Vec<u32> = (0..tiles.len() as u32).collect();
        let mut bytes = vec![0; tiling.byte_len()];
        for_each_block(&tensor, &numbers, |at, block| {
            tiling.scatter(tiles[at], block, &mut bytes).map_err(|error| ModelError::internal(error.to_string()))
        })?;
        let value = Arc::new(engine_tensor(tensor.dtype(), &tensor.dims, &bytes)?);
        let wrong = |error: TractError| ModelError::internal(format!("placing a tensor: {error:#}"));
        node.outputs[0].fact = TypedFact::try_from(value.clone()).map_err(wrong)?;
        node.op = Box::new(Const::new(value).map_err(wrong)?);
    }
    Ok(())
}

/// Replaces all users of `outlet`, which is a view of the tensor. False if one of them has no block operator.
fn replace_users(
    model: &mut TypedModel,
    outlet: OutletId,
    tensor: &StoredTensor,
    view: &StoredView,
) -> TractResult<bool> {
    if model.outputs.contains(&outlet) {
        return Ok(false);
    }
    let users: Vec<InletId> = model.outlet_successors(outlet).to_vec();
    for inlet in users {
        let node = &model.nodes[inlet.node];
        let made: Option<(Box<dyn TypedOp>, OutletId)> = if let Some(change) = node.op_as::<AxisOp>() {
            let Some(changed) = view.change(change) else { return Ok(false) };
            if !replace_users(model, OutletId::new(inlet.node, 0), tensor, &changed)? {
                return Ok(false);
            }
            continue;
        } else if let Some(einsum) = node.op_as::<EinSum>() {
            let other = 1 - inlet.slot.min(1);
            match node.inputs.get(other) {
                Some(&input) if node.inputs.len() == 2 && input != outlet => {
                    let fact = model.outlet_fact(input)?;
                    let fits = tensor.dtype() == DType::Float32 && !tensor.dims.contains(&0);
                    view::matrix_axes(tensor)
                        .filter(|_| fits)
                        .and_then(|axes| {
                            let matrix = |transposed| Matrix::Stored(tensor.clone(), transposed);
                            product::product(einsum, inlet.slot, fact, view, axes, matrix)
                        })
                        .map(|op| (Box::new(op) as Box<dyn TypedOp>, input))
                }
                _ => None,
            }
        } else if let Some(gather) = node.op_as::<Gather>() {
            let data = inlet.slot == 0 && node.inputs[1] != outlet;
            lookup::lookup(gather, tensor, view)
                .filter(|_| data)
                .map(|op| (Box::new(op) as Box<dyn TypedOp>, node.inputs[1]))
        } else {
            None
        };
        let Some((op, input)) = made else { return Ok(false) };
        let name = node.name.clone();
        let wanted = node.outputs[0].fact.without_value();
        let mut patch = TypedModelPatch::default();
        let tap = patch.tap_model(model, input)?;
        let wires = patch.wire_node(name, op, &[tap])?;
        let made = patch.outlet_fact(wires[0])?.without_value();
        if made.datum_type != wanted.datum_type || made.shape != wanted.shape {
            return Ok(false);
        }
        patch.shunt_outside(model, OutletId::new(inlet.node, 0), wires[0])?;
        patch.apply(model)?;
    }
    Ok(true)
}
