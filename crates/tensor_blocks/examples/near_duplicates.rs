//! Near-duplicate detection compared: exact hashes, pairwise comparison, MinHash over discretised values as netsDB's
//! evaluation describes MISTIQUE's approximate match, the published parameters of netsDB, and the defaults. A table in
//! Markdown:
//!
//! ```text
//! cargo run --release -p tensor_blocks --example near_duplicates [-- BLOCKS ...]
//! ```
//!
//! The indexed blocks have 128 x 128 float32 with standard deviations of 0.03, 0.1 and 0.3. Looked for are 1,000
//! blocks: copies of indexed ones, the same with noise, the same with a quarter of the rows replaced, the same with one
//! element in a hundred replaced, and others that are like no indexed one.
//!
//! Time is that of finding: hashing a block, looking up, comparing; the least of three times for each block and step.
//! Making the blocks, which stands for reading them, is not in it. Building is the median of the last 1,000 blocks.
//! Blocks are kept in memory up to 10,000 and made again by their seed beyond, so that they are compared while they are
//! in the processor's cache. Where the time is marked with ~, every ninth of the blocks was looked for, and for pairwise
//! comparison beyond 10,000, in the first 10,000 blocks only.

#[path = "near_duplicates/minhash.rs"]
mod minhash;

use minhash::{MinHashIndex, discretised, jaccard, minhash};
use std::collections::HashMap;
use std::hint::black_box;
use std::time::{Duration, Instant};
use tensor_blocks::near::{Importance, NearIndex, NearOptions, Signature, importance, share_within};
use tensor_blocks::{BlockHash, DType, block_hash};

const SHAPE: [u32; 2] = [128, 128];
const ELEMENTS: usize = 128 * 128;
const SIGMAS: [f32; 3] = [0.03, 0.1, 0.3];
/// Blocks looked for.
const LOOKED_FOR: usize = 1000;
/// Most blocks that are kept in memory.
const IN_MEMORY: usize = 10_000;
/// Candidates of ours that are compared, at most.
const COMPARED: usize = 8;
/// Blocks in memory whose comparisons are timed together.
const AT_ONCE: usize = 100;
/// Blocks whose building is timed: the last ones.
const BUILDING_TIMED: usize = 1000;
const TOLERANCE: f32 = 0.01;
const SHARE: f64 = 0.7;

/// What is done to an indexed block.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Copy,
    Noise,
    Rows,
    Scattered,
    Other,
}

const KINDS: [Kind; 5] = [Kind::Copy, Kind::Noise, Kind::Rows, Kind::Scattered, Kind::Other];

/// The finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
const fn mix(z: u64) -> u64 {
    let mut z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Nearly normal numbers of that seed: each is a sum of four uniform ones.
fn normal(seed: u64, sigma: f32) -> impl Iterator<Item = f32> {
    let seed = mix(seed);
    (0u64..).map(move |at| {
        let bits = mix(seed ^ at);
        let sum = (bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48);
        (sum as f32 - 131_070.0) * (sigma / 37_837.0)
    })
}

fn sigma(id: usize) -> f32 {
    SIGMAS[id % SIGMAS.len()]
}

/// The indexed block.
fn indexed(id: usize, out: &mut Vec<f32>) {
    out.clear();
    out.extend(normal(id as u64, sigma(id)).take(ELEMENTS));
}

/// The block looked for with that number, among `count` indexed ones.
fn looked_for(number: usize, count: usize) -> (Kind, Vec<f32>) {
    let kind = KINDS[number % KINDS.len()];
    let seed = 1 << 40 | number as u64;
    let mut values = Vec::new();
    let id = mix(seed) as usize % count;
    indexed(id, &mut values);
    let noise = |values: &mut [f32], sigma: f32| {
        values.iter_mut().zip(normal(seed << 1, sigma)).for_each(|(value, noise)| *value += noise);
    };
    let others = normal(seed << 2, sigma(id));
    let replace = |values: &mut [f32], which: &dyn Fn(usize) -> bool| {
        values.iter_mut().zip(others).enumerate().filter(|(at, _)| which(*at)).for_each(|(_, (to, from))| *to = from);
    };
    match kind {
        Kind::Copy => {}
        // Nine in ten within the tolerance.
        Kind::Noise => noise(&mut values, 0.006),
        Kind::Rows => {
            noise(&mut values, 0.002);
            replace(&mut values, &|at| mix(seed ^ (at as u64 / 128)).is_multiple_of(4));
        }
        Kind::Scattered => {
            noise(&mut values, 0.002);
            replace(&mut values, &|at| mix(seed ^ at as u64).is_multiple_of(100));
        }
        Kind::Other => replace(&mut values, &|_| true),
    }
    (kind, values)
}

/// The indexed blocks, in memory or by seed.
struct Blocks {
    count: usize,
    kept: Vec<Vec<f32>>,
    made: Vec<f32>,
}

impl Blocks {
    fn get(&mut self, id: usize) -> &[f32] {
        if id < self.kept.len() {
            return &self.kept[id];
        }
        indexed(id, &mut self.made);
        &self.made
    }

    /// The most alike of `ids` that is near enough; `time` has the time of the comparisons added.
    fn most_alike(&mut self, values: &[f32], ids: &[usize], time: &mut Duration) -> Option<usize> {
        let mut best = (SHARE, None);
        // Blocks that are made each time are compared one by one, so that only the comparison is timed.
        let at_once = if self.kept.is_empty() { 1 } else { AT_ONCE };
        for ids in ids.chunks(at_once) {
            if self.kept.is_empty() {
                indexed(ids[0], &mut self.made);
            }
            let (kept, made) = (&self.kept, &self.made);
            let shares = least(time, || {
                let share = |&id: &usize| share_within(values, kept.get(id).unwrap_or(made), TOLERANCE);
                ids.iter().map(share).collect::<Vec<f64>>()
            });
            for (&id, share) in ids.iter().zip(shares) {
                if share > best.0 || (share == best.0 && best.1.is_none()) {
                    best = (share, Some(id));
                }
            }
        }
        best.1
    }
}

/// What one way did.
#[derive(Default)]
struct Tally {
    looked_for: [u32; KINDS.len()],
    found: [u32; KINDS.len()],
    wrong: u32,
    compared: usize,
    time: Duration,
}

impl Tally {
    /// `taken` is the indexed block that the way would merge with.
    fn add(&mut self, kind: Kind, values: &[f32], taken: Option<usize>, blocks: &mut Blocks) {
        self.looked_for[kind as usize] += 1;
        let Some(id) = taken else { return };
        if share_within(values, blocks.get(id), TOLERANCE) >= SHARE {
            self.found[kind as usize] += 1;
        } else {
            self.wrong += 1;
        }
    }

    fn line(&self, name: &str, count: usize, factor: f64, building: &[Duration], bytes: usize) {
        // The median: an insertion cannot be timed again.
        let mut building = building.to_vec();
        building.sort_unstable();
        let building = building.get(building.len() / 2).copied().unwrap_or_default();
        let all: u32 = self.looked_for.iter().sum();
        let per_thousand = self.time.as_secs_f64() * 1e6 / f64::from(all) * factor;
        let approximate = if factor > 1.0 || all < LOOKED_FOR as u32 { "~" } else { "" };
        let recall =
            |kind: Kind| f64::from(self.found[kind as usize]) / f64::from(self.looked_for[kind as usize].max(1));
        println!(
            "| {name} | {count} | {:.0} | {approximate}{per_thousand:.1} | {:.1} | {:.3} | {:.3} | {:.3} | {:.3} \
             | {:.0} | {} |",
            building.as_secs_f64() * 1e6,
            self.compared as f64 * factor / f64::from(all),
            recall(Kind::Copy),
            recall(Kind::Noise),
            recall(Kind::Rows),
            recall(Kind::Scattered),
            f64::from(self.wrong) * 1000.0 / f64::from(all),
            bytes / count,
        );
    }
}

/// All indexes over the same blocks, so that these are made once.
struct Indexes {
    exact: HashMap<BlockHash, usize>,
    minhash: MinHashIndex,
    published: NearIndex,
    ours: NearIndex,
    /// Of the last blocks, by way.
    building: [Vec<Duration>; 4],
}

fn build(count: usize, blocks: &mut Blocks) -> Result<Indexes, Box<dyn std::error::Error>> {
    let mut indexes = Indexes {
        exact: HashMap::new(),
        minhash: MinHashIndex::new(),
        published: NearIndex::new(ELEMENTS, &NearOptions::published())?,
        ours: NearIndex::new(ELEMENTS, &NearOptions::default())?,
        building: Default::default(),
    };
    let mut bytes = Vec::new();
    for id in 0..count {
        let is_timed = count - id <= BUILDING_TIMED;
        let mut times = [Duration::ZERO; 4];
        let [exact, minhashes, published, ours] = &mut times;
        let values = blocks.get(id);
        little_endian(values, &mut bytes);
        let hash = least(exact, || block_hash(DType::Float32, &SHAPE, &bytes));
        once(exact, || indexes.exact.insert(hash, id));
        let sets = || {
            let bins = discretised(values);
            let hashes = minhash(&bins);
            (bins, hashes)
        };
        // Three times only where it counts: it takes long.
        let (bins, hashes) = if is_timed { least(minhashes, sets) } else { sets() };
        once(minhashes, || indexes.minhash.insert(bins, &hashes));
        for (time, index) in [(published, &mut indexes.published), (ours, &mut indexes.ours)] {
            let signature = least(time, || index.signature(values));
            once(time, || index.insert(id as u64, &signature));
        }
        if is_timed {
            indexes.building.iter_mut().zip(times).for_each(|(building, time)| building.push(time));
        }
    }
    Ok(indexes)
}

/// As a store has them.
fn little_endian(values: &[f32], bytes: &mut Vec<u8>) {
    bytes.clear();
    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
}

/// Adds the time of the work.
fn once<T>(time: &mut Duration, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = work();
    *time += start.elapsed();
    result
}

/// Adds the least time of three: other work on the machine interrupts one of them, seldom all.
fn least<T>(time: &mut Duration, work: impl Fn() -> T) -> T {
    let mut times = [Duration::ZERO; 3];
    let [first, second, third] = &mut times;
    let result = once(first, &work);
    once(second, &work);
    once(third, &work);
    *time += times.into_iter().min().unwrap_or_default();
    result
}

fn measure(count: usize) -> Result<(), Box<dyn std::error::Error>> {
    let mut blocks = Blocks { count, kept: Vec::new(), made: Vec::new() };
    for id in 0..count.min(IN_MEMORY) {
        let mut values = Vec::with_capacity(ELEMENTS);
        indexed(id, &mut values);
        blocks.kept.push(values);
    }
    if count > IN_MEMORY {
        // Pairwise comparison has what is kept; the others make all blocks alike.
        pairwise(count, &mut blocks);
        blocks.kept = Vec::new();
    }
    let indexes = build(count, &mut blocks)?;
    exact(&indexes, &mut blocks);
    if count <= IN_MEMORY {
        pairwise(count, &mut blocks);
    }
    mistique(&indexes, &mut blocks);
    near("netsDB's parameters", &indexes.published, usize::MAX, &indexes.building[2], &mut blocks);
    near("defaults", &indexes.ours, COMPARED, &indexes.building[3], &mut blocks);
    Ok(())
}

fn exact(indexes: &Indexes, blocks: &mut Blocks) {
    let (mut tally, mut bytes) = (Tally::default(), Vec::new());
    for number in 0..LOOKED_FOR {
        let (kind, values) = looked_for(number, blocks.count);
        little_endian(&values, &mut bytes);
        let find = || indexes.exact.get(&block_hash(DType::Float32, &SHAPE, &bytes)).copied();
        let taken = least(&mut tally.time, find);
        tally.add(kind, &values, taken, blocks);
    }
    let bytes = indexes.exact.capacity() * size_of::<(BlockHash, usize)>();
    tally.line("exact hashes", blocks.count, 1.0, &indexes.building[0], bytes);
}

fn pairwise(count: usize, blocks: &mut Blocks) {
    let mut tally = Tally::default();
    let every = if blocks.kept.len() == IN_MEMORY { 9 } else { 1 };
    let ids: Vec<usize> = (0..blocks.kept.len()).collect();
    for number in (0..LOOKED_FOR).step_by(every) {
        let (kind, values) = looked_for(number, blocks.kept.len());
        tally.compared += ids.len();
        let taken = blocks.most_alike(&values, &ids, &mut tally.time);
        tally.add(kind, &values, taken, blocks);
    }
    tally.line("pairwise", count, count as f64 / blocks.kept.len() as f64, &[], 0);
}

fn mistique(indexes: &Indexes, blocks: &mut Blocks) {
    let mut tally = Tally::default();
    let every = if blocks.count >= IN_MEMORY { 9 } else { 1 };
    for number in (0..LOOKED_FOR).step_by(every) {
        let (kind, values) = looked_for(number, blocks.count);
        let (compared, taken) = least(&mut tally.time, || {
            let bins = discretised(&values);
            let candidates = indexes.minhash.candidates(&minhash(&bins));
            let of = |id: &u32| jaccard(&bins, indexes.minhash.bins(*id));
            let taken = candidates.iter().map(|id| (of(id), *id)).max_by(|left, right| left.0.total_cmp(&right.0));
            (candidates.len(), taken)
        });
        tally.compared += compared;
        tally.add(kind, &values, taken.map(|(_, id)| id as usize), blocks);
    }
    tally.line("MISTIQUE's approximate", blocks.count, 1.0, &indexes.building[1], indexes.minhash.memory_bytes());
}

fn near(name: &str, index: &NearIndex, most: usize, building: &[Duration], blocks: &mut Blocks) {
    let mut tally = Tally::default();
    // Where thousands are compared for each block.
    let every = if most > COMPARED && blocks.count >= IN_MEMORY { 9 } else { 1 };
    for number in (0..LOOKED_FOR).step_by(every) {
        let (kind, values) = looked_for(number, blocks.count);
        let candidates = least(&mut tally.time, || {
            let signature: Signature = index.signature(&values);
            index.candidates(&signature, most)
        });
        tally.compared += candidates.len();
        let ids: Vec<usize> = candidates.iter().map(|candidate| candidate.id as usize).collect();
        let taken = blocks.most_alike(&values, &ids, &mut tally.time);
        tally.add(kind, &values, taken, blocks);
    }
    tally.line(name, blocks.count, 1.0, building, index.memory_bytes());
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut counts = Vec::new();
    for argument in std::env::args().skip(1) {
        counts.push(argument.parse::<usize>()?);
    }
    if counts.is_empty() {
        counts = vec![1_000, 10_000, 100_000];
    }
    println!(
        "| way | blocks | build, ms per 1,000 | find, ms per 1,000 | compared per block | recall: copies | noise \
         | rows | scattered | wrong per 1,000 | index, bytes per block |"
    );
    println!("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |");
    counts.into_iter().try_for_each(|count| measure(count.max(1)))?;
    parts()
}

/// The least time of each part, which other work on the machine disturbs least.
fn parts() -> Result<(), Box<dyn std::error::Error>> {
    let least = |work: &mut dyn FnMut()| {
        let mut timed = || {
            let mut time = Duration::ZERO;
            once(&mut time, &mut *work);
            time
        };
        (0..2000).map(|_| timed()).min().unwrap_or_default().as_secs_f64() * 1e6
    };
    let (_, values) = looked_for(0, 1);
    let (_, other) = looked_for(1, 1);
    let index = NearIndex::new(ELEMENTS, &NearOptions::default())?;
    let published = NearIndex::new(ELEMENTS, &NearOptions::published())?;
    println!("\n| part, one block | least time, \u{b5}s |\n| --- | ---: |");
    let line = |name: &str, work: &mut dyn FnMut()| println!("| {name} | {:.1} |", least(work));
    line("signature, defaults", &mut || {
        black_box(index.signature(black_box(&values)));
    });
    line("signature, netsDB's parameters", &mut || {
        black_box(published.signature(black_box(&values)));
    });
    line("comparison of two blocks", &mut || {
        black_box(share_within(black_box(&values), &other, TOLERANCE));
    });
    for (name, how) in [("75th percentile", Importance::default()), ("mean square", Importance::MeanSquare)] {
        line(&format!("importance, {name}"), &mut || {
            black_box(importance(black_box(&values), how));
        });
    }
    Ok(())
}
