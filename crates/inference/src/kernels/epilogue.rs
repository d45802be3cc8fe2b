//! What follows a product: a bias and an activation, in one pass over the finished output.
//!
//! Responsible for: the activations as they are applied to values in registers ([`Activation`]), their elementary
//! functions, and the pass ([`finish`]). Everything is written for one value; the compiler makes vectors of it, once
//! for each [`Level`].
//!
//! Invariant: what is not a number stays so.
#![allow(unsafe_code)] // Calls of functions that need features of the processor.

use super::lanes::{Level, level};

/// A function of one value.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Activation {
    /// The value itself.
    #[default]
    Identity,
    /// max(x, 0).
    Relu,
    /// x, or `x * slope` below 0.
    LeakyRelu(f32),
    /// At least the first and at most the second.
    Clip(f32, f32),
    /// 1 / (1 + e^-x).
    Sigmoid,
    /// (e^x - e^-x) / (e^x + e^-x).
    Tanh,
    /// x sigmoid(x).
    Silu,
    /// x (1 + erf(x / √2)) / 2.
    Gelu,
    /// `clip(x * slope + offset, 0, 1)`: slope, offset.
    HardSigmoid(f32, f32),
    /// `x * clip(x / 6 + 1/2, 0, 1)`.
    HardSwish,
}

/// What is added before the activation.
#[derive(Clone, Copy, Debug, Default)]
pub enum Bias<'a> {
    /// Nothing.
    #[default]
    None,
    /// One value for each row.
    PerRow(&'a [f32]),
    /// One value for each column.
    PerColumn(&'a [f32]),
}

/// `out = activation(out + bias)`; the `rows` rows of `columns` values are `stride` apart.
///
/// # Panics
/// If `out` or the bias is shorter than the sizes say.
pub fn finish(out: &mut [f32], stride: usize, (rows, columns): (usize, usize), bias: Bias<'_>, activation: Activation) {
    if rows == 0 || columns == 0 || (matches!(bias, Bias::None) && activation == Activation::Identity) {
        return;
    }
    match bias {
        Bias::PerRow(values) => assert!(values.len() >= rows, "the bias is shorter than the rows"),
        Bias::PerColumn(values) => assert!(values.len() >= columns, "the bias is shorter than the columns"),
        Bias::None => {}
    }
    if stride == columns && !matches!(bias, Bias::PerColumn(_) | Bias::PerRow(_)) {
        return line(&mut out[..rows * columns], 1.0, 0.0, &[], activation);
    }
    for row in 0..rows {
        let values = &mut out[row * stride..][..columns];
        match bias {
            Bias::None => line(values, 1.0, 0.0, &[], activation),
            Bias::PerRow(bias) => line(values, 1.0, bias[row], &[], activation),
            Bias::PerColumn(bias) => line(values, 1.0, 0.0, &bias[..columns], activation),
        }
    }
}

/// Applies an activation.
pub fn activate(values: &mut [f32], activation: Activation) {
    if activation != Activation::Identity {
        line(values, 1.0, 0.0, &[], activation);
    }
}

/// One row: `values = activation(values * scale + offset + added)`, where `added` is empty or as long as `values`.
pub(super) fn line(values: &mut [f32], scale: f32, offset: f32, added: &[f32], activation: Activation) {
    debug_assert!(added.is_empty() || added.len() == values.len());
    match level() {
        // SAFETY: the level says that the processor has these features.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { line_avx512(values, scale, offset, added, activation) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { line_avx2(values, scale, offset, added, activation) },
        Level::Base => line_body(values, scale, offset, added, activation),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512dq,avx512vl,avx2,fma")]
fn line_avx512(values: &mut [f32], scale: f32, offset: f32, added: &[f32], activation: Activation) {
    line_body(values, scale, offset, added, activation);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn line_avx2(values: &mut [f32], scale: f32, offset: f32, added: &[f32], activation: Activation) {
    line_body(values, scale, offset, added, activation);
}

#[inline(always)]
fn line_body(values: &mut [f32], scale: f32, offset: f32, bias: &[f32], activation: Activation) {
    #[inline(always)]
    fn each(values: &mut [f32], scale: f32, offset: f32, bias: &[f32], function: impl Fn(f32) -> f32) {
        if bias.is_empty() {
            for value in values {
                *value = function(*value * scale + offset);
            }
        } else {
            for (value, bias) in values.iter_mut().zip(bias) {
                *value = function(*value * scale + offset + bias);
            }
        }
    }
    match activation {
        Activation::Identity => each(values, scale, offset, bias, |x| x),
        Activation::Relu => each(values, scale, offset, bias, |x| if x < 0.0 { 0.0 } else { x }),
        Activation::LeakyRelu(slope) => each(values, scale, offset, bias, |x| if x < 0.0 { x * slope } else { x }),
        Activation::Clip(low, high) => each(values, scale, offset, bias, |x| clip(x, low, high)),
        Activation::Sigmoid => each(values, scale, offset, bias, sigmoid),
        Activation::Tanh => each(values, scale, offset, bias, tanh),
        Activation::Silu => each(values, scale, offset, bias, |x| x * sigmoid(x)),
        Activation::Gelu => each(values, scale, offset, bias, gelu),
        Activation::HardSigmoid(slope, start) => {
            each(values, scale, offset, bias, |x| clip(x * slope + start, 0.0, 1.0))
        }
        Activation::HardSwish => each(values, scale, offset, bias, |x| x * clip(x * (1.0 / 6.0) + 0.5, 0.0, 1.0)),
    }
}

#[inline(always)]
fn clip(x: f32, low: f32, high: f32) -> f32 {
    let x = if x < low { low } else { x };
    if x > high { high } else { x }
}

/// e^x, between about 1e-38 and 2e38, to two units in the last place: x = n ln 2 + r, with the polynomial of Moshier's
/// Cephes library (expf) for e^r.
#[allow(clippy::excessive_precision)] // Coefficients as they were published.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it leaves an integer in the low bits.
    let x = clip(x, -87.3, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let whole = shifted - ROUND;
    let rest = (x - whole * 0.693_359_375) + whole * 2.121_944_4e-4;
    let mut sum = 1.987_569_15e-4;
    for coefficient in [1.398_199_950_7e-3, 8.333_451_907_3e-3, 4.166_579_589_4e-2, 1.666_666_545_9e-1, 0.5] {
        sum = sum * rest + coefficient;
    }
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    (sum * rest * rest + rest + 1.0) * power
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// tanh x; near 0 by Cephes's polynomial (tanhf), where the other form would cancel.
#[allow(clippy::excessive_precision)]
#[inline(always)]
pub(super) fn tanh(x: f32) -> f32 {
    let square = x * x;
    let mut sum = -5.704_988_727_45e-3;
    for coefficient in [2.063_908_879_54e-2, -5.373_971_552_31e-2, 1.333_144_226_67e-1, -3.333_328_226_71e-1] {
        sum = sum * square + coefficient;
    }
    let near = sum * square * x + x;
    let far = 1.0 - 2.0 / (exp(2.0 * x) + 1.0);
    if square < 0.625 * 0.625 { near } else { far }
}

/// x (1 + erf(x / √2)) / 2, erf to 1.5e-7 (Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26).
#[inline(always)]
fn gelu(x: f32) -> f32 {
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / (1.0 + 0.327_591_1 * z);
    let mut sum = 1.061_405_4;
    for coefficient in [-1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6] {
        sum = sum * t + coefficient;
    }
    // 1 - erf(z), and so 1 + erf(-z).
    let beyond = sum * t * exp(-z * z);
    0.5 * x * if x < 0.0 { beyond } else { 2.0 - beyond }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::tests::{Random, at_each_level, close};

    fn reference(x: f32, activation: Activation) -> f32 {
        let x = f64::from(x);
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        (match activation {
            Activation::Identity => x,
            Activation::Relu => x.max(0.0),
            Activation::LeakyRelu(slope) => {
                if x < 0.0 {
                    x * f64::from(slope)
                } else {
                    x
                }
            }
            Activation::Clip(low, high) => x.clamp(low.into(), high.into()),
            Activation::Sigmoid => sigmoid(x),
            Activation::Tanh => x.tanh(),
            Activation::Silu => x * sigmoid(x),
            Activation::Gelu => {
                // The integral of the normal density, by Simpson's rule.
                let (steps, density) = (2000, |t: f64| (-t * t / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt());
                let width = x / f64::from(steps);
                let weight = |step: i32| if step == 0 || step == steps { 1.0 } else { f64::from(2 + 2 * (step % 2)) };
                let sum: f64 = (0..=steps).map(|step| weight(step) * density(width * f64::from(step))).sum();
                x * (0.5 + sum * width / 3.0)
            }
            Activation::HardSigmoid(slope, start) => (x * f64::from(slope) + f64::from(start)).clamp(0.0, 1.0),
            Activation::HardSwish => x * (x / 6.0 + 0.5).clamp(0.0, 1.0),
        }) as f32
    }

    const ALL: [Activation; 10] = [
        Activation::Identity,
        Activation::Relu,
        Activation::LeakyRelu(0.1),
        Activation::Clip(-0.5, 6.0),
        Activation::Sigmoid,
        Activation::Tanh,
        Activation::Silu,
        Activation::Gelu,
        Activation::HardSigmoid(0.2, 0.5),
        Activation::HardSwish,
    ];

    #[test]
    fn activations_and_biases_are_those_of_the_definition() {
        at_each_level(|level| check(level as u64 + 3));
    }

    fn check(seed: u64) {
        let mut random = Random::new(seed);
        for activation in ALL {
            for bias in 0..3 {
                let (rows, columns, stride) = (random.between(1, 9), random.between(1, 70), 75);
                let scale = [1.0, 8.0, 0.01][random.below(3)];
                let mut out: Vec<f32> = random.values(rows * stride).iter().map(|x| x * scale).collect();
                let before = out.clone();
                let added = random.values(80);
                let bias = [Bias::None, Bias::PerRow(&added), Bias::PerColumn(&added)][bias];
                finish(&mut out, stride, (rows, columns), bias, activation);
                let expected: Vec<f32> = (0..before.len())
                    .map(|place| {
                        let (row, column) = (place / stride, place % stride);
                        match bias {
                            _ if column >= columns => before[place],
                            Bias::None => reference(before[place], activation),
                            Bias::PerRow(bias) => reference(before[place] + bias[row], activation),
                            Bias::PerColumn(bias) => reference(before[place] + bias[column], activation),
                        }
                    })
                    .collect();
                close(&out, &expected, 2e-6, &format!("{activation:?}, {bias:?}"));
            }
        }
    }

    #[test]
    fn activations_are_right_far_out() {
        for activation in ALL {
            for x in [-1e30f32, -200.0, -89.0, -20.0, 20.0, 89.0, 200.0, 1e30] {
                let mut value = [x];
                activate(&mut value, activation);
                let expected = if activation == Activation::Gelu { x.max(0.0) } else { reference(x, activation) };
                close(&value, &[expected], 1e-6 * expected.abs() + 1e-6, &format!("{activation:?} of {x}"));
            }
            let mut value = [f32::NAN];
            activate(&mut value, activation);
            assert!(value[0].is_nan(), "{activation:?}");
        }
    }
}
