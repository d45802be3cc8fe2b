//! What a training minimises, and its gradient at a net's outputs.
//!
//! Responsible for: [`Target`], the values that outputs are compared with, checked once; and [`loss_and_gradient`]. Cross entropies
//! take what goes into the last function (logits) and have that function themselves, so that no logarithm of a 0 is taken.
//!
//! Invariant: losses are added in float64, row after row.

use super::options::Loss;
use super::{FeedForward, Function};
use crate::error::ModelError;

/// What the outputs of a net should be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target<'a> {
    loss: Loss,
    /// Length of the outputs' rows.
    width: usize,
    values: Values<'a>,
}

#[derive(Clone, Copy, Debug)]
enum Values<'a> {
    /// A row of outputs for each row.
    Rows(&'a [f32]),
    /// For each row the number of the output that should be 1, the others being 0.
    Classes(&'a [f32]),
}

impl<'a> Target<'a> {
    /// # Errors
    /// `InvalidInput` for another number of values and for a loss that does not fit the net's last function, `OutOfRange` for values
    /// that the loss does not take.
    pub fn new(net: &FeedForward, y: &'a [f32], rows: usize, loss: Loss) -> Result<Target<'a>, ModelError> {
        let (_, width) = net.widths();
        let last = net.layers.last().map(|layer| layer.function);
        let fits = match loss {
            Loss::Mse => true,
            Loss::CrossEntropy => width > 1 && matches!(last, Some(Function::Softmax | Function::Identity)),
            Loss::BinaryCrossEntropy => matches!(last, Some(Function::Sigmoid | Function::Identity)),
        };
        if !fits {
            let wanted = if loss == Loss::CrossEntropy {
                "It wants at least two outputs, with a Softmax or nothing behind the last layer."
            } else {
                "It wants a Sigmoid or nothing behind the last layer."
            };
            return Err(ModelError::invalid_input(format!("the loss \"{}\" does not fit the model", loss.name()))
                .detail(wanted));
        }
        let values = if rows.checked_mul(width) == Some(y.len()) {
            Values::Rows(y)
        } else if loss == Loss::CrossEntropy && y.len() == rows {
            Values::Classes(y)
        } else {
            return Err(ModelError::invalid_input("the targets to train on do not fit the model")
                .detail(format!("{rows} rows of {width} values are wanted; there are {} values.", y.len())));
        };
        let (most, what) = match (loss, values) {
            (Loss::Mse, _) => return Ok(Target { loss, width, values }),
            (_, Values::Classes(_)) => ((width - 1) as f32, "a class"),
            (_, Values::Rows(_)) => (1.0, "a probability"),
        };
        let whole = matches!(values, Values::Classes(_));
        let wrong = y.iter().position(|value| !(0.0..=most).contains(value) || (whole && value.fract() != 0.0));
        if let Some(place) = wrong {
            return Err(ModelError::out_of_range(format!("a target to train on is not {what}"))
                .detail(format!("It is {}; {what} is from 0 to {most}.", y[place])));
        }
        Ok(Target { loss, width, values })
    }

    /// True where the loss has the net's last function.
    pub fn takes_logits(&self) -> bool {
        self.loss != Loss::Mse
    }

    fn at(&self, row: usize, column: usize) -> f32 {
        match self.values {
            Values::Rows(values) => values[row * self.width + column],
            Values::Classes(classes) => f32::from(classes[row] == column as f32),
        }
    }
}

/// The sum of the losses of rows, whose `outputs` these are. `gradient` becomes that of `share` times the sum.
pub(super) fn loss_and_gradient(
    target: &Target<'_>,
    outputs: &[f32],
    rows: &[usize],
    share: f32,
    gradient: &mut Vec<f32>,
) -> f64 {
    gradient.resize(outputs.len(), 0.0);
    let width = target.width;
    let lines = outputs.chunks_exact(width).zip(gradient.chunks_exact_mut(width)).zip(rows);
    let mut total = 0.0;
    for ((outputs, gradient), &row) in lines {
        let pairs = outputs.iter().zip(gradient).enumerate();
        total += match target.loss {
            Loss::Mse => {
                let (mut sum, factor) = (0.0, 2.0 * share / width as f32);
                for (column, (&output, gradient)) in pairs {
                    let off = output - target.at(row, column);
                    *gradient = factor * off;
                    sum += f64::from(off) * f64::from(off);
                }
                sum / width as f64
            }
            Loss::CrossEntropy => {
                let most =
                    outputs.iter().fold(f32::NEG_INFINITY, |most, &value| if value > most { value } else { most });
                let power = |value: f32| (f64::from(value) - f64::from(most)).exp();
                let powers: f64 = outputs.iter().map(|&value| power(value)).sum();
                let weight: f64 = (0..width).map(|column| f64::from(target.at(row, column))).sum();
                let mut sum = 0.0;
                for (column, (&output, gradient)) in pairs {
                    let wanted = f64::from(target.at(row, column));
                    *gradient = ((power(output) / powers * weight - wanted) * f64::from(share)) as f32;
                    if wanted > 0.0 {
                        sum += wanted * (f64::from(most) + powers.ln() - f64::from(output));
                    }
                }
                sum
            }
            Loss::BinaryCrossEntropy => {
                let mut sum = 0.0;
                for (column, (&output, gradient)) in pairs {
                    let (z, wanted) = (f64::from(output), f64::from(target.at(row, column)));
                    let probability = 1.0 / (1.0 + (-z).exp());
                    *gradient = ((probability - wanted) * f64::from(share) / width as f64) as f32;
                    sum += z.max(0.0) - z * wanted + (-z.abs()).exp().ln_1p();
                    // `max` would lose it.
                    if z.is_nan() {
                        sum = z;
                    }
                }
                sum / width as f64
            }
        };
    }
    total
}
