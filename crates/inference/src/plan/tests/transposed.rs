//! ConvTranspose: the same numbers with weights in the plan and in blocks, and those of the definition.

use super::layers::both_ways;
use super::*;
use crate::kernels::tests::{Random, close};

/// The sizes of one case, by axis.
struct Case {
    input: Vec<usize>,
    kernel: Vec<usize>,
    stride: Vec<usize>,
    dilation: Vec<usize>,
    /// Pixels that are cut off before the first, and how many are left.
    before: Vec<usize>,
    output: Vec<usize>,
    groups: usize,
    /// The attributes that lead to them.
    attributes: fn(NodeProto) -> NodeProto,
}

/// Each axis' position of a number in row-major order.
fn places(sizes: &[usize]) -> Vec<Vec<usize>> {
    let count: usize = sizes.iter().product();
    let place = |mut number: usize| {
        let mut place = vec![0; sizes.len()];
        for (axis, size) in sizes.iter().enumerate().rev() {
            place[axis] = number % size;
            number /= size;
        }
        place
    };
    (0..count).map(place).collect()
}

/// By the definition, for pictures of `channels` and `filters` of all groups.
fn reference(case: &Case, x: &[f32], weights: &[f32], (channels, filters): (usize, usize)) -> Vec<f32> {
    let (inputs, taps, outputs) = (places(&case.input), places(&case.kernel), places(&case.output));
    let images = x.len() / channels / inputs.len();
    let count = filters / case.groups;
    let mut out = vec![0.0; images * filters * outputs.len()];
    for (image, channel) in (0..images).flat_map(|image| (0..channels).map(move |channel| (image, channel))) {
        for (number, input) in inputs.iter().enumerate() {
            let value = x[(image * channels + channel) * inputs.len() + number];
            for (tap, kernel) in taps.iter().enumerate() {
                let mut target = Some(0);
                for axis in 0..input.len() {
                    let at = input[axis] * case.stride[axis] + kernel[axis] * case.dilation[axis];
                    let at = at.checked_sub(case.before[axis]).filter(|&at| at < case.output[axis]);
                    target = target.zip(at).map(|(target, at)| target * case.output[axis] + at);
                }
                let Some(target) = target else { continue };
                for filter in 0..count {
                    let plane = image * filters + channel / (channels / case.groups) * count + filter;
                    out[plane * outputs.len() + target] +=
                        value * weights[(channel * count + filter) * taps.len() + tap];
                }
            }
        }
    }
    out
}

fn check(case: &Case, images: usize, bias_is_input: bool) {
    let mut random = Random::new(91);
    let rank = case.input.len();
    let (channels, filters) = (24 * case.groups, 32 * case.groups);
    let taps: usize = case.kernel.iter().product();
    let weights = random.values(channels * 32 * taps);
    let bias = random.values(filters);
    let mut dims = vec![N("batch"), S(channels as i64)];
    dims.extend(["height", "width"].iter().take(rank).map(|name| N(name)));
    let mut sizes = vec![channels as i64, 32];
    sizes.extend(case.kernel.iter().map(|&size| size as i64));
    let transposed = node("ConvTranspose", &["x", "w", "b"], &["t"])
        .ints("strides", &case.stride.iter().map(|&size| size as i64).collect::<Vec<_>>())
        .ints("dilations", &case.dilation.iter().map(|&size| size as i64).collect::<Vec<_>>())
        .int("group", case.groups as i64);
    let mut inputs = vec![info("x", FLOAT, &dims)];
    let mut tensors = vec![floats("w", &sizes, &weights)];
    let mut given = vec![];
    if bias_is_input {
        inputs.push(info("b", FLOAT, &[S(filters as i64)]));
        given.push(("b", f32s(&[filters], &bias)));
    } else {
        tensors.push(floats("b", &[filters as i64], &bias));
    }
    let dims: Vec<D> = (0..rank + 2).map(|_| N("any")).collect();
    let graph = graph(
        inputs,
        vec![info("y", FLOAT, &dims)],
        vec![(case.attributes)(transposed), node("Relu", &["t"], &["y"])],
        tensors,
    );
    let mut shape = vec![images, channels];
    shape.extend(&case.input);
    let x = random.values(shape.iter().product());
    given.push(("x", f32s(&shape, &x)));
    let (outputs, stored) = both_ways(graph, &given);
    assert_eq!(stored, 1, "the filters are in blocks");
    let size: usize = case.output.iter().product();
    let sums = reference(case, &x, &weights, (channels, filters));
    let finish = |(at, sum): (usize, &f32)| (sum + bias[at / size % filters]).max(0.0);
    let expected: Vec<f32> = sums.iter().enumerate().map(finish).collect();
    close(&outputs[0], &expected, 1e-3, &format!("{:?}, {} groups", case.kernel, case.groups));
}

#[test]
fn transposed_convolutions_are_those_of_the_definition() {
    let square = |size: usize| vec![size; 2];
    let two = Case {
        input: vec![5, 7],
        kernel: square(2),
        stride: square(2),
        dilation: square(1),
        before: square(0),
        output: vec![10, 14],
        groups: 1,
        attributes: |node| node,
    };
    for images in [1, 3] {
        check(&two, images, false);
    }
    check(&Case { groups: 2, ..two }, 2, true);
    // Padding and what is added behind.
    let four = |attributes: fn(NodeProto) -> NodeProto, before: usize, output: [usize; 2]| Case {
        input: vec![4, 6],
        kernel: square(4),
        stride: square(2),
        dilation: square(1),
        before: square(before),
        output: output.to_vec(),
        groups: 1,
        attributes,
    };
    check(&four(|node| node.ints("pads", &[1, 1, 1, 1]), 1, [8, 12]), 2, false);
    check(&four(|node| node.ints("pads", &[1, 1, 0, 1]).ints("output_padding", &[1, 0]), 1, [10, 12]), 2, false);
    check(&four(|node| node.text("auto_pad", "SAME_UPPER"), 1, [8, 12]), 1, false);
    check(&four(|node| node.text("auto_pad", "VALID"), 0, [10, 14]), 1, false);
    // Of an odd number of pixels the larger half is cut off in front, but for SAME_UPPER.
    check(&four(|node| node.ints("output_shape", &[9, 13]), 1, [9, 13]), 1, false);
    check(&four(|node| node.ints("output_shape", &[9, 13]).text("auto_pad", "SAME_UPPER"), 0, [9, 13]), 1, false);
    let three = |attributes: fn(NodeProto) -> NodeProto, before: usize| Case {
        kernel: square(3),
        before: square(before),
        ..four(attributes, 0, [8, 12])
    };
    check(&three(|node| node.text("auto_pad", "SAME_LOWER"), 1), 1, false);
    check(&three(|node| node.text("auto_pad", "SAME_UPPER"), 0), 1, false);
    // One axis.
    let line = Case {
        input: vec![31],
        kernel: vec![9],
        stride: vec![4],
        dilation: vec![2],
        before: vec![3],
        output: vec![131],
        groups: 1,
        attributes: |node| node.ints("pads", &[3, 3]),
    };
    check(&line, 2, false);
}

#[test]
fn transposed_convolutions_of_volumes_are_tracts() {
    let graph = graph(
        vec![info("x", FLOAT, &[S(1), S(1), S(2), S(1), S(2)])],
        vec![info("y", FLOAT, &[S(1), S(1), S(3), S(2), S(3)])],
        vec![node("ConvTranspose", &["x", "w"], &["y"]).ints("kernel_shape", &[2, 2, 2])],
        vec![floats("w", &[1, 1, 2, 2, 2], &[1.0; 8])],
    );
    let plan = compile(graph).unwrap();
    let outputs = run(&plan, &[("x", f32s(&[1, 1, 2, 1, 2], &[1.0, 2.0, 3.0, 4.0]))]).unwrap();
    let (first, second, third) = ([1.0, 3.0, 2.0], [4.0, 10.0, 6.0], [3.0, 7.0, 4.0]);
    assert_eq!(outputs[0].1.to_f32().unwrap(), [first, first, second, second, third, third].concat());
}

#[test]
fn transposed_convolutions_of_volumes_that_tract_computes_wrongly_are_refused() {
    let graph = graph(
        vec![info("x", FLOAT, &[S(1), S(1), S(2), S(2), S(2)])],
        vec![info("y", FLOAT, &[S(1), S(1), S(3), S(3), S(3)])],
        vec![node("ConvTranspose", &["x", "w"], &["y"]).ints("strides", &[2; 3]).ints("output_shape", &[3; 3])],
        vec![floats("w", &[1, 1, 2, 2, 2], &[1.0; 8])],
    );
    let error = compile(graph).unwrap_err();
    assert!(error.detail.unwrap_or_default().contains("not supported"));
}

#[test]
fn paddings_that_leave_nothing_are_refused_when_it_is_run() {
    let graph = graph(
        vec![info("x", FLOAT, &[N("batch"), S(1), N("size")])],
        vec![info("y", FLOAT, &[N("batch"), S(1), N("more")])],
        vec![node("ConvTranspose", &["x", "w"], &["y"]).ints("pads", &[5, 5])],
        vec![floats("w", &[1, 1, 3], &[1.0; 3])],
    );
    let plan = compile(graph).unwrap();
    assert_eq!(run(&plan, &[("x", f32s(&[1, 1, 9], &[1.0; 9]))]).unwrap()[0].1.to_f32().unwrap(), [3.0]);
    for size in [4, 0] {
        let kind = run(&plan, &[("x", f32s(&[1, 1, size], &vec![1.0; size]))]).unwrap_err().kind;
        assert!(matches!(kind, InvalidInput | TooLarge), "{kind:?}");
    }
}
