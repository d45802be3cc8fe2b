//! A recurrent layer: one product for the inputs of all steps, then one small product and one pass a step.
//!
//! ```text
//!   sums (T B x G H) = X (T B x I) * W^T (I x G H) + bias          all steps at once
//!   sums of step t (B x G H) += h (B x H) * R^T (H x G H)          then the gates
//! ```
//!
//! T steps, a batch of B, I features, an output of H, G gates. Weights are used transposed, so that rows of R^T are
//! read one after the other with a batch of one: constants are transposed when the plan is made; of others, R is once a
//! run, and W is used as it lies.

use crate::kernels::epilogue::{Activation, Bias, finish};
use crate::kernels::gemm::{Operand, product};
use crate::kernels::recurrent;
use crate::kernels::turn::transpose;
use crate::plan::blocks::{carry, short_block};
use crate::weights::{StoredTensor, for_each_block};
use std::borrow::Cow;
use std::ops::Range;
use tract_onnx::tract_hir::internal::*;

/// Elements of the sums that are made at a time, about: 16 MB. A sequence may be long where only its last output is asked
/// for.
const SUMS: usize = if cfg!(test) { 2 * 3 * 192 } else { 4 << 20 };

/// Which layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in crate::plan) enum Kind {
    Lstm,
    Gru { linear_before_reset: bool },
}

impl Kind {
    /// Gates.
    pub fn gates(self) -> usize {
        match self {
            Kind::Lstm => 4,
            Kind::Gru { .. } => 3,
        }
    }
}

/// Weights of all directions: G H rows each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::plan) enum Weights {
    /// Transposed, one direction after the other.
    Turned(Arc<Tensor>),
    Stored(StoredTensor),
    /// An input of the operator.
    Input(usize),
}

impl Weights {
    /// Transposes a constant of shape (directions, rows, columns).
    pub fn turned(constant: &Tensor) -> TractResult<Weights> {
        Ok(Weights::Turned(constant.clone().permute_axes(&[0, 2, 1])?.into_arc_tensor()))
    }
}

/// The operator. Inputs: the sequence (T x B x I), then those that the fields name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::plan) struct Layer {
    pub kind: Kind,
    pub directions: usize,
    /// H.
    pub size: usize,
    /// I.
    pub features: usize,
    pub input: Weights,
    pub recurrent: Weights,
    pub bias: Option<usize>,
    pub initial: [Option<usize>; 2],
    pub outputs: [bool; 3],
}

impl Layer {
    /// Gates times H: rows of a direction's weights.
    fn sums(&self) -> usize {
        self.kind.gates() * self.size
    }

    /// The weights, transposed: for each direction a matrix of `width` rows.
    fn turned<'a>(&self, weights: &'a Weights, inputs: &'a [TValue], width: usize) -> TractResult<Cow<'a, [f32]>> {
        let rows = self.sums();
        let mut turned = match weights {
            Weights::Turned(constant) => return Ok(Cow::Borrowed(floats(constant)?)),
            _ => vec![0.0; self.directions * rows * width],
        };
        match weights {
            Weights::Turned(_) => {}
            Weights::Input(slot) => {
                let values = floats(&inputs[*slot])?;
                ensure!(values.len() == turned.len(), "the weights have another shape than was declared");
                for (to, from) in turned.chunks_exact_mut(rows * width).zip(values.chunks_exact(rows * width)) {
                    transpose(to, rows, from, width, (rows, width));
                }
            }
            Weights::Stored(tensor) => self.for_each_piece(tensor, 0..self.directions, |piece| {
                let to = &mut turned[(piece.direction * width + piece.col0) * rows + piece.row0..];
                transpose(to, rows, piece.data, piece.cols, (piece.rows, piece.cols));
            })?,
        }
        Ok(Cow::Owned(turned))
    }

    /// Walks the blocks of these directions, cut where one ends.
    fn for_each_piece(
        &self,
        tensor: &StoredTensor,
        directions: Range<usize>,
        mut each: impl FnMut(Piece<'_>),
    ) -> TractResult<()> {
        let (tiling, all) = (&tensor.tiling, self.sums());
        let (height, across) = (tiling.tile_rows() as usize, tiling.block_cols());
        let block_rows = directions.start * all / height..(directions.end * all).div_ceil(height);
        let numbers: Vec<u32> = (block_rows.start as u32 * across..block_rows.end as u32 * across).collect();
        carry(for_each_block(tensor, &numbers, |at, block| {
            let tile = tiling.tile(numbers[at] / across, numbers[at] % across).ok_or_else(|| short_block(tensor))?;
            let (first, rows, cols) = (tile.row0 as usize, tile.rows as usize, tile.cols as usize);
            let data: &[f32] = bytemuck::try_cast_slice(block).map_err(|_| short_block(tensor))?;
            if data.len() != rows * cols {
                return Err(short_block(tensor));
            }
            for direction in directions.clone() {
                let (start, end) = (first.max(direction * all), (first + rows).min((direction + 1) * all));
                if start < end {
                    each(Piece {
                        direction,
                        row0: start - direction * all,
                        col0: tile.col0 as usize,
                        rows: end - start,
                        cols,
                        data: &data[(start - first) * cols..(end - first) * cols],
                    });
                }
            }
            Ok(())
        }))
    }

    /// The input's part of the sums of one direction, for these rows of all steps: (T B x I) times W^T.
    fn input_part(&self, sums: &mut [f32], inputs: &[TValue], rows: Range<usize>, direction: usize) -> TractResult<()> {
        let (width, features) = (self.sums(), self.features);
        let x = &floats(&inputs[0])?[rows.start * features..];
        let rows = rows.len();
        match &self.input {
            Weights::Stored(tensor) => self.for_each_piece(tensor, direction..direction + 1, |piece| {
                if rows > 0 {
                    let x = Operand::row_major(&x[piece.col0..], features);
                    let weights = Operand::transposed(piece.data, piece.cols);
                    let out = &mut sums[piece.row0..];
                    product(out, width, rows, piece.rows, piece.cols, x, weights, piece.col0 > 0);
                }
            }),
            Weights::Input(slot) => {
                let values = floats(&inputs[*slot])?;
                ensure!(values.len() == self.directions * width * features, "weights of another shape than declared");
                let weights = Operand::transposed(&values[direction * width * features..], features);
                product(sums, width, rows, width, features, Operand::row_major(x, features), weights, false);
                Ok(())
            }
            Weights::Turned(constant) => {
                let weights = Operand::row_major(&floats(constant)?[direction * features * width..], width);
                product(sums, width, rows, width, features, Operand::row_major(x, features), weights, false);
                Ok(())
            }
        }
    }

    /// The bias that is added for all steps at once, and that of the recurrent part, where it has to stay apart.
    fn biases(&self, values: Option<&[f32]>) -> (Vec<f32>, Vec<f32>) {
        let (size, sums) = (self.size, self.kind.gates() * self.size);
        let Some(values) = values else { return (vec![], vec![]) };
        let (input, recurrent) = values.split_at(sums);
        let mut both: Vec<f32> = input.iter().zip(recurrent).map(|(input, recurrent)| input + recurrent).collect();
        // The reset gate is multiplied with the recurrent part of the candidate, bias included.
        let mut apart = vec![];
        if self.kind == (Kind::Gru { linear_before_reset: true }) {
            both[2 * size..].copy_from_slice(&input[2 * size..]);
            apart = vec![0.0; sums];
            apart[2 * size..].copy_from_slice(&recurrent[2 * size..]);
        }
        (both, apart)
    }
}

fn floats(tensor: &Tensor) -> TractResult<&[f32]> {
    tensor.try_as_plain_ram()?.as_slice::<f32>()
}

/// A part of a block of weights: rows of one direction.
struct Piece<'a> {
    direction: usize,
    row0: usize,
    col0: usize,
    rows: usize,
    cols: usize,
    data: &'a [f32],
}

/// One direction of a run.
struct Direction<'a> {
    layer: &'a Layer,
    batch: usize,
    backwards: bool,
    /// R^T.
    recurrent: &'a [f32],
    /// The recurrent part's own bias; may be empty.
    bias: &'a [f32],
    /// The output, and the cell of an LSTM: those of the step before, of the whole batch.
    output: Vec<f32>,
    cell: Vec<f32>,
}

impl Direction<'_> {
    /// Goes through these steps, of which `sums` are; `each` gets the number of a step and its output.
    fn run(&mut self, sums: &mut [f32], steps: Range<usize>, mut each: impl FnMut(usize, &[f32])) {
        let (size, batch) = (self.layer.size, self.batch);
        let width = self.layer.kind.gates() * size;
        let mut next = vec![0.0; batch * size];
        let mut apart = vec![0.0; batch * width];
        for step in 0..steps.len() {
            let step = if self.backwards { steps.len() - 1 - step } else { step };
            let sums = &mut sums[step * batch * width..][..batch * width];
            let before = Operand::row_major(&self.output, size);
            let weights = Operand::row_major(self.recurrent, width);
            match self.layer.kind {
                Kind::Lstm => {
                    product(sums, width, batch, width, size, before, weights, true);
                    let rows = sums.chunks_exact(width).zip(self.cell.chunks_exact_mut(size));
                    for ((sums, cell), next) in rows.zip(next.chunks_exact_mut(size)) {
                        recurrent::lstm(sums, cell, next);
                    }
                }
                Kind::Gru { linear_before_reset: true } => {
                    product(&mut apart, width, batch, width, size, before, weights, false);
                    if !self.bias.is_empty() {
                        let bias = Bias::PerColumn(self.bias);
                        finish(&mut apart, width, (batch, width), bias, Activation::Identity);
                    }
                    for row in 0..batch {
                        let (gates, state) = (row * width..(row + 1) * width, row * size..(row + 1) * size);
                        let before = &self.output[state.clone()];
                        recurrent::gru_after(&sums[gates.clone()], &apart[gates], before, &mut next[state]);
                    }
                }
                Kind::Gru { linear_before_reset: false } => {
                    product(sums, width, batch, 2 * size, size, before, weights, true);
                    for row in 0..batch {
                        let state = row * size..(row + 1) * size;
                        recurrent::gru_reset(
                            &sums[row * width..][..width],
                            &self.output[state.clone()],
                            &mut apart[state],
                        );
                    }
                    let reset = Operand::row_major(&apart, size);
                    let candidate = Operand::row_major(&self.recurrent[2 * size..], width);
                    product(&mut sums[2 * size..], width, batch, size, size, reset, candidate, true);
                    for row in 0..batch {
                        let state = row * size..(row + 1) * size;
                        let before = &self.output[state.clone()];
                        recurrent::gru_before(&sums[row * width..][..width], before, &mut next[state]);
                    }
                }
            }
            std::mem::swap(&mut self.output, &mut next);
            each(steps.start + step, &self.output);
        }
    }
}

impl Op for Layer {
    fn name(&self) -> StaticName {
        match self.kind {
            Kind::Lstm => "LstmLayer".into(),
            Kind::Gru { .. } => "GruLayer".into(),
        }
    }

    op_as_typed_op!();
}

impl EvalOp for Layer {
    not_out_of_plan!();

    fn eval(&self, _: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let &[steps, batch, features] = inputs[0].shape() else { bail!("a sequence of another rank than 3") };
        ensure!(features == self.features, "the sequence does not fit the weights");
        let (size, width) = (self.size, self.kind.gates() * self.size);
        let recurrent_weights = self.turned(&self.recurrent, &inputs, size)?;
        let bias = self.bias.map(|slot| floats(&inputs[slot])).transpose()?;
        ensure!(bias.is_none_or(|bias| bias.len() == self.directions * 2 * width), "a bias of another shape");
        let mut sequence =
            Tensor::zero::<f32>(&if self.outputs[0] { [steps, self.directions, batch, size] } else { [0; 4] })?;
        let mut last = [
            Tensor::zero::<f32>(&[self.directions, batch, size])?,
            Tensor::zero::<f32>(&[self.directions, batch, size])?,
        ];
        let state = batch * size;
        let part = (SUMS / (batch * width).max(1)).clamp(1, steps.max(1));
        let parts = steps.div_ceil(part);
        let mut sums = vec![0.0; part.min(steps) * batch * width];
        for number in 0..self.directions {
            let initial = |slot: Option<usize>| -> TractResult<Vec<f32>> {
                let Some(slot) = slot else { return Ok(vec![0.0; state]) };
                let values = floats(&inputs[slot])?;
                ensure!(values.len() == self.directions * state, "an initial state of another shape");
                Ok(values[number * state..][..state].to_vec())
            };
            let (both, apart) = self.biases(bias.map(|bias| &bias[number * 2 * width..][..2 * width]));
            let mut direction = Direction {
                layer: self,
                batch,
                backwards: number == 1,
                recurrent: &recurrent_weights[number * size * width..][..size * width],
                bias: &apart,
                output: initial(self.initial[0])?,
                cell: initial(self.initial[1])?,
            };
            for number_of_part in 0..parts {
                carry(crate::weights::check_cancelled())?;
                let at = if direction.backwards { parts - 1 - number_of_part } else { number_of_part } * part;
                let these = at..steps.min(at + part);
                let rows = these.start * batch..these.end * batch;
                let sums = &mut sums[..rows.len() * width];
                self.input_part(sums, &inputs, rows.clone(), number)?;
                if !both.is_empty() {
                    finish(sums, width, (rows.len(), width), Bias::PerColumn(&both), Activation::Identity);
                }
                let mut plain = sequence.try_as_plain_ram_mut()?;
                let all = plain.as_slice_mut::<f32>()?;
                direction.run(sums, these, |step, output| {
                    if let Some(place) =
                        all.get_mut((step * self.directions + number) * state..).filter(|it| !it.is_empty())
                    {
                        place[..state].copy_from_slice(output);
                    }
                });
            }
            for (last, values) in last.iter_mut().zip([&direction.output, &direction.cell]) {
                let mut plain = last.try_as_plain_ram_mut()?;
                plain.as_slice_mut::<f32>()?[number * state..][..state].copy_from_slice(values);
            }
        }
        let [output, cell] = last;
        let made = self.outputs.into_iter().zip([sequence, output, cell]);
        Ok(made.filter(|(asked, _)| *asked).map(|(_, tensor)| tensor.into_tvalue()).collect())
    }
}

impl TypedOp for Layer {
    as_op!();

    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        ensure!(inputs[0].rank() == 3, "a sequence of another rank than 3");
        let (steps, batch) = (inputs[0].shape[0].clone(), inputs[0].shape[1].clone());
        let (directions, size) = (self.directions.to_dim(), self.size.to_dim());
        let state = f32::fact([directions.clone(), batch.clone(), size.clone()]);
        let facts = [f32::fact([steps, directions, batch, size]), state.clone(), state];
        Ok(self.outputs.into_iter().zip(facts).filter(|(asked, _)| *asked).map(|(_, fact)| fact).collect())
    }

    fn cost(&self, inputs: &[&TypedFact]) -> TractResult<TVec<(Cost, TDim)>> {
        let rows = inputs[0].shape[0].clone() * &inputs[0].shape[1];
        let each = self.directions * self.kind.gates() * self.size * (self.features + self.size);
        Ok(tvec!((Cost::FMA(f32::datum_type()), rows * each)))
    }
}
