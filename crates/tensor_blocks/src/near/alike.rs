//! How alike two blocks are, how important one is, and their values.

use crate::DType;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::str::FromStr;

/// Elements whose count cannot overflow a lane.
const COUNTED_AT_ONCE: usize = 1 << 16;

/// The fraction of elements that differ by at most `tolerance`, 0 to 1.
///
/// A NaN is never within, nor are infinities, equal ones neither. 0 for blocks of different lengths or none.
pub fn share_within(a: &[f32], b: &[f32], tolerance: f32) -> f64 {
    if a.len() != b.len() || a.is_empty() {
        return 0.0;
    }
    let mut within = 0u64;
    for (a, b) in a.chunks(COUNTED_AT_ONCE).zip(b.chunks(COUNTED_AT_ONCE)) {
        // Counts as wide as the values, and no question whether they overflow: so whole vectors are compared and added.
        let count = |count: u32, (a, b): (&f32, &f32)| count.wrapping_add(u32::from((a - b).abs() <= tolerance));
        within += u64::from(a.iter().zip(b).fold(0, count));
    }
    within as f64 / a.len() as f64
}

/// What makes a block important. Blocks are tried from the least important on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Importance {
    /// The percentile of the values with their signs, 0 to 100, as published; the published one is 75.
    Percentile(f64),
    /// The mean magnitude.
    MeanAbs,
    /// The mean square.
    MeanSquare,
}

impl Default for Importance {
    fn default() -> Importance {
        Importance::Percentile(75.0)
    }
}

impl FromStr for Importance {
    type Err = ();

    /// "percentile" followed by a number from 0 to 100 (as in "percentile75"), "mean_abs" or "mean_square".
    fn from_str(text: &str) -> Result<Importance, ()> {
        match text {
            "mean_abs" => Ok(Importance::MeanAbs),
            "mean_square" => Ok(Importance::MeanSquare),
            _ => {
                let percent: f64 = text.strip_prefix("percentile").and_then(|of| of.parse().ok()).ok_or(())?;
                if (0.0..=100.0).contains(&percent) { Ok(Importance::Percentile(percent)) } else { Err(()) }
            }
        }
    }
}

/// The importance of a block, comparable for one `how` only.
///
/// Infinite for a block with a NaN, which is tried last; 0 for one without elements.
pub fn importance(values: &[f32], how: Importance) -> f64 {
    if values.is_empty() {
        return 0.0;
    }
    let importance = match how {
        Importance::Percentile(percent) => percentile(values, percent),
        Importance::MeanAbs => mean(values, f64::abs),
        Importance::MeanSquare => mean(values, |value| value * value),
    };
    if importance.is_nan() { f64::INFINITY } else { importance }
}

/// The mean of a function of the values, which are not none. Several sums, so that none waits for the one before it.
fn mean(values: &[f32], of: impl Fn(f64) -> f64) -> f64 {
    let mut sums = [0.0; 8];
    let (chunks, rest) = values.as_chunks::<8>();
    for values in chunks {
        sums.iter_mut().zip(values).for_each(|(sum, &value)| *sum += of(f64::from(value)));
    }
    sums.iter_mut().zip(rest).for_each(|(sum, &value)| *sum += of(f64::from(value)));
    sums.iter().sum::<f64>() / values.len() as f64
}

/// The percentile with linear interpolation between neighbours, which is NumPy's default; a NaN if there is one.
fn percentile(values: &[f32], percent: f64) -> f64 {
    if values.iter().fold(false, |nan, value| nan | value.is_nan()) {
        return f64::NAN;
    }
    let mut values = values.to_vec();
    // NaN counts as 0.
    let at = (values.len() - 1) as f64 * (percent.max(0.0) / 100.0).min(1.0);
    let (_, &mut low, above) = values.select_nth_unstable_by(at as usize, f32::total_cmp);
    let high = above.iter().copied().min_by(f32::total_cmp).unwrap_or(low);
    let (low, high, part) = (f64::from(low), f64::from(high), at.fract());
    // Without the branch an infinite neighbour that has no part in it would make a NaN.
    if part == 0.0 || low == high { low } else { low + (high - low) * part }
}

/// The values of a block of `dtype` whose little-endian elements are `bytes`, in place of what `out` had.
///
/// float32, float16, bfloat16 and float64, the last rounded to float32. False for other element types and for bytes
/// that are no whole number of elements; `out` is empty then.
pub fn elements_f32(dtype: DType, bytes: &[u8], out: &mut Vec<f32>) -> bool {
    out.clear();
    match dtype {
        DType::Float32 => each(bytes, out, f32::from_le_bytes),
        DType::Float16 => halves(bytes, out),
        DType::BFloat16 => each(bytes, out, |bytes| bf16::from_le_bytes(bytes).to_f32()),
        DType::Float64 => each(bytes, out, |bytes| f64::from_le_bytes(bytes) as f32),
        _ => false,
    }
}

fn each<const WIDTH: usize>(bytes: &[u8], out: &mut Vec<f32>, value: impl Fn([u8; WIDTH]) -> f32) -> bool {
    let (elements, rest) = bytes.as_chunks::<WIDTH>();
    if !rest.is_empty() {
        return false;
    }
    out.extend(elements.iter().map(|&bytes| value(bytes)));
    true
}

/// As [`each`], by what the processor has for many at a time.
fn halves(bytes: &[u8], out: &mut Vec<f32>) -> bool {
    let (elements, rest) = bytes.as_chunks::<2>();
    if !rest.is_empty() {
        return false;
    }
    let mut some = [f16::ZERO; 256];
    out.resize(elements.len(), 0.0);
    for (elements, out) in elements.chunks(some.len()).zip(out.chunks_mut(some.len())) {
        let some = &mut some[..elements.len()];
        some.iter_mut().zip(elements).for_each(|(half, &bytes)| *half = f16::from_le_bytes(bytes));
        some.convert_to_f32_slice(out);
    }
    true
}
