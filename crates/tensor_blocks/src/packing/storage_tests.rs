//! Tests of the storage order: against every order of a few blocks, and of what it promises for any input.

use super::*;
use crate::random::Random;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// Bytes and tensors of blocks.
type Blocks = Vec<(u32, Vec<u64>)>;

fn uses(blocks: &Blocks) -> Vec<BlockUse<'_>> {
    blocks.iter().map(|(bytes, tensors)| BlockUse { bytes: *bytes, tensors }).collect()
}

fn random_blocks(seed: u64, count: usize, tensors: usize, sizes: &[u32]) -> Blocks {
    let mut random = Random(seed);
    let sets: Vec<Vec<u64>> = (0..1 + random.below(12))
        .map(|_| (0..random.below(5)).map(|_| random.below(tensors) as u64 * 77).collect())
        .collect();
    (0..count).map(|_| (sizes[random.below(sizes.len())], sets[random.below(sets.len())].clone())).collect()
}

/// Pages of each block, by the store's rule as its documentation states it; also checks that no block straddles.
fn naive_reads(blocks: &Blocks, order: &[u32], page_bytes: u64) -> (u64, u64) {
    let mut end = 0u64;
    let mut touched = BTreeSet::new();
    for &at in order {
        let (bytes, tensors) = &blocks[at as usize];
        let bytes = u64::from(*bytes).max(1);
        let start = end.next_multiple_of(8);
        let page = start / page_bytes;
        let start = if start.is_multiple_of(page_bytes) || start + bytes <= (page + 1) * page_bytes {
            start
        } else {
            (page + 1) * page_bytes
        };
        // A block that fills pages to the last byte leaves none of its last page to others.
        end = start + bytes;
        let pages = start / page_bytes..=(end - 1) / page_bytes;
        assert!(bytes > page_bytes || pages.clone().count() == 1, "straddles");
        touched.extend(pages.flat_map(|page| tensors.iter().map(move |tensor| (page, *tensor))));
    }
    (end.div_ceil(page_bytes), touched.len() as u64)
}

#[test]
fn reads_are_counted_as_the_store_fills_pages() {
    for seed in 0..500 {
        let blocks = random_blocks(seed, 60, 9, &[1, 8, 17, 40, 64, 79, 80, 81, 200, 0]);
        let order: Vec<u32> = (0..60).map(|at| at * 7 % 60).collect();
        let reads = page_reads(&uses(&blocks), &order, 80);
        assert_eq!((reads.pages, reads.pages_read()), naive_reads(&blocks, &order, 80), "seed {seed}");
    }
}

#[test]
fn reads_of_a_tensor() {
    let blocks = [(100, vec![7, 7, 3]), (60, vec![3]), (10, vec![7]), (40, vec![3])];
    let reads = page_reads(&uses(&blocks.to_vec()), &[0, 1, 2, 3, 99], 64);
    assert_eq!(reads.pages, 4);
    let rows: Vec<_> = reads.tensors.iter().map(|r| (r.tensor, r.pages, r.bytes, r.fewest)).collect();
    // 100 bytes on pages 0 and 1, 60 on page 2, 10 and 40 on page 3.
    assert_eq!(rows, [(3, 4, 200, 4), (7, 3, 110, 2)]);
    assert!((reads.amplification() - 7.0 / 6.0).abs() < 1e-9);
}

#[test]
fn every_block_comes_once_and_reads_never_get_more() {
    let sizes: [&[u32]; 4] = [&[65_548], &[65_548, 2_060], &[100_000, 300_000, 65_548, 12], &[65_548, 600_000, 0]];
    for seed in 0..60 {
        let mut random = Random(seed);
        let count = random.below(300);
        let blocks = random_blocks(seed, count, 1 + random.below(40), sizes[random.below(4)]);
        let uses = uses(&blocks);
        let order = storage_order(&uses, TENSOR_PAGE_BYTES);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        let as_given: Vec<u32> = (0..count as u32).collect();
        assert_eq!(sorted, as_given, "seed {seed}");
        let reads = |order: &[u32]| page_reads(&uses, order, TENSOR_PAGE_BYTES).pages_read();
        assert!(reads(&order) <= reads(&as_given), "seed {seed}");
        assert_eq!(order, storage_order(&uses, TENSOR_PAGE_BYTES), "seed {seed}: not the same again");
    }
}

/// Calls `visit` with every order of `items[from..]` behind what is before.
fn permutations(items: &mut Vec<u32>, from: usize, visit: &mut dyn FnMut(&[u32])) {
    if from == items.len() {
        return visit(items);
    }
    for at in from..items.len() {
        items.swap(from, at);
        permutations(items, from + 1, visit);
        items.swap(from, at);
    }
}

#[test]
fn few_blocks_are_read_with_the_fewest_reads() {
    let (mut ours, mut fewest, mut given) = (0, 0, 0);
    for seed in 0..25 {
        let sizes: &[u32] = if seed % 2 == 0 { &[80] } else { &[80, 40, 16] };
        let blocks = random_blocks(seed, 8, 5, sizes);
        let uses = uses(&blocks);
        let reads = |order: &[u32]| page_reads(&uses, order, 240).pages_read();
        let mut least = u64::MAX;
        permutations(&mut (0..8).collect(), 0, &mut |order| least = least.min(reads(order)));
        ours += reads(&storage_order(&uses, 240));
        given += reads(&(0..8).collect::<Vec<u32>>());
        fewest += least;
    }
    assert!(ours * 100 <= fewest * 103, "{ours} reads where {fewest} are enough; {given} as given");
    assert!(given * 100 > fewest * 120, "the problems are too easy: {given} as given, {fewest} at best");
}

/// Classes of whole pages and a rest: the rests of two classes fit one page.
#[test]
fn classes_fill_pages_of_their_own() {
    let blocks: Blocks = (0..40).map(|at| (65_548, vec![[1, 2][at % 2]])).collect();
    let reads = page_reads(&uses(&blocks), &storage_order(&uses(&blocks), TENSOR_PAGE_BYTES), TENSOR_PAGE_BYTES);
    assert_eq!(reads.pages, 5);
    assert!(reads.tensors.iter().all(|tensor| tensor.pages == 3), "{reads:?}");
}

/// Small blocks that fit the rest of a page full of large ones do not shift what follows.
#[test]
fn small_blocks_do_not_cut_classes_elsewhere() {
    let mut blocks: Blocks = Vec::new();
    for tensor in 0..12 {
        blocks.extend((0..16).map(|_| (65_548, vec![tensor])));
        blocks.extend((0..3).map(|_| (2_060, vec![tensor])));
    }
    let mut random = Random(5);
    (1..blocks.len()).for_each(|at| blocks.swap(at, random.below(at + 1)));
    let reads = page_reads(&uses(&blocks), &storage_order(&uses(&blocks), TENSOR_PAGE_BYTES), TENSOR_PAGE_BYTES);
    assert_eq!((reads.pages, reads.amplification()), (24, 1.0));
}

/// Pages that are full of small blocks, among pages that have room for some more of these.
#[test]
fn pages_of_small_blocks_stay_whole() {
    // 162 small blocks or 8 large ones to a page. The tensor with more blocks would come first.
    for large in [8, 400] {
        let blocks: Blocks = [vec![(320, vec![6]); large], vec![(16, vec![5]); 324]].concat();
        let reads = page_reads(&uses(&blocks), &storage_order(&uses(&blocks), 2600), 2600);
        assert_eq!((reads.pages, reads.amplification()), (2 + large as u64 / 8, 1.0), "{large} large ones");
    }
}

/// Thousands of classes, too many for exchanges alone to bring the similar ones together.
#[test]
fn similar_classes_meet_on_pages() {
    let mut random = Random(17);
    let blocks: Blocks = (0..20_000)
        .map(|_| {
            // One of 2,500 groups of tensors, and of these some may be missing.
            let group = random.below(2_500) as u64 * 4;
            (65_548, (group..group + 4).filter(|_| random.below(8) > 0).collect())
        })
        .collect();
    let uses = uses(&blocks);
    let amplification = |order: &[u32]| page_reads(&uses, order, TENSOR_PAGE_BYTES).amplification();
    let packed = amplification(&storage_order(&uses, TENSOR_PAGE_BYTES));
    let as_given = amplification(&(0..20_000).collect::<Vec<u32>>());
    assert!(as_given > 5.0 && packed < 1.3, "{as_given} as given, {packed} packed");
}

#[test]
fn odd_inputs() {
    let order = |blocks: Blocks, page_bytes| storage_order(&uses(&blocks), page_bytes);
    assert_eq!(order(vec![], TENSOR_PAGE_BYTES), [0; 0]);
    assert_eq!(order(vec![(5, vec![])], TENSOR_PAGE_BYTES), [0]);
    assert_eq!(order(vec![(5, vec![9, 9]), (5, vec![9])], TENSOR_PAGE_BYTES), [0, 1]);
    assert_eq!(order(vec![(65_548, vec![1]); 20], TENSOR_PAGE_BYTES), (0..20).collect::<Vec<u32>>());
    for page_bytes in [0, 1, 7, u64::MAX] {
        let mut order = order(vec![(5, vec![u64::MAX]), (u32::MAX, vec![0, 1]), (0, vec![1])], page_bytes);
        order.sort_unstable();
        assert_eq!(order, [0, 1, 2], "{page_bytes}");
    }
    // Keys in disorder and twice are the same class.
    let blocks: Blocks = (0..16).map(|at| (65_548, if at % 2 == 0 { vec![1, 2] } else { vec![2, 1, 2] })).collect();
    assert_eq!(order(blocks, TENSOR_PAGE_BYTES), (0..16).collect::<Vec<u32>>());
    let none = page_reads(&[], &[], 0);
    assert_eq!((none.pages, none.amplification()), (0, 1.0));
}

#[test]
fn it_stops_when_told_to() {
    let blocks: Blocks = (0..3000).map(|at| (65_548, vec![at % 50, at / 7 % 50, at / 31])).collect();
    let mut questions = 0;
    let whole = storage_order_until(&uses(&blocks), TENSOR_PAGE_BYTES, &mut || {
        questions += 1;
        true
    });
    assert!(whole.is_some() && questions > 10, "{questions} questions");
    for last in [1, questions / 2, questions] {
        let mut asked = 0;
        let stopped = storage_order_until(&uses(&blocks), TENSOR_PAGE_BYTES, &mut || {
            asked += 1;
            asked < last
        });
        assert_eq!((stopped, asked), (None, last));
    }
}

/// 10,000 tensors, 100,000 references and classes of thousands of tensors: minutes if a step were quadratic. The
/// longest pause between two questions is what a cancelled statement waits.
#[test]
fn thousands_of_tensors_take_seconds() {
    let mut random = Random(11);
    let mut blocks: Blocks = (0..60_000).map(|at| (65_548, vec![at / 6])).collect();
    for _ in 0..10_000 {
        blocks.push((65_548, (0..2).map(|_| random.below(10_000) as u64).collect()));
    }
    blocks.extend((0..20).map(|at| (65_548, (at..10_000).step_by(10).collect())));
    let start = Instant::now();
    let (mut last, mut pause) = (start, Duration::ZERO);
    let order = storage_order_until(&uses(&blocks), TENSOR_PAGE_BYTES, &mut || {
        pause = pause.max(last.elapsed());
        last = Instant::now();
        true
    });
    assert_eq!(order.map(|order| order.len()), Some(blocks.len()));
    let seconds = start.elapsed().as_secs();
    assert!(seconds < 60, "{seconds} s");
    assert!(pause < Duration::from_secs(5), "{pause:?} without a question");
}
