//! Copies of many short rows, for which a call of memcpy each would cost more than the copy.
//!
//! Invariant: bounds are checked once a call.
#![allow(unsafe_code)] // Vectors by pointer, and functions that need features of the processor.

#[cfg(target_arch = "x86_64")]
use super::lanes::{Eight, Sixteen};
use super::lanes::{Four, Lanes, Level, level};

/// Rows of a matrix: `rows` of `columns` contiguous elements each, `stride` apart.
#[derive(Clone, Copy)]
struct Copied {
    to: *mut f32,
    to_stride: usize,
    from: *const f32,
    from_stride: usize,
    rows: usize,
    columns: usize,
}

/// Copies rows of `columns` elements; rows lie `to_stride` and `from_stride` elements apart. With `STEP` 2, elements 0, 2,
/// 4, ... of the rows of `from` are taken, otherwise `STEP` is 1.
///
/// # Panics
/// If a slice does not hold the rows.
pub(super) fn copy_rows<const STEP: usize>(
    to: &mut [f32],
    to_stride: usize,
    from: &[f32],
    from_stride: usize,
    (rows, columns): (usize, usize),
) {
    if rows == 0 || columns == 0 {
        return;
    }
    const { assert!(STEP == 1 || STEP == 2) };
    let fits = |stride: usize, step: usize, len: usize| {
        let last = (columns - 1).checked_mul(step);
        let end = (rows - 1).checked_mul(stride).and_then(|start| start.checked_add(last?));
        end.is_some_and(|end| end < len)
    };
    assert!(fits(to_stride, 1, to.len()) && fits(from_stride, STEP, from.len()), "rows to copy are not there");
    let copied = Copied { to: to.as_mut_ptr(), to_stride, from: from.as_ptr(), from_stride, rows, columns };
    // SAFETY: the rows were found to be there; the slices do not overlap; the level is the processor's.
    unsafe {
        match level() {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => avx512::<STEP>(copied),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => avx2::<STEP>(copied),
            Level::Base => body::<Four, STEP>(copied),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512dq,avx512vl,avx2,fma")]
unsafe fn avx512<const STEP: usize>(copied: Copied) {
    // SAFETY: the caller's promise.
    unsafe { body::<Sixteen, STEP>(copied) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2<const STEP: usize>(copied: Copied) {
    // SAFETY: as above.
    unsafe { body::<Eight, STEP>(copied) }
}

#[inline(always)]
unsafe fn body<L: Lanes, const STEP: usize>(copied: Copied) {
    let Copied { mut to, to_stride, mut from, from_stride, rows, columns } = copied;
    // The last vector, whole or not, is read no further than its last element.
    let whole = (columns - 1) / L::WIDTH * L::WIDTH;
    let tail = columns - whole;
    let read = STEP * (tail - 1) + 1;
    for _ in 0..rows {
        // SAFETY: columns of a row, which the caller says is there.
        unsafe {
            let mut column = 0;
            while column < whole {
                let source = from.add(STEP * column);
                let values =
                    if STEP == 1 { L::load(source) } else { L::load(source).even(L::load(source.add(L::WIDTH))) };
                values.store(to.add(column));
                column += L::WIDTH;
            }
            let source = from.add(STEP * whole);
            let near = L::load_between(source, 0, read.min(L::WIDTH));
            let values = if STEP == 1 {
                near
            } else {
                near.even(L::load_between(source.wrapping_add(L::WIDTH), 0, read.saturating_sub(L::WIDTH)))
            };
            values.store_some(to.add(whole), tail);
        }
        // Past the memory only behind the last row, where they are not read.
        to = to.wrapping_add(to_stride);
        from = from.wrapping_add(from_stride);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::tests::{Random, at_each_level};

    #[test]
    fn rows_of_any_length_are_copied_and_nothing_else() {
        at_each_level(|_| check());
    }

    fn check() {
        let mut random = Random::new(2);
        for _ in 0..200 {
            let (rows, columns) = (random.between(1, 6), random.between(1, 80));
            let (to_stride, slack) = (columns + random.below(9), random.below(9));
            for step in [1, 2] {
                let from_stride = step * columns + slack;
                let from = random.values((rows - 1) * from_stride + step * (columns - 1) + 1);
                let mut to = vec![7.0; rows * to_stride];
                match step {
                    1 => copy_rows::<1>(&mut to, to_stride, &from, from_stride, (rows, columns)),
                    _ => copy_rows::<2>(&mut to, to_stride, &from, from_stride, (rows, columns)),
                }
                for (place, value) in to.iter().enumerate() {
                    let (row, column) = (place / to_stride, place % to_stride);
                    let expected = if column < columns { from[row * from_stride + step * column] } else { 7.0 };
                    assert_eq!(*value, expected);
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "not there")]
    fn missing_rows_are_noticed() {
        copy_rows::<1>(&mut [0.0; 5], 3, &[0.0; 9], 3, (2, 3));
    }
}
