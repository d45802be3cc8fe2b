//! Convolutions of one channel each, which have too few products for planes to be worth filling.
//!
//! Responsible for: one channel of the input to one of the output, read and written in place. A vector of output pixels
//! of a row is the sum over the taps of vectors of the input, shifted; padding is what a masked load leaves out.
#![allow(unsafe_code)] // Vectors by pointer.

use super::conv::{After, Geometry};
use super::epilogue::{Activation, line};
use super::filters::Filters;
#[cfg(target_arch = "x86_64")]
use super::lanes::{Eight, Sixteen};
use super::lanes::{Four, Lanes, Level, level};
use super::rows::copy_rows;

/// Most taps in a row of the kernel.
const TAPS: usize = 16;

/// Whether this module does this convolution.
pub(super) fn serves(geometry: &Geometry) -> bool {
    geometry.group_channels() == 1 && geometry.stride[1] <= 2 && geometry.kernel[1] <= TAPS
}

/// As [`conv`](super::conv::conv), for what [`serves`] says yes to; its sizes have been checked.
pub(super) fn conv<F: Filters>(
    out: &mut [f32],
    input: &[f32],
    geometry: &Geometry,
    filters: &mut F,
    after: After<'_>,
) -> Result<(), F::Error> {
    let depth = geometry.depth();
    let pixels = (Geometry::pixels(geometry.input), Geometry::pixels(geometry.output));
    let mut taps = vec![0.0; geometry.filters * depth];
    filters.walk(0..geometry.filters, 0..depth, &mut |tile| {
        let to = &mut taps[tile.row0 * depth + tile.col0..];
        copy_rows::<1>(to, depth, tile.data, tile.cols, (tile.rows, tile.cols));
    })?;
    // What can be done before the values are written.
    let limits = match after.activation {
        Activation::Relu => Some((0.0, f32::INFINITY)),
        Activation::Clip(low, high) => Some((low, high)),
        Activation::Identity => Some((f32::NEG_INFINITY, f32::INFINITY)),
        _ => None,
    };
    let limits = limits.filter(|_| after.added.is_none());
    for (number, out) in out.chunks_exact_mut(pixels.1).enumerate() {
        let (image, filter) = (number / geometry.filters, number % geometry.filters);
        let channel = image * geometry.channels + filter / geometry.group_filters();
        let picture = &input[channel * pixels.0..][..pixels.0];
        let value = |values: Option<&[f32]>, otherwise| values.map_or(otherwise, |values| values[filter]);
        let (scale, bias) = match limits {
            Some(_) => (value(after.scale, 1.0), value(after.bias, 0.0)),
            None => (1.0, 0.0),
        };
        let ends = limits.unwrap_or((f32::NEG_INFINITY, f32::INFINITY));
        channel_of(out, picture, geometry, &taps[filter * depth..][..depth], scale, bias, ends);
        if limits.is_none() {
            let added = after.added.map_or(&[][..], |added| &added[number * pixels.1..][..pixels.1]);
            after.finish(out, filter, added);
        } else if let Some((scale, bias)) = after.then {
            line(out, scale, bias, &[], Activation::Identity);
        }
    }
    Ok(())
}

/// One channel.
struct Channel<'a> {
    geometry: &'a Geometry,
    input: *const f32,
    out: *mut f32,
    taps: &'a [f32],
    scale: f32,
    bias: f32,
    limits: (f32, f32),
}

/// `out = sum over taps * scale + bias`, at least `limits.0` and at most `limits.1`, for one channel.
///
/// # Panics
/// If a slice is not as long as the geometry says, or [`serves`] says no.
fn channel_of(
    out: &mut [f32],
    input: &[f32],
    geometry: &Geometry,
    taps: &[f32],
    scale: f32,
    bias: f32,
    limits: (f32, f32),
) {
    let pixels = |[rows, columns]: [usize; 2]| rows * columns;
    assert!(input.len() == pixels(geometry.input) && out.len() == pixels(geometry.output), "a channel of another size");
    assert!(taps.len() == pixels(geometry.kernel) && serves(geometry), "a kernel of another size");
    let channel = Channel { geometry, input: input.as_ptr(), out: out.as_mut_ptr(), taps, scale, bias, limits };
    // SAFETY: input and output are there; the level is the processor's.
    unsafe {
        match level() {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => avx512(&channel),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => avx2(&channel),
            Level::Base => body::<Four>(&channel),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512dq,avx512vl,avx2,fma")]
unsafe fn avx512(channel: &Channel<'_>) {
    // SAFETY: the caller's promise.
    unsafe { body::<Sixteen>(channel) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(channel: &Channel<'_>) {
    // SAFETY: as above.
    unsafe { body::<Eight>(channel) }
}

/// The usual sizes, whose loops unroll, and the others.
#[inline(always)]
unsafe fn body<L: Lanes>(channel: &Channel<'_>) {
    let Geometry { kernel, stride, .. } = *channel.geometry;
    // SAFETY: the caller's promise.
    unsafe {
        match (kernel, stride[1]) {
            ([3, 3], 1) => columns::<L, 3, 1>(channel),
            ([3, 3], 2) => columns::<L, 3, 2>(channel),
            ([5, 5], 1) => columns::<L, 5, 1>(channel),
            ([5, 5], 2) => columns::<L, 5, 2>(channel),
            (_, 1) => columns::<L, 0, 1>(channel),
            _ => columns::<L, 0, 2>(channel),
        }
    }
}

/// All rows of one vector of columns after the other. `K` is the number of taps in a row and in a column, 0 if they
/// are known only now; `S` the stride along a row.
#[inline(always)]
unsafe fn columns<L: Lanes, const K: usize, const S: usize>(channel: &Channel<'_>) {
    let Geometry { input, output, kernel, stride, dilation, pad, .. } = *channel.geometry;
    let [down, right] = if K > 0 { [K, K] } else { kernel };
    // SAFETY: the caller's promise: features, input and output are there.
    unsafe {
        let (scale, bias): (L, L) = (L::splat(channel.scale), L::splat(channel.bias));
        let (low, high): (L, L) = (L::splat(channel.limits.0), L::splat(channel.limits.1));
        let mut x = 0;
        while x < output[1] {
            let width = L::WIDTH.min(output[1] - x);
            // For each tap the part of its vector that is in the input: (first, end) in lanes of the S vectors it takes.
            let mut parts = [(0usize, 0usize); TAPS];
            let mut shifts = [0isize; TAPS];
            let mut inside = true;
            for tap in 0..right {
                let shift = (x * S + tap * dilation[1]) as isize - pad[1] as isize;
                let first = usize::try_from(-shift).unwrap_or(0).min(S * L::WIDTH);
                let end = usize::try_from(input[1] as isize - shift).unwrap_or(0).min(S * L::WIDTH);
                inside &= first == 0 && end == S * L::WIDTH;
                parts[tap] = (first, end.max(first));
                shifts[tap] = shift;
            }
            let part = Columns { x, width, parts, shifts, inside, scale, bias, low, high };
            let mut y = 0;
            while y < output[0] {
                let top = (y * stride[0]) as isize - pad[0] as isize;
                let room = top >= 0 && top as usize + (ROWS - 1) * stride[0] + down <= input[0];
                if K > 0 && room && y + ROWS <= output[0] && stride[0] == S && dilation[0] == 1 {
                    together::<L, K, S>(channel, &part, y, top as usize);
                    y += ROWS;
                } else {
                    one_row::<L, K, S>(channel, &part, y, top);
                    y += 1;
                }
            }
            x += width;
        }
    }
}

/// Rows of the output that are computed together: they share rows of the input.
const ROWS: usize = 4;

/// A vector of columns of the output, and where its taps lie.
struct Columns<L> {
    x: usize,
    width: usize,
    /// For each tap of a row, which lanes are in the input.
    parts: [(usize, usize); TAPS],
    /// The column of the input of the first lane.
    shifts: [isize; TAPS],
    /// Whether all lanes of all taps are in the input.
    inside: bool,
    scale: L,
    bias: L,
    low: L,
    high: L,
}

impl<L: Lanes> Columns<L> {
    /// The vector of tap `tap` in a row of the input.
    #[inline(always)]
    unsafe fn load<const S: usize>(&self, line: *const f32, tap: usize) -> L {
        let from = line.wrapping_offset(self.shifts[tap]);
        let (first, end) = self.parts[tap];
        // SAFETY: the lanes that are read lie in the row.
        unsafe {
            match (S, self.inside) {
                (1, true) => L::load(from),
                (1, false) => L::load_between(from, first, end),
                (_, true) => L::load(from).even(L::load(from.add(L::WIDTH))),
                _ => {
                    let near = L::load_between(from, first.min(L::WIDTH), end.min(L::WIDTH));
                    let behind = |lane: usize| lane.saturating_sub(L::WIDTH);
                    let far = from.wrapping_add(L::WIDTH);
                    near.even(L::load_between(far, behind(first), behind(end)))
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn finish(&self, channel: &Channel<'_>, y: usize, sum: L) {
        // SAFETY: these columns of the row are in the output.
        unsafe {
            let value = sum.fma(self.scale, self.bias).clamp(self.low, self.high);
            let to = channel.out.add(y * channel.geometry.output[1] + self.x);
            if self.width == L::WIDTH { value.store(to) } else { value.store_some(to, self.width) }
        }
    }
}

/// One row of the output; `top` is the row of the input of its first taps.
#[inline(always)]
unsafe fn one_row<L: Lanes, const K: usize, const S: usize>(
    channel: &Channel<'_>,
    columns: &Columns<L>,
    y: usize,
    top: isize,
) {
    let Geometry { input, kernel, dilation, .. } = *channel.geometry;
    let [down, right] = if K > 0 { [K, K] } else { kernel };
    // SAFETY: rows outside of the input are left out; there is a tap for each place of the kernel.
    unsafe {
        let mut sum = L::splat(0.0);
        for ky in 0..down {
            let row = top + (ky * dilation[0]) as isize;
            if row < 0 || row >= input[0] as isize {
                continue;
            }
            let line = channel.input.add(row as usize * input[1]);
            for kx in 0..right {
                let tap = L::splat(*channel.taps.get_unchecked(ky * right + kx));
                sum = tap.fma(columns.load::<S>(line, kx), sum);
            }
        }
        columns.finish(channel, y, sum);
    }
}

/// [`ROWS`] rows of the output whose taps all lie in rows of the input.
#[inline(always)]
unsafe fn together<L: Lanes, const K: usize, const S: usize>(
    channel: &Channel<'_>,
    columns: &Columns<L>,
    y: usize,
    top: usize,
) {
    // SAFETY: as for `one_row`.
    unsafe {
        let mut sums = [L::splat(0.0); ROWS];
        for row in 0..(ROWS - 1) * S + K {
            let line = channel.input.add((top + row) * channel.geometry.input[1]);
            for kx in 0..K {
                let values = columns.load::<S>(line, kx);
                for (place, sum) in sums.iter_mut().enumerate() {
                    // The row of the kernel that this row of the input is for this row of the output.
                    if row >= place * S && row - place * S < K {
                        let tap = L::splat(*channel.taps.get_unchecked((row - place * S) * K + kx));
                        *sum = tap.fma(values, *sum);
                    }
                }
            }
        }
        for (place, sum) in sums.into_iter().enumerate() {
            columns.finish(channel, y + place, sum);
        }
    }
}
