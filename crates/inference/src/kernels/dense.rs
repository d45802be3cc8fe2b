//! Constant matrices, made ready once for all their products.
//!
//! Responsible for: the order in which such a matrix lies ([`Dense`]), and its product with rows, with bias and activation.
//!
//! ```text
//!   up to 4 columns: each column contiguous, for dot products
//!   more: panels of 256 columns, the rows of each contiguous, so that neighbouring rows lie near each other
//! ```
//!
//! Invariant: a row of the output has the same bits whatever the number of rows (as [`gemm`]).

use super::epilogue::{self, Activation};
use super::gemm::{self, DOTS_MAX, Ending, Operand};
use super::turn::transpose;
use crate::weights::AlignedBytes;

/// Columns of a panel. Rows of a matrix that are as far apart as this are multiplied where they lie.
pub(crate) const PANEL: usize = 256;

/// A matrix (K x N) of float32.
#[derive(Clone, Debug)]
pub struct Dense {
    k: usize,
    n: usize,
    values: AlignedBytes,
}

impl PartialEq for Dense {
    fn eq(&self, other: &Dense) -> bool {
        (self.k, self.n, self.values.bytes()) == (other.k, other.n, other.values.bytes())
    }
}

impl Dense {
    /// The matrix of `k` x `n`.
    ///
    /// # Panics
    /// If the operand does not hold the elements.
    pub fn new(k: usize, n: usize, from: Operand<'_>) -> Dense {
        let mut values = AlignedBytes::zeroed(k * n * size_of::<f32>());
        if k == 0 || n == 0 {
            return Dense { k, n, values };
        }
        let to: &mut [f32] = bytemuck::cast_slice_mut(values.bytes_mut());
        let (data, row_stride, col_stride) = (from.data, from.row_stride, from.col_stride);
        let panels = (0..n).step_by(PANEL).map(|column| (column, PANEL.min(n - column)));
        match (n <= DOTS_MAX, row_stride, col_stride) {
            (true, ..) => {
                for (column, line) in to.chunks_exact_mut(k).enumerate() {
                    let element = |row: usize| data[row * row_stride + column * col_stride];
                    line.iter_mut().enumerate().for_each(|(row, value)| *value = element(row));
                }
            }
            (false, 1, _) => {
                for (column, width) in panels {
                    let to = &mut to[column * k..(column + width) * k];
                    transpose(to, width, &data[column * col_stride..], col_stride, (width, k));
                }
            }
            (false, ..) => {
                for (column, width) in panels {
                    let rows = to[column * k..(column + width) * k].chunks_exact_mut(width).enumerate();
                    for (row, line) in rows {
                        let element = |at: usize| data[row * row_stride + (column + at) * col_stride];
                        line.iter_mut().enumerate().for_each(|(at, value)| *value = element(at));
                    }
                }
            }
        }
        Dense { k, n, values }
    }

    /// K and N.
    pub fn sizes(&self) -> (usize, usize) {
        (self.k, self.n)
    }

    /// `out (m x N) = activation(x (m x K) times the matrix + bias)`, all rows contiguous; no bias if it is empty.
    ///
    /// # Panics
    /// If a slice is shorter than the sizes say.
    pub fn apply(&self, x: &[f32], m: usize, out: &mut [f32], bias: &[f32], activation: Activation) {
        let (k, n) = (self.k, self.n);
        let values: &[f32] = bytemuck::cast_slice(self.values.bytes());
        let x = Operand::row_major(x, k);
        // What the product's own kernels do, and what is left for a pass.
        let (low, rest) = match activation {
            Activation::Relu => (0.0, Activation::Identity),
            other => (f32::NEG_INFINITY, other),
        };
        if n <= DOTS_MAX {
            gemm::finished_product(out, n, (m, n, k), x, Operand::transposed(values, k), false, Ending { bias, low });
        } else {
            for column in (0..n).step_by(PANEL) {
                let width = PANEL.min(n - column);
                let panel = Operand::row_major(&values[column * k..], width);
                let ending = Ending { bias: bias.get(column..).unwrap_or(&[]), low };
                let out = out.get_mut(column..).unwrap_or(&mut []);
                gemm::finished_product(out, n, (m, width, k), x, panel, false, ending);
            }
        }
        epilogue::activate(&mut out[..m * n], rest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::tests::{Random, at_each_level, close};

    #[test]
    fn products_are_those_of_the_definition_and_the_same_for_each_row() {
        at_each_level(|level| {
            let mut random = Random::new(level as u64 + 5);
            for round in 0..150 {
                let (k, n) = (random.between(0, 70), random.between(0, 20) * random.between(1, 30));
                let m = if round == 9 { 1024 } else { random.between(0, 40) };
                let n = if round % 3 == 0 { n % 7 } else { n };
                let (x, w, bias) = (random.values(m * k), random.values(k * n), random.values(n));
                let (rows, columns) = if round % 2 == 0 { (n, 1) } else { (1, k) };
                let dense = Dense::new(k, n, Operand { data: &w, row_stride: rows, col_stride: columns });
                let bias = if round % 4 < 2 { &bias[..] } else { &[] };
                let activation = [Activation::Identity, Activation::Relu, Activation::Tanh][random.below(3)];
                let mut out = random.values(m * n);
                dense.apply(&x, m, &mut out, bias, activation);
                let expected: Vec<f32> = (0..m * n)
                    .map(|place| {
                        let (row, column) = (place / n, place % n);
                        let term = |step: usize| x[row * k + step] * w[step * rows + column * columns];
                        let sum = (0..k).map(|step| f64::from(term(step))).sum::<f64>() as f32;
                        let sum = sum + bias.get(column).unwrap_or(&0.0);
                        match activation {
                            Activation::Relu => sum.max(0.0),
                            Activation::Tanh => sum.tanh(),
                            _ => sum,
                        }
                    })
                    .collect();
                close(&out, &expected, 2e-5, &format!("{m} x {n} x {k}, {level:?}"));
                for row in 0..m {
                    let mut alone = vec![7.0; n];
                    dense.apply(&x[row * k..][..k], 1, &mut alone, bias, activation);
                    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
                    assert_eq!(bits(&alone), bits(&out[row * n..][..n]), "row {row} of {m} x {n} x {k}, {level:?}");
                }
            }
        });
    }
}
