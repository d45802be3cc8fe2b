//! Blocks of the mixed pages change places while that saves reads.
//!
//! Simulated annealing over exchanges of two blocks, with integers only, so that every machine does the same. Only
//! exchanges: pages keep their number of blocks, so holes do not spread. The chance of an exchange that costs `d`
//! reads is 2^(-d k), where k grows to the end; at last only exchanges that cost nothing are made.

use super::storage::Store;
use crate::random::Random;

/// Exchanges looked at: so many per block, within these limits.
const STEPS_PER_BLOCK: usize = 40;
const STEPS: std::ops::RangeInclusive<usize> = 200_000..=2_000_000;

/// Tensors looked at, over all steps, after which the rest is left out: classes can have thousands of tensors.
const WORK: usize = 50_000_000;

/// Steps between two questions whether to go on; fewer where classes are large.
const STEPS_PER_QUESTION: usize = 4096;

/// The largest k, but for the last part of the schedule.
const COLDEST: usize = 12;

/// Blocks up to which it starts anew, so often: where there are few, one run easily ends beside the best.
const FEW_BLOCKS: usize = 2048;
const RESTARTS: u64 = 4;

/// Reads of `pages` when every tensor is read once.
pub(super) fn cost(store: &Store, pages: &[Vec<u32>]) -> u64 {
    let mut seen_on = vec![usize::MAX; store.sharing.tensor_count];
    let mut cost = 0;
    for (page, blocks) in pages.iter().enumerate() {
        for &tensor in blocks.iter().flat_map(|&block| store.sharing.tensors(block)) {
            if seen_on[tensor as usize] != page {
                seen_on[tensor as usize] = page;
                cost += 1;
            }
        }
    }
    cost
}

/// Pages of the same blocks that cost no more. `None` when `go_on` says so.
pub(super) fn improve(store: &Store, pages: Vec<Vec<u32>>, go_on: &mut dyn FnMut() -> bool) -> Option<Vec<Vec<u32>>> {
    if pages.len() < 2 {
        return Some(pages);
    }
    let blocks: usize = pages.iter().map(Vec::len).sum();
    let (mut least, mut best) = (cost(store, &pages), None);
    for seed in 0..if blocks <= FEW_BLOCKS { RESTARTS } else { 1 } {
        let annealed = Annealing::new(store, &pages, seed).run(go_on)?;
        let cost = cost(store, &annealed);
        if cost < least {
            (least, best) = (cost, Some(annealed));
        }
    }
    Some(best.unwrap_or(pages))
}

/// A block and its place.
#[derive(Clone, Copy)]
struct Placed {
    block: u32,
    page: u32,
}

struct Annealing<'a> {
    store: &'a Store,
    random: Random,
    blocks: Vec<Placed>,
    /// Places in `blocks` of those that each tensor references.
    blocks_of: Vec<Vec<u32>>,
    /// Room left on each page.
    room: Vec<u64>,
    /// For each page its tensors, ascending, and how many blocks each has there.
    counts: Vec<Vec<(u32, u32)>>,
    work: usize,
}

impl<'a> Annealing<'a> {
    fn new(store: &'a Store, pages: &[Vec<u32>], seed: u64) -> Annealing<'a> {
        let mut annealing = Annealing {
            store,
            random: Random(seed),
            blocks: Vec::new(),
            blocks_of: vec![Vec::new(); store.sharing.tensor_count],
            room: vec![store.page_bytes; pages.len()],
            counts: vec![Vec::new(); pages.len()],
            work: 0,
        };
        for (page, blocks) in pages.iter().enumerate() {
            for &block in blocks {
                let left = &mut annealing.room[page];
                *left = left.saturating_sub(store.rooms[block as usize]);
                for &tensor in store.sharing.tensors(block) {
                    annealing.blocks_of[tensor as usize].push(annealing.blocks.len() as u32);
                }
                add(&mut annealing.counts[page], store.sharing.tensors(block));
                annealing.blocks.push(Placed { block, page: page as u32 });
            }
        }
        annealing
    }

    /// The pages in the end. `None` when `go_on` says so.
    fn run(mut self, go_on: &mut dyn FnMut() -> bool) -> Option<Vec<Vec<u32>>> {
        let steps = (self.blocks.len() * STEPS_PER_BLOCK).clamp(*STEPS.start(), *STEPS.end());
        let mut asked_at = 0;
        for step in 0..steps {
            // Where classes are large the schedule runs by the work done, so that it always gets cold.
            let done = (step * 1024 / steps).max(self.work / (WORK / 1024));
            if done >= 1024 {
                break;
            }
            if step % STEPS_PER_QUESTION == 0 || self.work - asked_at > WORK / 64 {
                asked_at = self.work;
                if !go_on() {
                    return None;
                }
            }
            self.step(1 + done * (COLDEST + 1) / 1024);
        }
        Some(self.pages(self.room.len()))
    }

    fn pages(&self, count: usize) -> Vec<Vec<u32>> {
        let mut pages = vec![Vec::new(); count];
        self.blocks.iter().for_each(|placed| pages[placed.page as usize].push(placed.block));
        pages
    }

    /// Looks at one exchange, and makes it if it saves reads or the chance 2^(-cost k) comes true.
    fn step(&mut self, k: usize) {
        let left = self.random.below(self.blocks.len());
        let right = self.partner(left);
        let (l, r) = (self.blocks[left], self.blocks[right]);
        let (class_l, class_r) =
            (self.store.sharing.class_of[l.block as usize], self.store.sharing.class_of[r.block as usize]);
        if l.page == r.page || class_l == class_r {
            return;
        }
        let (room_l, room_r) = (self.store.rooms[l.block as usize], self.store.rooms[r.block as usize]);
        if self.room[l.page as usize] + room_l < room_r || self.room[r.page as usize] + room_r < room_l {
            return;
        }
        let cost = self.change(l.page, l.block, r.block) + self.change(r.page, r.block, l.block);
        if cost > 0 {
            let bits = cost as usize * k;
            if k > COLDEST || bits >= 64 || self.random.next() >> (64 - bits) != 0 {
                return;
            }
        }
        self.exchange(l, r);
        self.room[l.page as usize] = self.room[l.page as usize] + room_l - room_r;
        self.room[r.page as usize] = self.room[r.page as usize] + room_r - room_l;
        self.blocks[left].page = r.page;
        self.blocks[right].page = l.page;
    }

    /// Every other time any block; else one on a page that has a tensor in common with `left`, where exchanges are
    /// likelier to save something.
    fn partner(&mut self, left: usize) -> usize {
        let tensors = self.store.sharing.tensors(self.blocks[left].block);
        if tensors.is_empty() || self.random.next() & 1 == 0 {
            return self.random.below(self.blocks.len());
        }
        let tensor = tensors[self.random.below(tensors.len())];
        let list = &self.blocks_of[tensor as usize];
        let other = list[self.random.below(list.len())] as usize;
        // Places start page by page, so blocks near it were on its page at first.
        let near = (other + self.random.below(17)).saturating_sub(8).min(self.blocks.len() - 1);
        if self.blocks[near].page == self.blocks[other].page { near } else { other }
    }

    /// Reads more, or less, when `page` gets `new` for `old`.
    fn change(&mut self, page: u32, old: u32, new: u32) -> i64 {
        let (old, new) = (self.store.sharing.tensors(old), self.store.sharing.tensors(new));
        self.work += old.len() + new.len();
        let counts = &self.counts[page as usize];
        let count = |tensor: &u32| counts.binary_search_by_key(tensor, |(t, _)| *t).map_or(0, |at| counts[at].1);
        let gone = old.iter().filter(|t| count(t) == 1 && new.binary_search(t).is_err()).count();
        let come = new.iter().filter(|t| count(t) == 0).count();
        come as i64 - gone as i64
    }

    fn exchange(&mut self, l: Placed, r: Placed) {
        for (from, to, block) in [(l.page, r.page, l.block), (r.page, l.page, r.block)] {
            let tensors = self.store.sharing.tensors(block);
            self.work += self.counts[from as usize].len() + self.counts[to as usize].len();
            remove(&mut self.counts[from as usize], tensors);
            add(&mut self.counts[to as usize], tensors);
        }
    }
}

/// Counts one more block of each of `tensors`.
fn add(counts: &mut Vec<(u32, u32)>, tensors: &[u32]) {
    let before = counts.len();
    for &tensor in tensors {
        match counts[..before].binary_search_by_key(&tensor, |(t, _)| *t) {
            Ok(at) => counts[at].1 += 1,
            Err(_) => counts.push((tensor, 1)),
        }
    }
    // Two ascending runs, which the stable sort merges.
    counts.sort_by_key(|(tensor, _)| *tensor);
}

/// Counts one block less of each of `tensors`.
fn remove(counts: &mut Vec<(u32, u32)>, tensors: &[u32]) {
    for tensor in tensors {
        if let Ok(at) = counts.binary_search_by_key(tensor, |(t, _)| *t) {
            counts[at].1 -= 1;
        }
    }
    counts.retain(|(_, count)| *count > 0);
}
