//! Elements of half the width.
//!
//! Responsible for: finding out whether all elements of a block have one, and both ways. Everything is arithmetic of integers
//! (or of normal numbers, in the one case where that is exact in every mode), so NaNs keep their payloads and no processor
//! flushes a subnormal number.

use crate::DType;

/// What the elements become.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Narrow {
    /// float32 to bfloat16.
    BFloat16,
    /// float32 to float16.
    Float16,
    /// float64 to float32.
    Float32,
}

/// Elements that are looked at before it is asked whether to go on: most blocks are told by the first run.
const RUN: usize = 256;

impl Narrow {
    /// All, the first choice first: bfloat16 is the fastest to turn back.
    pub const ALL: [Narrow; 3] = [Narrow::BFloat16, Narrow::Float16, Narrow::Float32];

    /// The type of the elements as they are.
    pub const fn of(self) -> DType {
        match self {
            Narrow::BFloat16 | Narrow::Float16 => DType::Float32,
            Narrow::Float32 => DType::Float64,
        }
    }

    /// The type of the narrow elements.
    pub const fn dtype(self) -> DType {
        match self {
            Narrow::BFloat16 => DType::BFloat16,
            Narrow::Float16 => DType::Float16,
            Narrow::Float32 => DType::Float32,
        }
    }

    /// True if every element comes back from its narrow form bit for bit.
    pub fn fits(self, dtype: DType, elements: &[u8]) -> bool {
        let all = |fits: fn(u32) -> bool| {
            let runs = elements.as_chunks().0.chunks(RUN);
            runs.into_iter().all(|run| run.iter().fold(true, |all, &e| all & fits(u32::from_le_bytes(e))))
        };
        dtype == self.of()
            && match self {
                Narrow::BFloat16 => all(|bits| bits as u16 == 0),
                Narrow::Float16 => all(|bits| bits & 0x1fff == 0) && all(|bits| widen16(narrow16(bits)) == bits),
                Narrow::Float32 => {
                    let runs = elements.as_chunks().0.chunks(RUN);
                    runs.into_iter().all(|run| run.iter().all(|&e| fits32(u64::from_le_bytes(e))))
                }
            }
    }

    /// Appends the narrow form of elements that have one.
    pub fn narrow(self, elements: &[u8], out: &mut Vec<u8>) {
        match self {
            Narrow::BFloat16 => {
                out.extend(elements.as_chunks::<4>().0.iter().flat_map(|e| [e[2], e[3]]));
            }
            Narrow::Float16 => {
                let narrow = |e: &[u8; 4]| narrow16(u32::from_le_bytes(*e)).to_le_bytes();
                out.extend(elements.as_chunks().0.iter().flat_map(narrow));
            }
            Narrow::Float32 => {
                let narrow = |e: &[u8; 8]| narrow32(u64::from_le_bytes(*e)).to_le_bytes();
                out.extend(elements.as_chunks().0.iter().flat_map(narrow));
            }
        }
    }

    /// Fills `out` with the elements of which `narrow`, half as many bytes, is the narrow form.
    pub fn widen(self, narrow: &[u8], out: &mut [u8]) {
        match self {
            Narrow::BFloat16 => {
                for (out, e) in out.as_chunks_mut().0.iter_mut().zip(narrow.as_chunks().0) {
                    *out = (u32::from(u16::from_le_bytes(*e)) << 16).to_le_bytes();
                }
            }
            Narrow::Float16 => {
                for (out, e) in out.as_chunks_mut().0.iter_mut().zip(narrow.as_chunks().0) {
                    *out = widen16(u16::from_le_bytes(*e)).to_le_bytes();
                }
            }
            Narrow::Float32 => {
                for (out, e) in out.as_chunks_mut().0.iter_mut().zip(narrow.as_chunks().0) {
                    *out = widen32(u32::from_le_bytes(*e)).to_le_bytes();
                }
            }
        }
    }
}

/// What exponents of float32 are above those of float16.
const BIAS_16: u32 = 127 - 15;

/// The float16 whose value is this float32, both as bits; anything if there is none.
fn narrow16(bits: u32) -> u16 {
    let sign = (bits >> 16 & 0x8000) as u16;
    let (exponent, mantissa) = (bits >> 23 & 0xff, bits & 0x7f_ffff);
    let size = match exponent {
        0xff => 0x7c00 | mantissa >> 13,
        113..=142 => (exponent - BIAS_16) << 10 | mantissa >> 13,
        // A subnormal float16: the leading one stands in the mantissa, which counts in 2^-24.
        102..=112 => (mantissa | 0x80_0000) >> (126 - exponent),
        _ => 0,
    };
    sign | size as u16
}

/// The float32 whose value is this float16, both as bits. The payload of a NaN moves along.
///
/// Without branches, so that compilers make vectors of it. A subnormal float16 is normal as float32: 2^-14 with its mantissa,
/// less 2^-14, both normal numbers whose difference is exact.
fn widen16(bits: u16) -> u32 {
    const SMALLEST: u32 = 113 << 23;
    let sign = u32::from(bits & 0x8000) << 16;
    let size = u32::from(bits & 0x7fff) << 13;
    let exponent = size & 0x1f << 23;
    let normal = size + (BIAS_16 << 23);
    let subnormal = (f32::from_bits(size + SMALLEST) - f32::from_bits(SMALLEST)).to_bits();
    let special = if exponent == 0x1f << 23 { BIAS_16 << 23 } else { 0 };
    sign | if exponent == 0 { subnormal } else { normal + special }
}

/// What exponents of float64 are above those of float32.
const BIAS_32: u64 = 1023 - 127;

/// True for bits of a float64 that is zero, infinite, or a normal number of float32. NaNs and what float32 has as subnormal are
/// left alone.
fn fits32(bits: u64) -> bool {
    let exponent = bits >> 52 & 0x7ff;
    let kept = bits & 0x1fff_ffff == 0;
    let ordinary = exponent > BIAS_32 && exponent < BIAS_32 + 0xff;
    bits << 1 == 0 || bits << 1 == 0x7ff << 53 || kept && ordinary
}

/// The float32 for which [`fits32`] is true.
fn narrow32(bits: u64) -> u32 {
    let sign = (bits >> 32 & 0x8000_0000) as u32;
    let size = bits & !(1 << 63);
    sign | match size >> 52 {
        0 => 0,
        0x7ff => 0xff << 23,
        _ => ((size - (BIAS_32 << 52)) >> 29) as u32,
    }
}

/// The inverse of [`narrow32`].
fn widen32(bits: u32) -> u64 {
    let sign = u64::from(bits & 0x8000_0000) << 32;
    let size = u64::from(bits & 0x7fff_ffff) << 29;
    sign | match bits >> 23 & 0xff {
        0 => 0,
        0xff => size + ((0x7ff - 0xff) << 52),
        _ => size + (BIAS_32 << 52),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_float16_comes_back_and_is_the_number_that_half_says() {
        for bits in 0..=u16::MAX {
            let wide = widen16(bits);
            assert_eq!(narrow16(wide), bits);
            let value = half::f16::from_bits(bits);
            if value.is_nan() {
                assert!(f32::from_bits(wide).is_nan() && wide >> 13 & 0x3ff == u32::from(bits) & 0x3ff);
            } else {
                assert_eq!(wide, value.to_f32().to_bits(), "{bits:#x}");
            }
        }
    }

    #[test]
    fn what_float16_has_not_does_not_fit() {
        let fits = |value: f32| Narrow::Float16.fits(DType::Float32, &value.to_le_bytes());
        for value in
            [0.0, -0.0, 1.0, 65504.0, -(2f32.powi(-14)), 2f32.powi(-24), 1023.0 * 2f32.powi(-24), f32::INFINITY]
        {
            assert!(fits(value), "{value}");
        }
        for value in [65536.0, 65505.0, 2f32.powi(-25), 1.5 * 2f32.powi(-24), 0.1, f32::MIN_POSITIVE, 1e-45] {
            assert!(!fits(value), "{value}");
        }
        assert!(!fits(f32::from_bits(0x7f80_0001)), "a NaN whose payload is lost");
    }

    #[test]
    fn float64_fits_float32_only_where_its_bits_come_back() {
        let fits = |bits: u64| Narrow::Float32.fits(DType::Float64, &bits.to_le_bytes());
        let values =
            [0.0, -0.0, 1.5, f64::from(f32::MAX), f64::from(f32::MIN_POSITIVE), f64::INFINITY, -3.25e-30f32 as f64];
        for value in values.map(f64::to_bits) {
            assert!(fits(value) && widen32(narrow32(value)) == value, "{value:#x}");
            assert_eq!(f64::from(f32::from_bits(narrow32(value))).to_bits(), value);
        }
        for value in [0.1, f64::NAN, f64::from(f32::MIN_POSITIVE) / 2.0, f64::from(f32::MAX) * 2.0, f64::MIN_POSITIVE] {
            assert!(!fits(value.to_bits()), "{value}");
        }
    }
}
