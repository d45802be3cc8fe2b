//! Convolutions of two spatial dimensions, channels first.
//!
//! Responsible for: [`conv`], for any stride, dilation, padding and number of groups, with what follows it (a scale and
//! a bias per channel, a second operand to add, an activation).
//!
//! A convolution is a product of the filters, a matrix of `filters x (channels taps)`, with a matrix that has a column
//! for each output pixel. That matrix is not made. The input is copied once, padded, to planes whose rows follow one
//! another, so that the row of a tap is a run of its channel's plane, from an offset:
//!
//! ```text
//!  plane (3 x 3, padding 1)          output pixel q = y * width + x
//!   0 0 0 0 0 0                      tap (ky, kx) reads plane[q + ky * width + kx]
//!   0 a b c d 0 | e f g h 0 | ...    the padding to the right of a row is that to the left of the next
//! ```
//!
//! The columns between the rows of the output are computed in vain, and left out when the output is copied to its
//! place. With a stride of s, a plane is cut into s x s planes, of the rows and columns of one remainder each; those that
//! no tap reads are left out. Several small images lie in one plane, one below the other. Work is cut into chunks of output rows, or of images, so that the
//! planes of a chunk stay in the near caches.
//!
//! Invariant: filters are walked tile by tile, once a chunk, and no tile is needed with another.

use super::depthwise;
use super::epilogue::{Activation, line};
use super::filters::Filters;
use super::gemm::{Operand, scattered_product};
use super::rows::copy_rows;
use std::cell::RefCell;
use std::ops::Range;

/// Elements of the planes of a chunk, about: 384 kB.
const CHUNK: usize = 96 << 10;
/// Columns of a chunk, at least and at most.
const COLUMNS: Range<usize> = 192..2048;

/// Elements of scratch that a thread keeps: 4 MB.
const KEPT: usize = 1 << 20;

/// Sizes of a convolution. Pairs are of rows and columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Channels of the input, of all groups.
    pub channels: usize,
    /// Channels of the output, of all groups.
    pub filters: usize,
    /// Groups; they divide channels and filters.
    pub groups: usize,
    /// Pixels of the input.
    pub input: [usize; 2],
    /// Pixels of the output.
    pub output: [usize; 2],
    /// Taps of a filter.
    pub kernel: [usize; 2],
    /// Input pixels from one output pixel to the next.
    pub stride: [usize; 2],
    /// Input pixels from one tap to the next.
    pub dilation: [usize; 2],
    /// Zeros before the first input pixel. What is behind the last is zero as far as the output's size asks for it.
    pub pad: [usize; 2],
}

impl Geometry {
    /// Channels of a group.
    pub fn group_channels(&self) -> usize {
        self.channels / self.groups
    }

    /// Filters of a group.
    pub fn group_filters(&self) -> usize {
        self.filters / self.groups
    }

    /// Columns of the matrix of filters.
    pub fn depth(&self) -> usize {
        self.group_channels() * self.kernel[0] * self.kernel[1]
    }

    pub(super) fn pixels(size: [usize; 2]) -> usize {
        size[0] * size[1]
    }

    /// The same convolution, of pictures of one row instead of one column: rows are what is worked along.
    pub(super) fn lying(&self) -> Geometry {
        let upright = self.input[1] == 1 && self.output[1] == 1 && self.kernel[1] == 1 && self.pad[1] == 0;
        if !upright {
            return *self;
        }
        let turn = |[rows, columns]: [usize; 2]| [columns, rows];
        Geometry {
            input: turn(self.input),
            output: turn(self.output),
            kernel: turn(self.kernel),
            stride: turn(self.stride),
            dilation: turn(self.dilation),
            pad: turn(self.pad),
            ..*self
        }
    }

    /// How many remainders of the stride the taps have. Those of the first taps are all: tap t has that of tap t modulo this.
    fn phases(&self) -> [usize; 2] {
        let divisor = |mut a: usize, mut b: usize| {
            while b != 0 {
                (a, b) = (b, a % b);
            }
            a
        };
        std::array::from_fn(|axis| {
            (self.stride[axis] / divisor(self.stride[axis], self.dilation[axis])).min(self.kernel[axis])
        })
    }

    /// Elements of scratch that [`conv`] takes: sizes of kernels and paddings come from a model, and wide ones make planes
    /// that are much larger than the pictures.
    pub fn scratch(&self, images: usize) -> usize {
        let geometry = &self.lying();
        if images == 0 || Geometry::pixels(geometry.output) == 0 || depthwise::serves(geometry) {
            return 0;
        }
        let layout = Layout::new(geometry);
        let most = chunks(geometry, layout, images).map(|chunk| chunk.columns(geometry, layout)).max().unwrap_or(0);
        let [down, right] = geometry.phases();
        let planes =
            geometry.group_channels().saturating_mul(down * right).saturating_mul(most.saturating_add(layout.reach));
        planes.saturating_add(geometry.group_filters().saturating_mul(most))
    }

    /// Whether each output pixel is of the one input pixel at the same place.
    fn pointwise(&self) -> bool {
        self.kernel == [1, 1] && self.stride == [1, 1] && self.pad == [0, 0] && self.input == self.output
    }
}

/// What follows a convolution: `activation(x * scale + bias + added)`, which may be multiplied and added to once more.
#[derive(Clone, Copy, Debug, Default)]
pub struct After<'a> {
    /// One factor for each filter.
    pub scale: Option<&'a [f32]>,
    /// One value for each filter.
    pub bias: Option<&'a [f32]>,
    /// As many values as the output has.
    pub added: Option<&'a [f32]>,
    /// The function of the sum.
    pub activation: Activation,
    /// A factor and an addition behind the function.
    pub then: Option<(f32, f32)>,
}

impl After<'_> {
    /// # Panics
    /// If it does not fit an output of so many elements.
    pub(super) fn check(&self, len: usize, geometry: &Geometry) {
        let fits = |values: Option<&[f32]>, count: usize| values.is_none_or(|values| values.len() == count);
        assert!(fits(self.scale, geometry.filters) && fits(self.bias, geometry.filters), "what follows a convolution");
        assert!(fits(self.added, len), "what is added to a convolution");
    }

    /// Finishes a row of the filter with this number.
    pub(super) fn finish(&self, values: &mut [f32], filter: usize, added: &[f32]) {
        let scale = self.scale.map_or(1.0, |scale| scale[filter]);
        let bias = self.bias.map_or(0.0, |bias| bias[filter]);
        if scale != 1.0 || bias != 0.0 || !added.is_empty() || self.activation != Activation::Identity {
            line(values, scale, bias, added, self.activation);
        }
        if let Some((scale, bias)) = self.then {
            line(values, scale, bias, &[], Activation::Identity);
        }
    }
}

/// What a thread keeps from one convolution to the next.
#[derive(Default)]
struct Scratch {
    planes: Vec<f32>,
    sums: Vec<f32>,
    offsets: Vec<usize>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Planes of the input and where output pixels lie in them.
#[derive(Clone, Copy)]
struct Layout {
    /// Elements from one row to the next.
    width: usize,
    /// Rows from one image to the next, where several lie in a plane.
    period: usize,
    /// How far behind its output pixel a tap reads at most.
    reach: usize,
}

impl Layout {
    fn new(geometry: &Geometry) -> Layout {
        let Geometry { input, output, kernel, stride, dilation, pad, .. } = *geometry;
        let extent = |axis: usize| (kernel[axis] - 1) * dilation[axis] / stride[axis];
        let size = |axis: usize| {
            let whole = output[axis] + extent(axis);
            // Zeros at both ends serve twice.
            let after = whole.saturating_sub(pad[axis] + input[axis]);
            if stride[axis] == 1 { whole - after.min(pad[axis]) } else { whole }
        };
        let width = size(1);
        Layout { width, period: size(0), reach: extent(0).saturating_mul(width).saturating_add(extent(1)) }
    }
}

/// Output rows `rows` of the images `images`; more than one image comes with all rows.
#[derive(Clone)]
struct Chunk {
    images: Range<usize>,
    rows: Range<usize>,
}

impl Chunk {
    fn columns(&self, geometry: &Geometry, layout: Layout) -> usize {
        ((self.images.len() - 1) * layout.period + self.rows.len() - 1) * layout.width + geometry.output[1]
    }
}

/// `out = after(input * filters)`; images, channels, rows and columns, in this order, without gaps.
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
    let pixels = (Geometry::pixels(geometry.input), Geometry::pixels(geometry.output));
    assert_eq!(input.len(), images * geometry.channels * pixels.0, "the input of a convolution");
    assert_eq!(out.len(), images * geometry.filters * pixels.1, "the output of a convolution");
    after.check(out.len(), geometry);
    if out.is_empty() {
        return Ok(());
    }
    let geometry = &geometry.lying();
    if depthwise::serves(geometry) {
        return depthwise::conv(out, input, geometry, filters, after);
    }
    let layout = Layout::new(geometry);
    let mut scratch = SCRATCH.take();
    let mut done = Ok(());
    'all: for chunk in chunks(geometry, layout, images) {
        for group in 0..geometry.groups {
            done = chunk_of_group(out, input, &chunk, group, geometry, layout, filters, after, &mut scratch);
            if done.is_err() {
                break 'all;
            }
        }
    }
    if scratch.planes.len() + scratch.sums.len() <= KEPT {
        SCRATCH.set(scratch);
    }
    done
}

fn chunks(geometry: &Geometry, layout: Layout, images: usize) -> impl Iterator<Item = Chunk> {
    let columns = (CHUNK / geometry.group_channels().max(1)).clamp(COLUMNS.start, COLUMNS.end);
    let image = layout.period.saturating_mul(layout.width);
    let height = geometry.output[0];
    let together = (columns / image).max(1);
    // As even as can be.
    let rows = (columns / layout.width).clamp(1, height);
    let pieces = if together > 1 { 1 } else { height.div_ceil(rows) };
    (0..images).step_by(together).flat_map(move |first| {
        let images = first..(first + together).min(images);
        (0..pieces).map(move |piece| Chunk {
            images: images.clone(),
            rows: piece * height / pieces..(piece + 1) * height / pieces,
        })
    })
}

#[allow(clippy::too_many_arguments)]
fn chunk_of_group<F: Filters>(
    out: &mut [f32],
    input: &[f32],
    chunk: &Chunk,
    group: usize,
    geometry: &Geometry,
    layout: Layout,
    filters: &mut F,
    after: After<'_>,
    scratch: &mut Scratch,
) -> Result<(), F::Error> {
    let (channels, count) = (geometry.group_channels(), geometry.group_filters());
    let pixels = (Geometry::pixels(geometry.input), Geometry::pixels(geometry.output));
    let columns = chunk.columns(geometry, layout);
    let Scratch { planes, sums, offsets } = scratch;

    // In place where that is as good: rows of planes must not fall into the same few sets of the cache.
    let in_place = geometry.pointwise() && chunk.images.len() == 1 && !pixels.0.is_multiple_of(256);
    let data = if in_place {
        let first = (chunk.images.start * geometry.channels + group * channels) * pixels.0;
        offsets.clear();
        offsets.extend((0..channels).map(|channel| channel * pixels.0 + chunk.rows.start * geometry.input[1]));
        &input[first..first + channels * pixels.0]
    } else {
        let len = columns + layout.reach;
        let stride = (len.div_ceil(16) | 1) * 16;
        let [down, right] = geometry.phases();
        let phases = down * right;
        let wanted = channels * phases * stride;
        if planes.len() < wanted {
            planes.resize(wanted, 0.0);
        }
        for channel in 0..channels {
            let at = |image: usize| (image * geometry.channels + group * channels + channel) * pixels.0;
            for phase in 0..phases {
                let plane = &mut planes[(channel * phases + phase) * stride..][..len];
                let tap = [phase / right, phase % right];
                let place = std::array::from_fn(|axis| tap[axis] * geometry.dilation[axis] % geometry.stride[axis]);
                fill(plane, place, chunk, geometry, layout, |image| &input[at(image)..at(image) + pixels.0]);
            }
        }
        tap_offsets(offsets, geometry, layout, stride);
        &planes[..wanted]
    };

    // Straight to the output where rows of it follow one another as they do in the planes.
    let straight = chunk.images.len() == 1 && layout.width == geometry.output[1];
    let place = (chunk.images.start * geometry.filters + group * count) * pixels.1;
    let first_row = chunk.rows.start * geometry.output[1];
    let (target, target_stride): (&mut [f32], usize) = if straight {
        (&mut out[place + first_row..place + count * pixels.1], pixels.1)
    } else {
        let stride = (columns.div_ceil(16) | 1) * 16;
        if sums.len() < count * stride {
            sums.resize(count * stride, 0.0);
        }
        (&mut sums[..count * stride], stride)
    };
    let rows = group * count..(group + 1) * count;
    filters.walk(rows.clone(), 0..geometry.depth(), &mut |tile| {
        let (start, end) = (tile.row0.max(rows.start), (tile.row0 + tile.rows).min(rows.end));
        if start < end {
            scattered_product(
                &mut target[(start - rows.start) * target_stride..],
                target_stride,
                end - start,
                columns,
                Operand::row_major(&tile.data[(start - tile.row0) * tile.cols..], tile.cols),
                data,
                &offsets[tile.col0..tile.col0 + tile.cols],
                tile.col0 > 0,
            );
        }
    })?;

    for filter in 0..count {
        let at = group * count + filter;
        if straight {
            let start = place + filter * pixels.1 + first_row;
            let added = after.added.map_or(&[][..], |added| &added[start..start + columns]);
            after.finish(&mut out[start..start + columns], at, added);
            continue;
        }
        let values = &mut sums[filter * target_stride..][..columns];
        if after.added.is_none() {
            after.finish(values, at, &[]);
        }
        let width = geometry.output[1];
        for (number, image) in chunk.images.clone().enumerate() {
            let plane = (image * geometry.filters + at) * pixels.1;
            let from = &values[number * layout.period * layout.width..];
            let start = plane + first_row;
            let rows = chunk.rows.len();
            let to = &mut out[start..start + rows * width];
            copy_rows::<1>(to, width, from, layout.width, (rows, width));
            if let Some(added) = after.added {
                after.finish(to, at, &added[start..start + rows * width]);
            }
        }
    }
    Ok(())
}

/// The offsets of all taps, in the order of the columns of the filters.
fn tap_offsets(offsets: &mut Vec<usize>, geometry: &Geometry, layout: Layout, plane: usize) {
    let [down, right] = geometry.phases();
    let place = |tap: usize, axis: usize| tap * geometry.dilation[axis] / geometry.stride[axis];
    offsets.clear();
    offsets.reserve(geometry.depth());
    for channel in 0..geometry.group_channels() {
        for y in 0..geometry.kernel[0] {
            for x in 0..geometry.kernel[1] {
                let phase = (channel * down + y % down) * right + x % right;
                offsets.push(phase * plane + place(y, 0) * layout.width + place(x, 1));
            }
        }
    }
}

/// Fills a plane with the rows and columns of one remainder of the stride.
fn fill<'a>(
    plane: &mut [f32],
    phase: [usize; 2],
    chunk: &Chunk,
    geometry: &Geometry,
    layout: Layout,
    image: impl Fn(usize) -> &'a [f32],
) {
    let Geometry { input, stride, pad, .. } = *geometry;
    let [down, right] = stride;
    // Columns of the plane that are columns of the input: before them is padding, as behind them.
    let first = pad[1].saturating_sub(phase[1]).div_ceil(right);
    let start = first * right + phase[1] - pad[1];
    let count = input[1].saturating_sub(start).div_ceil(right).min(layout.width.saturating_sub(first));
    plane.fill(0.0);
    // Likewise the rows. A single image goes on below the period, into the rows of the next chunk.
    let single = chunk.images.len() == 1;
    let above = pad[0].saturating_sub(chunk.rows.start * down + phase[0]).div_ceil(down);
    let top = (chunk.rows.start + above) * down + phase[0] - pad[0];
    let rows = input[0].saturating_sub(top).div_ceil(down);
    for (place, image_number) in chunk.images.clone().enumerate() {
        let source = image(image_number);
        let begin = (place * layout.period + above) * layout.width + first;
        // What of these rows the plane has room for; the last may be cut.
        let left = plane.len().saturating_sub(begin);
        let rows = if single { rows } else { rows.min(layout.period.saturating_sub(above)) };
        let whole = rows.min((left + layout.width - count.min(left)) / layout.width);
        if count == 0 || rows == 0 || left == 0 {
            continue;
        }
        let target = &mut plane[begin..];
        let from = &source[top * input[1] + start..];
        let shape = (whole, count);
        match right {
            1 => copy_rows::<1>(target, layout.width, from, down * input[1], shape),
            2 => copy_rows::<2>(target, layout.width, from, down * input[1], shape),
            _ => {}
        }
        for row in if right <= 2 { whole } else { 0 }..rows.min(whole + 1) {
            let Some(to) = target.get_mut(row * layout.width..) else { break };
            let from = from[row * down * input[1]..].iter().step_by(right);
            to.iter_mut().take(count).zip(from).for_each(|(to, from)| *to = *from);
        }
    }
}

#[cfg(test)]
#[path = "conv_tests.rs"]
mod tests;
