//! Vectors of float32 as wide as the processor has them.
//!
//! Responsible for: the few operations that the kernels are written in, for AVX-512, AVX2 with FMA, and for what every
//! processor has; and for telling which of them this processor runs ([`level`]).
//!
//! Invariant: a function that is generic over [`Lanes`] is inlined into one that carries the target features of the
//! type, and that one is called only where [`level`] allows it.
#![allow(unsafe_code)] // Vector instructions beyond the baseline of the target, and loads by pointer.

use std::sync::OnceLock;

/// What this processor runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Level {
    /// The baseline of the target: SSE2 on x86-64, NEON on aarch64.
    Base,
    /// AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512F, DQ and VL.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// The widest level that this processor has.
pub(super) fn level() -> Level {
    #[cfg(test)]
    if let Some(level) = super::tests::ASSUMED.get() {
        return level;
    }
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let wide = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if avx2 && wide {
                return Level::Avx512;
            }
            if avx2 {
                return Level::Avx2;
            }
        }
        Level::Base
    })
}

/// Elements of the widest vector.
pub(super) const WIDEST: usize = 16;

/// A vector of float32.
///
/// Every function needs the processor's features of the type; loads and stores need as many elements behind the
/// pointer as they move, at any alignment.
pub(super) trait Lanes: Copy {
    /// Elements.
    const WIDTH: usize;
    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    /// The first `count` elements, then zeros; `count` is in `1..=WIDTH`.
    unsafe fn load_some(from: *const f32, count: usize) -> Self;
    /// Elements `first..end`, zeros elsewhere; `first <= end <= WIDTH`. Only these need to lie behind the pointer, which
    /// may point outside of their memory.
    unsafe fn load_between(from: *const f32, first: usize, end: usize) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn store_some(self, to: *mut f32, count: usize);
    unsafe fn add(self, other: Self) -> Self;
    /// `self * factor + term`.
    unsafe fn fma(self, factor: Self, term: Self) -> Self;
    /// The sum of the elements.
    unsafe fn sum(self) -> f32;
    /// Elements 0, 2, 4, ... of the two vectors as one.
    unsafe fn even(self, other: Self) -> Self;
    /// At least `low` and at most `high`; what is not a number stays so.
    unsafe fn clamp(self, low: Self, high: Self) -> Self;
    /// Elements `at..at + 4` of the first `WIDTH` lines as four vectors, each with one element of every line.
    unsafe fn turn(lines: &[*const f32; WIDEST], at: usize) -> [Self; 4];
}

/// Four elements, in what the compiler makes of an array.
#[derive(Clone, Copy)]
#[repr(align(16))]
pub(super) struct Four([f32; 4]);

// SAFETY of the bodies below: the caller's promise of the trait; no special features are used here.
impl Lanes for Four {
    const WIDTH: usize = 4;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Four {
        Four([value; 4])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Four {
        // SAFETY: four elements lie there; the read needs no alignment.
        Four(unsafe { from.cast::<[f32; 4]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn load_some(from: *const f32, count: usize) -> Four {
        let mut values = [0.0; 4];
        for (place, value) in values.iter_mut().enumerate().take(count) {
            // SAFETY: `count` elements lie there.
            *value = unsafe { *from.add(place) };
        }
        Four(values)
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: there is room for four elements; the write needs no alignment.
        unsafe { to.cast::<[f32; 4]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn store_some(self, to: *mut f32, count: usize) {
        for (place, value) in self.0.iter().enumerate().take(count) {
            // SAFETY: there is room for `count` elements.
            unsafe { *to.add(place) = *value }
        }
    }

    #[inline(always)]
    unsafe fn add(self, other: Four) -> Four {
        Four(std::array::from_fn(|lane| self.0[lane] + other.0[lane]))
    }

    #[inline(always)]
    unsafe fn fma(self, factor: Four, term: Four) -> Four {
        // Where the baseline has no fused instruction, `mul_add` would be a call of a function.
        Four(std::array::from_fn(|lane| {
            if cfg!(target_arch = "aarch64") {
                self.0[lane].mul_add(factor.0[lane], term.0[lane])
            } else {
                self.0[lane] * factor.0[lane] + term.0[lane]
            }
        }))
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        (self.0[0] + self.0[2]) + (self.0[1] + self.0[3])
    }

    #[inline(always)]
    unsafe fn load_between(from: *const f32, first: usize, end: usize) -> Four {
        let mut values = [0.0; 4];
        for (place, value) in values.iter_mut().enumerate().take(end).skip(first) {
            // SAFETY: these elements lie there.
            *value = unsafe { *from.wrapping_add(place) };
        }
        Four(values)
    }

    #[inline(always)]
    unsafe fn even(self, other: Four) -> Four {
        Four([self.0[0], self.0[2], other.0[0], other.0[2]])
    }

    #[inline(always)]
    unsafe fn clamp(self, low: Four, high: Four) -> Four {
        Four(std::array::from_fn(|lane| {
            let value = if self.0[lane] < low.0[lane] { low.0[lane] } else { self.0[lane] };
            if value > high.0[lane] { high.0[lane] } else { value }
        }))
    }

    #[inline(always)]
    unsafe fn turn(lines: &[*const f32; WIDEST], at: usize) -> [Four; 4] {
        // SAFETY: four elements of each line lie there.
        let lines: [Four; 4] = std::array::from_fn(|place| unsafe { Four::load(lines[place].add(at)) });
        std::array::from_fn(|step| Four(std::array::from_fn(|place| lines[place].0[step])))
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Eight, Sixteen};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Lanes, WIDEST};
    use std::arch::x86_64::*;

    /// Eight elements: AVX2 and FMA.
    #[derive(Clone, Copy)]
    pub struct Eight(__m256);

    /// The mask of the first `count` of eight elements.
    #[inline(always)]
    unsafe fn first_of_eight(count: usize) -> __m256i {
        // SAFETY: AVX2 is there.
        unsafe {
            let places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            _mm256_cmpgt_epi32(_mm256_set1_epi32(count as i32), places)
        }
    }

    // SAFETY of the bodies below: the features are there and the pointers have the elements behind them, as the trait
    // demands of its callers. Masked-out elements are not touched.
    impl Lanes for Eight {
        const WIDTH: usize = 8;

        #[inline(always)]
        unsafe fn splat(value: f32) -> Eight {
            // SAFETY: as above.
            Eight(unsafe { _mm256_set1_ps(value) })
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Eight {
            // SAFETY: as above.
            Eight(unsafe { _mm256_loadu_ps(from) })
        }

        #[inline(always)]
        unsafe fn load_some(from: *const f32, count: usize) -> Eight {
            // SAFETY: as above.
            Eight(unsafe { _mm256_maskload_ps(from, first_of_eight(count)) })
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: as above.
            unsafe { _mm256_storeu_ps(to, self.0) }
        }

        #[inline(always)]
        unsafe fn store_some(self, to: *mut f32, count: usize) {
            // SAFETY: as above.
            unsafe { _mm256_maskstore_ps(to, first_of_eight(count), self.0) }
        }

        #[inline(always)]
        unsafe fn add(self, other: Eight) -> Eight {
            // SAFETY: as above.
            Eight(unsafe { _mm256_add_ps(self.0, other.0) })
        }

        #[inline(always)]
        unsafe fn fma(self, factor: Eight, term: Eight) -> Eight {
            // SAFETY: as above.
            Eight(unsafe { _mm256_fmadd_ps(self.0, factor.0, term.0) })
        }

        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            // SAFETY: as above.
            unsafe {
                let four = _mm_add_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
                let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
            }
        }

        #[inline(always)]
        unsafe fn load_between(from: *const f32, first: usize, end: usize) -> Eight {
            // SAFETY: as above.
            Eight(unsafe {
                let mask = _mm256_andnot_si256(first_of_eight(first), first_of_eight(end));
                _mm256_maskload_ps(from, mask)
            })
        }

        #[inline(always)]
        unsafe fn even(self, other: Eight) -> Eight {
            // SAFETY: as above.
            Eight(unsafe {
                let pairs = _mm256_shuffle_ps::<0b10_00_10_00>(self.0, other.0);
                _mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(_mm256_castps_pd(pairs)))
            })
        }

        #[inline(always)]
        unsafe fn clamp(self, low: Eight, high: Eight) -> Eight {
            // SAFETY: as above. Of two operands, the second is given where one is not a number.
            Eight(unsafe { _mm256_min_ps(high.0, _mm256_max_ps(low.0, self.0)) })
        }

        #[inline(always)]
        unsafe fn turn(lines: &[*const f32; WIDEST], at: usize) -> [Eight; 4] {
            // SAFETY: as above. Lines that are four apart lie side by side, so each half is turned by itself.
            unsafe {
                let mut pairs = [_mm256_setzero_ps(); 4];
                for place in 0..4 {
                    let low = _mm256_castps128_ps256(_mm_loadu_ps(lines[place].add(at)));
                    pairs[place] = _mm256_insertf128_ps::<1>(low, _mm_loadu_ps(lines[place + 4].add(at)));
                }
                let [a, b, c, d] = pairs;
                let (ab, cd) = (_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d));
                let (ab, cd) = (_mm256_castps_pd(ab), _mm256_castps_pd(cd));
                let near = (_mm256_unpacklo_pd(ab, cd), _mm256_unpackhi_pd(ab, cd));
                let (ab, cd) = (_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d));
                let (ab, cd) = (_mm256_castps_pd(ab), _mm256_castps_pd(cd));
                let far = (_mm256_unpacklo_pd(ab, cd), _mm256_unpackhi_pd(ab, cd));
                [
                    Eight(_mm256_castpd_ps(near.0)),
                    Eight(_mm256_castpd_ps(near.1)),
                    Eight(_mm256_castpd_ps(far.0)),
                    Eight(_mm256_castpd_ps(far.1)),
                ]
            }
        }
    }

    /// Sixteen elements: AVX-512F.
    #[derive(Clone, Copy)]
    pub struct Sixteen(__m512);

    #[inline(always)]
    fn first_of_sixteen(count: usize) -> __mmask16 {
        ((1u32 << count) - 1) as __mmask16
    }

    // SAFETY of the bodies below: as for `Eight`.
    impl Lanes for Sixteen {
        const WIDTH: usize = 16;

        #[inline(always)]
        unsafe fn splat(value: f32) -> Sixteen {
            // SAFETY: as above.
            Sixteen(unsafe { _mm512_set1_ps(value) })
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Sixteen {
            // SAFETY: as above.
            Sixteen(unsafe { _mm512_loadu_ps(from) })
        }

        #[inline(always)]
        unsafe fn load_some(from: *const f32, count: usize) -> Sixteen {
            // SAFETY: as above.
            Sixteen(unsafe { _mm512_maskz_loadu_ps(first_of_sixteen(count), from) })
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: as above.
            unsafe { _mm512_storeu_ps(to, self.0) }
        }

        #[inline(always)]
        unsafe fn store_some(self, to: *mut f32, count: usize) {
            // SAFETY: as above.
            unsafe { _mm512_mask_storeu_ps(to, first_of_sixteen(count), self.0) }
        }

        #[inline(always)]
        unsafe fn add(self, other: Sixteen) -> Sixteen {
            // SAFETY: as above.
            Sixteen(unsafe { _mm512_add_ps(self.0, other.0) })
        }

        #[inline(always)]
        unsafe fn fma(self, factor: Sixteen, term: Sixteen) -> Sixteen {
            // SAFETY: as above.
            Sixteen(unsafe { _mm512_fmadd_ps(self.0, factor.0, term.0) })
        }

        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            // SAFETY: as above.
            unsafe { _mm512_reduce_add_ps(self.0) }
        }

        #[inline(always)]
        unsafe fn load_between(from: *const f32, first: usize, end: usize) -> Sixteen {
            let mask = first_of_sixteen(end) & !first_of_sixteen(first);
            // SAFETY: as above.
            Sixteen(unsafe { _mm512_maskz_loadu_ps(mask, from) })
        }

        #[inline(always)]
        unsafe fn even(self, other: Sixteen) -> Sixteen {
            // SAFETY: as above.
            Sixteen(unsafe {
                let places = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
                _mm512_permutex2var_ps(self.0, places, other.0)
            })
        }

        #[inline(always)]
        unsafe fn clamp(self, low: Sixteen, high: Sixteen) -> Sixteen {
            // SAFETY: as above. Of two operands, the second is given where one is not a number.
            Sixteen(unsafe { _mm512_min_ps(high.0, _mm512_max_ps(low.0, self.0)) })
        }

        #[inline(always)]
        unsafe fn turn(lines: &[*const f32; WIDEST], at: usize) -> [Sixteen; 4] {
            // SAFETY: as for `Eight`.
            unsafe {
                let mut fours = [_mm512_setzero_ps(); 4];
                for place in 0..4 {
                    let four = _mm512_castps128_ps512(_mm_loadu_ps(lines[place].add(at)));
                    let four = _mm512_insertf32x4::<1>(four, _mm_loadu_ps(lines[place + 4].add(at)));
                    let four = _mm512_insertf32x4::<2>(four, _mm_loadu_ps(lines[place + 8].add(at)));
                    fours[place] = _mm512_insertf32x4::<3>(four, _mm_loadu_ps(lines[place + 12].add(at)));
                }
                let [a, b, c, d] = fours;
                let (ab, cd) = (_mm512_unpacklo_ps(a, b), _mm512_unpacklo_ps(c, d));
                let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
                let near = (_mm512_unpacklo_pd(ab, cd), _mm512_unpackhi_pd(ab, cd));
                let (ab, cd) = (_mm512_unpackhi_ps(a, b), _mm512_unpackhi_ps(c, d));
                let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
                let far = (_mm512_unpacklo_pd(ab, cd), _mm512_unpackhi_pd(ab, cd));
                [
                    Sixteen(_mm512_castpd_ps(near.0)),
                    Sixteen(_mm512_castpd_ps(near.1)),
                    Sixteen(_mm512_castpd_ps(far.0)),
                    Sixteen(_mm512_castpd_ps(far.1)),
                ]
            }
        }
    }
}
