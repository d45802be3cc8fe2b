//! Layer normalisation as one operator.
//!
//! Responsible for: [`LayerNorm`], which ONNX's operator becomes at once where its scale and bias are known, because tract has
//! 16 nodes for it that a compilation would have to simplify; in the place of its parts (sum, mean, difference, root mean
//! square, scale, bias) where a graph has those; and of the addition of a residual before it.
//!
//! ```text
//!   a [+ b] = x;  sum(x) * 1/N = mean;  x - mean = d;  d / sqrt(mean(d²) + ε) [* scale] [+ bias]
//! ```
//!
//! Invariant: only parts whose values nothing else uses are taken.

use super::sum::WideSum;
use crate::kernels::normal;
use std::sync::LazyLock;
use tract_onnx::model::ParsingContext;
use tract_onnx::pb::NodeProto;
use tract_onnx::tract_core::ops::binary::TypedBinOp;
use tract_onnx::tract_core::ops::nn::{Reduce, Reducer, RmsNorm};
use tract_onnx::tract_hir::internal::*;

/// Normalises along the last axis; a second input is added first.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct LayerNorm {
    pub epsilon: f32,
    /// As many values as a row has.
    pub scale: Arc<Tensor>,
    pub bias: Arc<Tensor>,
}

impl Eq for LayerNorm {}

/// ONNX LayerNormalization as tract has it, and what its attributes say of it.
#[derive(Clone, Debug)]
struct Normalization {
    parts: Box<dyn Expansion>,
    epsilon: f32,
    /// Along the last axis, in float32, with one output.
    usual: bool,
}

/// How an operator is made from its node.
type Builder = fn(&ParsingContext, &NodeProto) -> TractResult<(Box<dyn InferenceOp>, Vec<String>)>;

/// Puts ONNX's operator into tract's register.
pub(super) fn register(framework: &mut tract_onnx::Onnx) {
    framework.op_register.insert("LayerNormalization", |context, node| {
        static TRACT: LazyLock<Option<Builder>> =
            LazyLock::new(|| tract_onnx::onnx().op_register.0.get("LayerNormalization").copied());
        let (op, closures) = (*TRACT).context("tract has no LayerNormalization")?(context, node)?;
        let attribute = |name: &str| node.attribute.iter().find(|it| it.name == name);
        let usual = attribute("axis").is_some_and(|it| it.i == -1) || attribute("axis").is_none();
        let usual = usual && attribute("stash_type").is_none_or(|it| it.i == 1) && node.output.len() == 1;
        let epsilon = attribute("epsilon").map_or(1e-5, |it| it.f);
        Ok(match op.as_op().downcast_ref::<Box<dyn Expansion>>() {
            Some(parts) => (expand(Normalization { parts: parts.clone(), epsilon, usual }), closures),
            None => (op, closures),
        })
    });
}

impl Expansion for Normalization {
    fn name(&self) -> StaticName {
        "LayerNorm".into()
    }

    fn nboutputs(&self) -> TractResult<usize> {
        Expansion::nboutputs(&*self.parts)
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        solver: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        Expansion::rules(&*self.parts, solver, inputs, outputs)
    }

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        let fact = model.outlet_fact(inputs[0])?;
        let n = fact.shape.last().and_then(|last| last.to_usize().ok()).unwrap_or(0);
        let float32 = fact.datum_type == f32::datum_type();
        let row = |input: usize| -> TractResult<Option<Arc<Tensor>>> {
            let Some(&outlet) = inputs.get(input) else { return Ok(Some(tensor1(&vec![0f32; n]).into_arc_tensor())) };
            let constant = model.outlet_fact(outlet)?.konst.clone();
            Ok(constant.filter(|it| *it.shape() == [n] && it.datum_type() == f32::datum_type()))
        };
        if let (Some(scale), Some(bias), true) = (row(1)?, row(2)?, self.usual && float32 && n > 0) {
            return model.wire_node(prefix, LayerNorm { epsilon: self.epsilon, scale, bias }, &inputs[..1]);
        }
        Expansion::wire(&*self.parts, prefix, model, inputs)
    }
}

/// Puts it in the places of its parts, and of an addition before it.
pub(super) fn fuse(model: &mut TypedModel) -> TractResult<()> {
    for id in model.eval_order()? {
        let Some((op, inputs, last)) = found(model, id)? else { continue };
        let mut patch = TypedModelPatch::default();
        let taps = inputs.iter().map(|&input| patch.tap_model(model, input)).collect::<TractResult<TVec<_>>>()?;
        let wires = patch.wire_node(model.nodes[last].name.clone(), op, &taps)?;
        patch.shunt_outside(model, last.into(), wires[0])?;
        patch.apply(model)?;
    }
    Ok(())
}

/// The only user of a node's value.
pub(super) fn only_user(model: &TypedModel, id: usize) -> Option<&TypedNode> {
    let &[inlet] = &*model.nodes[id].outputs[0].successors else { return None };
    (!model.outputs.contains(&id.into())).then(|| &model.nodes[inlet.node])
}

/// The operands of a binary operator of this name that keeps float32.
pub(super) fn operands(node: &TypedNode, name: &str) -> Option<(OutletId, OutletId)> {
    let binary = node.op_as::<TypedBinOp>()?;
    let (&[a, b], true) = (&*node.inputs, binary.0.name() == name) else { return None };
    (node.outputs[0].fact.datum_type == f32::datum_type()).then_some((a, b))
}

/// The operand of such an operator that is no constant, and the values of the other one.
pub(super) fn with_constant(
    model: &TypedModel,
    node: &TypedNode,
    name: &str,
) -> TractResult<Option<(OutletId, Arc<Tensor>)>> {
    let Some((a, b)) = operands(node, name) else { return Ok(None) };
    for (input, constant) in [(a, b), (b, a)] {
        if let Some(value) = &model.outlet_fact(constant)?.konst
            && value.datum_type() == f32::datum_type()
        {
            return Ok(Some((input, value.clone())));
        }
    }
    Ok(None)
}

/// The value of a float32 constant of one element, whatever its rank.
pub(super) fn value_of(constant: &Tensor) -> TractResult<f32> {
    constant.try_as_plain_ram()?.as_slice::<f32>()?.first().copied().context("a constant without elements")
}

/// A constant that is the same row of `n` values for all rows.
fn row_of(constant: &Tensor, n: usize) -> TractResult<Option<Arc<Tensor>>> {
    let outer_ones = constant.len() == n && constant.shape().last() == Some(&n);
    let mut row = match () {
        () if outer_ones => constant.clone(),
        () if constant.len() == 1 => tensor1(&vec![value_of(constant)?; n]),
        () => return Ok(None),
    };
    row.set_shape(&[n])?;
    Ok(Some(row.into_arc_tensor()))
}

/// The operator that ends at or behind the root mean square `id`, its inputs, and its last part.
fn found(model: &TypedModel, id: usize) -> TractResult<Option<(LayerNorm, TVec<OutletId>, usize)>> {
    let node = &model.nodes[id];
    if let (Some(op), &[x]) = (node.op_as::<LayerNorm>(), &*node.inputs) {
        return Ok(residual(model, x, 1).map(|inputs| (op.clone(), inputs, id)));
    }
    let Some(norm) = node.op_as::<RmsNorm>() else { return Ok(None) };
    let fact = &node.outputs[0].fact;
    let Some(n) = fact.shape.last().and_then(|last| last.to_usize().ok()) else { return Ok(None) };
    if fact.datum_type != f32::datum_type() || norm.axis + 1 != fact.rank() || n == 0 {
        return Ok(None);
    }
    let difference = node.inputs[0].node;
    let Some((x, mean)) = operands(&model.nodes[difference], "Sub") else { return Ok(None) };
    if only_user(model, difference).is_none_or(|user| user.id != id) || model.outlet_fact(x)?.shape != fact.shape {
        return Ok(None);
    }
    let Some((total, share)) = with_constant(model, &model.nodes[mean.node], "Mul")? else { return Ok(None) };
    let is_share = share.len() == 1 && (value_of(&share)? * n as f32 - 1.0).abs() < 1e-6;
    let sum = &model.nodes[total.node];
    let reduce = sum.op_as::<Reduce>().or_else(|| sum.op_as::<WideSum>().map(|sum| &sum.reduce));
    let is_sum = reduce.is_some_and(|it| it.reducer == Reducer::Sum && *it.axes == [norm.axis]);
    let alone = only_user(model, mean.node).is_some() && only_user(model, sum.id).is_some();
    if !is_share || !is_sum || !alone || *sum.inputs != [x] {
        return Ok(None);
    }
    // What is behind it.
    let (mut last, mut scale, mut bias) = (id, None, None);
    while let Some(user) = only_user(model, last) {
        let slot = if scale.is_none() && bias.is_none() { "Mul" } else { "Add" };
        let next = match with_constant(model, user, slot)? {
            None if slot == "Mul" => with_constant(model, user, "Add")?.map(|it| ("Add", it)),
            next => next.map(|it| (slot, it)),
        };
        let Some((name, (_, constant))) = next.filter(|_| bias.is_none()) else { break };
        let Some(row) = row_of(&constant, n)?.filter(|_| user.outputs[0].fact.shape == fact.shape) else { break };
        *(if name == "Mul" { &mut scale } else { &mut bias }) = Some(row);
        last = user.id;
    }
    let same = |value: f32| tensor1(&vec![value; n]).into_arc_tensor();
    let op = LayerNorm {
        epsilon: norm.eps.cast_to_scalar::<f32>()?,
        scale: scale.unwrap_or_else(|| same(1.0)),
        bias: bias.unwrap_or_else(|| same(0.0)),
    };
    let inputs = residual(model, x, 2).unwrap_or_else(|| tvec!(x));
    Ok(Some((op, inputs, last)))
}

/// The two values of one shape whose sum this is, if it has this number of uses, all of them ours.
fn residual(model: &TypedModel, x: OutletId, uses: usize) -> Option<TVec<OutletId>> {
    let (node, fact) = (&model.nodes[x.node], model.outlet_fact(x).ok()?);
    let (a, b) = operands(node, "Add")?;
    let alike =
        |it: OutletId| model.outlet_fact(it).is_ok_and(|it| it.shape == fact.shape && it.datum_type == fact.datum_type);
    let ours = node.outputs[0].successors.len() == uses && !model.outputs.contains(&x);
    (ours && alike(a) && alike(b)).then(|| tvec!(a, b))
}

impl Op for LayerNorm {
    fn name(&self) -> StaticName {
        "LayerNorm".into()
    }

    op_as_typed_op!();
}

impl EvalOp for LayerNorm {
    op_out_of_plan!();

    fn eval(&self, _: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let n = self.scale.len();
        ensure!(inputs.iter().all(|it| it.shape().last() == Some(&n) && it.shape() == inputs[0].shape()));
        let mut inputs = inputs.into_iter();
        let mut output = inputs.next().context("a normalisation without input")?.into_tensor();
        {
            let mut plain = output.try_as_plain_ram_mut()?;
            let values = plain.as_slice_mut::<f32>()?;
            if let Some(added) = inputs.next() {
                normal::add(values, added.try_as_plain_ram()?.as_slice::<f32>()?);
            }
            let (scale, bias) = (self.scale.try_as_plain_ram()?, self.bias.try_as_plain_ram()?);
            normal::normalise(values, n, self.epsilon, scale.as_slice::<f32>()?, bias.as_slice::<f32>()?);
        }
        Ok(tvec!(output.into_tvalue()))
    }
}

impl TypedOp for LayerNorm {
    as_op!();

    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        ensure!(inputs.iter().all(|it| it.datum_type == f32::datum_type()), "a normalisation takes float32");
        Ok(tvec!(f32::fact(inputs[0].shape.clone())))
    }
}
