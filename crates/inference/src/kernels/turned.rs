//! Products with few rows and a second operand whose columns are contiguous: Gemm with transB = 1, as PyTorch exports it.
//!
//! Responsible for: reading such an operand once, where it lies. Squares of it are turned in registers, so that a vector of
//! the output takes one step along k with one multiply-add, as if the operand lay row by row:
//!
//! ```text
//!                 k                     4 vectors, one for each step
//!          +------------+
//!   lines  | 4 elements |   turned     | step 0 | step 1 | step 2 | step 3 |
//!   of b   | of WIDTH   |  -------->     WIDTH columns of the output each
//!          | lines      |
//!          +------------+
//! ```
//!
//! Invariant: an element of the output is one chain of multiply-adds along k, as everywhere ([`micro`](super::micro)).
#![allow(unsafe_code)] // Operands by pointer: their bounds were checked for the whole product (gemm.rs).
#![allow(clippy::needless_range_loop)] // Loops over registers by number; all unroll.

use super::lanes::{Lanes, WIDEST};
use super::micro::{Isa, Part};

/// Most rows that are computed at a time.
pub(super) const TURNED_ROWS: usize = 4;
/// Steps along k that are turned at a time.
const STEPS: usize = 4;

/// Asks for values to be brought into the cache, all at once, so that they come while something else is computed.
pub fn fetch(values: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    for line in values.chunks(16) {
        // SAFETY: a hint, for memory that is there.
        unsafe { std::arch::x86_64::_mm_prefetch::<3>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = values;
}

/// All columns of `m` rows, some rows at a time.
///
/// # Safety
/// The elements of `whole` are there for `m` rows, `b_row` being the distance of columns, whose elements are contiguous.
pub(super) unsafe fn few_rows(isa: &Isa, m: usize, whole: Part) {
    let heights = m.div_ceil(TURNED_ROWS);
    let mut row = 0;
    for part in 0..heights {
        let height = (m - row).div_ceil(heights - part);
        // SAFETY: rows of the product; `wrapping_add` because a matrix of one row may have any stride.
        unsafe {
            (isa.turned[height - 1])(&Part {
                a: whole.a.wrapping_add(row * whole.a_row),
                out: whole.out.add(row * whole.out_row),
                ..whole
            });
        }
        row += height;
    }
}

/// `R` rows times any number of columns; `b_row` is the distance of columns, whose elements are contiguous.
///
/// # Safety
/// The part's elements are there, and the processor has the lanes' features.
#[inline(always)]
pub(super) unsafe fn turned<L: Lanes, const R: usize>(part: &Part) {
    let mut column = 0;
    // SAFETY: columns of the part.
    unsafe {
        while column + 2 * L::WIDTH <= part.columns {
            group::<L, R, 2, false>(part, column);
            column += 2 * L::WIDTH;
        }
        if column + L::WIDTH <= part.columns {
            group::<L, R, 1, false>(part, column);
            column += L::WIDTH;
        }
        if column < part.columns {
            group::<L, R, 1, true>(part, column);
        }
    }
}

/// `V` vectors of columns from `first`; with `TAIL`, those that are left of one vector.
#[inline(always)]
unsafe fn group<L: Lanes, const R: usize, const V: usize, const TAIL: bool>(part: &Part, first: usize) {
    let tail = part.columns - first;
    // SAFETY: rows 0..R, steps 0..k and columns first.. are those of the part.
    unsafe {
        let mut sums = [[L::splat(0.0); V]; R];
        for v in 0..V {
            let column = first + v * L::WIDTH;
            for r in 0..R {
                if part.accumulate {
                    sums[r][v] = some::<L, TAIL>(part.out.add(r * part.out_row + column), tail);
                } else if !part.bias.is_null() {
                    sums[r][v] = some::<L, TAIL>(part.bias.add(column), tail);
                }
            }
        }
        // Where a line is missing, the last one is read again, and what comes of it is not stored.
        let mut lines = [[part.b; WIDEST]; V];
        for v in 0..V {
            for place in 0..L::WIDTH {
                let there = if TAIL { place.min(tail - 1) } else { place };
                lines[v][place] = part.b.add((first + v * L::WIDTH + there) * part.b_row);
            }
        }
        let mut at = 0;
        while at + STEPS <= part.k {
            for v in 0..V {
                let steps = L::turn(&lines[v], at);
                for step in 0..STEPS {
                    add::<L, R, V>(part, &mut sums, v, at + step, steps[step]);
                }
            }
            at += STEPS;
        }
        if at < part.k && part.k >= STEPS {
            // The last square of whole ones reaches back to steps that are done.
            let back = part.k - STEPS;
            for v in 0..V {
                let steps = L::turn(&lines[v], back);
                for step in 0..STEPS {
                    if back + step >= at {
                        add::<L, R, V>(part, &mut sums, v, back + step, steps[step]);
                    }
                }
            }
        } else {
            for step in at..part.k {
                for v in 0..V {
                    let mut values = [0.0; WIDEST];
                    for place in 0..L::WIDTH {
                        values[place] = *lines[v][place].add(step);
                    }
                    add::<L, R, V>(part, &mut sums, v, step, L::load(values.as_ptr()));
                }
            }
        }
        if part.low > f32::NEG_INFINITY {
            let (low, high) = (L::splat(part.low), L::splat(f32::INFINITY));
            for r in 0..R {
                for v in 0..V {
                    sums[r][v] = sums[r][v].clamp(low, high);
                }
            }
        }
        for r in 0..R {
            for v in 0..V {
                let to = part.out.add(r * part.out_row + first + v * L::WIDTH);
                if TAIL {
                    sums[r][v].store_some(to, tail);
                } else {
                    sums[r][v].store(to);
                }
            }
        }
    }
}

/// A vector, or with `TAIL` the first `tail` elements of one.
#[inline(always)]
unsafe fn some<L: Lanes, const TAIL: bool>(from: *const f32, tail: usize) -> L {
    // SAFETY: the caller's elements.
    unsafe { if TAIL { L::load_some(from, tail) } else { L::load(from) } }
}

/// Adds step `step` of vector `v` of the columns to the sums of all rows.
#[inline(always)]
unsafe fn add<L: Lanes, const R: usize, const V: usize>(
    part: &Part,
    sums: &mut [[L; V]; R],
    v: usize,
    step: usize,
    column: L,
) {
    for r in 0..R {
        // SAFETY: an element of row `r`; `wrapping_add` because a matrix of one row may have any stride.
        unsafe {
            let factor = L::splat(*part.a.wrapping_add(r * part.a_row + step * part.a_col));
            sums[r][v] = factor.fma(column, sums[r][v]);
        }
    }
}
