//! Running a feed-forward net with tensors where they lie.
//!
//! Responsible for: [`FeedForward::run`]. Rows go through all layers a few at a time. Each layer is one product, in the way that
//! gives the bits of [`Dense`](crate::kernels::dense::Dense), which a compiled plan multiplies with:
//!
//! | columns | sums |
//! | --- | --- |
//! | up to [`DOTS_MAX`] | dot products; columns that are not contiguous are copied |
//! | more | one chain of multiply-adds along K for each element, beginning with its bias |
//! | the last one, alone in a panel of [`PANEL`] | a dot product; with K = 1, up to [`DOTS_MAX`] of them |
//!
//! Invariant: a row of the output has the same bits whatever other rows there are.

use super::{FeedForward, Function, Layer};
use crate::kernels::dense::PANEL;
use crate::kernels::epilogue::{self, Activation};
use crate::kernels::gemm::{self, DOTS_MAX, Ending, Operand};
use crate::kernels::{normal, turned};

/// Elements between two layers that are held at a time: a part of an L2 cache.
const BETWEEN: usize = 32 << 10;
/// Rows that blocks of the products' kernels have: pieces are multiples.
const BLOCK: usize = 6;

/// Most rows for which the time is, in part, that of bringing tensors from memory.
const FETCHED_MAX: usize = 7;
/// Elements of the next layer's weights that are brought near while a layer is computed: 64 kB.
const FETCHED: usize = 16 << 10;

/// Memory that runs use one after the other.
#[derive(Clone, Debug, Default)]
pub struct Scratch {
    /// Rows between two layers, twice.
    between: Vec<f32>,
    /// Columns of narrow matrices.
    columns: Vec<f32>,
}

impl FeedForward {
    /// Takes `m` rows of K elements, `x`, through the net whose tensors are `params`, by ordinal, each row-major as the graph
    /// declares it; writes `m` rows of N to `out`. Tensors that no layer uses are not looked at.
    ///
    /// # Panics
    /// If a tensor is missing or has another number of elements than the graph says, or `x` or `out` has not `m` rows.
    pub fn run(&self, params: &[&[f32]], x: &[f32], m: usize, out: &mut [f32], scratch: &mut Scratch) {
        let (k, n) = self.widths();
        assert!(params.len() >= self.tensors, "a tensor of the net is missing");
        for layer in &self.layers {
            let bias = layer.bias.is_none_or(|bias| params[bias].len() == layer.outputs);
            assert!(bias && params[layer.weights].len() == layer.inputs * layer.outputs, "a tensor has another size");
        }
        assert!(m.checked_mul(k) == Some(x.len()) && m.checked_mul(n) == Some(out.len()), "rows of another length");
        let rows = BETWEEN.checked_div(self.widest).map_or(m, |rows| rows.max(BLOCK) / BLOCK * BLOCK).min(m).max(1);
        let size = rows * self.widest;
        if scratch.between.len() < 2 * size {
            scratch.between.resize(2 * size, 0.0);
        }
        let (mut from, mut to) = scratch.between.split_at_mut(size);
        let last = self.layers.len() - 1;
        for first in (0..m).step_by(rows) {
            let count = rows.min(m - first);
            for (place, layer) in self.layers.iter().enumerate() {
                // Rows of a matrix are fetched by the product itself; squares touch lines in an order that nothing foresees.
                if let Some(next) = self.layers.get(place + 1)
                    && next.transposed
                    && m <= FETCHED_MAX
                {
                    let weights = params[next.weights];
                    turned::fetch(&weights[..weights.len().min(FETCHED)]);
                }
                let input = if place == 0 { &x[first * k..(first + count) * k] } else { &from[..count * layer.inputs] };
                let output = if place == last {
                    &mut out[first * n..(first + count) * n]
                } else {
                    &mut to[..count * layer.outputs]
                };
                layer.run_with(params, input, count, output, &mut scratch.columns);
                std::mem::swap(&mut from, &mut to);
            }
        }
    }
}

impl Layer {
    /// `out (m x N)` of `x (m x K)`; lengths were checked.
    pub(super) fn run(&self, params: &[&[f32]], x: &[f32], m: usize, out: &mut [f32], scratch: &mut Scratch) {
        self.run_with(params, x, m, out, &mut scratch.columns);
    }

    fn run_with(&self, params: &[&[f32]], x: &[f32], m: usize, out: &mut [f32], columns: &mut Vec<f32>) {
        let bias = self.bias.map_or(&[][..], |bias| params[bias]);
        self.sums(params[self.weights], bias, x, m, out, columns);
        self.finish(out);
    }

    /// What follows the sums and Relu.
    pub(super) fn finish(&self, out: &mut [f32]) {
        match self.function {
            Function::Identity | Function::Relu => {}
            Function::LeakyRelu(slope) => leak(out, slope),
            Function::Sigmoid => epilogue::activate(out, Activation::Sigmoid),
            Function::Tanh => epilogue::activate(out, Activation::Tanh),
            Function::Softmax => normal::softmax(out, self.outputs),
        }
    }

    /// The products with the bias, and what Relu makes of them.
    fn sums(&self, weights: &[f32], bias: &[f32], x: &[f32], m: usize, out: &mut [f32], columns: &mut Vec<f32>) {
        let (k, n) = (self.inputs, self.outputs);
        let low = if self.function == Function::Relu { 0.0 } else { f32::NEG_INFINITY };
        let rows = Operand::row_major(x, k);
        // Columns of the last panel, of which dot products are formed.
        let panel = (n - 1) % PANEL + 1;
        let narrow = if n <= DOTS_MAX || panel == 1 || (k == 1 && panel <= DOTS_MAX) { panel } else { 0 };
        let wide = n - narrow;
        if wide > 0 {
            let matrix = if self.transposed { Operand::transposed(weights, k) } else { Operand::row_major(weights, n) };
            let ending = Ending { bias: bias.get(..wide).unwrap_or(&[]), low };
            gemm::finished_product(out, n, (m, wide, k), rows, matrix, false, ending);
        }
        if narrow > 0 {
            let contiguous = self.transposed || n == 1 || k == 1;
            let lines = if contiguous {
                &weights[wide * k..]
            } else {
                columns.clear();
                for column in wide..n {
                    columns.extend(weights.iter().skip(column).step_by(n));
                }
                &columns[..]
            };
            let ending = Ending { bias: bias.get(wide..).unwrap_or(&[]), low };
            let lines = Operand::transposed(lines, k);
            gemm::finished_product(&mut out[wide..], n, (m, narrow, k), rows, lines, false, ending);
        }
    }
}

/// As the engine's LeakyRelu: a zero keeps its sign, which the pass of [`epilogue`] would not.
fn leak(values: &mut [f32], slope: f32) {
    for value in values {
        *value = if *value < 0.0 { *value * slope } else { *value };
    }
}
