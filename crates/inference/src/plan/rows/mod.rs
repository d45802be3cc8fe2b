//! Row independence: whether rows of a query may be computed with in one run.
//!
//! Responsible for: proving that each row of a model's outputs depends on one row of its inputs alone ([`Rows`]), and
//! estimating what a row costs ([`Work`]). Many rows are then stacked along one axis of the inputs, and the outputs are cut into
//! rows again.
//!
//! The proof follows the axis through tract's typed graph before it is simplified, not through ONNX's: it is the graph that
//! is run, its shapes are inferred already, computed shapes (Shape, Gather, Concat, Reshape) are algebra over the free
//! dimensions there, and its operators are few where ONNX's are many and change with their versions. Tensors may be absent.
//!
//! For each free dimension that all inputs have, N here, every value of the graph is one of
//! - *free of rows*: the same whatever the rows are, and however many;
//! - *rows along an axis* ([`Run`]): the axis has B * N * A indices, and what stands at (b, n, a) depends on row n alone;
//! - *the number of rows*: a constant with N in it. It may be a shape, never data.
//!
//! Invariants:
//! - what is not proven is [`Rows::Dependent`]: an operator that is in no table, a graph that is compiled for concrete
//!   shapes only, a shape whose algebra is not understood;
//! - after each operator the shapes of its outputs are compared with what was derived: the axis of the rows has
//!   B * N * A indices, and N is in no other dimension;
//! - the verdict holds for any number of rows above zero, with the other free dimensions being equal for all.

mod operators;
mod shapes;
mod walk;
mod work;

use super::names::Names;
use super::{CompileOptions, ErrorKind, Shapes, build, cast};
use crate::signature::{Dim, Signature};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::sync::atomic::AtomicBool;
use tract_onnx::pb::GraphProto;
use tract_onnx::tract_hir::internal::*;

pub(super) use work::Work;

/// Whether a model's rows are independent of each other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "verdict")]
pub enum Rows {
    /// Rows may be stacked. A run on stacked inputs gives the stacked outputs, but for the rounding of
    /// floating-point numbers, where kernels add in another order for another number of rows.
    Independent {
        /// By input, the axis along which rows are stacked.
        inputs: Vec<usize>,
        /// By output, the axis along which they come out: as many indices a row as it has in the inputs.
        outputs: Vec<usize>,
        /// The free dimension that counts the rows, as the signature names it; empty if it has no name.
        dimension: String,
        /// The other free dimensions of the inputs, as (input, axis): they must be equal among the rows of a stack.
        others: Vec<(usize, usize)>,
        /// False where this is proven for likely sizes of the other dimensions only, because the graph is not known before
        /// them: [`Plan::rows_at`](super::Plan::rows_at) proves it for the sizes of a run.
        every_size: bool,
    },
    /// Rows have to be run one by one.
    Dependent {
        /// The first obstacle on the way: the operator, its node, and what it does.
        reason: String,
    },
}

impl Rows {
    /// True for [`Rows::Independent`].
    pub fn are_independent(&self) -> bool {
        matches!(self, Rows::Independent { .. })
    }

    /// True if a batch of any size can be run in parts, along the first axis of each input, that are put together along the
    /// first axis of each output.
    pub(super) fn can_be_cut(&self) -> bool {
        matches!(self, Rows::Independent { inputs, outputs, every_size: true, .. }
            if inputs.iter().chain(outputs).all(|axis| *axis == 0))
    }

    /// Why rows are not independent.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Rows::Independent { .. } => None,
            Rows::Dependent { reason } => Some(reason),
        }
    }

    pub(super) fn dependent(reason: impl Into<String>) -> Rows {
        Rows::Dependent { reason: reason.into() }
    }
}

/// ONNX's operator of each node of the main graph, by the name that tract gives the node.
pub(super) type Operators = HashMap<String, String>;

/// Collects the operators, for the reasons of verdicts.
pub(super) fn operators(graph: Option<&GraphProto>) -> Operators {
    let name = |names: &[String]| names.first().cloned().unwrap_or_default();
    graph
        .iter()
        .flat_map(|graph| &graph.node)
        .map(|node| (if node.name.is_empty() { name(&node.output) } else { node.name.clone() }, node.op_type.clone()))
        .collect()
}

/// The verdict on a graph, with symbols as its free dimensions, and the work of a row.
pub(super) fn analyse(
    model: &TypedModel,
    signature: &Signature,
    names: &Names,
    operators: &Operators,
) -> (Rows, Option<Work>) {
    let mut first: Option<Rows> = None;
    let mut shared: Option<Rows> = None;
    for symbol in candidates(names) {
        let axes = match input_axes(&symbol, signature, names) {
            Ok(axes) => axes,
            Err(reason) => {
                shared.get_or_insert_with(|| Rows::dependent(reason));
                continue;
            }
        };
        match walk::outputs(model, &symbol, &axes, signature, operators) {
            Ok(outputs) => {
                let rows = independent(&symbol, axes, outputs, signature, names);
                return (rows, Some(Work::of(model, names, Some(symbol))));
            }
            Err(reason) => {
                first.get_or_insert_with(|| Rows::dependent(reason));
            }
        }
    }
    if let Some((symbol, joined, others)) = leading(names)
        && let Ok(model) = model.set_symbols(&others.into_iter().map(|other| (other, symbol.to_dim())).collect())
        && let Ok(axes) = input_axes(&symbol, signature, &joined)
        && let Ok(outputs) = walk::outputs(&model, &symbol, &axes, signature, operators)
    {
        let rows = independent(&symbol, axes, outputs, signature, &joined);
        return (rows, Some(Work::of(&model, &joined, Some(symbol))));
    }
    let rows = first.or(shared).unwrap_or_else(|| Rows::dependent(fixed(signature)));
    // Rows run one by one: what leads is likely to count them.
    (rows, Some(Work::of(model, names, candidates(names).into_iter().next())))
}

/// The same for a graph that cannot be compiled with all its dimensions free: all but one have the sizes that they have in
/// these shapes.
pub(super) fn at_sizes(
    parsed: &InferenceModel,
    signature: &Signature,
    operators: &Operators,
    shapes: &Shapes,
    options: &CompileOptions,
    cancel: &AtomicBool,
) -> (Rows, Option<Work>) {
    let names = Names::new(signature, &parsed.symbols);
    let mut obstacle: Option<Rows> = None;
    let joined = leading(&names).map(|(symbol, joined, _)| (symbol, joined));
    // A second candidate is worth another compilation, a third is not.
    let single = candidates(&names).into_iter().take(2).map(|symbol| (symbol, names.clone()));
    for (symbol, names) in joined.into_iter().chain(single) {
        let mut only = names.clone();
        for its in only.inputs.iter_mut().flatten().filter(|its| its.as_ref() != Some(&symbol)) {
            *its = None;
        }
        let axes = match input_axes(&symbol, signature, &only) {
            Ok(axes) => axes,
            Err(reason) => {
                obstacle.get_or_insert_with(|| Rows::dependent(reason));
                continue;
            }
        };
        let dim = |its: &Option<Symbol>, size: &usize| its.as_ref().map_or(size.to_dim(), |its| its.to_dim());
        let dims = only
            .inputs
            .iter()
            .zip(shapes)
            .map(|(axes, shape)| axes.iter().zip(shape).map(|(a, b)| dim(a, b)).collect());
        let dims = dims.collect();
        let proven = super::contain("following the rows", ErrorKind::InvalidModel, || {
            let mut parsed = parsed.clone();
            cast::keep_dimensions(&mut parsed);
            shapes::leave_whole(&mut parsed).map_err(|error| build::failure("reading the slices", &error))?;
            let model = build::with_facts(parsed, signature, dims, &[], options, cancel)?;
            // Such a comparison is taken to be the same for all sizes where it is for some. The graph of another
            // number of rows may be another one.
            if let Some(node) = shapes::comparison(&model, &symbol) {
                return Ok(Err(format!("node \"{node}\" compares the number of rows")));
            }
            let model = build::into_typed(model, options, cancel)?;
            let proven = walk::outputs(&model, &symbol, &axes, signature, operators);
            Ok(proven.map(|outputs| (outputs, Work::of(&model, &only, Some(symbol.clone())))))
        });
        match proven {
            Ok(Ok((outputs, work))) => {
                let mut rows = independent(&symbol, axes, outputs, signature, &names);
                if let Rows::Independent { others, every_size, .. } = &mut rows {
                    *every_size = others.is_empty();
                }
                return (rows, Some(work));
            }
            Ok(Err(reason)) => obstacle = obstacle.or(Some(Rows::dependent(reason))),
            Err(error) => {
                let detail = error.detail.unwrap_or(error.message);
                let reason = format!("the graph cannot be followed with a free number of rows: {detail}");
                obstacle = obstacle.or(Some(Rows::dependent(reason)));
            }
        }
    }
    (obstacle.unwrap_or_else(|| Rows::dependent(fixed(signature))), None)
}

/// The free dimensions, leading axes first.
fn candidates(names: &Names) -> Vec<Symbol> {
    let deepest = names.inputs.iter().map(Vec::len).max().unwrap_or(0);
    let mut found: Vec<Symbol> = Vec::new();
    for axis in 0..deepest {
        for symbol in names.inputs.iter().filter_map(|axes| axes.get(axis)?.as_ref()) {
            if !found.contains(symbol) {
                found.push(symbol.clone());
            }
        }
    }
    found
}

/// Leading dimensions that are free but not one and the same, as exports of data frames have them: rows are stacked along all. Returns
/// the first's symbol, the dimensions with it in the place of the others, and the others.
fn leading(names: &Names) -> Option<(Symbol, Names, Vec<Symbol>)> {
    let first = names.inputs.first()?.first()?.clone()?;
    let mut joined = names.clone();
    let mut others = Vec::new();
    for axes in &names.inputs {
        let symbol = axes.first()?.clone()?;
        if symbol != first && !others.contains(&symbol) {
            others.push(symbol);
        }
    }
    for symbol in joined.inputs.iter_mut().flatten().flatten().filter(|symbol| others.contains(symbol)) {
        *symbol = first.clone();
    }
    (!others.is_empty()).then_some((first, joined, others))
}

/// By input, the one axis that has this symbol.
fn input_axes(symbol: &Symbol, signature: &Signature, names: &Names) -> Result<Vec<usize>, String> {
    let mut found = Vec::with_capacity(names.inputs.len());
    for (port, axes) in signature.inputs.iter().zip(&names.inputs) {
        let mut places = axes.iter().enumerate().filter(|(_, its)| its.as_ref() == Some(symbol)).map(|(axis, _)| axis);
        match (places.next(), places.next()) {
            (Some(axis), None) => found.push(axis),
            (Some(_), Some(_)) => return Err(format!("input \"{}\" has one free dimension twice", port.name)),
            (None, _) => {
                let named = dimension_name(symbol, signature, names);
                let named = if named.is_empty() { String::new() } else { format!(" \"{named}\"") };
                return Err(format!("input \"{}\" has no free dimension{named} to stack rows along", port.name));
            }
        }
    }
    Ok(found)
}

/// The signature's name of a free dimension; empty if it has none.
fn dimension_name(symbol: &Symbol, signature: &Signature, names: &Names) -> String {
    let dims = signature.inputs.iter().flat_map(|port| &port.shape);
    let mut places = dims.zip(names.inputs.iter().flatten()).filter(|(_, its)| its.as_ref() == Some(symbol));
    match places.next() {
        Some((Dim::Symbol(name), _)) => name.clone(),
        _ => String::new(),
    }
}

fn independent(symbol: &Symbol, inputs: Vec<usize>, outputs: Vec<usize>, signature: &Signature, names: &Names) -> Rows {
    let other = |its: &Option<Symbol>| its.as_ref().is_some_and(|its| its != symbol);
    let others = names.inputs.iter().enumerate().flat_map(|(input, axes)| {
        axes.iter().enumerate().filter(|(_, its)| other(its)).map(move |(axis, _)| (input, axis))
    });
    let others = others.collect();
    Rows::Independent { inputs, outputs, dimension: dimension_name(symbol, signature, names), others, every_size: true }
}

/// Why a model without free dimensions takes no more rows.
fn fixed(signature: &Signature) -> String {
    match signature.inputs.first() {
        None => "the model has no input".into(),
        Some(port) => match port.shape.first() {
            Some(size) => format!("dimension 0 of input \"{}\" is always {size}", port.name),
            None => format!("input \"{}\" has no dimension", port.name),
        },
    }
}

/// Where the rows of a value are: along `axis`, which has `before` * N * `after` indices.
#[derive(Clone, Debug, PartialEq)]
struct Run {
    axis: usize,
    before: TDim,
    after: TDim,
}

impl Run {
    /// One index a row.
    fn at(axis: usize) -> Run {
        Run { axis, before: 1.to_dim(), after: 1.to_dim() }
    }

    /// The same rows along another axis.
    fn moved(&self, axis: usize) -> Run {
        Run { axis, ..self.clone() }
    }

    fn is_plain(&self) -> bool {
        self.before.is_one() && self.after.is_one()
    }
}

/// How a value depends on the rows.
#[derive(Clone, Debug, PartialEq)]
enum State {
    /// Not at all.
    Free,
    Rows(Run),
    /// It is a constant computed from the number of rows.
    Count,
}
