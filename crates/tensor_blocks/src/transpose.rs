//! Transposing a tile on its way out of a tensor, and back into it.
//!
//! Responsible for: moving elements between rows and columns in squares that fit the first-level cache.

/// Edge in elements of the square that stays in the first-level cache while it is transposed.
const TRANSPOSE_EDGE: usize = 16;

/// `out[i * lines + j] = src[j * stride + i]` for i < run, j < lines, in elements of W bytes.
pub(crate) fn transpose<const W: usize>(src: &[u8], stride: usize, out: &mut [u8], run: usize, lines: usize) {
    let (src, out) = (src.as_chunks::<W>().0, out.as_chunks_mut::<W>().0);
    for j0 in (0..lines).step_by(TRANSPOSE_EDGE) {
        for i0 in (0..run).step_by(TRANSPOSE_EDGE) {
            let n = TRANSPOSE_EDGE.min(run - i0);
            for j in j0..(j0 + TRANSPOSE_EDGE).min(lines) {
                let line = &src[j * stride + i0..][..n];
                for (i, element) in line.iter().enumerate() {
                    out[(i0 + i) * lines + j] = *element;
                }
            }
        }
    }
}

/// The inverse of [`transpose`]: `dst[j * stride + i] = block[i * lines + j]`.
pub(crate) fn untranspose<const W: usize>(block: &[u8], dst: &mut [u8], stride: usize, run: usize, lines: usize) {
    let (block, dst) = (block.as_chunks::<W>().0, dst.as_chunks_mut::<W>().0);
    for j0 in (0..lines).step_by(TRANSPOSE_EDGE) {
        for i0 in (0..run).step_by(TRANSPOSE_EDGE) {
            let n = TRANSPOSE_EDGE.min(run - i0);
            for j in j0..(j0 + TRANSPOSE_EDGE).min(lines) {
                let line = &mut dst[j * stride + i0..][..n];
                for (i, element) in line.iter_mut().enumerate() {
                    *element = block[(i0 + i) * lines + j];
                }
            }
        }
    }
}
