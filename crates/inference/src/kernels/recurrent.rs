//! One step of recurrent layers: what follows the products.
//!
//! Responsible for: the equations of ONNX's LSTM and GRU (operators of the same names, default activations), one row of
//! the batch at a time. Gates lie side by side in a row, in ONNX's order.
#![allow(unsafe_code)] // In the macro: calls of functions that need features of the processor.

use super::epilogue::{sigmoid, tanh};
use super::levels::for_levels;

for_levels! {
    /// LSTM: from the sums of the gates i, o, f, c and the cell of the step before to the cell and the output.
    ///
    /// # Panics
    /// If `gates` is not four times as long as `cell`, or `output` shorter than it.
    lstm(gates: &[f32], cell: &mut [f32], output: &mut [f32]) {
        let size = cell.len();
        let output = &mut output[..size];
        let (input, rest) = gates[..4 * size].split_at(size);
        let (out, rest) = rest.split_at(size);
        let (forget, candidate) = rest.split_at(size);
        for at in 0..size {
            let value = sigmoid(forget[at]) * cell[at] + sigmoid(input[at]) * tanh(candidate[at]);
            cell[at] = value;
            output[at] = sigmoid(out[at]) * tanh(value);
        }
    }
}

for_levels! {
    /// GRU with `linear_before_reset`: from the input's part of the gates z, r, h, the recurrent part of all three with
    /// its biases, and the output of the step before to the output.
    ///
    /// # Panics
    /// If `gates` or `recurrent` is not three times as long as `before`, or `output` shorter than it.
    gru_after(gates: &[f32], recurrent: &[f32], before: &[f32], output: &mut [f32]) {
        let size = before.len();
        let output = &mut output[..size];
        let (gates, recurrent) = (&gates[..3 * size], &recurrent[..3 * size]);
        for at in 0..size {
            let update = sigmoid(gates[at] + recurrent[at]);
            let reset = sigmoid(gates[size + at] + recurrent[size + at]);
            let candidate = tanh(gates[2 * size + at] + reset * recurrent[2 * size + at]);
            output[at] = (1.0 - update) * candidate + update * before[at];
        }
    }
}

for_levels! {
    /// GRU without `linear_before_reset`, its first half: `reset * before`, from the sums of the gates z and r.
    ///
    /// # Panics
    /// If `gates` is not twice as long as `before`, or `output` shorter than it.
    gru_reset(gates: &[f32], before: &[f32], output: &mut [f32]) {
        let size = before.len();
        let (output, gates) = (&mut output[..size], &gates[..2 * size]);
        for at in 0..size {
            output[at] = sigmoid(gates[size + at]) * before[at];
        }
    }
}

for_levels! {
    /// The second half: the output, from the sums of all three gates.
    ///
    /// # Panics
    /// If `gates` is not three times as long as `before`, or `output` shorter than it.
    gru_before(gates: &[f32], before: &[f32], output: &mut [f32]) {
        let size = before.len();
        let (output, gates) = (&mut output[..size], &gates[..3 * size]);
        for at in 0..size {
            let update = sigmoid(gates[at]);
            output[at] = (1.0 - update) * tanh(gates[2 * size + at]) + update * before[at];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::tests::{Random, at_each_level, close};

    fn sigmoid(x: f32) -> f32 {
        1.0 / (1.0 + (-x).exp())
    }

    #[test]
    fn steps_are_those_of_the_definition() {
        let mut random = Random::new(9);
        at_each_level(|level| {
            for size in [0, 1, 7, 16, 40, 129] {
                let gates = random.values(4 * size);
                let (before, recurrent) = (random.values(size), random.values(3 * size));
                let (mut cell, mut output) = (before.clone(), vec![0.0; size]);
                lstm(&gates, &mut cell, &mut output);
                let cells: Vec<f32> = (0..size)
                    .map(|at| {
                        let kept = sigmoid(gates[2 * size + at]) * before[at];
                        kept + sigmoid(gates[at]) * gates[3 * size + at].tanh()
                    })
                    .collect();
                let outputs: Vec<f32> = (0..size).map(|at| sigmoid(gates[size + at]) * cells[at].tanh()).collect();
                close(&cell, &cells, 1e-6, &format!("cell of {size}, {level:?}"));
                close(&output, &outputs, 1e-6, &format!("LSTM of {size}, {level:?}"));

                gru_after(&gates, &recurrent, &before, &mut output);
                let blend =
                    |update: f32, candidate: f32, at: usize| (1.0 - update) * candidate.tanh() + update * before[at];
                let outputs: Vec<f32> = (0..size)
                    .map(|at| {
                        let reset = sigmoid(gates[size + at] + recurrent[size + at]);
                        let candidate = gates[2 * size + at] + reset * recurrent[2 * size + at];
                        blend(sigmoid(gates[at] + recurrent[at]), candidate, at)
                    })
                    .collect();
                close(&output, &outputs, 1e-6, &format!("GRU of {size}, {level:?}"));

                gru_reset(&gates, &before, &mut output);
                let outputs: Vec<f32> = (0..size).map(|at| sigmoid(gates[size + at]) * before[at]).collect();
                close(&output, &outputs, 1e-6, &format!("reset of {size}, {level:?}"));

                gru_before(&gates, &before, &mut output);
                let outputs: Vec<f32> =
                    (0..size).map(|at| blend(sigmoid(gates[at]), gates[2 * size + at], at)).collect();
                close(&output, &outputs, 1e-6, &format!("candidate of {size}, {level:?}"));
            }
        });
    }
}
