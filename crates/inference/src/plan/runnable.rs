//! A compiled form: tract's plan, and what a run with it will take.
//!
//! Responsible for: memory and cost of a run, known from the shapes before it starts.

use super::blocks::RowChain;
use super::conv::Convolution;
use super::names::Names;
use super::{CompileOptions, Shapes};
use crate::error::ModelError;
use std::sync::{Arc, Mutex, PoisonError};
use tract_onnx::tract_core::ops::array::Topk;
use tract_onnx::tract_hir::internal::*;

/// An operator with more than this many estimated nanoseconds makes a run heavy: half of what a caller may wait.
const HEAVY_NANOSECONDS: u64 = 10_000_000;

/// A run's demands.
#[derive(Clone, Copy, Debug)]
pub(super) struct Demand {
    /// Nanoseconds of the run, roughly.
    pub nanoseconds: u64,
    /// Bytes of all values that there are at a time, at most.
    pub peak: u64,
    /// Bytes of the largest value.
    pub largest: u64,
    /// It holds while a value may have up to so many bytes in memory.
    holds_to: u64,
}

/// One value that a step makes.
struct Value {
    shape: TVec<TDim>,
    item_bytes: u64,
    /// The step after which it is dropped.
    last_use: usize,
}

struct Step {
    node: usize,
    values: TVec<Value>,
    /// Multiply-adds and divisions.
    work: TVec<TDim>,
    /// Axes along which its value may be cut, to lie in a temporary file if it is large.
    spill_axes: TVec<usize>,
    /// Bytes that are known only while running, because a dimension depends on data.
    pub dynamic: bool,
}

impl Step {
    /// Bytes that are in memory at a time of a value of `bytes`, of which `in_memory` may be: a piece of one row is the
    /// smallest, and along an axis of one row there are none.
    fn held(&self, value: &Value, bytes: u64, in_memory: u64, symbols: &SymbolValues) -> u64 {
        let size = |axis: usize| u64::try_from(value.shape.get(axis)?.eval(symbols).to_i64().ok()?).ok();
        let sizes = self.spill_axes.iter().filter_map(|&axis| size(axis)).filter(|&size| size > 1);
        sizes.map(|size| (bytes / size).max(in_memory)).min().unwrap_or(bytes)
    }
}

/// A compiled form of a model.
pub(super) struct Runnable {
    pub plan: Arc<TypedSimplePlan>,
    /// The only operator of the graph, if it is one on rows.
    pub direct: Option<RowChain>,
    names: Names,
    /// The inputs whose values are compiled in: a run does not give them.
    pub bound: Vec<usize>,
    steps: Vec<Step>,
    /// By node: its step makes values whose size is known only while running.
    pub dynamic: Vec<bool>,
    limit: u64,
    /// Rows of a batch may be given a few at a time.
    pub rows_are_independent: bool,
    /// By node: nobody writes to what our convolution makes there.
    pub only_read: Vec<bool>,
    /// The demand of the shapes that came last.
    last: Mutex<Option<(Shapes, Demand)>>,
}

/// The error for a value or a run beyond the memory limit; no bytes for a size that does not even fit 64 bits.
pub(super) fn beyond_limit(node: &str, bytes: Option<u64>, limit: u64) -> ModelError {
    let size = bytes.map_or("more than 2^64".to_owned(), |bytes| bytes.to_string());
    ModelError::too_large("the model needs more memory than a run may take")
        .detail(format!("Node \"{node}\" takes {size} bytes; the limit is {limit}."))
        .hint("Give fewer rows or smaller inputs at a time.")
}

impl Runnable {
    pub fn new(model: TypedModel, names: Names, bound: Vec<usize>, options: &CompileOptions) -> TractResult<Runnable> {
        let plan = TypedSimplePlan::new(model)?;
        let model = plan.model();
        let order = plan.order_without_consts();
        let mut place = vec![usize::MAX; model.nodes.len()];
        for (step, &node) in order.iter().enumerate() {
            place[node] = step;
        }
        let free: Vec<&Symbol> = names.inputs.iter().flatten().flatten().collect();
        let mut dynamic = vec![false; model.nodes.len()];
        let mut steps = Vec::with_capacity(order.len());
        for (step, &id) in order.iter().enumerate() {
            let node = &model.nodes[id];
            let mut values = tvec!();
            for (slot, outlet) in node.outputs.iter().enumerate() {
                let shape: TVec<TDim> = outlet.fact.shape.iter().cloned().collect();
                dynamic[id] |= shape.iter().flat_map(|dim| dim.symbols()).any(|symbol| !free.contains(&&symbol));
                let kept = model.outputs.contains(&OutletId::new(id, slot));
                let used = outlet.successors.iter().map(|inlet| place[inlet.node]).filter(|&use_| use_ != usize::MAX);
                let last_use = if kept { usize::MAX } else { used.max().unwrap_or(step) };
                values.push(Value { shape, item_bytes: outlet.fact.datum_type.size_of() as u64, last_use });
            }
            dynamic[id] |= node.op_is::<Topk>();
            let facts = model.node_input_facts(id)?;
            let work = node
                .op
                .cost(&facts)
                .unwrap_or_default()
                .into_iter()
                .filter(|(cost, _)| cost.is_compute())
                .map(|(_, count)| count)
                .collect();
            let spill_axes = super::spill::spill_axes(model, node);
            steps.push(Step { node: id, values, work, spill_axes, dynamic: dynamic[id] });
        }
        let direct = if bound.is_empty() { only_chain(model) } else { None };
        let reads = |inlet: &InletId| model.nodes[inlet.node].op_is::<Convolution>();
        let only_read = |node: &TypedNode| {
            node.op_is::<Convolution>()
                && !model.outputs.contains(&node.id.into())
                && node.outputs[0].successors.iter().all(reads)
        };
        let only_read = model.nodes.iter().map(only_read).collect();
        let (rows_are_independent, last) = (false, Mutex::new(None));
        let limit = options.memory_limit;
        Ok(Runnable { plan, direct, names, bound, steps, dynamic, limit, rows_are_independent, only_read, last })
    }

    /// Says whether rows of a batch may be given a few at a time.
    pub fn with_independent_rows(mut self, independent: bool) -> Runnable {
        self.rows_are_independent = independent;
        self
    }

    /// Sizes of the free dimensions.
    pub fn symbols(&self, shapes: &Shapes) -> SymbolValues {
        let mut values = SymbolValues::default();
        for (symbols, shape) in self.names.inputs.iter().zip(shapes) {
            for (symbol, &size) in symbols.iter().zip(shape) {
                if let Some(symbol) = symbol {
                    values.set(symbol, size as i64);
                }
            }
        }
        values
    }

    /// What a run with these shapes takes.
    ///
    /// # Errors
    /// `TooLarge` beyond the memory limit.
    pub fn demand(&self, shapes: &Shapes) -> Result<Demand, ModelError> {
        let in_memory = crate::weights::source().map_or(u64::MAX, |source| source.operator_memory());
        if let Some((held, demand)) = &*self.last.lock().unwrap_or_else(PoisonError::into_inner)
            && held == shapes
            && in_memory <= demand.holds_to
        {
            return Ok(*demand);
        }
        let demand = self.measure(&self.symbols(shapes), in_memory)?;
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some((shapes.clone(), demand));
        Ok(demand)
    }

    fn measure(&self, symbols: &SymbolValues, in_memory: u64) -> Result<Demand, ModelError> {
        let mut holds_to = u64::MAX;
        let mut dropped = vec![0u64; self.steps.len()];
        let (mut alive, mut nanoseconds) = (0u64, 0u64);
        let (mut peak, mut largest) = (0u64, 0u64);
        for (step, item) in self.steps.iter().enumerate() {
            let mut made = 0u64;
            for value in &item.values {
                let mut bytes = value_bytes(value, symbols);
                if bytes.is_some_and(|bytes| bytes > in_memory) {
                    let held = bytes.map(|bytes| item.held(value, bytes, in_memory, symbols));
                    if held != bytes {
                        (bytes, holds_to) = (held, in_memory);
                    }
                }
                largest = largest.max(bytes.unwrap_or(0));
                made = bytes
                    .and_then(|bytes| made.checked_add(bytes))
                    .filter(|made| *made <= self.limit)
                    .ok_or_else(|| self.beyond(item, bytes))?;
                if let Some(place) = dropped.get_mut(value.last_use) {
                    *place += bytes.unwrap_or(0);
                }
            }
            alive += made;
            peak = peak.max(alive);
            if alive > self.limit {
                return Err(self.beyond(item, Some(alive)));
            }
            alive -= dropped[step];
            // 10 ns for 4 bytes of output (a slow function such as erf), half a nanosecond for a multiply-add.
            let work = item.work.iter().filter_map(|count| u64::try_from(count.eval(symbols).to_i64().ok()?).ok());
            let step = (made / 4).saturating_mul(10).max(work.fold(0, u64::saturating_add) / 2);
            let step = if item.dynamic { step.max(HEAVY_NANOSECONDS + 1) } else { step };
            nanoseconds = nanoseconds.saturating_add(step);
        }
        Ok(Demand { nanoseconds, peak, largest, holds_to })
    }

    fn beyond(&self, step: &Step, bytes: Option<u64>) -> ModelError {
        beyond_limit(&self.plan.model().nodes[step.node].name, bytes, self.limit)
    }

    /// True when a run with these shapes may take longer than about 20 ms. One that is beyond the memory limit may be
    /// within it where values can go to files, and is no quick one then.
    pub fn is_heavy(&self, shapes: &Shapes) -> bool {
        self.demand(shapes).map_or(true, |demand| demand.nanoseconds > HEAVY_NANOSECONDS)
    }
}

/// The operator on rows that takes the graph's only input and gives its only output.
fn only_chain(model: &TypedModel) -> Option<RowChain> {
    let (&[input], &[output]) = (&*model.inputs, &*model.outputs) else { return None };
    let node = &model.nodes[output.node];
    let chain = node.op_as::<RowChain>()?;
    (*node.inputs == [input]).then(|| chain.clone())
}

/// Bytes of a value: 0 where they depend on data, none where they do not fit.
fn value_bytes(value: &Value, symbols: &SymbolValues) -> Option<u64> {
    let mut bytes = value.item_bytes;
    for dim in &value.shape {
        match dim.eval(symbols).to_i64() {
            Ok(size) => bytes = bytes.checked_mul(u64::try_from(size).ok()?)?,
            Err(_) => return Some(0),
        }
    }
    Some(bytes)
}

/// Checks the values that a node is about to make, now that its inputs are there.
///
/// # Errors
/// The text of a `TooLarge` error.
pub(super) fn check_dynamic(
    node: &TypedNode,
    inputs: &[TValue],
    symbols: &SymbolValues,
    limit: u64,
) -> Result<(), ModelError> {
    if let (Some(top), [values, count]) = (node.op_as::<Topk>(), inputs) {
        let most = values.shape().get(top.axis).copied().unwrap_or(0);
        // tract makes room for as many as are asked for.
        if !count.cast_to_scalar::<i64>().is_ok_and(|count| usize::try_from(count).is_ok_and(|count| count <= most)) {
            return Err(ModelError::invalid_input(format!(
                "node \"{}\" takes more values than the {most} there are",
                node.name
            ))
            .hint("Give larger inputs, or ask for fewer values."));
        }
    }
    for (slot, outlet) in node.outputs.iter().enumerate() {
        let shape: TVec<TDim> = outlet.fact.shape.iter().cloned().collect();
        let value = Value { shape, item_bytes: outlet.fact.datum_type.size_of() as u64, last_use: 0 };
        let mut bytes = value_bytes(&value, symbols);
        match (&*node.op.name(), slot) {
            ("Range", 0) if runs_backwards(inputs) => {
                return Err(ModelError::invalid_input(format!(
                    "node \"{}\" makes a range without elements",
                    node.name
                ))
                .hint("Give larger inputs."));
            }
            ("Range", 0) => bytes = range_length(inputs).and_then(|length| length.checked_mul(value.item_bytes)),
            ("DynTile", 0) => bytes = tiled(inputs).and_then(|count| count.checked_mul(value.item_bytes)),
            _ => {}
        }
        if bytes.is_none_or(|bytes| bytes > limit) {
            return Err(beyond_limit(&node.name, bytes, limit));
        }
    }
    Ok(())
}

/// True when end lies behind start: the range has no elements, but tract gives it some if a shape is involved.
fn runs_backwards(inputs: &[TValue]) -> bool {
    let number = |input: usize| inputs.get(input).and_then(|value| value.cast_to_scalar::<f64>().ok());
    let dimensions = inputs.first().is_some_and(|value| value.datum_type() == DatumType::TDim);
    match (number(0), number(1), number(2)) {
        (Some(start), Some(end), Some(step)) => dimensions && (end - start) * step < 0.0,
        _ => false,
    }
}

fn range_length(inputs: &[TValue]) -> Option<u64> {
    let number = |input: usize| inputs.get(input)?.cast_to_scalar::<f64>().ok();
    let length = ((number(1)? - number(0)?) / number(2)?).ceil();
    // Not a number for a step of zero.
    if length.is_nan() || length > 1e18 { None } else { Some(length.max(0.0) as u64) }
}

fn tiled(inputs: &[TValue]) -> Option<u64> {
    let mut count = inputs.first()?.len() as u64;
    let multipliers = inputs.get(1)?.cast_to::<i64>().ok()?;
    for &multiplier in multipliers.try_as_plain_ram().ok()?.as_slice::<i64>().ok()? {
        count = count.checked_mul(u64::try_from(multiplier).ok()?)?;
    }
    Some(count)
}
