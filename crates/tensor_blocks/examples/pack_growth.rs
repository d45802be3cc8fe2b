//! How the time of page packing grows, as a table in Markdown:
//!
//! ```text
//! cargo run --release -p tensor_blocks --example pack_growth
//! ```
//!
//! For each workload and size: the read amplification of random order and of the storage order; the seconds that the
//! storage order takes, and the longest pause between two questions whether to go on; and the seconds of the
//! published two-stage heuristic, whose packing is checked.

use std::time::{Duration, Instant};
use tensor_blocks::packing::{
    BlockUse, Heuristic, PackingProblem, TENSOR_PAGE_BYTES, check_packing, page_reads, storage_order_until,
};

/// Stored bytes of a block of 128 x 128 float32, and of a small one.
const BLOCK_BYTES: u32 = 65_548;
const SMALL_BYTES: u32 = 3_084;

/// SplitMix64 (Steele, Lea and Flood, 2014).
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n as u64) as usize
    }
}

/// Bytes of a block and its tensors.
type Block = (u32, Vec<u64>);

/// Makes that many blocks.
type Workload = fn(usize, &mut Random) -> Vec<Block>;

/// 50 tensors in five families of ten that were fine-tuned from one base: of a family's blocks 60 in 100 are all
/// tensors', 20 one tensor's, and 20 are those of one of 40 random subsets.
fn families(blocks: usize, random: &mut Random) -> Vec<Block> {
    let subset = |random: &mut Random| (0..10u64).filter(|_| random.below(2) == 0).collect::<Vec<u64>>();
    let subsets: Vec<Vec<u64>> = (0..40).map(|_| subset(random)).collect();
    let block = |_| {
        let first = 10 * random.below(5) as u64;
        let tensors = match random.below(10) {
            0..6 => (first..first + 10).collect(),
            6..8 => vec![first + random.below(10) as u64],
            _ => subsets[random.below(subsets.len())].iter().map(|tensor| first + tensor).collect(),
        };
        (BLOCK_BYTES, tensors)
    };
    (0..blocks).map(block).collect()
}

/// 50 tensors, and each block is that of a random half of them: nearly every block is a class of its own, so
/// there is next to nothing to gain. The worst case for time.
fn random_halves(blocks: usize, random: &mut Random) -> Vec<Block> {
    (0..blocks).map(|_| (BLOCK_BYTES, (0..50).filter(|_| random.below(2) == 0).collect())).collect()
}

/// A tenth as many tensors as blocks: each has a small block and nine others, which one in five is shared with
/// one more tensor.
fn many_tensors(blocks: usize, random: &mut Random) -> Vec<Block> {
    let tensors = (blocks / 10).max(1);
    let block = |at: usize| {
        let mut list = vec![(at / 10) as u64];
        if random.below(5) == 0 {
            list.push(random.below(tensors) as u64);
        }
        (if at.is_multiple_of(10) { SMALL_BYTES } else { BLOCK_BYTES }, list)
    };
    (0..blocks).map(block).collect()
}

fn main() {
    println!(
        "| workload | blocks | references | classes | random order | storage order | seconds | longest pause, ms \
         | two-stage, seconds |"
    );
    println!("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |");
    let workloads: [(&str, Workload); 3] = [
        ("50 tensors in families", families),
        ("50 tensors, random halves", random_halves),
        ("tensors of ten blocks", many_tensors),
    ];
    for (name, workload) in workloads {
        for size in [1_000, 10_000, 100_000] {
            line(name, workload(size, &mut Random(size as u64)));
        }
    }
}

fn line(name: &str, blocks: Vec<Block>) {
    let uses: Vec<BlockUse> = blocks.iter().map(|(bytes, tensors)| BlockUse { bytes: *bytes, tensors }).collect();
    let references: usize = blocks.iter().map(|(_, tensors)| tensors.len()).sum();
    let mut classes: Vec<&Vec<u64>> = blocks.iter().map(|(_, tensors)| tensors).collect();
    classes.sort_unstable();
    classes.dedup();

    let mut shuffled: Vec<u32> = (0..blocks.len() as u32).collect();
    let mut random = Random(1);
    (1..shuffled.len()).for_each(|at| shuffled.swap(at, random.below(at + 1)));
    let before = page_reads(&uses, &shuffled, TENSOR_PAGE_BYTES).amplification();
    let start = Instant::now();
    let (mut last, mut pause) = (start, Duration::ZERO);
    let mut go_on = || {
        pause = pause.max(last.elapsed());
        last = Instant::now();
        true
    };
    let order = storage_order_until(&uses, TENSOR_PAGE_BYTES, &mut go_on).unwrap_or_default();
    pause = pause.max(last.elapsed());
    let (seconds, pause) = (start.elapsed().as_secs_f64(), pause.as_millis());
    let after = page_reads(&uses, &order, TENSOR_PAGE_BYTES).amplification();

    let count = blocks.iter().flat_map(|(_, tensors)| tensors).max().map_or(0, |last| *last as usize + 1);
    let mut tensors = vec![Vec::new(); count];
    for (block, (_, list)) in blocks.iter().enumerate() {
        list.iter().for_each(|&tensor| tensors[tensor as usize].push(block as u32));
    }
    let problem = PackingProblem::new(8, tensors);
    let start = Instant::now();
    let pages = Heuristic::TwoStage.pack(&problem);
    let published = start.elapsed().as_secs_f64();
    let verdict = check_packing(&problem, &pages).map_or_else(|fault| format!(" ({fault})"), |()| String::new());
    println!(
        "| {name} | {} | {references} | {} | {before:.3} | {after:.3} | {seconds:.2} | {pause} | {published:.2}{verdict} |",
        blocks.len(),
        classes.len()
    );
}
