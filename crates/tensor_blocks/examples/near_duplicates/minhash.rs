//! MISTIQUE's approximate match (Vartak et al., SIGMOD 2018) as netsDB compares with it: values are discretised into
//! 10,000 bins over -1 to 1, MinHash with 48 functions finds sets with a Jaccard index above 0.2, and the set with the
//! largest index is taken.

use super::mix;
use std::collections::HashMap;

const BINS: usize = 10_000;
const HASHES: usize = 48;
const THRESHOLD: f64 = 0.2;

/// The set of bins that have a value, a bit each.
pub type Bins = Box<[u64]>;

pub fn discretised(values: &[f32]) -> Bins {
    let mut bins = vec![0u64; BINS.div_ceil(64)].into_boxed_slice();
    for value in values {
        let bin = ((value + 1.0) * (BINS as f32 / 2.0)).clamp(0.0, BINS as f32 - 1.0) as usize;
        bins[bin / 64] |= 1 << (bin % 64);
    }
    bins
}

pub fn jaccard(left: &Bins, right: &Bins) -> f64 {
    let count = |of: fn(u64, u64) -> u64| -> u32 {
        left.iter().zip(right).map(|(left, right)| of(*left, *right).count_ones()).sum()
    };
    f64::from(count(|left, right| left & right)) / f64::from(count(|left, right| left | right))
}

/// The least hash of the bins by each function.
pub fn minhash(bins: &Bins) -> [u32; HASHES] {
    let mut least = [u32::MAX; HASHES];
    for (at, &word) in bins.iter().enumerate() {
        let mut word = word;
        while word != 0 {
            let bin = at as u32 * 64 + word.trailing_zeros();
            word &= word - 1;
            for (function, least) in least.iter_mut().enumerate() {
                let hash = (bin ^ SEEDS[function]).wrapping_mul(0x85eb_ca6b);
                let hash = (hash ^ hash >> 15).wrapping_mul(0xc2b2_ae35);
                *least = (*least).min(hash ^ hash >> 13);
            }
        }
    }
    least
}

/// One for each function.
const SEEDS: [u32; HASHES] = {
    let mut seeds = [0; HASHES];
    let mut at = 0;
    while at < HASHES {
        seeds[at] = mix(at as u64) as u32;
        at += 1;
    }
    seeds
};

/// Bands and hashes of a band for which the two errors, integrated over all Jaccard indexes, are least.
fn shape() -> (usize, usize) {
    let cost = |bands: usize, rows: usize| {
        let steps = 1000;
        let found = |index: f64| 1.0 - (1.0 - index.powi(rows as i32)).powi(bands as i32);
        let error = |index: f64| if index < THRESHOLD { found(index) } else { 1.0 - found(index) };
        (0..steps).map(|step| error((f64::from(step) + 0.5) / f64::from(steps))).sum::<f64>()
    };
    let shapes = (1..=HASHES).flat_map(|bands| (1..=HASHES / bands).map(move |rows| (bands, rows)));
    shapes.min_by(|left, right| cost(left.0, left.1).total_cmp(&cost(right.0, right.1))).unwrap_or((HASHES, 1))
}

pub struct MinHashIndex {
    bins: Vec<Bins>,
    bands: Vec<HashMap<u64, Vec<u32>>>,
    rows: usize,
}

impl MinHashIndex {
    pub fn new() -> MinHashIndex {
        let (bands, rows) = shape();
        MinHashIndex { bins: Vec::new(), bands: vec![HashMap::new(); bands], rows }
    }

    fn keys(&self, hashes: &[u32; HASHES]) -> Vec<u64> {
        let key = |rows: &[u32]| rows.iter().fold(0, |key, &hash| mix(key ^ u64::from(hash)));
        hashes.chunks_exact(self.rows).take(self.bands.len()).map(key).collect()
    }

    /// Its id is the number of sets before it.
    pub fn insert(&mut self, bins: Bins, hashes: &[u32; HASHES]) {
        let keys = self.keys(hashes);
        for (band, key) in self.bands.iter_mut().zip(keys) {
            band.entry(key).or_default().push(self.bins.len() as u32);
        }
        self.bins.push(bins);
    }

    pub fn candidates(&self, hashes: &[u32; HASHES]) -> Vec<u32> {
        let keys = self.keys(hashes);
        let mut found: Vec<u32> =
            self.bands.iter().zip(keys).filter_map(|(band, key)| band.get(&key)).flatten().copied().collect();
        found.sort_unstable();
        found.dedup();
        found
    }

    pub fn bins(&self, id: u32) -> &Bins {
        &self.bins[id as usize]
    }

    pub fn memory_bytes(&self) -> usize {
        let lists = self.bands.iter().flat_map(HashMap::values).map(|list| list.capacity() * 4).sum::<usize>();
        let maps = self.bands.iter().map(|band| band.capacity() * size_of::<(u64, Vec<u32>)>()).sum::<usize>();
        self.bins.len() * BINS.div_ceil(64) * 8 + lists + maps
    }
}
