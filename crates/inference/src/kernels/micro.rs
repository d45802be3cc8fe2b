//! The innermost loops of products: a few rows by a few vectors of the output, held in registers.
//!
//! Responsible for: the instantiations of these loops for every [`Level`](super::lanes::Level), and the table that
//! [`isa`] picks one from.
//!
//! ```text
//!              vectors of b (contiguous)
//!            +----+----+----+----+
//!   k steps  | b_row apart       |
//!            +----+----+----+----+
//!  a (1..=6) | sums in registers |  6 x 4 vectors for blocks, 3 x 8 for lines: rows that are so few that reading b is
//!   rows     +----+----+----+----+  all the work, which goes best along whole rows of a tile
//! ```
//!
//! Half as wide, 6 x 2 and 3 x 4, where there are 16 registers instead of 32: sums that do not fit are written to memory and
//! read again in each step, which takes two to three times as long.
//!
//! Invariant: an element of the output is one chain of multiply-adds along k, from what was there before, or the bias, or 0,
//! whatever the kernel, its height and width, and wherever k was cut. So its bits do not depend on how many rows
//! are computed at a time. Dot products have an order of their own, which does not depend on their number either.
#![allow(unsafe_code)] // Operands by pointer: their bounds were checked for the whole product (gemm.rs).
#![allow(clippy::needless_range_loop)] // Loops over registers by number, as the drawing has them; all unroll.

#[cfg(target_arch = "x86_64")]
use super::lanes::{Eight, Sixteen};
use super::lanes::{Four, Lanes, Level, level};
use super::turned::TURNED_ROWS;

/// Most rows of a block.
pub(super) const ROWS: usize = 6;
/// Most vectors of a row of a block.
pub(super) const VECTORS: usize = 4;
/// Most rows of a line.
pub(super) const LINE_ROWS: usize = 3;
/// Most vectors of a line.
pub(super) const LINE_VECTORS: usize = 8;
/// Rows of b that a sweep takes at a time.
pub(super) const SWEEP: usize = 8;
/// Most rows and columns of a block of dot products.
pub(super) const DOTS: (usize, usize) = (2, 4);

/// A part of a product. Elements are counted in float32.
#[derive(Clone, Copy)]
pub(super) struct Part {
    /// Length of the products.
    pub k: usize,
    /// Rows times `k`.
    pub a: *const f32,
    pub a_row: usize,
    pub a_col: usize,
    /// `k` times `columns`, rows contiguous.
    pub b: *const f32,
    pub b_row: usize,
    /// For kernels that take them: where each of the `k` rows of `b` begins, in elements behind `b`.
    pub offsets: *const usize,
    /// Rows times `columns`, rows contiguous.
    pub out: *mut f32,
    pub out_row: usize,
    /// Columns: they fill all vectors but the last, which has `1..=WIDTH`.
    pub columns: usize,
    /// Adds to the output instead of replacing it.
    pub accumulate: bool,
    /// For blocks and lines that do not accumulate: a value for each column with which the sums begin; may be null.
    pub bias: *const f32,
    /// For blocks and lines: the sums are at least so large. What is not a number stays so.
    pub low: f32,
    /// For blocks and lines: rows of `b` come from memory, and are fetched ahead of their use.
    pub ahead: bool,
}

/// Computes a part. Sound if all elements that the part names are there, the output's being nobody else's, and the
/// processor has the level of the table.
pub(super) type Kernel = unsafe fn(&Part);

/// The kernels of one level.
pub(super) struct Isa {
    /// Elements of a vector.
    pub lanes: usize,
    /// Most vectors of a row of a block, of a line, and columns of a block of dot products, that fit the registers.
    pub block_vectors: usize,
    pub line_vectors: usize,
    pub dot_columns: usize,
    /// By rows - 1 and vectors - 1.
    pub blocks: [[Kernel; VECTORS]; ROWS],
    /// By rows - 1 and vectors - 1.
    pub lines: [[Kernel; LINE_VECTORS]; LINE_ROWS],
    /// As `blocks`, the rows of `b` beginning at offsets.
    pub scattered_blocks: [[Kernel; VECTORS]; ROWS],
    /// As `lines`, the rows of `b` beginning at offsets.
    pub scattered_lines: [[Kernel; LINE_VECTORS]; LINE_ROWS],
    /// One row of any number of columns; `k` is [`SWEEP`].
    pub sweep: Kernel,
    /// Dot products of [`DOTS`]`.0` rows of `a` and `DOTS.1` columns of `b`, where `b_row` is the distance of
    /// columns, whose elements are contiguous, as are those of `a`'s rows. By rows - 1 and columns - 1.
    pub dots: [[Kernel; DOTS.1]; DOTS.0],
    /// Few rows, any number of columns, where `b_row` is the distance of columns, whose elements are contiguous. By
    /// rows - 1.
    pub turned: [Kernel; TURNED_ROWS],
}

/// The kernels for this processor.
pub(super) fn isa() -> &'static Isa {
    match level() {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => &avx512::ISA,
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => &avx2::ISA,
        Level::Base => &base::ISA,
    }
}

/// `R` rows by `V` vectors; the rows of `b` begin at `offsets` with `AT`.
#[inline(always)]
unsafe fn block<L: Lanes, const R: usize, const V: usize, const AT: bool>(part: &Part) {
    let tail = part.columns - (V - 1) * L::WIDTH;
    // SAFETY: the part's elements are there, as the caller says; so are the processor's features.
    unsafe {
        if tail == L::WIDTH {
            tile::<L, R, V, AT, false>(part, tail);
        } else {
            tile::<L, R, V, AT, true>(part, tail);
        }
    }
}

#[inline(always)]
unsafe fn tile<L: Lanes, const R: usize, const V: usize, const AT: bool, const TAIL: bool>(part: &Part, tail: usize) {
    // SAFETY: rows 0..R, steps 0..k and columns 0..(V - 1) * WIDTH + tail are those of the part.
    unsafe {
        let mut sums = [[L::splat(0.0); V]; R];
        let some = |from: *const f32, v: usize| {
            let from = from.wrapping_add(v * L::WIDTH);
            if TAIL && v == V - 1 { L::load_some(from, tail) } else { L::load(from) }
        };
        if part.accumulate {
            for r in 0..R {
                for v in 0..V {
                    sums[r][v] = some(part.out.wrapping_add(r * part.out_row), v);
                }
            }
        } else if !part.bias.is_null() {
            for v in 0..V {
                let bias = some(part.bias, v);
                for r in 0..R {
                    sums[r][v] = bias;
                }
            }
        }
        let (mut a, mut b) = (part.a, part.b);
        for step in 0..part.k {
            if AT {
                b = part.b.add(*part.offsets.add(step));
            } else if part.ahead {
                // Few rows wait for memory, and what fetches ahead by itself starts anew with each row of a tile.
                ahead::<V>(b.wrapping_add(AHEAD.wrapping_mul(part.b_row)), L::WIDTH);
            }
            let mut line = [L::splat(0.0); V];
            for v in 0..V {
                let from = b.add(v * L::WIDTH);
                line[v] = if TAIL && v == V - 1 { L::load_some(from, tail) } else { L::load(from) };
            }
            for r in 0..R {
                let factor = L::splat(*a.wrapping_add(r.wrapping_mul(part.a_row)));
                for v in 0..V {
                    sums[r][v] = factor.fma(line[v], sums[r][v]);
                }
            }
            // One step behind the last row both may point past their memory: they are not read there.
            a = a.wrapping_add(part.a_col);
            if !AT {
                b = b.wrapping_add(part.b_row);
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
                let to = part.out.add(r * part.out_row + v * L::WIDTH);
                let sum = sums[r][v];
                if TAIL && v == V - 1 {
                    sum.store_some(to, tail);
                } else {
                    sum.store(to);
                }
            }
        }
    }
}

/// Rows of `b` that are fetched ahead of their use.
const AHEAD: usize = 8;

/// Fetches `V` vectors into the cache. Any address will do.
#[inline(always)]
fn ahead<const V: usize>(from: *const f32, width: usize) {
    #[cfg(target_arch = "x86_64")]
    for v in 0..V {
        // SAFETY: a hint, which does nothing where there is no memory.
        unsafe { std::arch::x86_64::_mm_prefetch::<3>(from.wrapping_add(v * width).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (from, width);
}

/// One row of any width by [`SWEEP`] steps: reads that many rows of `b` side by side.
#[inline(always)]
unsafe fn sweep<L: Lanes>(part: &Part) {
    // SAFETY: steps 0..SWEEP and all columns are those of the part.
    unsafe {
        let mut factors = [L::splat(0.0); SWEEP];
        let mut rows = [part.b; SWEEP];
        for step in 0..SWEEP {
            factors[step] = L::splat(*part.a.add(step * part.a_col));
            rows[step] = part.b.add(step * part.b_row);
        }
        let mut column = 0;
        while column + L::WIDTH <= part.columns {
            let to = part.out.add(column);
            let mut sum = if part.accumulate { L::load(to) } else { L::splat(0.0) };
            for step in 0..SWEEP {
                sum = factors[step].fma(L::load(rows[step].add(column)), sum);
            }
            sum.store(to);
            column += L::WIDTH;
        }
        let tail = part.columns - column;
        if tail > 0 {
            let to = part.out.add(column);
            let mut sum = if part.accumulate { L::load_some(to, tail) } else { L::splat(0.0) };
            for step in 0..SWEEP {
                sum = factors[step].fma(L::load_some(rows[step].add(column), tail), sum);
            }
            sum.store_some(to, tail);
        }
    }
}

/// Dot products of `R` rows and `C` columns.
#[inline(always)]
unsafe fn dots<L: Lanes, const R: usize, const C: usize>(part: &Part) {
    // SAFETY: rows 0..R of a and columns 0..C of b have k elements each.
    unsafe {
        let mut sums = [[[L::splat(0.0); 2]; C]; R];
        let mut at = 0;
        while at + 2 * L::WIDTH <= part.k {
            for half in 0..2 {
                let mut rows = [L::splat(0.0); R];
                for r in 0..R {
                    rows[r] = L::load(part.a.add(r * part.a_row + at + half * L::WIDTH));
                }
                for c in 0..C {
                    let column = L::load(part.b.add(c * part.b_row + at + half * L::WIDTH));
                    for r in 0..R {
                        sums[r][c][half] = rows[r].fma(column, sums[r][c][half]);
                    }
                }
            }
            at += 2 * L::WIDTH;
        }
        while at < part.k {
            let count = (part.k - at).min(L::WIDTH);
            for c in 0..C {
                let column = L::load_some(part.b.add(c * part.b_row + at), count);
                for r in 0..R {
                    let row = L::load_some(part.a.add(r * part.a_row + at), count);
                    sums[r][c][0] = row.fma(column, sums[r][c][0]);
                }
            }
            at += count;
        }
        for r in 0..R {
            for c in 0..C {
                let to = part.out.add(r * part.out_row + c);
                let sum = sums[r][c][0].add(sums[r][c][1]).sum();
                *to = if part.accumulate { *to + sum } else { sum };
            }
        }
    }
}

macro_rules! level {
    ($name:ident, $lanes:ty, $registers:expr, #[$features:meta]) => {
        mod $name {
            use super::*;

            /// The kernels of this level.
            pub(super) static ISA: Isa = Isa {
                lanes: <$lanes as Lanes>::WIDTH,
                block_vectors: if $registers < 32 { VECTORS / 2 } else { VECTORS },
                line_vectors: if $registers < 32 { LINE_VECTORS / 2 } else { LINE_VECTORS },
                dot_columns: if $registers < 32 { DOTS.1 / 2 } else { DOTS.1 },
                blocks: blocks::<false>(),
                lines: [row8::<1, false>(), row8::<2, false>(), row8::<3, false>()],
                scattered_blocks: blocks::<true>(),
                scattered_lines: [row8::<1, true>(), row8::<2, true>(), row8::<3, true>()],
                sweep,
                dots: [
                    [dots::<1, 1>, dots::<1, 2>, dots::<1, 3>, dots::<1, 4>],
                    [dots::<2, 1>, dots::<2, 2>, dots::<2, 3>, dots::<2, 4>],
                ],
                turned: [turned::<1>, turned::<2>, turned::<3>, turned::<4>],
            };

            const fn blocks<const AT: bool>() -> [[Kernel; VECTORS]; ROWS] {
                [row4::<1, AT>(), row4::<2, AT>(), row4::<3, AT>(), row4::<4, AT>(), row4::<5, AT>(), row4::<6, AT>()]
            }

            const fn row4<const R: usize, const AT: bool>() -> [Kernel; VECTORS] {
                [block::<R, 1, AT>, block::<R, 2, AT>, block::<R, 3, AT>, block::<R, 4, AT>]
            }

            const fn row8<const R: usize, const AT: bool>() -> [Kernel; LINE_VECTORS] {
                [
                    block::<R, 1, AT>,
                    block::<R, 2, AT>,
                    block::<R, 3, AT>,
                    block::<R, 4, AT>,
                    block::<R, 5, AT>,
                    block::<R, 6, AT>,
                    block::<R, 7, AT>,
                    block::<R, 8, AT>,
                ]
            }

            #[$features]
            unsafe fn block<const R: usize, const V: usize, const AT: bool>(part: &Part) {
                // SAFETY: the features are those of the lanes; the rest is the caller's promise.
                unsafe { super::block::<$lanes, R, V, AT>(part) }
            }

            #[$features]
            unsafe fn sweep(part: &Part) {
                // SAFETY: as above.
                unsafe { super::sweep::<$lanes>(part) }
            }

            #[$features]
            unsafe fn dots<const R: usize, const C: usize>(part: &Part) {
                // SAFETY: as above.
                unsafe { super::dots::<$lanes, R, C>(part) }
            }

            #[$features]
            unsafe fn turned<const R: usize>(part: &Part) {
                // SAFETY: as above.
                unsafe { super::super::turned::turned::<$lanes, R>(part) }
            }
        }
    };
}

level!(base, Four, if cfg!(target_arch = "aarch64") { 32 } else { 16 }, #[inline(never)]);
#[cfg(target_arch = "x86_64")]
level!(avx2, Eight, 16, #[target_feature(enable = "avx2,fma")]);
#[cfg(target_arch = "x86_64")]
level!(avx512, Sixteen, 32, #[target_feature(enable = "avx512f,avx512dq,avx512vl,avx2,fma")]);
