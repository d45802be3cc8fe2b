//! Values that do not fit in memory: written to a temporary file by the operator that makes them, piece by piece, and read
//! back so by the next.
//!
//! Responsible for: running an operator on slices of its inputs where its output, or an input, is larger than an operator may
//! hold ([`Budget`]). The slices go along one axis, which the operator must map one to one from its inputs to its output; a sum
//! or a maximum over that axis is put together from the pieces. What cannot be sliced gets its input as a whole, if the memory
//! limit allows it.
//!
//! ```text
//!   value (1 x 64 x 2048 x 2048)   piece 0: rows    0 ..  63   at byte 0 of the file
//!   axis 2, 64 rows a piece        piece 1: rows   64 .. 127   behind it, and so on; each piece is row-major
//! ```
//!
//! Invariants: a spilled value is represented in tract's turn by an empty tensor, which no operator ever gets; the shape of
//! every piece that an operator makes is compared with what it must be; files are dropped with the last use of their value.

use super::attention::{Attention, RowSoftmax};
use super::blocks::{BlockProduct, RowChain, carry};
use super::conv::Convolution;
use super::norm::LayerNorm;
use super::runnable::beyond_limit;
use super::sum::WideSum;
use crate::weights::{BlockSource, SpillFile};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use tract_onnx::tract_core::ops::binary::{BinMiniOp, OptBinByScalar, OptBinChain, OptBinUnicast, TypedBinOp};
use tract_onnx::tract_core::ops::cast::Cast;
use tract_onnx::tract_core::ops::element_wise::ElementWiseOp;
use tract_onnx::tract_core::ops::nn::{Reduce, Reducer, Softmax};
use tract_onnx::tract_core::plan::eval;
use tract_onnx::tract_hir::internal::*;

/// What a run may hold.
#[derive(Clone, Copy, Debug)]
pub(super) struct Budget {
    /// Bytes of one value in memory, if there is a way to spill it.
    pub operator: u64,
    /// Bytes of one value that cannot be spilled.
    pub limit: u64,
}

/// A value in a file.
struct Spilled {
    file: Box<dyn SpillFile>,
    datum_type: DatumType,
    shape: TVec<usize>,
    axis: usize,
    /// Length of a piece along the axis; the last one may be shorter.
    piece: usize,
    /// Uses that are still to come.
    uses: usize,
}

impl Spilled {
    fn pieces(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (size, piece) = (self.shape[self.axis], self.piece);
        (0..size).step_by(piece).map(move |start| start..size.min(start + piece))
    }

    fn bytes(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64 * self.datum_type.size_of() as u64
    }

    fn read(&mut self, range: &Range<usize>) -> TractResult<Tensor> {
        let unit = self.bytes() / self.shape[self.axis].max(1) as u64;
        let mut shape = self.shape.clone();
        shape[self.axis] = range.len();
        let mut tensor = Tensor::zero_dt(self.datum_type, &shape)?;
        let bytes = carry(self.file.read(unit * range.start as u64, (unit * range.len() as u64) as usize))?;
        let mut plain = tensor.try_as_plain_ram_mut()?;
        let out = plain.as_bytes_mut();
        ensure!(out.len() == bytes.len(), "a temporary file gave another number of bytes");
        out.copy_from_slice(&bytes);
        Ok(tensor)
    }

    fn whole(&mut self, node: &str, limit: u64) -> TractResult<Tensor> {
        if self.bytes() > limit {
            return carry(Err(beyond_limit(node, Some(self.bytes()), limit)));
        }
        let mut tensor = Tensor::zero_dt(self.datum_type, &self.shape)?;
        for range in self.pieces() {
            let piece = self.read(&range)?;
            tensor.assign_slice(range.clone(), &piece, 0..range.len(), self.axis)?;
        }
        Ok(tensor)
    }
}

/// The spilled values of one run.
pub(super) struct Spills {
    source: Arc<dyn BlockSource>,
    budget: Budget,
    held: HashMap<OutletId, Spilled>,
}

/// The reduction that a node is.
fn reduction(node: &TypedNode) -> Option<&Reduce> {
    node.op_as::<Reduce>().or_else(|| node.op_as::<WideSum>().map(|sum| &sum.reduce))
}

/// True for an operator that maps each element to one of the same place, broadcasting.
fn is_elementwise(node: &TypedNode) -> bool {
    node.op_is::<ElementWiseOp>()
        || node.op_is::<TypedBinOp>()
        || node.op_is::<OptBinByScalar>()
        || node.op_is::<OptBinUnicast>()
        || node.op_is::<OptBinChain>()
        || node.op_is::<Cast>()
}

/// For each input, the axis along which it is sliced when the output is along `axis`; none for an input that is given
/// whole. `None` if the operator cannot be run on slices along that axis. `ranks`: by input; `is_one(input, axis)`.
pub(super) fn sliced_inputs(
    node: &TypedNode,
    axis: usize,
    ranks: &[usize],
    is_one: &dyn Fn(usize, usize) -> bool,
) -> Option<TVec<Option<usize>>> {
    if is_elementwise(node) {
        let rank = node.outputs.first()?.fact.rank();
        let input = |(input, &its): (usize, &usize)| {
            if its == 0 || (its == rank && is_one(input, axis)) {
                Some(None)
            } else if its == rank {
                Some(Some(axis))
            } else {
                None
            }
        };
        return ranks.iter().enumerate().map(input).collect();
    }
    if let Some(product) = node.op_as::<BlockProduct>() {
        return product.input_axis_of(axis).map(|axis| tvec!(Some(axis)));
    }
    if let Some(chain) = node.op_as::<RowChain>() {
        return chain.input_axis_of(axis).map(|axis| tvec!(Some(axis)));
    }
    if let Some(attention) = node.op_as::<Attention>() {
        return attention.sliced_inputs(axis, ranks, is_one);
    }
    if node.op_is::<LayerNorm>() || node.op_is::<RowSoftmax>() {
        return (axis + 1 < *ranks.first()?).then(|| tvec!(Some(axis); ranks.len()));
    }
    if let Some(convolution) = node.op_as::<Convolution>() {
        return convolution.sliced_inputs(axis);
    }
    if let Some(reduce) = reduction(node) {
        return (!reduce.axes.contains(&axis)).then(|| tvec!(Some(axis)));
    }
    if let Some(softmax) = node.op_as::<Softmax>() {
        return (!softmax.axes.contains(&axis)).then(|| tvec!(Some(axis)));
    }
    None
}

/// How two pieces of a reduction along the sliced axis become one.
fn combine(reducer: Reducer, sum: &mut Tensor, piece: &Tensor) -> TractResult<bool> {
    if sum.datum_type() != f32::datum_type() || sum.shape() != piece.shape() {
        return Ok(false);
    }
    let with: fn(f32, f32) -> f32 = match reducer {
        Reducer::Sum => |a, b| a + b,
        Reducer::Prod => |a, b| a * b,
        // What is not a number stays so.
        Reducer::Max => |a, b| if b > a || b.is_nan() { b } else { a },
        Reducer::Min => |a, b| if b < a || b.is_nan() { b } else { a },
        _ => return Ok(false),
    };
    let mut plain = sum.try_as_plain_ram_mut()?;
    let piece = piece.try_as_plain_ram()?;
    for (sum, &value) in plain.as_slice_mut::<f32>()?.iter_mut().zip(piece.as_slice::<f32>()?) {
        *sum = with(*sum, value);
    }
    Ok(true)
}

/// How a node is run on slices.
struct Slicing {
    /// Along this axis of the output; none where that axis is reduced.
    output: Option<usize>,
    inputs: TVec<Option<usize>>,
    size: usize,
    piece: usize,
}

impl Spills {
    pub fn new(source: Arc<dyn BlockSource>, limit: u64) -> Spills {
        let operator = source.operator_memory();
        Spills { source, budget: Budget { operator, limit }, held: HashMap::new() }
    }

    /// Runs a node, on slices if its output or an input is beyond the budget. Otherwise `check` is asked before, with the
    /// inputs as they are.
    pub fn run(
        &mut self,
        model: &TypedModel,
        context: &EvalContext<'_>,
        state: Option<&mut (dyn OpState + 'static)>,
        node: &TypedNode,
        inputs: TVec<TValue>,
        check: impl FnOnce(&[TValue]) -> TractResult<()>,
    ) -> TractResult<TVec<TValue>> {
        let from_file = node.inputs.iter().any(|outlet| self.held.contains_key(outlet));
        let shape = output_shape(node, context.symbols);
        let bytes = shape.as_ref().map_or(0, |shape| bytes_of(shape, node.outputs[0].fact.datum_type));
        // A source of the graph gets its value as an input of which the node knows nothing.
        let source = inputs.len() != node.inputs.len();
        if source || (!from_file && bytes <= self.budget.operator) {
            check(&inputs)?;
            return eval(context, state, node, inputs);
        }
        let spill = bytes > self.budget.operator && !model.outputs.contains(&node.id.into());
        let made = match shape.filter(|_| state.is_none()) {
            Some(shape) if from_file || spill => self.run_sliced(context, node, &inputs, &shape, spill)?,
            _ => None,
        };
        let made = match made {
            Some(made) => made,
            None => {
                let mut whole = inputs;
                for (value, outlet) in whole.iter_mut().zip(&node.inputs) {
                    if let Some(spilled) = self.held.get_mut(outlet) {
                        *value = spilled.whole(&node.name, self.budget.limit)?.into_tvalue();
                    }
                }
                if bytes > self.budget.limit {
                    return carry(Err(beyond_limit(&node.name, Some(bytes), self.budget.limit)));
                }
                check(&whole)?;
                eval(context, state, node, whole)?
            }
        };
        for outlet in &node.inputs {
            if let Some(spilled) = self.held.get_mut(outlet) {
                spilled.uses -= 1;
                if spilled.uses == 0 {
                    self.held.remove(outlet);
                }
            }
        }
        Ok(made)
    }

    fn shape<'a>(&'a self, node: &TypedNode, inputs: &'a [TValue], input: usize) -> &'a [usize] {
        self.held.get(&node.inputs[input]).map_or_else(|| inputs[input].shape(), |spilled| &spilled.shape)
    }

    /// Along which axis, and in which pieces.
    fn slicing(&self, node: &TypedNode, inputs: &[TValue], shape: &[usize], spill: bool) -> Option<Slicing> {
        let ranks: TVec<usize> = (0..inputs.len()).map(|input| self.shape(node, inputs, input).len()).collect();
        let is_one = |input: usize, axis: usize| self.shape(node, inputs, input).get(axis) == Some(&1);
        let first = node.inputs.iter().enumerate().find_map(|(n, outlet)| Some((n, self.held.get(outlet)?)));
        if let Some((input, spilled)) = first {
            let (size, piece) = (spilled.shape[spilled.axis], spilled.piece);
            if let Some(reduce) = reduction(node).filter(|reduce| reduce.axes.contains(&spilled.axis)) {
                let fits = matches!(reduce.reducer, Reducer::Sum | Reducer::Prod | Reducer::Max | Reducer::Min);
                return (fits && !spill).then(|| Slicing {
                    output: None,
                    inputs: tvec!(Some(spilled.axis)),
                    size,
                    piece,
                });
            }
            return (0..shape.len()).find_map(|axis| {
                let inputs = sliced_inputs(node, axis, &ranks, &is_one)?;
                let right = inputs.get(input) == Some(&Some(spilled.axis)) && shape[axis] == size;
                right.then_some(Slicing { output: Some(axis), inputs, size, piece })
            });
        }
        let bytes = bytes_of(shape, node.outputs[0].fact.datum_type);
        let wanted = (self.budget.operator / 4).max(1);
        let candidates = (0..shape.len()).filter(|&axis| shape[axis] > 1).filter_map(|axis| {
            let inputs = sliced_inputs(node, axis, &ranks, &is_one)?;
            let unit = bytes / shape[axis] as u64;
            let piece = usize::try_from(wanted / unit.max(1)).unwrap_or(usize::MAX).clamp(1, shape[axis]);
            Some((unit, Slicing { output: Some(axis), inputs, size: shape[axis], piece }))
        });
        candidates.min_by_key(|(unit, _)| *unit).map(|(_, slicing)| slicing)
    }

    /// Runs a node on slices. `None` if it cannot be, before anything is lost.
    fn run_sliced(
        &mut self,
        context: &EvalContext<'_>,
        node: &TypedNode,
        inputs: &TVec<TValue>,
        shape: &TVec<usize>,
        spill: bool,
    ) -> TractResult<Option<TVec<TValue>>> {
        let Some(slicing) = self.slicing(node, inputs, shape, spill) else { return Ok(None) };
        let datum_type = node.outputs[0].fact.datum_type;
        // How long the pieces are may have been chosen for an input that has shorter rows.
        let rows = slicing.output.map_or(1, |axis| shape[axis].max(1) as u64);
        let piece = (bytes_of(shape, datum_type) / rows).saturating_mul(slicing.piece.min(rows as usize) as u64);
        if piece > self.budget.limit {
            return carry(Err(beyond_limit(&node.name, Some(piece), self.budget.limit)));
        }
        let mut file = if spill {
            let Some(file) = carry(self.source.spill_file())? else { return Ok(None) };
            Some(file)
        } else {
            None
        };
        // Inputs that lie in files and are needed whole, or in other slices.
        let mut whole: TVec<Option<TValue>> = tvec!(None; inputs.len());
        for (input, outlet) in node.inputs.iter().enumerate() {
            if let Some(spilled) = self.held.get_mut(outlet)
                && (slicing.inputs[input] != Some(spilled.axis) || spilled.piece != slicing.piece)
            {
                whole[input] = Some(spilled.whole(&node.name, self.budget.limit)?.into_tvalue());
            }
        }
        let mut result: Option<Tensor> = None;
        if file.is_none() && slicing.output.is_some() {
            result = Some(Tensor::zero_dt(datum_type, shape)?);
        }
        for start in (0..slicing.size).step_by(slicing.piece) {
            carry(crate::weights::check_cancelled())?;
            let range = start..slicing.size.min(start + slicing.piece);
            let mut slices = TVec::with_capacity(inputs.len());
            for (input, outlet) in node.inputs.iter().enumerate() {
                let value = whole[input].as_ref();
                slices.push(match (slicing.inputs[input], value, self.held.get_mut(outlet)) {
                    (Some(_), None, Some(spilled)) => spilled.read(&range)?.into_tvalue(),
                    (Some(axis), value, _) => {
                        value.unwrap_or(&inputs[input]).slice(axis, range.start, range.end)?.into_tvalue()
                    }
                    (None, value, _) => value.unwrap_or(&inputs[input]).clone(),
                });
            }
            let piece = eval_slices(context, node, slices)?;
            let [piece] = &*piece else { return Ok(None) };
            match (slicing.output, &mut file, &mut result) {
                (Some(axis), file, result) => {
                    let mut expected = shape.clone();
                    expected[axis] = range.len();
                    if piece.shape() != &*expected || piece.datum_type() != datum_type {
                        return Ok(None);
                    }
                    match (file, result) {
                        (Some(file), _) => carry(file.append(piece.try_as_plain_ram()?.as_bytes().to_vec()))?,
                        (None, Some(result)) => result.assign_slice(range.clone(), piece, 0..range.len(), axis)?,
                        (None, None) => bail!("a value without a place"),
                    }
                }
                (None, _, None) => result = Some((**piece).clone()),
                (None, _, Some(sum)) => {
                    let Some(reduce) = reduction(node) else { return Ok(None) };
                    if !combine(reduce.reducer, sum, piece)? {
                        return Ok(None);
                    }
                }
            }
        }
        let Some(file) = file else {
            return Ok(result.map(|result| tvec!(result.into_tvalue())));
        };
        let uses = node.outputs[0].successors.len();
        let axis = slicing.output.context("a spilled value without an axis")?;
        if uses > 0 {
            let spilled = Spilled { file, datum_type, shape: shape.clone(), axis, piece: slicing.piece, uses };
            self.held.insert(node.id.into(), spilled);
        }
        Ok(Some(tvec!(Tensor::zero_dt(datum_type, &[])?.into_tvalue())))
    }
}

/// Evaluates a node on slices. Where one operand of a binary operator is repeated, tract chooses a kernel that needs each
/// repetition to begin at a whole vector; that was so for the whole operands only.
fn eval_slices(context: &EvalContext<'_>, node: &TypedNode, slices: TVec<TValue>) -> TractResult<TVec<TValue>> {
    const VECTOR: usize = 64;
    let first = slices.first().map_or(0, |first| first.len());
    let whole =
        |b: &TValue| b.len() <= 1 || b.len() == first || (b.len() * b.datum_type().size_of()).is_multiple_of(VECTOR);
    if slices.iter().all(whole) {
        return eval(context, None, node, slices);
    }
    let steps: TVec<&dyn BinMiniOp> = if let Some(op) = node.op_as::<OptBinUnicast>() {
        tvec!(&*op.binop)
    } else if let Some(op) = node.op_as::<OptBinChain>() {
        op.steps.iter().map(|step| &*step.binop).collect()
    } else {
        return eval(context, None, node, slices);
    };
    ensure!(slices.len() == steps.len() + 1, "a binary operator with another number of operands");
    let mut slices = slices.into_iter();
    let first = slices.next().context("an operator without operands")?;
    let made = steps.iter().zip(slices).try_fold(first, |a, (op, b)| {
        let datum_type = op.result_datum_type(a.datum_type(), b.datum_type())?;
        op.eval(a, b, datum_type).map(IntoTValue::into_tvalue)
    })?;
    Ok(tvec!(made))
}

/// The shape of a node's only output, if it is known before the node runs.
fn output_shape(node: &TypedNode, symbols: &SymbolValues) -> Option<TVec<usize>> {
    let [output] = &*node.outputs else { return None };
    output.fact.shape.iter().map(|dim| dim.eval(symbols).to_usize().ok()).collect()
}

fn bytes_of(shape: &[usize], datum_type: DatumType) -> u64 {
    shape.iter().fold(datum_type.size_of() as u64, |bytes, &dim| bytes.saturating_mul(dim as u64))
}

/// The axes of its output along which a node can be run on slices, its output then being held in pieces; but one of which
/// the size is 1 when it runs gives no slices.
pub(super) fn spill_axes(model: &TypedModel, node: &TypedNode) -> TVec<usize> {
    let (Ok(facts), [output]) = (model.node_input_facts(node.id), &*node.outputs) else { return tvec!() };
    if model.outputs.contains(&node.id.into()) {
        return tvec!();
    }
    let ranks: TVec<usize> = facts.iter().map(|fact| fact.rank()).collect();
    let is_one = |input: usize, axis: usize| facts[input].shape.get(axis).is_some_and(|dim| dim.is_one());
    (0..output.fact.rank())
        .filter(|&axis| !output.fact.shape[axis].is_one() && sliced_inputs(node, axis, &ranks, &is_one).is_some())
        .collect()
}
