//! Products of matrices: one operand is usually a tile of weights.
//!
//! Responsible for: cutting a product into the parts that [`micro`](super::micro) computes, so that what a part reads
//! again is in a near cache; and for choosing between the ways through it.
//!
//! | case | way |
//! | --- | --- |
//! | up to [`LINE_MAX`] rows, `b` row-major | lines: `b` is read once, along its rows; wide ones by sweeps of 8 rows |
//! | few columns, both operands contiguous along k | dot products |
//! | `b` row-major | blocks of 6 rows by 4 vectors or 2, straight from where `b` lies |
//! | up to [`TURNED_MAX`] rows, the columns of `b` contiguous | its squares are turned in registers |
//! | `b` otherwise, or its rows a page apart | the same, from a copy of a piece of `b` in the thread's scratch |
//!
//! Invariants: a row of the output has the same bits whatever the number of rows; bounds are checked once, here; nothing is allocated but the scratch, once a thread.
#![allow(unsafe_code)] // Hands checked bounds to kernels that work by pointer.

use super::epilogue::{self, Activation, Bias};
use super::micro::{DOTS, Isa, LINE_ROWS, Part, ROWS, SWEEP, isa};
use super::turn::copy_panel;
use super::turned::few_rows;
use std::cell::RefCell;

/// Steps of k that are taken at a time: a piece of `b` as wide as a block stays in L1 or near it.
const STEPS: usize = 256;
/// Rows of `a` that are taken at a time: with [`STEPS`] columns, a quarter of a megabyte.
const A_ROWS: usize = 240;
/// Columns of `b` that are copied at a time.
const COPIED: usize = 512;
/// Most rows that lines are taken for: the time is that of reading `b`.
const LINE_MAX: usize = LINE_ROWS;
/// Most rows for which the time is, in part, that of bringing `b` from memory.
const FETCHED_MAX: usize = 96;
/// Most rows for which turning `b` in registers, anew for each few rows, costs less than a copy of it.
const TURNED_MAX: usize = 7;
/// Wider rows than this are swept: a line would touch a new page for each of its steps.
const LINE_WIDTH: usize = 256;
/// Most columns of dot products. That it is not chosen by rows keeps their results apart from their number.
pub(crate) const DOTS_MAX: usize = 4;
/// Rows of `b` at least this many elements apart are copied before many rows of `a` are multiplied with them: the same
/// column of them falls into few sets of the cache, and into as many pages as there are rows.
const FAR: usize = 512;

/// A matrix in memory: element (row, column) is `data[row * row_stride + column * col_stride]`.
#[derive(Clone, Copy, Debug)]
pub struct Operand<'a> {
    /// The elements.
    pub data: &'a [f32],
    /// Elements from one row to the next.
    pub row_stride: usize,
    /// Elements from one column to the next.
    pub col_stride: usize,
}

impl<'a> Operand<'a> {
    /// A matrix whose rows are contiguous and `row_stride` elements apart.
    pub fn row_major(data: &'a [f32], row_stride: usize) -> Operand<'a> {
        Operand { data, row_stride, col_stride: 1 }
    }

    /// The transpose of the matrix whose rows are contiguous and `row_stride` elements apart.
    pub fn transposed(data: &'a [f32], row_stride: usize) -> Operand<'a> {
        Operand { data, row_stride: 1, col_stride: row_stride }
    }

    pub(super) fn holds(&self, rows: usize, cols: usize) -> bool {
        let last = |count: usize, stride: usize| (count - 1).checked_mul(stride);
        let end = || last(rows, self.row_stride)?.checked_add(last(cols, self.col_stride)?);
        end().is_some_and(|end| end < self.data.len())
    }
}

/// `out (m x n) = a (m x k) b (k x n)`, or `+=` with `accumulate`. The rows of `out` are contiguous and `out_stride`
/// elements apart; what lies between them is left alone.
///
/// # Panics
/// If an operand or `out` does not hold the elements that the sizes name, or rows of `out` overlap.
#[allow(clippy::too_many_arguments)] // BLAS's words, in BLAS's order.
pub fn product(
    out: &mut [f32],
    out_stride: usize,
    m: usize,
    n: usize,
    k: usize,
    a: Operand<'_>,
    b: Operand<'_>,
    accumulate: bool,
) {
    finished_product(out, out_stride, (m, n, k), a, b, accumulate, Ending::default());
}

/// What is done to the elements of a product on the way.
#[derive(Clone, Copy, Debug)]
pub struct Ending<'a> {
    /// A value for each column, with which the sums begin; empty for none.
    pub bias: &'a [f32],
    /// The results are at least so large; what is not a number stays so.
    pub low: f32,
}

impl Default for Ending<'_> {
    fn default() -> Self {
        Ending { bias: &[], low: f32::NEG_INFINITY }
    }
}

/// As [`product`], for `m`, `n`, `k` in this order, with an ending. There is no bias where it accumulates.
///
/// # Panics
/// As [`product`], and if the bias is shorter than `n`, or there is one where there must not be.
pub fn finished_product(
    out: &mut [f32],
    out_stride: usize,
    (m, n, k): (usize, usize, usize),
    a: Operand<'_>,
    b: Operand<'_>,
    accumulate: bool,
    ending: Ending<'_>,
) {
    if m == 0 || n == 0 {
        return;
    }
    check_output(out, out_stride, m, n);
    let with_bias = !ending.bias.is_empty();
    assert!(!with_bias || (ending.bias.len() >= n && !accumulate), "the bias of a product does not fit");
    if k == 0 {
        if !accumulate {
            out.chunks_mut(out_stride.max(n)).take(m).for_each(|row| row[..n].fill(0.0));
        }
        return finish(out, out_stride, (m, n), ending);
    }
    assert!(a.holds(m, k) && b.holds(k, n), "{OPERAND}");
    let whole = Part {
        k,
        a: a.data.as_ptr(),
        a_row: a.row_stride,
        a_col: a.col_stride,
        b: b.data.as_ptr(),
        b_row: b.row_stride,
        offsets: std::ptr::null(),
        out: out.as_mut_ptr(),
        out_row: out_stride,
        columns: n,
        accumulate,
        bias: if with_bias { ending.bias.as_ptr() } else { std::ptr::null() },
        low: ending.low,
        ahead: b.col_stride == 1 && m <= FETCHED_MAX,
    };
    let isa = isa();
    let along_k = k == 1 || (a.col_stride == 1 && b.row_stride == 1);
    let row_major = b.col_stride == 1 || n == 1;
    // SAFETY: all elements that `whole` names were found to be there, and each way stays within them; the output is
    // borrowed exclusively; `isa` is of this processor.
    unsafe {
        if along_k && n <= DOTS_MAX {
            dots(isa, m, Part { b_row: b.col_stride, ..whole });
            finish(out, out_stride, (m, n), ending);
        } else if row_major && m <= LINE_MAX {
            lines(isa, m, whole);
        } else if b.row_stride == 1 && m <= TURNED_MAX {
            few_rows(isa, m, Part { b_row: b.col_stride, ..whole });
        } else {
            blocks(isa, m, whole, b.col_stride);
        }
    }
}

/// The ending, in a pass of its own.
fn finish(out: &mut [f32], stride: usize, sizes: (usize, usize), ending: Ending<'_>) {
    let bias = if ending.bias.is_empty() { Bias::None } else { Bias::PerColumn(ending.bias) };
    let activation = match ending.low {
        f32::NEG_INFINITY => Activation::Identity,
        0.0 => Activation::Relu,
        low => Activation::Clip(low, f32::INFINITY),
    };
    epilogue::finish(out, stride, sizes, bias, activation);
}

/// A part of `k` steps from step `first` of a whole: the bias goes to the first one, what ends a sum to the last.
fn steps(whole: &Part, first: usize, k: usize) -> Part {
    Part {
        k,
        accumulate: whole.accumulate || first > 0,
        low: if first + k == whole.k { whole.low } else { f32::NEG_INFINITY },
        ..*whole
    }
}

/// Where the bias of this column is.
fn bias_of(whole: &Part, column: usize) -> *const f32 {
    if whole.bias.is_null() { whole.bias } else { whole.bias.wrapping_add(column) }
}

pub(super) const OPERAND: &str = "an operand of a product does not hold its elements";

pub(super) fn check_output(out: &[f32], stride: usize, m: usize, n: usize) {
    let end = (m - 1).checked_mul(stride).and_then(|start| start.checked_add(n));
    assert!(end.is_some_and(|end| end <= out.len()), "the output of a product does not hold its elements");
    assert!(m == 1 || stride >= n, "rows of the output of a product overlap");
}

/// # Safety
/// The elements of `whole` are there for `m` rows.
unsafe fn dots(isa: &Isa, m: usize, whole: Part) {
    let (rows, columns) = (DOTS.0, isa.dot_columns);
    for column in (0..whole.columns).step_by(columns) {
        let count = columns.min(whole.columns - column);
        for row in (0..m).step_by(rows) {
            let height = rows.min(m - row);
            // SAFETY: rows and columns of the product; `wrapping_add` because a matrix of one row may have any stride.
            unsafe {
                (isa.dots[height - 1][count - 1])(&Part {
                    a: whole.a.wrapping_add(row * whole.a_row),
                    b: whole.b.wrapping_add(column * whole.b_row),
                    out: whole.out.add(row * whole.out_row + column),
                    columns: count,
                    ..whole
                });
            }
        }
    }
}

/// # Safety
/// As for [`dots`].
unsafe fn lines(isa: &Isa, m: usize, whole: Part) {
    let (mut start, mut accumulate) = (0, whole.accumulate);
    if m == 1 && whole.columns > LINE_WIDTH && whole.low == f32::NEG_INFINITY {
        if !whole.bias.is_null() {
            // SAFETY: both have the columns of the product.
            unsafe { std::ptr::copy_nonoverlapping(whole.bias, whole.out, whole.columns) };
            accumulate = true;
        }
        while start + SWEEP <= whole.k {
            // SAFETY: steps start..start + SWEEP of the product.
            unsafe {
                (isa.sweep)(&Part {
                    k: SWEEP,
                    a: whole.a.wrapping_add(start * whole.a_col),
                    b: whole.b.add(start * whole.b_row),
                    accumulate,
                    ..whole
                });
            }
            start += SWEEP;
            accumulate = true;
        }
        if start == whole.k {
            return;
        }
    }
    let heights = m.div_ceil(LINE_ROWS);
    let width = isa.line_vectors * isa.lanes;
    // Steps in the outer loop: with several passes over `b`, the later ones find it in the cache.
    for first in (start..whole.k).step_by(STEPS) {
        let piece = steps(&whole, first, STEPS.min(whole.k - first));
        for column in (0..whole.columns).step_by(width) {
            let columns = width.min(whole.columns - column);
            let mut row = 0;
            for part in 0..heights {
                let height = (m - row).div_ceil(heights - part);
                // SAFETY: a piece of the product.
                unsafe {
                    (isa.lines[height - 1][columns.div_ceil(isa.lanes) - 1])(&Part {
                        a: whole.a.wrapping_add(row * whole.a_row + first * whole.a_col),
                        b: whole.b.add(first * whole.b_row + column),
                        out: whole.out.add(row * whole.out_row + column),
                        bias: bias_of(&whole, column),
                        columns,
                        accumulate: accumulate || first > start,
                        ahead: row == 0,
                        ..piece
                    });
                }
                row += height;
            }
        }
    }
}

thread_local! {
    /// A piece of an operand in the order in which it is read.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// # Safety
/// As for [`dots`]; the columns of `b` are `b_col` elements apart.
unsafe fn blocks(isa: &Isa, m: usize, whole: Part, b_col: usize) {
    let copy = b_col != 1 || (whole.b_row >= FAR && m >= 4 * ROWS);
    if !copy {
        // SAFETY: the whole product.
        unsafe { panels::<false>(isa, m, whole) };
        return;
    }
    let width = isa.block_vectors * isa.lanes;
    SCRATCH.with_borrow_mut(|scratch| {
        if scratch.len() < STEPS * COPIED {
            scratch.resize(STEPS * COPIED, 0.0);
        }
        for first in (0..whole.k).step_by(STEPS) {
            let k = STEPS.min(whole.k - first);
            let piece = steps(&whole, first, k);
            for column in (0..whole.columns).step_by(COPIED) {
                let columns = COPIED.min(whole.columns - column);
                for (panel, at) in (0..columns).step_by(width).enumerate() {
                    let count = width.min(columns - at);
                    let to = &mut scratch[panel * width * k..][..width * k];
                    // SAFETY: a piece of `b`.
                    unsafe {
                        let from = whole.b.add(first * whole.b_row + (column + at) * b_col);
                        copy_panel(to, width, k, count, from, whole.b_row, b_col);
                    }
                }
                for row in (0..m).step_by(A_ROWS) {
                    let rows = A_ROWS.min(m - row);
                    for (panel, at) in (0..columns).step_by(width).enumerate() {
                        // SAFETY: a piece of the product, and the copy that was just made.
                        unsafe {
                            panel_of_rows::<false>(
                                isa,
                                rows,
                                Part {
                                    a: whole.a.wrapping_add(row * whole.a_row + first * whole.a_col),
                                    b: scratch[panel * width * k..].as_ptr(),
                                    b_row: width,
                                    out: whole.out.add(row * whole.out_row + column + at),
                                    bias: bias_of(&whole, column + at),
                                    columns: width.min(columns - at),
                                    ..piece
                                },
                            );
                        }
                    }
                }
            }
        }
    });
}

/// `out (m x n) = a (m x k) b (k x n)`, or `+=` with `accumulate`, where row `step` of `b` is the `n` elements of `data`
/// from `offsets[step]`; rows may overlap. This is how a convolution sees its input: a row for each tap of the kernel.
///
/// # Panics
/// As [`product`]; `k` is the number of offsets.
#[allow(clippy::too_many_arguments)] // As `product`.
pub fn scattered_product(
    out: &mut [f32],
    out_stride: usize,
    m: usize,
    n: usize,
    a: Operand<'_>,
    data: &[f32],
    offsets: &[usize],
    accumulate: bool,
) {
    let k = offsets.len();
    if m == 0 || n == 0 || k == 0 {
        return product(out, out_stride, m, n, k, a, Operand::row_major(data, n), accumulate);
    }
    check_output(out, out_stride, m, n);
    let last = offsets.iter().copied().max().unwrap_or(0).checked_add(n);
    assert!(a.holds(m, k) && last.is_some_and(|last| last <= data.len()), "{OPERAND}");
    let isa = isa();
    let whole = Part {
        k,
        a: a.data.as_ptr(),
        a_row: a.row_stride,
        a_col: a.col_stride,
        b: data.as_ptr(),
        b_row: 0,
        offsets: offsets.as_ptr(),
        out: out.as_mut_ptr(),
        out_row: out_stride,
        columns: n,
        accumulate,
        bias: std::ptr::null(),
        low: f32::NEG_INFINITY,
        ahead: false,
    };
    // SAFETY: all elements that `whole` names were found to be there.
    unsafe { panels::<true>(isa, m, whole) }
}

/// All blocks, `b` being read where it lies.
///
/// # Safety
/// As for [`dots`].
unsafe fn panels<const AT: bool>(isa: &Isa, m: usize, whole: Part) {
    let vectors = if AT && m <= LINE_ROWS { isa.line_vectors } else { isa.block_vectors };
    let width = vectors * isa.lanes;
    // As even as can be: each piece but the first adds to the output.
    let length = whole.k.div_ceil(whole.k.div_ceil(STEPS).max(1)).max(1);
    for first in (0..whole.k).step_by(length) {
        let piece = steps(&whole, first, length.min(whole.k - first));
        for row in (0..m).step_by(A_ROWS) {
            let rows = A_ROWS.min(m - row);
            for column in (0..whole.columns).step_by(width) {
                // SAFETY: a piece of the product.
                unsafe {
                    let (b, offsets) = if AT {
                        (whole.b, whole.offsets.add(first))
                    } else {
                        (whole.b.add(first * whole.b_row), whole.offsets)
                    };
                    panel_of_rows::<AT>(
                        isa,
                        rows,
                        Part {
                            a: whole.a.wrapping_add(row * whole.a_row + first * whole.a_col),
                            b: b.add(column),
                            offsets,
                            out: whole.out.add(row * whole.out_row + column),
                            bias: bias_of(&whole, column),
                            columns: width.min(whole.columns - column),
                            // Scattered rows of `b` are near; those of `a` are after the first panel.
                            ahead: if AT { column == 0 } else { piece.ahead },
                            ..piece
                        },
                    );
                }
            }
        }
    }
}

/// One panel of `b`, as wide as a block, or with `AT` and few rows as a line, with all rows of `a`.
///
/// # Safety
/// As for [`dots`].
unsafe fn panel_of_rows<const AT: bool>(isa: &Isa, m: usize, whole: Part) {
    let vectors = whole.columns.div_ceil(isa.lanes);
    let heights = m.div_ceil(ROWS);
    let mut row = 0;
    for part in 0..heights {
        // As even as can be: one row alone would be slow.
        let height = (m - row).div_ceil(heights - part);
        let kernel = match AT {
            true if m <= LINE_ROWS => isa.scattered_lines[height - 1][vectors - 1],
            true => isa.scattered_blocks[height - 1][vectors - 1],
            false => isa.blocks[height - 1][vectors - 1],
        };
        if AT && whole.ahead && whole.a_col == 1 {
            let next = whole.a.wrapping_add((row + height) * whole.a_row);
            ahead(next, whole.a_row, ROWS.min(m - row - height), whole.k);
        }
        // SAFETY: a piece of the product.
        unsafe {
            kernel(&Part {
                a: whole.a.wrapping_add(row * whole.a_row),
                out: whole.out.add(row * whole.out_row),
                // The first rows bring it near for the others.
                ahead: whole.ahead && row == 0,
                ..whole
            });
        }
        row += height;
    }
}

/// Fetches rows of `a` into the cache while the rows before them are computed with: they are short, so that what fetches
/// ahead by itself starts anew with each.
fn ahead(a: *const f32, stride: usize, rows: usize, k: usize) {
    #[cfg(target_arch = "x86_64")]
    for row in 0..rows {
        for step in (0..k).step_by(16) {
            let from = a.wrapping_add(row * stride + step);
            // SAFETY: a hint, which does nothing where there is no memory.
            unsafe { std::arch::x86_64::_mm_prefetch::<3>(from.cast()) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (a, stride, rows, k);
}

#[cfg(test)]
#[path = "gemm_tests.rs"]
mod tests;
