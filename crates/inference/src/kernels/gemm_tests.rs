use super::*;
use crate::kernels::tests::{Random, at_each_level, close};

fn reference(
    out: &mut [f32],
    stride: usize,
    (m, n, k): (usize, usize, usize),
    a: Operand,
    b: Operand,
    accumulate: bool,
) {
    for row in 0..m {
        for column in 0..n {
            let at = |step: usize| {
                let left = a.data[row * a.row_stride + step * a.col_stride];
                f64::from(left) * f64::from(b.data[step * b.row_stride + column * b.col_stride])
            };
            let sum: f64 = (0..k).map(at).sum();
            let place = &mut out[row * stride + column];
            *place = sum as f32 + if accumulate { *place } else { 0.0 };
        }
    }
}

/// A matrix with a stride that may be wider than it must be, exactly as long as it must be.
fn operand(random: &mut Random, rows: usize, cols: usize) -> (Vec<f32>, usize, usize) {
    let slack = random.below(2) * random.below(40);
    let (row_stride, col_stride) = match random.below(5) {
        0 | 1 => (cols + slack, 1),
        2 | 3 => (1, rows + slack),
        _ => (cols * 3 + slack, 2),
    };
    let len = if rows == 0 || cols == 0 { 0 } else { (rows - 1) * row_stride + (cols - 1) * col_stride + 1 };
    (random.values(len), row_stride, col_stride)
}

#[test]
fn products_of_random_shapes_are_those_of_the_definition() {
    at_each_level(|level| check(level as u64 + 7, 800));
}

fn check(seed: u64, rounds: usize) {
    let mut random = Random::new(seed);
    let sizes = [0, 1, 2, 3, 4, 5, 6, 7, 8, 13, 16, 17, 28, 31, 48, 63, 64, 65, 100, 128, 129, 200, 260, 530];
    for round in 0..rounds {
        let mut size = || sizes[random.below(sizes.len())];
        let (m, n, k) = (size(), size(), size());
        if m * n * k > 4_000_000 {
            continue;
        }
        let (a, a_row, a_col) = operand(&mut random, m, k);
        let (b, b_row, b_col) = operand(&mut random, k, n);
        let a = Operand { data: &a, row_stride: a_row, col_stride: a_col };
        let b = Operand { data: &b, row_stride: b_row, col_stride: b_col };
        let stride = n + random.below(2) * random.below(9);
        let len = if m == 0 || n == 0 { 0 } else { (m - 1) * stride + n };
        let mut out = random.values(len);
        let mut expected = out.clone();
        let accumulate = random.below(2) == 0;
        product(&mut out, stride, m, n, k, a, b, accumulate);
        reference(&mut expected, stride, (m, n, k), a, b, accumulate);
        close(
            &out,
            &expected,
            1e-5 * k as f32 + 1e-6,
            &format!("round {round}: {m} x {n} x {k}, {a_row} {a_col} {b_row} {b_col}"),
        );
    }
}

#[test]
fn infinities_of_one_column_stay_there() {
    let (a, mut b) = (vec![1.0; 17], vec![1.0; 17 * 300]);
    b[5] = f32::INFINITY;
    let mut out = vec![0.0; 300];
    product(&mut out, 300, 1, 300, 17, Operand::row_major(&a, 17), Operand::row_major(&b, 300), false);
    assert!(out.iter().enumerate().all(|(column, &value)| value == if column == 5 { f32::INFINITY } else { 17.0 }));
}

#[test]
#[should_panic(expected = "does not hold")]
fn short_operands_are_noticed() {
    let mut out = vec![0.0; 6];
    product(&mut out, 3, 2, 3, 4, Operand::row_major(&[0.0; 8], 4), Operand::row_major(&[0.0; 11], 3), false);
}

#[test]
fn scattered_rows_are_those_at_their_offsets() {
    let mut random = Random::new(5);
    for _ in 0..300 {
        let (m, n, k) = (random.between(1, 20), random.between(1, 300), random.between(1, 300));
        let (a, data) = (random.values(m * k), random.values(n + 1000));
        let offsets: Vec<usize> = (0..k).map(|_| random.below(1001)).collect();
        let gathered: Vec<f32> = offsets.iter().flat_map(|&at| data[at..at + n].to_vec()).collect();
        let mut out = random.values(m * n);
        let mut expected = out.clone();
        let (left, right) = (Operand::row_major(&a, k), Operand::row_major(&gathered, n));
        let accumulate = random.below(2) == 0;
        scattered_product(&mut out, n, m, n, left, &data, &offsets, accumulate);
        reference(&mut expected, n, (m, n, k), left, right, accumulate);
        close(&out, &expected, 1e-5 * k as f32 + 1e-6, &format!("{m} x {n} x {k}"));
    }
}

#[test]
fn rows_have_the_same_bits_in_any_company() {
    at_each_level(|level| {
        let mut random = Random::new(level as u64 + 31);
        for round in 0..60 {
            let m = if round % 12 == 0 { 1024 } else { random.between(2, 40) };
            let (n, k) = ([1, 2, 3, 4, 5, 10, 17, 64, 100, 256, 300, 530][random.below(12)], random.between(1, 700));
            let (n, k) = if m == 1024 { (n.min(100), k.min(100)) } else { (n, k) };
            let (a, before) = (random.values(m * k), random.values(m * n));
            let (b, b_row, b_col) = operand(&mut random, k, n);
            let b = Operand { data: &b, row_stride: b_row, col_stride: b_col };
            let bias = random.values(n);
            let accumulate = random.below(2) == 0;
            let bias = if accumulate || random.below(2) == 0 { &[][..] } else { &bias };
            let ending = Ending { bias, low: [f32::NEG_INFINITY, 0.0][random.below(2)] };
            let mut out = before.clone();
            finished_product(&mut out, n, (m, n, k), Operand::row_major(&a, k), b, accumulate, ending);
            for row in 0..m {
                let mut alone = before[row * n..][..n].to_vec();
                let a = Operand::row_major(&a[row * k..], k);
                finished_product(&mut alone, n, (1, n, k), a, b, accumulate, ending);
                assert_eq!(bits(&alone), bits(&out[row * n..][..n]), "row {row} of {m} x {n} x {k}, {level:?}");
            }
        }
    });
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn endings_are_those_of_the_definition() {
    at_each_level(|level| {
        let mut random = Random::new(level as u64 + 41);
        for _ in 0..200 {
            let (m, n, k) =
                (random.between(0, 30), random.between(0, 300), random.between(0, 40) * random.between(0, 20));
            let (a, b, bias) = (random.values(m * k), random.values(k * n), random.values(n));
            let low = [f32::NEG_INFINITY, 0.0, -0.5][random.below(3)];
            let (left, right) = (Operand::row_major(&a, k), Operand::row_major(&b, n));
            let mut out = random.values(m * n);
            let mut expected = vec![0.0; m * n];
            finished_product(&mut out, n, (m, n, k), left, right, false, Ending { bias: &bias, low });
            reference(&mut expected, n, (m, n, k), left, right, false);
            expected.iter_mut().enumerate().for_each(|(at, value)| *value = (*value + bias[at % n]).max(low));
            close(&out, &expected, 1e-5 * k as f32 + 1e-6, &format!("{m} x {n} x {k}, at least {low}"));
        }
    });
}

#[test]
fn columns_that_are_contiguous_give_the_bits_of_rows_that_are() {
    at_each_level(|level| {
        let mut random = Random::new(level as u64 + 31);
        for round in 0..400 {
            let (m, n, k) = (random.between(1, 20), random.between(5, 90), random.between(2, 70));
            let slack = random.below(2) * random.below(9);
            let stride = k + slack;
            let lines = random.values((n - 1) * stride + k);
            let rows: Vec<f32> = (0..k * n).map(|place| lines[place % n * stride + place / n]).collect();
            let (a, bias, start) = (random.values(m * k), random.values(n), random.values(m * n));
            let accumulate = round % 3 == 0;
            let low = if round % 2 == 0 { 0.0 } else { f32::NEG_INFINITY };
            let ending = Ending { bias: if accumulate || round % 5 == 0 { &[] } else { &bias }, low };
            let multiply = |b: Operand| {
                let mut out = start.clone();
                finished_product(&mut out, n, (m, n, k), Operand::row_major(&a, k), b, accumulate, ending);
                out.iter().map(|value| value.to_bits()).collect::<Vec<_>>()
            };
            let (turned, expected) =
                (multiply(Operand::transposed(&lines, stride)), multiply(Operand::row_major(&rows, n)));
            assert_eq!(turned, expected, "{m} x {n} x {k}, {level:?}, round {round}");
        }
    });
}
