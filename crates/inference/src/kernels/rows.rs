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

/// Copies rows of `columns` elements; rows lie `to_stride` and `from_stride` elements apart.
///
/// # Panics
/// If a slice does not hold the rows.
pub(super) fn copy_rows(
    to: &mut [f32],
    to_stride: usize,
    from: &[f32],
    from_stride: usize,
    (rows, columns): (usize, usize),
) {
    if rows == 0 || columns == 0 {
        return;
    }
    let end = |stride: usize| (rows - 1).checked_mul(stride).and_then(|start| start.checked_add(columns));
    let fits = |stride: usize, len: usize| end(stride).is_some_and(|end| end <= len);
    assert!(fits(to_stride, to.len()) && fits(from_stride, from.len()), "rows to copy are not there");
    let copied = Copied { to: to.as_mut_ptr(), to_stride, from: from.as_ptr(), from_stride, rows, columns };
    // SAFETY: the rows were found to be there; the slices do not overlap; the level is the processor's.
    unsafe {
        match level() {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => avx512(copied),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => avx2(copied),
            Level::Base => body::<Four>(copied),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512dq,avx512vl,avx2,fma")]
unsafe fn avx512(copied: Copied) {
    // SAFETY: the caller's promise.
    unsafe { body::<Sixteen>(copied) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(copied: Copied) {
    // SAFETY: as above.
    unsafe { body::<Eight>(copied) }
}

#[inline(always)]
unsafe fn body<L: Lanes>(copied: Copied) {
    let Copied { mut to, to_stride, mut from, from_stride, rows, columns } = copied;
    let whole = columns / L::WIDTH * L::WIDTH;
    let tail = columns - whole;
    for _ in 0..rows {
        // SAFETY: columns of a row, which the caller says is there.
        unsafe {
            let mut column = 0;
            while column < whole {
                L::load(from.add(column)).store(to.add(column));
                column += L::WIDTH;
            }
            if tail > 0 {
                L::load_some(from.add(whole), tail).store_some(to.add(whole), tail);
            }
        }
        // Past the memory only behind the last row, where they are not read.
        to = to.wrapping_add(to_stride);
        from = from.wrapping_add(from_stride);
    }
}

super::levels::for_levels! {
    /// Takes elements 0, 2, 4, ... of `from`: as many as `to` has.
    ///
    /// # Panics
    /// If `from` does not have them.
    every_second(to: &mut [f32], from: &[f32]) {
        let Some(last) = to.len().checked_sub(1) else { return };
        let from = &from[..2 * last + 1];
        // The pairs let the compiler shuffle vectors.
        for (to, pair) in to.iter_mut().zip(from.chunks_exact(2)) {
            *to = pair[0];
        }
        to[last] = from[2 * last];
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
            let (to_stride, from_stride) = (columns + random.below(9), columns + random.below(9));
            let from = random.values((rows - 1) * from_stride + columns);
            let mut to = vec![7.0; rows * to_stride];
            copy_rows(&mut to, to_stride, &from, from_stride, (rows, columns));
            for (place, value) in to.iter().enumerate() {
                let (row, column) = (place / to_stride, place % to_stride);
                let expected = if column < columns { from[row * from_stride + column] } else { 7.0 };
                assert_eq!(*value, expected);
            }
            let mut half = vec![0.0; columns];
            let values = random.values(2 * columns - 1);
            every_second(&mut half, &values);
            assert!(half.iter().enumerate().all(|(place, value)| *value == values[2 * place]));
        }
        every_second(&mut [], &[]);
    }

    #[test]
    #[should_panic(expected = "not there")]
    fn missing_rows_are_noticed() {
        copy_rows(&mut [0.0; 5], 3, &[0.0; 9], 3, (2, 3));
    }
}
