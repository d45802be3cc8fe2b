use super::*;
use crate::kernels::epilogue::Activation;
use crate::kernels::filters::{FilterTile, Whole};
use crate::kernels::tests::{Random, at_each_level, close};

/// By the definition: each input pixel adds its multiples of the filters.
fn reference(input: &[f32], images: usize, g: &Geometry, filters: &[f32], after: After<'_>) -> Vec<f32> {
    let size = g.output[0] * g.output[1];
    let mut sums = vec![0f64; images * g.filters * size];
    for image in 0..images {
        for channel in 0..g.channels {
            let group = channel / g.group_channels();
            for place in 0..g.input[0] * g.input[1] {
                let value = f64::from(input[(image * g.channels + channel) * g.input[0] * g.input[1] + place]);
                let (y, x) = (place / g.input[1], place % g.input[1]);
                for filter in 0..g.group_filters() {
                    for tap in 0..g.kernel[0] * g.kernel[1] {
                        let (ky, kx) = (tap / g.kernel[1], tap % g.kernel[1]);
                        let row = (y * g.stride[0] + ky * g.dilation[0]).checked_sub(g.pad[0]);
                        let col = (x * g.stride[1] + kx * g.dilation[1]).checked_sub(g.pad[1]);
                        let (Some(row), Some(col)) = (row, col) else { continue };
                        if row < g.output[0] && col < g.output[1] {
                            let weight =
                                filters[(channel * g.group_filters() + filter) * g.kernel[0] * g.kernel[1] + tap];
                            let plane = image * g.filters + group * g.group_filters() + filter;
                            sums[plane * size + row * g.output[1] + col] += value * f64::from(weight);
                        }
                    }
                }
            }
        }
    }
    let finish = |(at, sum): (usize, &f64)| {
        let filter = at / size % g.filters;
        let mut value = *sum as f32 * after.scale.map_or(1.0, |scale| scale[filter]);
        value += after.bias.map_or(0.0, |bias| bias[filter]);
        value += after.added.map_or(0.0, |added| added[at]);
        value = if after.activation == Activation::Relu { value.max(0.0) } else { value };
        after.then.map_or(value, |(scale, bias)| value * scale + bias)
    };
    sums.iter().enumerate().map(finish).collect()
}

/// Filters in tiles of 4 x 16.
struct Tiles<'a> {
    data: &'a [f32],
    width: usize,
}

impl Filters for Tiles<'_> {
    type Error = ();

    fn walk(&mut self, rows: Range<usize>, cols: Range<usize>, each: &mut dyn FnMut(FilterTile<'_>)) -> Result<(), ()> {
        let all = self.data.len() / self.width;
        for col0 in (cols.start / 16 * 16..cols.end).step_by(16) {
            for row0 in (rows.start / 4 * 4..rows.end).step_by(4) {
                let (height, width) = (4.min(all - row0), 16.min(self.width - col0));
                let line = |row: usize| self.data[row * self.width + col0..][..width].to_vec();
                let data: Vec<f32> = (row0..row0 + height).flat_map(line).collect();
                each(FilterTile { row0, col0, rows: height, cols: width, data: &data });
            }
        }
        Ok(())
    }
}

fn both_ways(geometry: &Geometry, images: usize, random: &mut Random, round: usize) {
    let values = random.values(images * geometry.channels * Geometry::pixels(geometry.input));
    let width = geometry.group_filters() * geometry.kernel[0] * geometry.kernel[1];
    let weights = random.values(geometry.channels * width);
    let count = images * geometry.filters * Geometry::pixels(geometry.output);
    let (scale, bias) = (random.values(geometry.filters), random.values(geometry.filters));
    let added = random.values(count);
    let mut some = |values| if random.below(2) == 0 { Some(values) } else { None };
    let after = After {
        scale: some(&scale[..]),
        bias: some(&bias[..]),
        added: some(&added[..]),
        activation: [Activation::Identity, Activation::Relu][round % 2],
        then: [None, None, Some((0.5, 2.0))][round % 3],
    };
    let expected = reference(&values, images, geometry, &weights, after);
    let what = format!("round {round}, {images} images: {geometry:?}");
    let tolerance = 1e-5 * (geometry.group_channels() * geometry.kernel[0] * geometry.kernel[1]) as f32 + 1e-5;
    let mut out = vec![f32::NAN; count];
    let Ok(()) = conv(&mut out, &values, images, geometry, &mut Whole { data: &weights, depth: width }, after);
    close(&out, &expected, tolerance, &what);
    out.fill(f32::NAN);
    conv(&mut out, &values, images, geometry, &mut Tiles { data: &weights, width }, after).unwrap();
    close(&out, &expected, tolerance, &what);
    assert!(scratch(geometry, images) < 1 << 24, "{what}");
}

#[test]
fn transposed_convolutions_of_random_shapes_are_those_of_the_definition() {
    at_each_level(|level| {
        let mut random = Random::new(level as u64 + 51);
        for round in 0..300 {
            let groups = [1, 1, 1, 2, 3][random.below(5)];
            let pick = |random: &mut Random, most: usize| [random.between(1, most), random.between(1, most)];
            let (mut kernel, stride, dilation) = match random.below(4) {
                0 => ([2, 2], [2, 2], [1, 1]),
                1 => ([[3, 3], [4, 4]][random.below(2)], [2, 2], [1, 1]),
                _ => (pick(&mut random, 5), pick(&mut random, 4), pick(&mut random, 3)),
            };
            let mut input = pick(&mut random, if round % 8 == 0 { 50 } else { 12 });
            let mut pad = [random.below(4), random.below(4)];
            if random.below(8) == 0 {
                (kernel[1], input[1], pad[1]) = (1, 1, 0);
            }
            let size = |axis: usize, more: usize| {
                let whole = (input[axis] - 1) * stride[axis] + (kernel[axis] - 1) * dilation[axis] + 1 + more;
                whole.checked_sub(pad[axis] + random.below(3)).filter(|size| *size > 0)
            };
            let mut size = size;
            let (Some(high), Some(wide)) = (size(0, round % 3), size(1, round % 2)) else { continue };
            let geometry = Geometry {
                channels: groups * random.between(1, 7),
                filters: groups * random.between(1, 7),
                groups,
                input,
                output: [high, wide],
                kernel,
                stride,
                dilation,
                pad,
            };
            let images = random.between(1, 4);
            both_ways(&geometry, images, &mut random, round);
        }
    });
}

#[test]
fn large_pictures_are_cut_into_pieces() {
    let mut random = Random::new(61);
    // Rows of one picture, columns of one row, and more filters than a piece has.
    for (input, kernel, stride, filters) in [
        ([70, 60], [4, 4], [2, 2], 3),
        ([2, 2500], [3, 5], [3, 2], 2),
        ([1, 5000], [1, 9], [1, 3], 2),
        ([5000, 1], [3, 1], [1, 1], 2),
        ([33, 33], [5, 5], [1, 1], 40),
    ] {
        let pad = [kernel[0] / 3, kernel[1] / 3];
        let size = |axis: usize| (input[axis] - 1) * stride[axis] + kernel[axis] - 2 * pad[axis];
        let output = [size(0), size(1)];
        let geometry =
            Geometry { channels: 2, filters, groups: 1, input, output, kernel, stride, dilation: [1, 1], pad };
        both_ways(&geometry, 2, &mut random, 0);
    }
}

#[test]
fn no_images_and_no_pixels_are_no_work() {
    let pair = |value| [value; 2];
    let mut geometry = Geometry {
        channels: 2,
        filters: 3,
        groups: 1,
        input: pair(4),
        output: pair(6),
        kernel: pair(3),
        stride: pair(1),
        dilation: pair(1),
        pad: pair(0),
    };
    let weights = [0.0; 54];
    let mut filters = Whole { data: &weights, depth: 27 };
    let Ok(()) = conv(&mut [], &[], 0, &geometry, &mut filters, After::default());
    geometry.output = [0, 2];
    let Ok(()) = conv(&mut [], &[0.0; 32], 1, &geometry, &mut filters, After::default());
    // Pictures without pixels give what follows.
    (geometry.input, geometry.output) = ([0, 4], [2, 6]);
    let (mut out, bias) = ([7.0; 36], [1.0, 2.0, 3.0]);
    let after = After { bias: Some(&bias), ..After::default() };
    let Ok(()) = conv(&mut out, &[], 1, &geometry, &mut filters, after);
    assert!(out.iter().enumerate().all(|(at, value)| *value == (at / 12) as f32 + 1.0));
}
