//! Operands of products copied in another order: panels, and transposes.
//!
//! Invariant: bounds are checked once a call, or are the caller's promise.
#![allow(unsafe_code)] // Elements by pointer: squares of them are transposed in registers.

use super::gemm::{OPERAND, Operand, check_output};

/// Copies `k` rows of `count` columns, to rows that are `width` apart.
///
/// # Safety
/// The elements are there, by these strides.
pub(super) unsafe fn copy_panel(
    to: &mut [f32],
    width: usize,
    k: usize,
    count: usize,
    from: *const f32,
    row_stride: usize,
    col_stride: usize,
) {
    if col_stride == 1 {
        for (step, line) in to.chunks_exact_mut(width).take(k).enumerate() {
            // SAFETY: `count` contiguous elements of this row.
            line[..count].copy_from_slice(unsafe { std::slice::from_raw_parts(from.add(step * row_stride), count) });
        }
        return;
    }
    // Squares, so that neither side leaves the lines of the cache that it has touched.
    for step in (0..k).step_by(EDGE) {
        let steps = EDGE.min(k - step);
        for column in (0..count).step_by(EDGE) {
            let columns = EDGE.min(count - column);
            let square = &mut to[step * width + column..];
            // SAFETY: elements of the piece; a whole square of rows that are contiguous along k for `turn`.
            unsafe {
                let start = from.add(step * row_stride + column * col_stride);
                if row_stride == 1 && steps == EDGE && columns == EDGE {
                    turn(&mut square[..(EDGE - 1) * width + EDGE], width, start, col_stride);
                    continue;
                }
                for row in 0..steps {
                    for place in 0..columns {
                        square[row * width + place] = *start.add(row * row_stride + place * col_stride);
                    }
                }
            }
        }
    }
}

/// Transposes a matrix of `rows` x `columns`: `to[column * to_stride + row] = from[row * from_stride + column]`.
///
/// # Panics
/// If a slice does not hold its elements, or rows of `to` overlap.
pub fn transpose(to: &mut [f32], to_stride: usize, from: &[f32], from_stride: usize, (rows, columns): (usize, usize)) {
    if rows == 0 || columns == 0 {
        return;
    }
    check_output(to, to_stride, columns, rows);
    assert!(Operand::row_major(from, from_stride).holds(rows, columns), "{OPERAND}");
    // The last row of `to` may end before its stride does.
    let (most, last) = to.split_at_mut((columns - 1) * to_stride);
    // SAFETY: the elements were found to be there.
    unsafe {
        copy_panel(most, to_stride, columns - 1, rows, from.as_ptr(), 1, from_stride);
        copy_panel(&mut last[..rows], rows, 1, rows, from.as_ptr().add(columns - 1), 1, from_stride);
    }
}

/// Edge of the squares in which operands are transposed.
const EDGE: usize = 4;

/// Transposes a square: `EDGE` lines that are `stride` apart become rows that are `width` apart.
///
/// # Safety
/// The lines are there.
#[inline(always)]
unsafe fn turn(to: &mut [f32], width: usize, from: *const f32, stride: usize) {
    assert!(to.len() > (EDGE - 1) * width + EDGE - 1);
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is in the baseline; the lines are there; four rows of `to` were checked.
    unsafe {
        use std::arch::x86_64::*;
        let line = |place: usize| _mm_loadu_ps(from.add(place * stride));
        let (mut a, mut b, mut c, mut d) = (line(0), line(1), line(2), line(3));
        _MM_TRANSPOSE4_PS(&mut a, &mut b, &mut c, &mut d);
        let to = to.as_mut_ptr();
        for (row, value) in [a, b, c, d].into_iter().enumerate() {
            _mm_storeu_ps(to.add(row * width), value);
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    for row in 0..EDGE {
        for place in 0..EDGE {
            // SAFETY: the lines are there.
            to[row * width + place] = unsafe { *from.add(place * stride + row) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::tests::Random;

    #[test]
    fn transposes_of_any_size() {
        let mut random = Random::new(4);
        for _ in 0..100 {
            let (rows, columns) = (random.between(1, 30), random.between(1, 30));
            let (to_stride, from_stride) = (rows + random.below(3), columns + random.below(3));
            let from = random.values((rows - 1) * from_stride + columns);
            let mut to = vec![0.0; (columns - 1) * to_stride + rows];
            transpose(&mut to, to_stride, &from, from_stride, (rows, columns));
            let place = |row: usize, column: usize| to[column * to_stride + row] == from[row * from_stride + column];
            assert!((0..rows).all(|row| (0..columns).all(|column| place(row, column))), "{rows} x {columns}");
        }
    }
}
