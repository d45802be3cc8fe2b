use super::*;
use crate::kernels::filters::{FilterTile, Whole};
use crate::kernels::tests::{Random, at_each_level, close};

fn reference(input: &[f32], images: usize, g: &Geometry, filters: &[f32], after: After<'_>) -> Vec<f32> {
    let mut out = Vec::new();
    for image in 0..images {
        for filter in 0..g.filters {
            for y in 0..g.output[0] {
                for x in 0..g.output[1] {
                    let mut sum = 0.0f64;
                    for channel in 0..g.group_channels() {
                        let from = filter / g.group_filters() * g.group_channels() + channel;
                        for ky in 0..g.kernel[0] {
                            for kx in 0..g.kernel[1] {
                                let row = (y * g.stride[0] + ky * g.dilation[0]).checked_sub(g.pad[0]);
                                let col = (x * g.stride[1] + kx * g.dilation[1]).checked_sub(g.pad[1]);
                                let (Some(row), Some(col)) = (row, col) else { continue };
                                if row >= g.input[0] || col >= g.input[1] {
                                    continue;
                                }
                                let tap = ((filter * g.group_channels() + channel) * g.kernel[0] + ky) * g.kernel[1];
                                let value = input[((image * g.channels + from) * g.input[0] + row) * g.input[1] + col];
                                sum += f64::from(filters[tap + kx]) * f64::from(value);
                            }
                        }
                    }
                    let mut value = sum as f32 * after.scale.map_or(1.0, |scale| scale[filter]);
                    value += after.bias.map_or(0.0, |bias| bias[filter]);
                    value += after.added.map_or(0.0, |added| added[out.len()]);
                    value = if after.activation == Activation::Relu { value.max(0.0) } else { value };
                    out.push(after.then.map_or(value, |(scale, bias)| value * scale + bias));
                }
            }
        }
    }
    out
}

/// Filters in tiles of 8 x 16, those of a column below each other first.
struct Tiles<'a> {
    data: &'a [f32],
    depth: usize,
}

impl Filters for Tiles<'_> {
    type Error = ();

    fn walk(&mut self, rows: Range<usize>, _: Range<usize>, each: &mut dyn FnMut(FilterTile<'_>)) -> Result<(), ()> {
        let all = self.data.len() / self.depth;
        for col0 in (0..self.depth).step_by(16) {
            for row0 in (rows.start / 8 * 8..rows.end).step_by(8) {
                let (height, width) = (8.min(all - row0), 16.min(self.depth - col0));
                let line = |row: usize| self.data[row * self.depth + col0..][..width].to_vec();
                let data: Vec<f32> = (row0..row0 + height).flat_map(line).collect();
                each(FilterTile { row0, col0, rows: height, cols: width, data: &data });
            }
        }
        Ok(())
    }
}

#[test]
fn convolutions_of_random_shapes_are_those_of_the_definition() {
    at_each_level(|level| {
        let checked = check(level as u64 + 21, 300);
        assert!(checked > 200, "{checked}");
    });
}

/// Checks random convolutions; returns how many there were.
fn check(seed: u64, rounds: usize) -> usize {
    let mut random = Random::new(seed);
    let mut checked = 0;
    for round in 0..rounds {
        let groups = [1, 1, 1, 2, 3, 8][random.below(6)];
        let wide = random.below(4) == 0;
        let most = if wide { 40 } else { 9 };
        let channels = groups * if groups == 8 { 1 } else { random.between(1, most) };
        let filters = groups * random.between(1, if groups == 8 { 2 } else { most });
        let pick = |random: &mut Random, most: usize| [random.between(1, most), random.between(1, most)];
        let (mut kernel, stride, dilation) = match random.below(5) {
            0 => ([3, 3], [1, 1], [1, 1]),
            2 => ([[3, 3], [5, 5]][random.below(2)], [[1, 1], [2, 2]][random.below(2)], [1, 1]),
            1 => ([1, 1], pick(&mut random, 2), [1, 1]),
            _ => (pick(&mut random, 5), pick(&mut random, 3), pick(&mut random, 3)),
        };
        let mut input = pick(&mut random, if wide { 33 } else { 19 });
        let mut pad = [random.below(4), random.below(4)];
        let mut behind = [random.below(4), random.below(4)];
        if random.below(8) == 0 {
            (kernel[1], input[1], pad[1], behind[1]) = (1, 1, 0, 0);
        }
        let images = random.between(1, 5);
        let size = |axis: usize| {
            let whole = pad[axis] + input[axis] + behind[axis];
            Some((whole.checked_sub((kernel[axis] - 1) * dilation[axis] + 1)?) / stride[axis] + 1)
        };
        let (Some(high), Some(broad)) = (size(0), size(1)) else { continue };
        let output = [high, broad];
        let geometry = Geometry { channels, filters, groups, input, output, kernel, stride, dilation, pad };
        let values = random.values(images * channels * input[0] * input[1]);
        let weights = random.values(filters * geometry.depth());
        let count = images * filters * output[0] * output[1];
        let (scale, bias, added) = (random.values(filters), random.values(filters), random.values(count));
        let mut some = |values| if random.below(2) == 0 { Some(values) } else { None };
        let after = After {
            scale: some(&scale[..]),
            bias: some(&bias[..]),
            added: some(&added[..]),
            activation: [Activation::Identity, Activation::Relu][round % 2],
            then: [None, None, Some((0.5, 2.0))][round % 3],
        };
        let expected = reference(&values, images, &geometry, &weights, after);
        let what = format!("round {round}, {images} images: {geometry:?}");
        let mut out = vec![f32::NAN; count];
        let mut whole = Whole { data: &weights, depth: geometry.depth() };
        conv(&mut out, &values, images, &geometry, &mut whole, after).unwrap();
        close(&out, &expected, 1e-5 * geometry.depth() as f32 + 1e-5, &what);
        out.fill(f32::NAN);
        let mut tiles = Tiles { data: &weights, depth: geometry.depth() };
        conv(&mut out, &values, images, &geometry, &mut tiles, after).unwrap();
        close(&out, &expected, 1e-5 * geometry.depth() as f32 + 1e-5, &what);
        checked += 1;
    }
    checked
}

#[test]
fn no_images_and_no_pixels_are_no_work() {
    let pair = |value| [value; 2];
    let mut geometry = Geometry {
        channels: 2,
        filters: 3,
        groups: 1,
        input: pair(4),
        output: pair(2),
        kernel: pair(3),
        stride: pair(1),
        dilation: pair(1),
        pad: pair(0),
    };
    let weights = [0.0; 54];
    let mut filters = Whole { data: &weights, depth: 18 };
    conv(&mut [], &[], 0, &geometry, &mut filters, After::default()).unwrap();
    geometry.output = [0, 2];
    conv(&mut [], &[0.0; 32], 1, &geometry, &mut filters, After::default()).unwrap();
}

#[test]
fn a_stride_beyond_the_kernel_takes_no_planes_that_no_tap_reads() {
    let mut random = Random::new(77);
    for (kernel, stride, dilation, pad) in [
        ([2, 1], [1 << 20, 1 << 20], [1, 1], [0, 0]),
        ([1, 1], [7, 5], [3, 3], [2, 1]),
        ([3, 2], [6, 9], [4, 6], [1, 3]),
        ([4, 5], [4, 6], [2, 4], [0, 2]),
    ] {
        let input = [31, 37];
        let size =
            |axis: usize| (pad[axis] + input[axis] - ((kernel[axis] - 1) * dilation[axis] + 1)) / stride[axis] + 1;
        let output = [size(0), size(1)];
        let geometry = Geometry { channels: 2, filters: 3, groups: 1, input, output, kernel, stride, dilation, pad };
        assert!(geometry.scratch(2) < 1 << 20, "{geometry:?}");
        let values = random.values(2 * 2 * 31 * 37);
        let weights = random.values(3 * geometry.depth());
        let expected = reference(&values, 2, &geometry, &weights, After::default());
        let mut out = vec![f32::NAN; expected.len()];
        let mut whole = Whole { data: &weights, depth: geometry.depth() };
        conv(&mut out, &values, 2, &geometry, &mut whole, After::default()).unwrap();
        close(&out, &expected, 1e-4, &format!("{geometry:?}"));
    }
}
