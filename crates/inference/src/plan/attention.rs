//! Attention as one operator.
//!
//! Responsible for: [`Attention`] in the place of the product of queries and keys, its scale and mask, the softmax, and the
//! product with the values. A few queries of one head at a time go through all of it, so that the scores of all heads
//! and all queries, which may be larger than everything else, are never in memory; heads are read and written where they lie.
//!
//! ```text
//!   for each index of the batch axes (rows, heads), for a few queries:
//!     scores (queries x keys) = Q K^T * scale + mask;   softmax along keys;   out (queries x width) = scores V
//! ```
//!
//! Invariants: the scratch has [`SCRATCH`] elements, or [`FEW`] rows of scores; between two heads the run's cancel flag is looked
//! at; what one index of the batch axes gives has the same bits whatever others there are. Other softmaxes of float32 along the
//! last axis are [`RowSoftmax`].

use super::blocks::carry;
use super::norm::{only_user, operands, value_of, with_constant};
use crate::kernels::gemm::{Operand, product};
use crate::kernels::normal;
use crate::weights::check_cancelled;
use tract_onnx::tract_core::ops::einsum::EinSum;
use tract_onnx::tract_core::ops::nn::{Softmax, SoftmaxKind};
use tract_onnx::tract_hir::internal::*;

/// Scores that are held at a time.
const SCRATCH: usize = 64 << 10;
/// Queries that are worth reading all keys.
const FEW: usize = 24;

/// An axis's places in queries, keys, scores, values and output, where it has one.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Axis {
    query: usize,
    key: usize,
    score: usize,
    value: usize,
    output: usize,
}

/// `softmax(Q K^T * scale + mask) V`; inputs Q, K, V, and the mask if there is one.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Attention {
    batch: TVec<Axis>,
    /// Axes of queries, keys, and the two widths; each in the fields where it is one.
    queries: Axis,
    keys: Axis,
    inner: Axis,
    width: Axis,
    scale: f32,
}

impl Eq for Attention {}

/// Puts both operators in their places.
pub(super) fn fuse(model: &mut TypedModel) -> TractResult<()> {
    for id in model.eval_order()? {
        let Some(axes) = along_last(&model.nodes[id]) else { continue };
        let (op, inputs, last): (Box<dyn TypedOp>, _, _) = match found(model, id)? {
            Some((op, inputs, last)) => (Box::new(op), inputs, last),
            None => (Box::new(RowSoftmax { rank: axes }), model.nodes[id].inputs.iter().copied().collect(), id),
        };
        let mut patch = TypedModelPatch::default();
        let taps = inputs.iter().map(|&input| patch.tap_model(model, input)).collect::<TractResult<TVec<_>>>()?;
        let wires = patch.wire_node(model.nodes[last].name.clone(), op, &taps)?;
        let (made, wanted) = (patch.outlet_fact(wires[0])?, &model.nodes[last].outputs[0].fact);
        if made.shape != wanted.shape {
            continue;
        }
        patch.shunt_outside(model, last.into(), wires[0])?;
        patch.apply(model)?;
    }
    Ok(())
}

/// The rank of a softmax of float32 along its last axis.
fn along_last(node: &TypedNode) -> Option<usize> {
    let softmax = node.op_as::<Softmax>()?;
    let fact = &node.outputs[0].fact;
    let fits = fact.datum_type == f32::datum_type() && softmax.quant_output_dt.is_none();
    let last = fact.rank() > 0 && *softmax.axes == [fact.rank() - 1];
    (fits && last && softmax.kind == SoftmaxKind::Softmax).then(|| fact.rank())
}

/// A product of two float32 values.
fn product_of(node: &TypedNode) -> Option<&EinSum> {
    let einsum = node.op_as::<EinSum>()?;
    let f32 = f32::datum_type();
    let plain = einsum.q_params.is_none() && einsum.operating_dt == f32 && node.outputs[0].fact.datum_type == f32;
    (plain && node.inputs.len() == 2).then_some(einsum)
}

/// Places in an axis mapping: at most one each.
fn place(places: &[usize]) -> Option<usize> {
    places.first().copied()
}

/// The attention whose softmax is the node `id`, its inputs, and its last part.
fn found(model: &TypedModel, id: usize) -> TractResult<Option<(Attention, TVec<OutletId>, usize)>> {
    let softmax = &model.nodes[id];
    let rank = softmax.outputs[0].fact.rank();
    // Backwards: a mask, a scale, the product of queries and keys.
    let (mut scores, mut mask, mut scale) = (softmax.inputs[0], None, 1.0);
    if let Some((a, b)) = operands(&model.nodes[scores.node], "Add")
        && only_user(model, scores.node).is_some()
    {
        let shape = &softmax.outputs[0].fact.shape;
        let whole = |it: OutletId| {
            let node = &model.nodes[it.node];
            let product = product_of(node).is_some() || operands(node, "Mul").is_some();
            product && only_user(model, it.node).is_some() && node.outputs[0].fact.shape == *shape
        };
        let Some((product, added)) = [(a, b), (b, a)].into_iter().find(|&(it, _)| whole(it)) else { return Ok(None) };
        let fact = model.outlet_fact(added)?;
        let fits = fact.rank() == rank && fact.shape.iter().zip(shape.iter()).all(|(a, b)| a.is_one() || a == b);
        if !fits || fact.datum_type != f32::datum_type() {
            return Ok(None);
        }
        (scores, mask) = (product, Some(added));
    }
    if let Some((product, factor)) = with_constant(model, &model.nodes[scores.node], "Mul")?
        && only_user(model, scores.node).is_some()
        && factor.len() == 1
        && model.outlet_fact(product)?.rank() == rank
    {
        (scores, scale) = (product, value_of(&factor)?);
    }
    let first = &model.nodes[scores.node];
    let (Some(left), Some(user)) = (product_of(first), only_user(model, id)) else { return Ok(None) };
    let (Some(right), true) = (product_of(user), only_user(model, scores.node).is_some()) else { return Ok(None) };
    if user.inputs[0] == user.inputs[1] || first.outputs[0].fact.shape != softmax.outputs[0].fact.shape {
        return Ok(None);
    }
    let (score_slot, value_slot) = if user.inputs[0].node == id { (0, 1) } else { (1, 0) };
    let single = |einsum: &EinSum| {
        einsum.axes.iter_all_axes().all(|axis| axis.inputs.iter().chain(&axis.outputs).all(|places| places.len() <= 1))
    };
    if !single(left) || !single(right) {
        return Ok(None);
    }
    let Some(keys_axis) = left.axes.iter_all_axes().find(|axis| place(&axis.outputs[0]) == Some(rank - 1)) else {
        return Ok(None);
    };
    let key_slot = match (place(&keys_axis.inputs[0]), place(&keys_axis.inputs[1])) {
        (Some(_), None) => 0,
        (None, Some(_)) => 1,
        _ => return Ok(None),
    };
    let inputs = [first.inputs[1 - key_slot], first.inputs[key_slot], user.inputs[value_slot]];
    let shapes = inputs.iter().map(|&it| Ok(&model.outlet_fact(it)?.shape)).collect::<TractResult<TVec<_>>>()?;
    let mut op = Parts::default();
    let mut seen = 0;
    for axis in left.axes.iter_all_axes() {
        let (query, key, score) =
            (place(&axis.inputs[1 - key_slot]), place(&axis.inputs[key_slot]), place(&axis.outputs[0]));
        let second = score
            .and_then(|score| right.axes.iter_all_axes().find(|axis| place(&axis.inputs[score_slot]) == Some(score)));
        let (value, output) = match second {
            Some(axis) => (place(&axis.inputs[value_slot]), place(&axis.outputs[0])),
            None => (None, None),
        };
        seen += usize::from(second.is_some());
        let at = |place: Option<usize>| place.unwrap_or(usize::MAX);
        let made = Axis { query: at(query), key: at(key), score: at(score), value: at(value), output: at(output) };
        let kind = [query, key, score, value, output].map(|place| place.is_some());
        let taken = match kind {
            [true, true, true, true, true] => {
                let equal =
                    shapes[0][made.query] == shapes[1][made.key] && shapes[0][made.query] == shapes[2][made.value];
                op.batch.push(made);
                equal
            }
            [true, false, true, false, true] => op.queries.replace(made).is_none(),
            [false, true, true, true, false] => {
                shapes[1][made.key] == shapes[2][made.value] && op.keys.replace(made).is_none()
            }
            [true, true, false, false, false] => {
                shapes[0][made.query] == shapes[1][made.key] && op.inner.replace(made).is_none()
            }
            _ => false,
        };
        if !taken {
            return Ok(None);
        }
    }
    for axis in right.axes.iter_all_axes().filter(|axis| axis.inputs[score_slot].is_empty()) {
        let (Some(value), Some(output)) = (place(&axis.inputs[value_slot]), place(&axis.outputs[0])) else {
            return Ok(None);
        };
        let none = usize::MAX;
        if op.width.replace(Axis { query: none, key: none, score: none, value, output }).is_some() {
            return Ok(None);
        }
    }
    let (Some(queries), Some(keys), Some(inner), Some(width)) = (op.queries, op.keys, op.inner, op.width) else {
        return Ok(None);
    };
    // Rows of the output are contiguous, and so are those of the mask.
    if seen != rank || width.output + 1 != user.outputs[0].fact.rank() {
        return Ok(None);
    }
    let op = Attention { batch: op.batch, queries, keys, inner, width, scale };
    let inputs = inputs.into_iter().chain(mask).collect();
    Ok(Some((op, inputs, user.id)))
}

/// What has been found of an [`Attention`].
#[derive(Default)]
struct Parts {
    batch: TVec<Axis>,
    queries: Option<Axis>,
    keys: Option<Axis>,
    inner: Option<Axis>,
    width: Option<Axis>,
}

/// Elements from one index of an axis to the next, by axis; 0 where there is only one.
fn strides(shape: &[usize]) -> TVec<usize> {
    let mut strides = tvec!(0; shape.len());
    let mut step = 1;
    for (stride, &size) in strides.iter_mut().zip(shape).rev() {
        *stride = if size == 1 { 0 } else { step };
        step *= size;
    }
    strides
}

/// The operand from an element on. With an axis of one index any stride does.
fn operand(values: &[f32], at: usize, row_stride: usize, col_stride: usize) -> Operand<'_> {
    Operand { data: &values[at..], row_stride, col_stride: if col_stride == 0 { 1 } else { col_stride } }
}

impl Attention {
    fn output_shape<D: DimLike>(&self, query: &[D], value: &[D]) -> TVec<D> {
        let mut shape = tvec!(D::one(); self.batch.len() + 2);
        for axis in self.batch.iter().chain([&self.queries]) {
            shape[axis.output] = query[axis.query].clone();
        }
        shape[self.width.output] = value[self.width.value].clone();
        shape
    }

    /// For each input, the axis along which it is cut when the output is along `axis`, if that is a batch axis.
    pub fn sliced_inputs(
        &self,
        axis: usize,
        ranks: &[usize],
        is_one: &dyn Fn(usize, usize) -> bool,
    ) -> Option<TVec<Option<usize>>> {
        let axis = self.batch.iter().find(|it| it.output == axis)?;
        let mut inputs = tvec!(Some(axis.query), Some(axis.key), Some(axis.value));
        if ranks.len() > 3 {
            inputs.push((!is_one(3, axis.score)).then_some(axis.score));
        }
        Some(inputs)
    }

    /// Computes all heads. The shapes fit each other, but for the mask's.
    fn compute(
        &self,
        [q, k, v]: [&TValue; 3],
        mask: Option<&TValue>,
        out: &mut [f32],
        shape: &[usize],
    ) -> TractResult<()> {
        let size = |value: &TValue, axis: usize| value.shape()[axis];
        let (queries, keys) = (size(q, self.queries.query), size(k, self.keys.key));
        let (inner, width) = (size(q, self.inner.query), size(v, self.width.value));
        let (qs, ks, vs, os) = (strides(q.shape()), strides(k.shape()), strides(v.shape()), strides(shape));
        let ms = mask.map_or(tvec!(), |mask| strides(mask.shape()));
        for axis in self.batch.iter().chain([&self.queries, &self.keys]) {
            let (score, expected) = (axis.score, if axis.query == usize::MAX { keys } else { size(q, axis.query) });
            let fits = mask.is_none_or(|mask| [1, expected].contains(&mask.shape()[score]));
            ensure!(fits, "the mask does not fit");
        }
        let views =
            [q, k, v].into_iter().chain(mask).map(|it| it.try_as_plain_ram()).collect::<TractResult<TVec<_>>>()?;
        let values = views.iter().map(|it| it.as_slice::<f32>()).collect::<TractResult<TVec<_>>>()?;
        let rows = (SCRATCH / keys).max(FEW).min(queries);
        let mut scores = vec![0f32; rows * keys];
        let counts: TVec<usize> = self.batch.iter().map(|axis| size(q, axis.query)).collect();
        let (mask_query, mask_key) = match mask {
            Some(_) => (ms[self.queries.score], ms[self.keys.score]),
            None => (0, 0),
        };
        for index in 0..counts.iter().product() {
            carry(check_cancelled())?;
            let (mut rest, mut at) = (index, [0; 5]);
            for (axis, count) in self.batch.iter().zip(&counts).rev() {
                let place = rest % count;
                rest /= count;
                at[0] += place * qs[axis.query];
                at[1] += place * ks[axis.key];
                at[2] += place * vs[axis.value];
                at[3] += place * os[axis.output];
                at[4] += ms.get(axis.score).map_or(0, |stride| place * stride);
            }
            let key = operand(values[1], at[1], ks[self.inner.key], ks[self.keys.key]);
            let value = operand(values[2], at[2], vs[self.keys.value], vs[self.width.value]);
            for first in (0..queries).step_by(rows) {
                let count = rows.min(queries - first);
                let scores = &mut scores[..count * keys];
                let start = at[0] + first * qs[self.queries.query];
                let query = operand(values[0], start, qs[self.queries.query], qs[self.inner.query]);
                product(scores, keys, count, keys, inner, query, key, false);
                for (row, scores) in scores.chunks_exact_mut(keys).enumerate() {
                    let added = at[4] + (first + row) * mask_query;
                    match (mask, mask_key) {
                        (None, _) => normal::scale(scores, self.scale, 0.0),
                        (Some(_), 0) => normal::scale(scores, self.scale, values[3][added]),
                        (Some(_), _) => normal::scale_and_add(scores, self.scale, &values[3][added..]),
                    }
                }
                normal::softmax(scores, keys);
                let stride = os[self.queries.output];
                let out = &mut out[at[3] + first * stride..];
                product(out, stride, count, width, keys, Operand::row_major(scores, keys), value, false);
            }
        }
        Ok(())
    }
}

impl Op for Attention {
    fn name(&self) -> StaticName {
        "Attention".into()
    }

    op_as_typed_op!();
}

impl EvalOp for Attention {
    op_out_of_plan!();

    fn eval(&self, _: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let [q, k, v] = [&inputs[0], &inputs[1], &inputs[2]];
        let size = |value: &TValue, axis: usize| value.shape()[axis];
        let keys = size(k, self.keys.key);
        let inner = size(q, self.inner.query);
        let equal =
            |axis: &Axis| size(q, axis.query) == size(k, axis.key) && size(q, axis.query) == size(v, axis.value);
        ensure!(self.batch.iter().all(equal), "queries, keys and values do not fit each other");
        ensure!(size(k, self.inner.key) == inner && size(v, self.keys.value) == keys, "keys do not fit");
        let shape = self.output_shape(q.shape(), v.shape());
        let mut output = Tensor::zero::<f32>(&shape)?;
        if output.len() == 0 || keys == 0 {
            return Ok(tvec!(output.into_tvalue()));
        }
        self.compute([q, k, v], inputs.get(3), output.try_as_plain_ram_mut()?.as_slice_mut::<f32>()?, &shape)?;
        Ok(tvec!(output.into_tvalue()))
    }
}

impl TypedOp for Attention {
    as_op!();

    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        ensure!(inputs.iter().all(|it| it.datum_type == f32::datum_type()), "attention takes float32");
        let dims = |input: usize| inputs[input].shape.iter().cloned().collect::<TVec<TDim>>();
        Ok(tvec!(f32::fact(self.output_shape(&dims(0), &dims(2)))))
    }

    fn cost(&self, inputs: &[&TypedFact]) -> TractResult<TVec<(Cost, TDim)>> {
        let keys = inputs[1].shape[self.keys.key].clone();
        let made = self.output_facts(inputs)?[0].shape.volume();
        Ok(tvec!((Cost::FMA(f32::datum_type()), (inputs[0].shape.volume() + made) * keys)))
    }
}

/// A softmax of float32 along the last of `rank` axes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RowSoftmax {
    pub rank: usize,
}

impl Op for RowSoftmax {
    fn name(&self) -> StaticName {
        "RowSoftmax".into()
    }

    op_as_typed_op!();
}

impl EvalOp for RowSoftmax {
    op_out_of_plan!();

    fn eval(&self, _: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let mut output = args_1!(inputs).into_tensor();
        let width = output.shape().last().copied().unwrap_or(1);
        normal::softmax(output.try_as_plain_ram_mut()?.as_slice_mut::<f32>()?, width);
        Ok(tvec!(output.into_tvalue()))
    }
}

impl TypedOp for RowSoftmax {
    as_op!();

    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        Ok(tvec!(inputs[0].without_value()))
    }
}
