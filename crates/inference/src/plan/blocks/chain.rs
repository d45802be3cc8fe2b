//! Operators that work row by row, one behind the other, as one: a small net runs as a single operator.
//!
//! Responsible for: [`RowChain`], and for finding its parts: products whose matrix is held, and a softmax along the last axis.
//! Rows go through all parts a few at a time, so that what is between two parts stays in the processor's cache, and a run has
//! the cost of one operator.
//!
//! ```text
//!   input rows 0..96   -> part 1 -> scratch A -> part 2 -> scratch B -> part 3 -> output rows 0..96, then 96..192, ...
//! ```
//!
//! Invariants: the scratch has at most about [`SCRATCH`] elements or two rows; between two pieces the run's cancel flag is
//! looked at; a row of the output has the same bits whatever other rows there are.

use super::carry;
use super::product::{BlockProduct, Matrix};
use crate::kernels::normal;
use crate::weights::check_cancelled;
use std::cell::RefCell;
use tract_onnx::tract_core::ops::nn::{Softmax, SoftmaxKind};
use tract_onnx::tract_hir::internal::*;

/// Elements between two parts that are held at a time: a part of an L2 cache.
const SCRATCH: usize = 32 << 10;
/// Rows that blocks of the products' kernels have: pieces are multiples.
const BLOCK: usize = 6;
/// Elements of a matrix that stays in a near cache while rows go by; larger ones want many rows at a time.
const NEAR: usize = 128 << 10;
/// Multiply-adds between two looks at the cancel flag, unless [`MANY`] rows have more.
const WORK: usize = 256 << 20;
/// Rows for which reading a matrix is little of the work.
const MANY: usize = 240;

/// One part.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Part {
    Product(Box<BlockProduct>),
    /// Along the rows.
    Softmax,
}

/// Parts that rows go through; the first one is a product.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::plan) struct RowChain {
    parts: Vec<Part>,
}

impl Eq for RowChain {}

/// Puts chains in the places of their parts.
pub(super) fn place(model: &mut TypedModel) -> TractResult<()> {
    for id in model.eval_order()? {
        let Some(first) = held_product(&model.nodes[id]) else { continue };
        let mut parts = vec![Part::Product(Box::new(first.clone()))];
        let mut last = id;
        while let Some((user, part)) = following(model, last, &parts)? {
            parts.push(part);
            last = user;
        }
        let node = &model.nodes[last];
        let mut patch = TypedModelPatch::default();
        let tap = patch.tap_model(model, model.nodes[id].inputs[0])?;
        let wires = patch.wire_node(node.name.clone(), RowChain { parts }, &[tap])?;
        let (made, wanted) = (patch.outlet_fact(wires[0])?, &node.outputs[0].fact);
        if made.shape != wanted.shape || made.datum_type != wanted.datum_type {
            continue;
        }
        patch.shunt_outside(model, last.into(), wires[0])?;
        patch.apply(model)?;
    }
    Ok(())
}

/// The product that a node is, if a chain can have it.
fn held_product(node: &TypedNode) -> Option<&BlockProduct> {
    let product = node.op_as::<BlockProduct>()?;
    (matches!(product.matrix, Matrix::Held(_)) && product.is_row_by_row()).then_some(product)
}

/// The part behind a chain that ends at this node, and its node.
fn following(model: &TypedModel, id: usize, parts: &[Part]) -> TractResult<Option<(usize, Part)>> {
    let node = &model.nodes[id];
    let &[inlet] = &*node.outputs[0].successors else { return Ok(None) };
    if model.outputs.contains(&id.into()) {
        return Ok(None);
    }
    let width = width(parts);
    let user = &model.nodes[inlet.node];
    if let Some(product) = held_product(user) {
        let near = |product: &BlockProduct| product.inner().0 * product.inner().1 <= NEAR;
        let all_near = near(product) && parts.iter().all(|part| !matches!(part, Part::Product(it) if !near(it)));
        let fits = all_near && product.inner().0 == width;
        return Ok(fits.then(|| (user.id, Part::Product(Box::new(product.clone())))));
    }
    let Some(softmax) = user.op_as::<Softmax>() else { return Ok(None) };
    let shape = &node.outputs[0].fact.shape;
    let along_rows = shape.last().is_some_and(|last| *last == width.to_dim()) && *softmax.axes == [shape.rank() - 1];
    let plain = softmax.kind == SoftmaxKind::Softmax && softmax.quant_output_dt.is_none();
    Ok((along_rows && plain).then_some((user.id, Part::Softmax)))
}

/// Length of the rows that come out.
fn width(parts: &[Part]) -> usize {
    parts
        .iter()
        .rev()
        .find_map(|part| if let Part::Product(product) = part { Some(product.inner().1) } else { None })
        .unwrap_or(0)
}

impl RowChain {
    fn products(&self) -> impl DoubleEndedIterator<Item = &BlockProduct> {
        self.parts.iter().filter_map(|part| if let Part::Product(product) = part { Some(&**product) } else { None })
    }

    /// Length of an input's and an output's rows.
    pub fn widths(&self) -> (usize, usize) {
        (self.products().next().map_or(0, |product| product.inner().0), width(&self.parts))
    }

    /// The shape of the output for an input of this shape.
    pub fn output_shape<D: DimLike>(&self, input: &[D]) -> TVec<D> {
        self.products().fold(input.into(), |shape: TVec<D>, product| product.output_shape(&shape))
    }

    /// The input's axis that this axis of the output is, if rows are counted along it.
    pub fn input_axis_of(&self, output: usize) -> Option<usize> {
        self.products().rev().try_fold(output, |axis, product| product.input_axis_of(axis))
    }

    /// Computes all rows; `out` has as many as `x`.
    pub fn run(&self, x: &[f32], m: usize, out: &mut [f32]) -> TractResult<()> {
        let (k, n) = self.widths();
        let last = self.products().count() - 1;
        let widest = self.products().take(last).map(|product| product.inner().1).max().unwrap_or(0);
        let work: usize = self.products().map(|product| product.inner().0 * product.inner().1).sum();
        let rows = SCRATCH.checked_div(widest).unwrap_or((WORK / work.max(1)).max(MANY));
        let rows = (rows.max(BLOCK) / BLOCK * BLOCK).min(m).max(1);
        thread_local! {
            static BETWEEN: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
        }
        BETWEEN.with_borrow_mut(|scratch| {
            let size = rows * widest;
            if scratch.len() < 2 * size {
                scratch.resize(2 * size, 0.0);
            }
            let (mut from, mut to) = scratch.split_at_mut(size);
            for first in (0..m).step_by(rows) {
                carry(check_cancelled())?;
                let count = rows.min(m - first);
                let out = &mut out[first * n..(first + count) * n];
                let mut done = 0;
                for part in &self.parts {
                    let input = if done == 0 { &x[first * k..(first + count) * k] } else { &*from };
                    match part {
                        Part::Product(product) if done == last => product.multiply(input, count, out)?,
                        Part::Product(product) => {
                            product.multiply(input, count, to)?;
                            std::mem::swap(&mut from, &mut to);
                        }
                        Part::Softmax => {
                            let (width, values) = self.after(done, from, out);
                            normal::softmax(&mut values[..count * width], width);
                        }
                    }
                    done += usize::from(matches!(part, Part::Product(_)));
                }
            }
            // Little stays with the thread.
            if scratch.len() > 4 * SCRATCH {
                *scratch = Vec::new();
            }
            Ok(())
        })
    }

    /// The length of the rows behind so many products, and where they are.
    fn after<'a>(&self, done: usize, between: &'a mut [f32], out: &'a mut [f32]) -> (usize, &'a mut [f32]) {
        let width = self.products().nth(done - 1).map_or(0, |product| product.inner().1);
        if done == self.products().count() { (width, out) } else { (width, between) }
    }
}

impl Op for RowChain {
    fn name(&self) -> StaticName {
        "RowChain".into()
    }

    fn info(&self) -> TractResult<Vec<String>> {
        let part = |part: &Part| match part {
            Part::Product(product) => format!("product {:?} {:?}", product.inner(), product.activation),
            Part::Softmax => "softmax".to_owned(),
        };
        Ok(self.parts.iter().map(part).collect())
    }

    op_as_typed_op!();
}

impl EvalOp for RowChain {
    not_out_of_plan!();

    fn eval(&self, _: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let input = args_1!(inputs);
        let (k, n) = self.widths();
        let shape = self.output_shape::<usize>(input.shape());
        let m = input.len() / k.max(1);
        // A dimension that is free in the signature may be summed over.
        ensure!(input.len() == m * k && shape.iter().product::<usize>() == m * n, "the input does not fit the matrix");
        let mut output = Tensor::zero::<f32>(&shape)?;
        if m > 0 && n > 0 {
            let x = input.try_as_plain_ram()?;
            self.run(x.as_slice::<f32>()?, m, output.try_as_plain_ram_mut()?.as_slice_mut::<f32>()?)?;
        }
        Ok(tvec!(output.into_tvalue()))
    }
}

impl TypedOp for RowChain {
    as_op!();

    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        ensure!(inputs[0].datum_type == f32::datum_type(), "products take float32");
        let shape: TVec<TDim> = inputs[0].shape.iter().cloned().collect();
        Ok(tvec!(f32::fact(self.output_shape::<TDim>(&shape))))
    }

    fn cost(&self, inputs: &[&TypedFact]) -> TractResult<TVec<(Cost, TDim)>> {
        let mut shape: TVec<TDim> = inputs[0].shape.iter().cloned().collect();
        let mut count = TDim::Val(0);
        for product in self.products() {
            count += shape.iter().product::<TDim>() * product.inner().1.to_dim();
            shape = product.output_shape(&shape);
        }
        Ok(tvec!((Cost::FMA(f32::datum_type()), count)))
    }
}
