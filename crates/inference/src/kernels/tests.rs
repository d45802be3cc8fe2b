//! What the tests of kernels share.

use super::lanes::{Level, level};
use std::cell::Cell;

thread_local! {
    /// The level that this thread computes with, if not the processor's.
    pub(super) static ASSUMED: Cell<Option<Level>> = const { Cell::new(None) };
}

/// Calls `check` once for each level that this processor has.
pub(super) fn at_each_level(mut check: impl FnMut(Level)) {
    ASSUMED.set(None);
    #[cfg(target_arch = "x86_64")]
    let levels = match level() {
        Level::Avx512 => vec![Level::Base, Level::Avx2, Level::Avx512],
        Level::Avx2 => vec![Level::Base, Level::Avx2],
        Level::Base => vec![Level::Base],
    };
    #[cfg(not(target_arch = "x86_64"))]
    let levels = vec![level()];
    for level in levels {
        ASSUMED.set(Some(level));
        check(level);
    }
    ASSUMED.set(None);
}

/// Numbers that are the same in every run.
pub(crate) struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    fn next(&mut self) -> u64 {
        // SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// In `0..bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    /// In `low..=high`.
    pub fn between(&mut self, low: usize, high: usize) -> usize {
        low + self.below(high - low + 1)
    }

    /// Values in -1..1.
    pub fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
    }
}

/// Fails unless the values differ by at most `tolerance`.
pub(crate) fn close(actual: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    for (place, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        // A difference that is no number is too large as well.
        let near = (actual - expected).abs() <= tolerance || actual == expected;
        assert!(near, "{what}: {actual} instead of {expected} at {place}");
    }
}
