//! Transposed convolutions of two spatial dimensions, channels first.
//!
//! Responsible for: [`conv`], for any stride, dilation, padding and number of groups, with what follows it.
//!
//! Each input pixel adds its multiple of a filter to the output, `stride` pixels from the next one's:
//!
//! ```text
//!   output pixel o of tap t of input pixel i:  o = i * stride + t * dilation - pad
//! ```
//!
//! All multiples are a product: the transpose of the filters, a matrix of `channels x (filters taps)`, with the input,
//! `channels x pixels`. Then each row of the output gathers its sums. With a stride of s it is gathered as s rows, of the
//! columns of one remainder each, so that what is added is contiguous; they are interleaved at the end. Work is cut into
//! pieces of the output and of its filters, so that the product of a piece stays in the near caches; input rows that
//! reach into two pieces are multiplied twice.
//!
//! Invariant: every output pixel is written by one piece only, and finished there.
#![allow(unsafe_code)] // Calls of functions that need features of the processor.

use super::conv::{After, Geometry};
use super::filters::Filters;
use super::gemm::{Operand, product};
use super::levels::for_levels;
use std::cell::RefCell;
use std::ops::Range;

/// Input pixels of a piece, about.
const COLUMNS: usize = 1024;
/// Elements of the product of a piece, about: 512 kB.
const SUMS: usize = 128 << 10;
/// Rows of that product, at least: fewer would leave the product's kernels half empty.
const ROWS: usize = 12;
/// Elements of scratch that a thread keeps: 4 MB.
const KEPT: usize = 1 << 20;

#[derive(Default)]
struct Scratch {
    /// Small pictures of a piece, side by side.
    planes: Vec<f32>,
    sums: Vec<f32>,
    /// A row of the output, by remainder of the stride.
    row: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// How much of the output a piece has, at most.
#[derive(Clone, Copy)]
struct Pieces {
    images: usize,
    rows: usize,
    cols: usize,
    filters: usize,
    /// Input pixels, at most.
    columns: usize,
}

impl Pieces {
    fn new(geometry: &Geometry, images: usize) -> Pieces {
        let Geometry { input, output, kernel, stride, dilation, .. } = *geometry;
        let pixels = Geometry::pixels(input).max(1);
        // Input pixels along an axis that two neighbouring pieces both need.
        let shared = |axis: usize| ((kernel[axis] - 1) * dilation[axis]).div_ceil(stride[axis]);
        let taps = kernel[0] * kernel[1];
        let (images, rows, cols, columns) = if pixels <= COLUMNS / 2 {
            let images = (COLUMNS / pixels).min(images).max(1);
            (images, output[0], output[1], images * pixels)
        } else {
            let whole = input[1] <= 2 * COLUMNS;
            let wide = if whole { input[1] } else { COLUMNS.max(4 * shared(1)) };
            let high = (COLUMNS / wide.max(1)).max(4 * shared(0)).max(1);
            let reach = |size: usize, axis: usize| size.saturating_add(shared(axis)).saturating_add(1).min(input[axis]);
            let cols = if whole { output[1] } else { wide.saturating_mul(stride[1]).min(output[1]) };
            let rows = high.saturating_mul(stride[0]).min(output[0]);
            (1, rows, cols, reach(high, 0) * if whole { wide } else { reach(wide, 1) })
        };
        let filters = (SUMS / taps.saturating_mul(columns)).max(ROWS.div_ceil(taps)).min(geometry.group_filters());
        Pieces { images, rows, cols, filters, columns }
    }
}

/// Elements of scratch that [`conv`] takes.
pub fn scratch(geometry: &Geometry, images: usize) -> usize {
    let geometry = &geometry.lying();
    if images == 0 || Geometry::pixels(geometry.output) == 0 {
        return 0;
    }
    let Geometry { kernel, stride, .. } = *geometry;
    let pieces = Pieces::new(geometry, images);
    let padded = pieces.columns.saturating_add(31);
    let sums = pieces.filters.saturating_mul(kernel[0] * kernel[1]).saturating_mul(padded);
    let planes = if pieces.images > 1 { geometry.group_channels().saturating_mul(padded) } else { 0 };
    let row = if stride[1] > 1 { pieces.cols.saturating_add(stride[1].saturating_mul(2)) } else { 0 };
    sums.saturating_add(planes).saturating_add(row)
}

/// `out = after(transposed convolution of input)`; images, channels, rows and columns, in this order, without gaps. The
/// matrix of filters has a row for each channel of the input and a column for each filter of a group and tap.
///
/// # Errors
/// What walking the filters returns.
///
/// # Panics
/// If a slice is not as long as the sizes say.
pub fn conv<F: Filters>(
    out: &mut [f32],
    input: &[f32],
    images: usize,
    geometry: &Geometry,
    filters: &mut F,
    after: After<'_>,
) -> Result<(), F::Error> {
    after.check(out.len(), geometry);
    assert_eq!(input.len(), images * geometry.channels * Geometry::pixels(geometry.input), "the input");
    assert_eq!(out.len(), images * geometry.filters * Geometry::pixels(geometry.output), "the output");
    if out.is_empty() {
        return Ok(());
    }
    let geometry = &geometry.lying();
    let pieces = Pieces::new(geometry, images);
    let mut scratch = SCRATCH.take();
    let mut done = Ok(());
    'all: for first in (0..images).step_by(pieces.images) {
        let images = first..(first + pieces.images).min(images);
        for group in 0..geometry.groups {
            for filter in (0..geometry.group_filters()).step_by(pieces.filters) {
                let filters_of = filter..(filter + pieces.filters).min(geometry.group_filters());
                for row in (0..geometry.output[0]).step_by(pieces.rows) {
                    for col in (0..geometry.output[1]).step_by(pieces.cols) {
                        let piece = Piece {
                            images: images.clone(),
                            group,
                            filters: filters_of.clone(),
                            rows: row..(row + pieces.rows).min(geometry.output[0]),
                            cols: col..(col + pieces.cols).min(geometry.output[1]),
                        };
                        done = piece.run(out, input, geometry, filters, after, &mut scratch);
                        if done.is_err() {
                            break 'all;
                        }
                    }
                }
            }
        }
    }
    if scratch.planes.len() + scratch.sums.len() + scratch.row.len() <= KEPT {
        SCRATCH.set(scratch);
    }
    done
}

/// Output rows and columns of some images and filters of a group; more than one image comes with all rows and columns.
struct Piece {
    images: Range<usize>,
    group: usize,
    filters: Range<usize>,
    rows: Range<usize>,
    cols: Range<usize>,
}

impl Piece {
    /// The input pixels along an axis that reach these output pixels.
    fn sources(geometry: &Geometry, axis: usize, output: &Range<usize>) -> Range<usize> {
        let Geometry { input, kernel, stride, dilation, pad, .. } = *geometry;
        let end = ((output.end - 1 + pad[axis]) / stride[axis] + 1).min(input[axis]);
        let first = (output.start + pad[axis]).saturating_sub((kernel[axis] - 1) * dilation[axis]);
        first.div_ceil(stride[axis]).min(end)..end
    }

    fn run<F: Filters>(
        &self,
        out: &mut [f32],
        input: &[f32],
        geometry: &Geometry,
        filters: &mut F,
        after: After<'_>,
        scratch: &mut Scratch,
    ) -> Result<(), F::Error> {
        let channels = geometry.group_channels();
        let taps = geometry.kernel[0] * geometry.kernel[1];
        let pixels = Geometry::pixels(geometry.input);
        let width = geometry.input[1];
        let many = self.images.len() > 1;
        let [down, right] = if many {
            [0..geometry.input[0], 0..width]
        } else {
            [Piece::sources(geometry, 0, &self.rows), Piece::sources(geometry, 1, &self.cols)]
        };
        let columns = self.images.len() * down.len() * right.len();
        let stride = (columns.div_ceil(16) | 1) * 16;
        let Scratch { planes, sums, row } = scratch;
        let wanted = self.filters.len() * taps * stride;
        if sums.len() < wanted {
            sums.resize(wanted, 0.0);
        }
        let plane =
            |image: usize, channel: usize| (image * geometry.channels + self.group * channels + channel) * pixels;
        if many {
            if planes.len() < channels * stride {
                planes.resize(channels * stride, 0.0);
            }
            for channel in 0..channels {
                for (place, image) in self.images.clone().enumerate() {
                    planes[channel * stride + place * pixels..][..pixels]
                        .copy_from_slice(&input[plane(image, channel)..][..pixels]);
                }
            }
        }
        let rows = self.group * channels..(self.group + 1) * channels;
        let cols = self.filters.start * taps..self.filters.end * taps;
        if columns > 0 {
            filters.walk(rows.clone(), cols.clone(), &mut |tile| {
                let (first, last) = (tile.row0.max(rows.start), (tile.row0 + tile.rows).min(rows.end));
                let (left, end) = (tile.col0.max(cols.start), (tile.col0 + tile.cols).min(cols.end));
                if first >= last || left >= end {
                    return;
                }
                let a =
                    Operand::transposed(&tile.data[(first - tile.row0) * tile.cols + left - tile.col0..], tile.cols);
                let to = &mut sums[(left - cols.start) * stride..];
                let (m, k, accumulate) = (end - left, last - first, first > rows.start);
                let channel = first - rows.start;
                if many {
                    let b = Operand::row_major(&planes[channel * stride..], stride);
                    product(to, stride, m, columns, k, a, b, accumulate);
                    return;
                }
                let start = plane(self.images.start, channel) + down.start * width + right.start;
                // Whole rows follow one another.
                let (lines, line) = if right.len() == width { (1, columns) } else { (down.len(), right.len()) };
                for number in 0..lines {
                    let b = Operand::row_major(&input[start + number * width..], pixels);
                    product(&mut to[number * line..], stride, m, line, k, a, b, accumulate);
                }
            })?;
        }
        let each = down.len() * right.len();
        for (place, image) in self.images.clone().enumerate() {
            for filter in self.filters.clone() {
                let at = self.group * geometry.group_filters() + filter;
                let size = Geometry::pixels(geometry.output);
                let start = (image * geometry.filters + at) * size;
                let fold = Fold { geometry, rows: &self.rows, cols: &self.cols, down: &down, right: &right, stride };
                let from = (filter - self.filters.start) * taps * stride + place * each;
                gather(&mut out[start..start + size], &sums[from..], row, &fold);
                self.finish(out, start, at, geometry.output[1], after);
            }
        }
        Ok(())
    }

    /// What follows, for the plane of the output that begins at `start`.
    fn finish(&self, out: &mut [f32], start: usize, filter: usize, width: usize, after: After<'_>) {
        let whole = self.cols.len() == width;
        let (lines, line) = if whole { (1, self.rows.len() * width) } else { (self.rows.len(), self.cols.len()) };
        for number in 0..lines {
            let first = start + (self.rows.start + number) * width + self.cols.start;
            let added = after.added.map_or(&[][..], |added| &added[first..first + line]);
            after.finish(&mut out[first..first + line], filter, added);
        }
    }
}

/// How products of taps become a plane of the output.
pub struct Fold<'a> {
    geometry: &'a Geometry,
    /// Rows and columns of the output.
    rows: &'a Range<usize>,
    cols: &'a Range<usize>,
    /// Rows and columns of the input.
    down: &'a Range<usize>,
    right: &'a Range<usize>,
    /// Elements from one tap to the next.
    stride: usize,
}

for_levels! {
    /// Writes the sums of the taps to their places in a plane of the output. `scratch` is a row of it.
    gather(plane: &mut [f32], sums: &[f32], scratch: &mut Vec<f32>, fold: &Fold<'_>) {
        let Fold { geometry, rows, cols, down, right, stride: tap_stride } = *fold;
        let Geometry { output, kernel, stride, dilation, pad, .. } = *geometry;
        let step = stride[1];
        let origin = (cols.start + pad[1]) / step;
        let len = (cols.end - 1 + pad[1]) / step + 1 - origin;
        if step > 1 && scratch.len() < step * len {
            scratch.resize(step * len, 0.0);
        }
        for y in rows.clone() {
            let line = &mut plane[y * output[1] + cols.start..y * output[1] + cols.end];
            let parts = if step > 1 { &mut scratch[..step * len] } else { &mut *line };
            parts.fill(0.0);
            for ky in 0..kernel[0] {
                let Some(from) = (y + pad[0]).checked_sub(ky * dilation[0]) else { break };
                let source = from / stride[0];
                if !from.is_multiple_of(stride[0]) || !down.contains(&source) {
                    continue;
                }
                for kx in 0..kernel[1] {
                    let (shift, part) = (kx * dilation[1] / step, kx * dilation[1] % step);
                    let from = &sums[(ky * kernel[1] + kx) * tap_stride + (source - down.start) * right.len()..];
                    let begin = right.start + shift;
                    let skip = origin.saturating_sub(begin);
                    let place = (begin + skip - origin).min(len);
                    let count = right.len().saturating_sub(skip).min(len - place);
                    if count > 0 {
                        let to = &mut parts[part * len + place..][..count];
                        to.iter_mut().zip(&from[skip..skip + count]).for_each(|(to, from)| *to += from);
                    }
                }
            }
            if step > 1 {
                interleave(line, &scratch[..step * len], step, (cols.start + pad[1]) % step);
            }
        }
    }
}

/// `line[at]` is element `(phase + at) / step` of part `(phase + at) % step`, of `step` parts of the same length.
#[inline(always)]
fn interleave(line: &mut [f32], parts: &[f32], step: usize, phase: usize) {
    let len = parts.len() / step;
    if step > 2 {
        for (part, values) in parts.chunks_exact(len).enumerate() {
            let (first, skip) = if part >= phase { (part - phase, 0) } else { (part + step - phase, 1) };
            let to = line.iter_mut().skip(first).step_by(step);
            to.zip(values.iter().skip(skip)).for_each(|(to, from)| *to = *from);
        }
        return;
    }
    let (even, odd) = parts.split_at(len);
    if phase == 1 {
        line[0] = odd[0];
    }
    let (even, odd) = (&even[phase..], &odd[phase..]);
    let (pairs, last) = line[phase..].as_chunks_mut::<2>();
    let count = pairs.len();
    for ((pair, even), odd) in pairs.iter_mut().zip(even).zip(odd) {
        *pair = [*even, *odd];
    }
    if let [last] = last {
        *last = even[count];
    }
}

#[cfg(test)]
#[path = "transposed_tests.rs"]
mod tests;
