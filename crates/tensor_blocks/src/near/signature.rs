//! Signatures: p-stable hashes of runs of elements.
//!
//! Responsible for: the hash functions of an index. A hash is floor((a.x + b) / r) with a random vector a and a random
//! offset b, so that blocks at a distance d collide more often the smaller d / r is (Datar et al., *Locality-Sensitive
//! Hashing Scheme Based on p-Stable Distributions*, SoCG 2004). A band is several hashes, mixed into one number.
//!
//! Vectors of random signs stand for normal ones (Achlioptas, *Database-friendly random projections*, JCSS 2003): a sum
//! of that many terms is nearly normal. And a span's hashes share the work: its elements, with random signs, are added
//! up in as many lanes as there are hashes, and a Hadamard transform of the lanes gives one sum for each hash. Each of
//! these is the product of the elements with a vector of independent signs, and any two of the vectors are orthogonal,
//! but for lanes that have one element more than others. So where each band has a run of its own, a signature costs one
//! addition per element and a table of signs as long as a run.

use super::options::MAX_SPAN;
use super::{NearError, NearOptions, Span};
use crate::random::mix;

/// Fewest elements of a run, if the block has them: sums of fewer signs are hardly normal.
const MIN_RUN: usize = 128;
/// Fewest lanes, so that they fill vector registers.
const MIN_LANES: usize = 16;
/// Positions in the table of signs at which a run's signs may begin.
const SIGN_STARTS: usize = 2048;
/// Buckets beyond are one: so far off, float32 has no digits that would tell neighbours apart.
const FARTHEST_BUCKET: f64 = (1u64 << 50) as f64;
/// Added to a number up to [`FARTHEST_BUCKET`], it leaves the nearest whole number in the low bits of the sum.
const TO_WHOLE: f64 = (3u64 << 51) as f64;
/// A band that is in common with nothing: its sums are not finite.
pub(super) const NO_BUCKET: u32 = 0;

/// The bands of a block, comparable within one index. Four bytes a band.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature(pub(super) Box<[u32]>);

impl Signature {
    /// How many bands are in common with `other`.
    pub fn common_bands(&self, other: &Signature) -> u32 {
        self.0.iter().zip(&other.0).filter(|(left, right)| left == right && **left != NO_BUCKET).count() as u32
    }
}

/// Elements that hashes are taken over.
#[derive(Clone, Copy, Debug)]
struct Elements {
    /// The first one.
    start: usize,
    /// Where the table of signs is entered.
    signs: usize,
}

/// The hash functions of an index.
#[derive(Clone, Debug)]
pub(super) struct Hasher {
    elements: usize,
    /// Elements of each span.
    len: usize,
    spans: Box<[Elements]>,
    /// 1 and -1.
    signs: Box<[f32]>,
    lanes: usize,
    /// The offset of each hash, in units of the bucket width: 0 to 1.
    offsets: Box<[f64]>,
    /// The factors of the buckets in a band's hash.
    factors: Box<[u64]>,
    /// 1 / bucket width.
    per_width: f64,
    bands: usize,
    hashes_per_band: usize,
}

impl Hasher {
    pub fn new(elements: usize, options: &NearOptions) -> Result<Hasher, NearError> {
        options.validate()?;
        if elements == 0 {
            return Err(NearError::NoElements);
        }
        let (bands, hashes_per_band) = (options.bands as usize, options.hashes_per_band as usize);
        let (count, len) = match options.span {
            Span::Run => (bands, elements.div_ceil(bands).max(MIN_RUN).min(elements)),
            Span::Block => (1, elements),
        };
        if len > MAX_SPAN {
            return Err(NearError::Span(len));
        }
        let hashes = bands * hashes_per_band;
        let random = |kind: u64, number: usize| mix(mix(options.seed ^ kind.rotate_right(8)) ^ number as u64);
        let spans = (0..count)
            .map(|span| Elements {
                // Evenly from the first element to the last; runs overlap where the block has too few elements.
                start: ((elements - len) as u128 * span as u128 / (count - 1).max(1) as u128) as usize,
                signs: random(1, span) as usize % SIGN_STARTS,
            })
            .collect();
        let sign = |number: usize| if random(2, number / 64) >> (number % 64) & 1 == 0 { 1.0 } else { -1.0 };
        Ok(Hasher {
            elements,
            len,
            spans,
            signs: (0..len + SIGN_STARTS).map(sign).collect(),
            lanes: (hashes / count).next_power_of_two().max(MIN_LANES),
            offsets: (0..hashes).map(|hash| (random(3, hash) >> 11) as f64 / (1u64 << 53) as f64).collect(),
            factors: (0..hashes_per_band).map(|hash| random(4, hash) | 1).collect(),
            per_width: options.width(len)?.recip(),
            bands,
            hashes_per_band,
        })
    }

    /// The signature of a block; one that is like nothing where the number of values is another.
    pub fn signature(&self, values: &[f32]) -> Signature {
        let mut bands = Vec::with_capacity(self.bands);
        if values.len() != self.elements {
            return Signature(vec![NO_BUCKET; self.bands].into_boxed_slice());
        }
        let mut lanes = vec![0.0; self.lanes];
        let mut offsets = self.offsets.chunks_exact(self.hashes_per_band);
        for span in &self.spans {
            let run = &values[span.start..span.start + self.len];
            let signs = &self.signs[span.signs..span.signs + self.len];
            match <&mut [f32; MIN_LANES]>::try_from(lanes.as_mut_slice()) {
                Ok(lanes) => *lanes = fold_few(run, signs),
                Err(_) => fold(run, signs, &mut lanes),
            }
            hadamard(&mut lanes);
            let sums = lanes.chunks_exact(self.hashes_per_band);
            bands.extend(sums.zip(offsets.by_ref()).take(self.bands / self.spans.len()).map(|both| self.band(both)));
        }
        Signature(bands.into_boxed_slice())
    }

    /// One band of its sums and its offsets: a multilinear hash of the buckets (Lemire and Kaser, *Strongly universal
    /// string hashing is fast*, 2014), whose terms do not wait for one another.
    fn band(&self, (sums, offsets): (&[f32], &[f64])) -> u32 {
        let mut hash = 0u64;
        let mut finite = true;
        for ((&sum, &offset), &factor) in sums.iter().zip(offsets).zip(&self.factors) {
            finite &= sum.is_finite();
            // The offset is any fraction, so that rounding to the nearest does what rounding down would.
            let scaled = (f64::from(sum) * self.per_width + offset).clamp(-FARTHEST_BUCKET, FARTHEST_BUCKET);
            hash = hash.wrapping_add((scaled + TO_WHOLE).to_bits().wrapping_mul(factor));
        }
        if finite { ((mix(hash) >> 32) as u32).max(NO_BUCKET + 1) } else { NO_BUCKET }
    }

    /// Bytes on the heap.
    pub fn memory_bytes(&self) -> usize {
        size_of_val(&*self.spans)
            + size_of_val(&*self.signs)
            + size_of_val(&*self.offsets)
            + size_of_val(&*self.factors)
    }
}

/// Elements with their signs, added up by their position modulo [`MIN_LANES`].
fn fold_few(values: &[f32], signs: &[f32]) -> [f32; MIN_LANES] {
    let mut lanes = [0.0; MIN_LANES];
    let (values, rest) = values.as_chunks::<MIN_LANES>();
    let (signs, signs_rest) = signs.as_chunks::<MIN_LANES>();
    for (values, signs) in values.iter().zip(signs) {
        for (lane, (value, sign)) in lanes.iter_mut().zip(values.iter().zip(signs)) {
            *lane += value * sign;
        }
    }
    for (lane, (value, sign)) in lanes.iter_mut().zip(rest.iter().zip(signs_rest)) {
        *lane += value * sign;
    }
    lanes
}

/// Elements with their signs, added up by their position modulo the number of lanes.
fn fold(values: &[f32], signs: &[f32], lanes: &mut [f32]) {
    lanes.fill(0.0);
    for (values, signs) in values.chunks(lanes.len()).zip(signs.chunks(lanes.len())) {
        for (lane, (value, sign)) in lanes.iter_mut().zip(values.iter().zip(signs)) {
            *lane += value * sign;
        }
    }
}

/// The Walsh-Hadamard transform, in place; the length is a power of two.
fn hadamard(lanes: &mut [f32]) {
    let mut half = 1;
    while half < lanes.len() {
        for pair in lanes.chunks_exact_mut(2 * half) {
            let (left, right) = pair.split_at_mut(half);
            for (left, right) in left.iter_mut().zip(right) {
                (*left, *right) = (*left + *right, *left - *right);
            }
        }
        half *= 2;
    }
}
