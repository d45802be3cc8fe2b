//! Rows that are normalised: softmax and layer normalisation along contiguous rows.
//!
//! Invariants: sums along a row are formed in the order of its elements, in [`SUMS`] sums side by side, on every processor
//! and whatever lies around the row, so its result has the same bits in any company; what is not a number stays so.
#![allow(unsafe_code)] // Calls of functions that need features of the processor.

use super::epilogue::exp;
use super::levels::for_levels;

/// Sums side by side: as many as the widest vectors have elements.
const SUMS: usize = 16;
/// Values that are exponentiated at a time, whole rows of them, so that they are still near when they are divided.
const NEAR: usize = 4096;

/// The sum of `function(x)`.
#[inline(always)]
fn sum(row: &[f32], function: impl Fn(f32) -> f32) -> f32 {
    let (vectors, rest) = row.as_chunks::<SUMS>();
    let mut sums = [0f32; SUMS];
    for vector in vectors {
        for lane in 0..SUMS {
            sums[lane] += function(vector[lane]);
        }
    }
    for (lane, &value) in rest.iter().enumerate() {
        sums[lane] += function(value);
    }
    if row.len() <= 4 {
        // The other sums are zeros.
        return (sums[0] + sums[2]) + (sums[1] + sums[3]);
    }
    let mut width = SUMS / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    sums[0]
}

/// The largest element; of elements that are no numbers it knows nothing. The lowest number for an empty row.
#[inline(always)]
fn largest(row: &[f32]) -> f32 {
    let (vectors, rest) = row.as_chunks::<SUMS>();
    let more = |a: f32, b: f32| if b > a { b } else { a };
    let mut most = f32::MIN;
    if !vectors.is_empty() {
        let mut lanes = [f32::MIN; SUMS];
        for vector in vectors {
            for lane in 0..SUMS {
                lanes[lane] = more(lanes[lane], vector[lane]);
            }
        }
        most = lanes.into_iter().fold(most, more);
    }
    rest.iter().fold(most, |most, &value| more(most, value))
}

for_levels! {
    /// e^x / sum(e^x) along each row of `width` elements. A row that is minus infinity throughout gives what is no number.
    softmax(values: &mut [f32], width: usize) {
        if width == 0 {
            return;
        }
        let piece = (NEAR / width).max(1) * width;
        for rows in values.chunks_mut(piece) {
            for row in rows.chunks_exact_mut(width) {
                let most = largest(row);
                for value in row {
                    *value -= most;
                }
            }
            // In one loop over all rows: they may be shorter than a vector.
            for value in rows.iter_mut() {
                let power = exp(*value);
                // Where exp gives the smallest number for all that is smaller.
                *value = if *value < -87.0 { 0.0 } else { power };
            }
            for row in rows.chunks_exact_mut(width) {
                let scale = 1.0 / sum(row, |x| x);
                for value in row {
                    *value *= scale;
                }
            }
        }
    }
}

for_levels! {
    /// `(x - mean) / sqrt(variance + epsilon) * scale + bias` along each row of `width` elements.
    ///
    /// # Panics
    /// If `scale` or `bias` is shorter than a row.
    normalise(values: &mut [f32], width: usize, epsilon: f32, scale: &[f32], bias: &[f32]) {
        if width == 0 {
            return;
        }
        let (scale, bias, share) = (&scale[..width], &bias[..width], 1.0 / width as f32);
        for row in values.chunks_exact_mut(width) {
            let mean = sum(row, |x| x) * share;
            let variance = sum(row, |x| (x - mean) * (x - mean)) * share;
            let factor = 1.0 / (variance + epsilon).sqrt();
            for ((value, scale), bias) in row.iter_mut().zip(scale).zip(bias) {
                *value = (*value - mean) * factor * scale + bias;
            }
        }
    }
}

for_levels! {
    /// `values += added`.
    ///
    /// # Panics
    /// If `added` is shorter than `values`.
    add(values: &mut [f32], added: &[f32]) {
        let added = &added[..values.len()];
        for (value, added) in values.iter_mut().zip(added) {
            *value += added;
        }
    }
}

for_levels! {
    /// `values = values * factor + term`.
    scale(values: &mut [f32], factor: f32, term: f32) {
        for value in values {
            *value = *value * factor + term;
        }
    }
}

for_levels! {
    /// `values = values * factor + added`.
    ///
    /// # Panics
    /// If `added` is shorter than `values`.
    scale_and_add(values: &mut [f32], factor: f32, added: &[f32]) {
        let added = &added[..values.len()];
        for (value, added) in values.iter_mut().zip(added) {
            *value = *value * factor + added;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::tests::{Random, at_each_level, close};

    const WIDTHS: [usize; 14] = [1, 2, 3, 4, 5, 7, 10, 15, 16, 17, 33, 128, 384, 5000];

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    #[test]
    fn rows_are_those_of_the_definition_in_any_company() {
        at_each_level(|level| {
            let mut random = Random::new(level as u64 + 1);
            for width in WIDTHS {
                let rows = random.between(1, 12);
                let scale = [1.0, 30.0, 200.0][random.below(3)];
                let values: Vec<f32> = random.values(rows * width).iter().map(|x| x * scale).collect();
                let (factors, terms) = (random.values(width), random.values(width));
                let (mut soft, mut normal) = (values.clone(), values.clone());
                softmax(&mut soft, width);
                normalise(&mut normal, width, 1e-5, &factors, &terms);
                for (row, given) in values.chunks(width).enumerate() {
                    let what = format!("{rows} x {width}, {level:?}");
                    let place = row * width..(row + 1) * width;
                    let most = f64::from(given.iter().copied().fold(f32::MIN, f32::max));
                    let powers: Vec<f64> = given.iter().map(|&x| (f64::from(x) - most).exp()).collect();
                    let total: f64 = powers.iter().sum();
                    let expected: Vec<f32> = powers.iter().map(|power| (power / total) as f32).collect();
                    close(&soft[place.clone()], &expected, 1e-6, &what);
                    let mean = given.iter().map(|&x| f64::from(x)).sum::<f64>() / width as f64;
                    let variance = given.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / width as f64;
                    let normed = |(at, &x): (usize, &f32)| {
                        let even = (f64::from(x) - mean) / (variance + 1e-5).sqrt();
                        (even * f64::from(factors[at]) + f64::from(terms[at])) as f32
                    };
                    let expected: Vec<f32> = given.iter().enumerate().map(normed).collect();
                    // A single element is its own mean.
                    close(&normal[place.clone()], &expected, 2e-5, &what);
                    let (mut soft_alone, mut normal_alone) = (given.to_vec(), given.to_vec());
                    softmax(&mut soft_alone, width);
                    normalise(&mut normal_alone, width, 1e-5, &factors, &terms);
                    assert_eq!(bits(&soft_alone), bits(&soft[place.clone()]), "{what}");
                    assert_eq!(bits(&normal_alone), bits(&normal[place]), "{what}");
                }
            }
            softmax(&mut [], 3);
            normalise(&mut [], 0, 0.0, &[], &[]);
        });
    }

    #[test]
    fn masked_elements_get_nothing_and_what_is_no_number_stays_so() {
        let mut row = [1.0, f32::NEG_INFINITY, 1.0, f32::MIN, -1e9];
        softmax(&mut row, 5);
        assert_eq!(row, [0.5, 0.0, 0.5, 0.0, 0.0]);
        let mut row = [f32::MIN; 4];
        softmax(&mut row, 4);
        assert_eq!(row, [0.25; 4]);
        let mut rows = [1.0, f32::NAN, 1.0, 1.0];
        softmax(&mut rows, 2);
        assert!(rows[..2].iter().all(|value| value.is_nan()) && rows[2..] == [0.5, 0.5]);
        for never in [f32::NEG_INFINITY, f32::INFINITY, f32::NAN] {
            let mut row = [never; 20];
            softmax(&mut row, 20);
            assert!(row.iter().all(|value| value.is_nan()), "{never}");
        }
        let mut values = [1.0, 2.0, 3.0];
        add(&mut values, &[0.5; 3]);
        scale(&mut values, 2.0, 1.0);
        assert_eq!(values, [4.0, 6.0, 8.0]);
        scale_and_add(&mut values, 0.5, &[1.0, 0.0, -1.0]);
        assert_eq!(values, [3.0, 3.0, 3.0]);
    }
}
