//! Oracles: pairwise comparison, dense projections, the collision probability of the literature, plain loops.

use super::signature::Hasher;
use super::*;
use crate::DType;
use crate::random::Random;
use std::collections::HashMap;

fn uniform(random: &mut Random) -> f64 {
    (random.next() >> 11) as f64 / (1u64 << 53) as f64
}

/// Nearly normal: a sum of twelve uniform numbers.
fn normal(random: &mut Random) -> f32 {
    ((0..12).map(|_| uniform(random)).sum::<f64>() - 6.0) as f32
}

fn block(elements: usize, sigma: f32, random: &mut Random) -> Vec<f32> {
    (0..elements).map(|_| sigma * normal(random)).collect()
}

fn noised(values: &[f32], sigma: f32, random: &mut Random) -> Vec<f32> {
    values.iter().map(|value| value + sigma * normal(random)).collect()
}

/// Blocks of 64 x 64 in families of three: a base, and two copies with noise, one of them with rows of its own.
fn planted(families: usize, sigma: f32) -> Vec<Vec<f32>> {
    let mut random = Random(42);
    let mut blocks = Vec::new();
    for _ in 0..families {
        let base = block(4096, sigma, &mut random);
        let near = noised(&base, 0.005, &mut random);
        let mut rows = noised(&base, 0.002, &mut random);
        let row = random.below(60) * 64;
        rows[row..row + 256].iter_mut().for_each(|value| *value = sigma * normal(&mut random));
        blocks.extend([base, near, rows]);
    }
    blocks
}

#[test]
fn finds_what_pairwise_comparison_finds() {
    for sigma in [0.03, 0.1, 0.5] {
        let blocks = planted(100, sigma);
        let options = NearOptions::default();
        let mut index = NearIndex::new(4096, &options).unwrap();
        let (mut pairs, mut found, mut looked_at) = (0, 0, 0);
        for (id, values) in blocks.iter().enumerate() {
            let alike: Vec<usize> = (0..id)
                .filter(|&other| share_within(values, &blocks[other], options.tolerance) >= options.share)
                .collect();
            let signature = index.signature(values);
            let candidates = index.candidates(&signature, usize::MAX);
            pairs += alike.len();
            looked_at += candidates.len();
            found += alike.iter().filter(|&&other| candidates.iter().any(|of| of.id == other as u64)).count();
            // The nearest are first.
            for (rank, other) in alike.iter().enumerate() {
                assert!(rank >= 4 || candidates[..alike.len()].iter().any(|of| of.id == *other as u64));
            }
            index.insert(id as u64, &signature);
        }
        assert_eq!(pairs, 300, "the planted pairs");
        assert_eq!(found, pairs, "at sigma {sigma}");
        assert!(looked_at <= pairs + pairs / 10, "{looked_at} candidates for {pairs} pairs at sigma {sigma}");
    }
}

/// P(collision) for buckets of width r at distance d: Datar et al., section 3.2, for the normal distribution.
fn collisions(r_per_d: f64) -> f64 {
    // Integrated by the trapezoid rule: 2 / d f(t / d) (1 - t / r) from 0 to r.
    let steps = 10_000;
    let density = |z: f64| (-z * z / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
    let at = |step: usize| 2.0 * density(r_per_d * step as f64 / steps as f64) * (1.0 - step as f64 / steps as f64);
    (1..steps).map(at).sum::<f64>() / steps as f64 * r_per_d + at(0) / 2.0 / steps as f64 * r_per_d
}

#[test]
fn collides_as_often_as_normal_projections_do() {
    for (span, elements, radius) in [(Span::Run, 8192, 4.0), (Span::Block, 1024, 0.4), (Span::Run, 5000, 1.0)] {
        let options = NearOptions { span, radius, bands: 256, hashes_per_band: 1, ..NearOptions::default() };
        for noise in [0.005, 0.01, 0.03] {
            let mut random = Random(7);
            let (mut common, mut distance) = (0, 0.0);
            for seed in 0..40 {
                let hasher = Hasher::new(elements, &NearOptions { seed, ..options }).unwrap();
                let base = block(elements, 0.1, &mut random);
                let near = noised(&base, noise, &mut random);
                common += hasher.signature(&base).common_bands(&hasher.signature(&near));
                let squares: f64 = base.iter().zip(&near).map(|(a, b)| f64::from(a - b).powi(2)).sum();
                distance += (squares / elements as f64).sqrt() / 40.0;
            }
            let share = f64::from(common) / 40.0 / 256.0;
            // In units of one element.
            let width = match span {
                Span::Run => radius * 0.01,
                Span::Block => radius / (elements as f64).sqrt(),
            };
            let expected = collisions(width / distance);
            assert!((share - expected).abs() < 0.03, "{share} for {expected} at {noise}, {span:?}");
        }
    }
}

#[test]
fn hashes_of_a_span_are_orthogonal_projections() {
    let elements = 256;
    let options =
        NearOptions { span: Span::Block, radius: 2.0, bands: 64, hashes_per_band: 1, ..NearOptions::default() };
    let hasher = Hasher::new(elements, &options).unwrap();
    let zero = hasher.signature(&vec![0.0; elements]);
    // The vectors of signs, up to one sign each: 1 and -1 in two elements add up to 0 if their signs agree, and else to
    // one bucket's width, which is another bucket whatever the offset.
    let mut vectors = vec![vec![1i32]; 64];
    for element in 1..elements {
        let mut two = vec![0.0; elements];
        (two[0], two[element]) = (1.0, -1.0);
        let signature = hasher.signature(&two);
        for (band, vector) in vectors.iter_mut().enumerate() {
            vector.push(if signature.0[band] == zero.0[band] { 1 } else { -1 });
        }
    }
    for (at, left) in vectors.iter().enumerate() {
        // As random as 256 fair coins: within five standard deviations.
        assert!(left.iter().sum::<i32>().abs() < 5 * 16);
        for right in &vectors[..at] {
            assert_eq!(left.iter().zip(right).map(|(left, right)| left * right).sum::<i32>(), 0);
        }
    }
}

#[test]
fn signatures_have_the_same_bits_everywhere() {
    let values: Vec<f32> = (0..1000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 1e7 - 0.8).collect();
    let hash = |options: &NearOptions| {
        let signature = NearIndex::new(1000, options).unwrap().signature(&values);
        signature.0.iter().fold(0u64, |hash, &band| crate::random::mix(hash ^ u64::from(band)))
    };
    assert_eq!(
        [
            hash(&NearOptions { radius: 6.0, bands: 64, hashes_per_band: 16, ..NearOptions::default() }),
            hash(&NearOptions::published()),
            hash(&NearOptions { bands: 7, hashes_per_band: 32, seed: 9, ..NearOptions::default() }),
        ],
        [6593224741303880238, 10614526840029461073, 4091173148282856493]
    );
}

#[test]
fn candidates_are_by_bands_and_ids() {
    let mut random = Random(3);
    for elements in [1, 2, 5, 100, 1000] {
        let options = NearOptions { bands: 20, hashes_per_band: 3, radius: 30.0, ..NearOptions::default() };
        let mut index = NearIndex::new(elements, &options).unwrap();
        assert!(index.is_empty());
        let mut signatures: HashMap<u64, Signature> = HashMap::new();
        for id in 0..500u64 {
            let signature = index.signature(&block(elements, 0.1, &mut random));
            index.insert(id ^ 0x155, &signature);
            signatures.insert(id ^ 0x155, signature);
        }
        assert_eq!(index.len(), 500);
        for _ in 0..20 {
            let asked = index.signature(&block(elements, 0.1, &mut random));
            let mut expected: Vec<Candidate> = signatures
                .iter()
                .map(|(&id, signature)| Candidate { id, bands: asked.common_bands(signature) })
                .filter(|candidate| candidate.bands > 0)
                .collect();
            expected.sort_by_key(|candidate| (std::cmp::Reverse(candidate.bands), candidate.id));
            assert!(!expected.is_empty());
            for most in [0, 1, 3, expected.len(), usize::MAX] {
                assert_eq!(index.candidates(&asked, most), expected[..most.min(expected.len())]);
            }
        }
    }
}

#[test]
fn values_that_are_no_numbers_are_like_nothing() {
    let options = NearOptions { bands: 8, ..NearOptions::default() };
    let mut random = Random(5);
    let good = block(2048, 0.1, &mut random);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut one = good.clone();
        one[0] = bad;
        let mut index = NearIndex::new(2048, &options).unwrap();
        let signature = index.signature(&one);
        index.insert(1, &signature);
        // Seven of the eight runs are without it.
        assert_eq!(index.candidates(&signature, 9), [Candidate { id: 1, bands: 7 }]);
        let all = index.signature(&vec![bad; 2048]);
        index.insert(2, &all);
        assert_eq!(index.candidates(&all, 9), []);
    }
    let index = NearIndex::new(2048, &options).unwrap();
    // Sums that overflow, saturated buckets, values too small to be seen.
    let huge = index.signature(&vec![f32::MAX; 2048]);
    assert_eq!(huge.common_bands(&huge), 0);
    for value in [1e30, -1e30, 1e-45, 0.0, -0.0] {
        let signature = index.signature(&vec![value; 2048]);
        assert_eq!(signature.common_bands(&signature), 8, "{value}");
    }
    let (zero, minus) = (index.signature(&vec![0.0; 2048]), index.signature(&vec![-0.0; 2048]));
    assert_eq!(zero.common_bands(&minus), 8);
    // Blocks of another size, and signatures of another index.
    for values in [&good[..2047], &[], &[1.0; 4000]] {
        let other = index.signature(values);
        assert_eq!(other.common_bands(&other), 0);
    }
    let short = NearIndex::new(2048, &NearOptions { bands: 3, ..options }).unwrap().signature(&good);
    let mut index = index;
    index.insert(1, &short);
    assert!(index.candidates(&short, 9).len() <= 1);
}

#[test]
fn options_out_of_range_are_errors() {
    let good = NearOptions::default();
    let new = |options: NearOptions| NearIndex::new(100, &options).map(|_| ());
    assert_eq!(new(good), Ok(()));
    assert_eq!(new(NearOptions::published()), Ok(()));
    for bands in [0, 1025, u32::MAX] {
        assert_eq!(new(NearOptions { bands, ..good }), Err(NearError::Bands(bands)));
    }
    for hashes_per_band in [0, 33, u32::MAX] {
        assert_eq!(new(NearOptions { hashes_per_band, ..good }), Err(NearError::HashesPerBand(hashes_per_band)));
    }
    for radius in [0.0, -1.0, f64::INFINITY] {
        assert_eq!(new(NearOptions { radius, ..good }), Err(NearError::Radius(radius)));
    }
    assert!(matches!(new(NearOptions { radius: f64::NAN, ..good }), Err(NearError::Radius(_))));
    for tolerance in [0.0, -0.01, f32::INFINITY, f32::NAN] {
        assert!(matches!(new(NearOptions { tolerance, ..good }), Err(NearError::Tolerance(_))));
    }
    for share in [-0.1, 1.1, f64::NAN] {
        assert!(matches!(new(NearOptions { share, ..good }), Err(NearError::Share(_))));
    }
    for radius in [1e-307, 1e308] {
        let options = NearOptions { radius, tolerance: if radius < 1.0 { 1e-38 } else { 1e38 }, ..good };
        assert!(matches!(new(options), Err(NearError::Width { .. })));
    }
    assert_eq!(NearIndex::new(0, &good).map(|_| ()), Err(NearError::NoElements));
    assert!(matches!(NearIndex::new(usize::MAX, &good), Err(NearError::Span(_))));
    assert!(matches!(NearIndex::new((1 << 24) + 1, &NearOptions::published()), Err(NearError::Span(_))));
    let widest = NearOptions { bands: 1024, hashes_per_band: 32, span: Span::Block, ..good };
    assert_eq!(NearIndex::new(3, &widest).unwrap().signature(&[1.0, 2.0, 3.0]).0.len(), 1024);
}

#[test]
fn a_bucket_of_very_many_blocks_does_not_hide_others() {
    let options = NearOptions { bands: 16, ..NearOptions::default() };
    let mut random = Random(11);
    let mut index = NearIndex::new(1024, &options).unwrap();
    let mut half = block(1024, 0.1, &mut random);
    half[512..].fill(0.0);
    let signature = index.signature(&half);
    index.insert(7, &signature);
    let zeros = index.signature(&[0.0; 1024]);
    (0..20_000).for_each(|id| index.insert(100 + id, &zeros));
    // Eight bands are of zeros and have many later blocks, eight are its own.
    let candidates = index.candidates(&signature, 1);
    assert_eq!((candidates[0].id, index.len()), (7, 20_001));
    assert!(candidates[0].bands >= 7);
    let memory = index.memory_bytes();
    assert!((20_001 * 16 * 12..20_001 * 16 * 24 + (1 << 20)).contains(&memory), "{memory}");
}

#[test]
fn share_within_counts() {
    let mut random = Random(1);
    for len in [1, 2, 15, 16, 17, 1000, 70_000, 200_000] {
        let a: Vec<f32> = (0..len).map(|_| normal(&mut random)).collect();
        let b = noised(&a, 0.02, &mut random);
        let mut within = 0;
        for at in 0..len {
            if (a[at] - b[at]).abs() <= 0.01 {
                within += 1;
            }
        }
        assert_eq!(share_within(&a, &b, 0.01), f64::from(within) / len as f64);
        assert_eq!(share_within(&a, &a, 0.01), 1.0);
    }
    let odd = [f32::NAN, f32::INFINITY, 1.0, f32::MAX];
    assert_eq!(share_within(&odd, &odd, 0.01), 0.5);
    assert_eq!(share_within(&[f32::MAX], &[f32::MIN], 0.01), 0.0);
    assert_eq!(share_within(&[], &[], 0.01), 0.0);
    assert_eq!(share_within(&[1.0], &[1.0, 1.0], 0.01), 0.0);
    assert_eq!(share_within(&[1.0], &[1.0], f32::NAN), 0.0);
}

#[test]
fn importance_is_what_it_says() {
    let values = [4.0, -1.0, 2.0, 3.0, -5.0];
    let of = |text: &str| importance(&values, text.parse().unwrap());
    // NumPy's percentile of the same values.
    assert_eq!(of("percentile75"), 3.0);
    assert_eq!(of("percentile50"), 2.0);
    assert_eq!(of("percentile90"), 3.6);
    assert_eq!((of("percentile0"), of("percentile100")), (-5.0, 4.0));
    assert_eq!(of("mean_abs"), 3.0);
    assert_eq!(of("mean_square"), 11.0);
    assert_eq!(importance(&[7.0], Importance::default()), 7.0);
    for how in [Importance::default(), Importance::MeanAbs, Importance::MeanSquare] {
        assert_eq!(importance(&[1.0, f32::NAN], how), f64::INFINITY);
        assert_eq!(importance(&[], how), 0.0);
        assert!(!importance(&[f32::INFINITY, 1.0, 2.0], how).is_nan());
        assert!(!importance(&[f32::MAX; 20], how).is_infinite());
    }
    assert_eq!(importance(&values, Importance::Percentile(f64::NAN)), -5.0);
    for text in ["", "percentile", "percentile101", "percentile-1", "percentileNaN", "mean", "Mean_abs"] {
        assert_eq!(text.parse::<Importance>(), Err(()), "{text}");
    }
    assert_eq!(("run".parse(), "block".parse(), "".parse::<Span>()), (Ok(Span::Run), Ok(Span::Block), Err(())));
}

#[test]
fn values_of_all_float_types() {
    let values = [0.5f32, -2.0, 1024.0, 0.0];
    let mut out = vec![9.0];
    let bytes = |width: usize, of: &dyn Fn(f32) -> Vec<u8>| {
        let bytes: Vec<u8> = values.iter().flat_map(|&value| of(value)).collect();
        assert_eq!(bytes.len(), 4 * width);
        bytes
    };
    for (dtype, bytes) in [
        (DType::Float32, bytes(4, &|value| value.to_le_bytes().to_vec())),
        (DType::Float64, bytes(8, &|value| f64::from(value).to_le_bytes().to_vec())),
        (DType::Float16, bytes(2, &|value| half::f16::from_f32(value).to_le_bytes().to_vec())),
        (DType::BFloat16, bytes(2, &|value| half::bf16::from_f32(value).to_le_bytes().to_vec())),
    ] {
        assert!(elements_f32(dtype, &bytes, &mut out), "{dtype}");
        assert_eq!(out, values, "{dtype}");
        assert!(elements_f32(dtype, &[], &mut out));
        assert!(out.is_empty());
        assert!(!elements_f32(dtype, &bytes[1..], &mut out), "{dtype}");
        assert!(out.is_empty());
    }
    for dtype in [DType::Int8, DType::Bool, DType::Int4, DType::Complex64, DType::Float8E4M3FN] {
        out.push(1.0);
        assert!(!elements_f32(dtype, &[0; 16], &mut out));
        assert!(out.is_empty());
    }
}

#[test]
fn largest_prefix_is_within_the_bound_and_costs_what_it_says() {
    for total in 0..70 {
        for limit in 0..=total {
            for walk in [Walk::Bisect, Walk::Steps(0), Walk::Steps(1), Walk::Steps(5), Walk::Steps(usize::MAX)] {
                let mut asked = Vec::new();
                let mut accept = |n: usize| {
                    asked.push(n);
                    Ok::<bool, ()>(n <= limit)
                };
                let found = largest_prefix(total, walk, &mut accept).unwrap();
                let step = match walk {
                    Walk::Bisect => 1,
                    Walk::Steps(step) => step.max(1),
                };
                let expected = if limit == total { total } else { limit / step * step };
                assert_eq!(found, expected, "{walk:?}, {limit} of {total}");
                assert!(found == 0 || asked.contains(&found));
                assert!(asked.iter().all(|n| (1..=total).contains(n)));
                let most = match walk {
                    Walk::Bisect if total == 0 => 0,
                    Walk::Bisect => 1 + total.next_power_of_two().ilog2() as usize,
                    Walk::Steps(_) => total.div_ceil(step),
                };
                assert!(asked.len() <= most, "{walk:?}: {asked:?}");
                assert!(walk != Walk::Bisect || limit != total || asked.len() <= 1);
            }
        }
    }
    // Not monotone: still one that was accepted.
    for seed in 0..200u64 {
        let good = |n: usize| crate::random::Random(seed ^ n as u64 ^ 77).below(3) > 0;
        for walk in [Walk::Bisect, Walk::Steps(3)] {
            let found = largest_prefix(50, walk, &mut |n| Ok::<bool, ()>(good(n))).unwrap();
            assert!(found == 0 || good(found));
        }
    }
    let mut calls = 0;
    let mut fails = |_: usize| {
        calls += 1;
        if calls == 2 { Err("cancelled") } else { Ok(calls > 2) }
    };
    assert_eq!(largest_prefix(9, Walk::Bisect, &mut fails), Err("cancelled"));
    assert_eq!(calls, 2);
}
