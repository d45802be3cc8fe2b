//! The order of blocks in a block store.
//!
//! netsDB's two stages, for blocks that stand once each:
//!
//! 1. each sharing class fills pages of its own, and all blocks of these pages are read with each tensor of the class;
//! 2. what is left of the classes, less than a page each, is put together on pages ([`super::stage_two`]) so that few
//!    tensors meet few pages; then blocks change places ([`super::anneal`]) while that saves reads.
//!
//! What is left to decide is the order of the pages: each must start with a block that the page before has no room
//! for, or the store would pull blocks forward and cut all that follows at other places.

use super::fill::{BlockUse, Filler, Seen, room};
use super::sharing::Sharing;
use super::stage_two::{Group, Seed, StageTwo};
use super::{anneal, stage_two};
use std::cmp::Reverse;

/// Pages of a class that are open for smaller blocks while it fills pages.
const OPEN_PAGES: usize = 32;

/// References of left-over blocks up to which every way of packing them is tried; beyond that only the first is.
const TRY_ALL_REFERENCES: usize = 1 << 20;

/// The order in which a block store should lay out `blocks` on tensor pages of `page_bytes`, so that a tensor is read
/// from as few of them as possible: indexes into `blocks`, each once.
///
/// It is meant for the store's way of filling ([`super::page_reads`]): a block goes to the current page if it fits,
/// else to the next. Blocks of equal size fill every page but the last. Blocks of one sharing class keep the order in
/// which they come, largest first. No order is returned that costs more reads than the one given.
///
/// Deterministic. For N blocks with R references to tensors, time is O(R log R) and memory O(N + R).
pub fn storage_order(blocks: &[BlockUse], page_bytes: u64) -> Vec<u32> {
    storage_order_until(blocks, page_bytes, &mut || true).unwrap_or_else(|| (0..blocks.len() as u32).collect())
}

/// [`storage_order`] that ends early, with `None`, when `go_on` says false.
///
/// It is asked every few milliseconds while there are few references, and within half a second with 2.5 million.
pub fn storage_order_until(blocks: &[BlockUse], page_bytes: u64, go_on: &mut dyn FnMut() -> bool) -> Option<Vec<u32>> {
    let store = Store {
        sharing: Sharing::until(blocks.iter().map(|block| block.tensors), go_on)?,
        rooms: blocks.iter().map(|block| room(block.bytes)).collect(),
        bytes: blocks.iter().map(|block| u64::from(block.bytes)).collect(),
        page_bytes: page_bytes.max(1),
    };
    let mut ask = || go_on().then_some(());
    let mut best = Best::new(&store, (0..blocks.len() as u32).collect());
    ask()?;
    let classes = store.similar_classes();
    ask()?;
    best.offer(&store, classes.iter().flat_map(|&class| store.sharing.classes[class].blocks.clone()).collect());

    ask()?;
    let (full, groups) = store.stage_one(&classes);
    let references: usize = groups.iter().map(|group| store.sharing.classes[group.class as usize].tensors.len()).sum();
    let mut fewest: Option<(u64, Vec<Vec<u32>>)> = None;
    for seed in Seed::ALL.into_iter().take(if references <= TRY_ALL_REFERENCES { Seed::ALL.len() } else { 1 }) {
        for per_byte in [false, true] {
            let pages = stage_two::pack(&store, groups.clone(), StageTwo { seed, per_byte }, go_on)?;
            best.offer(&store, store.order_of_pages(&full, &pages));
            let cost = anneal::cost(&store, &pages);
            if fewest.as_ref().is_none_or(|(least, _)| cost < *least) {
                fewest = Some((cost, pages));
            }
        }
    }
    if let Some((_, pages)) = fewest {
        let pages = anneal::improve(&store, pages, go_on)?;
        best.offer(&store, store.order_of_pages(&full, &pages));
    }
    Some(best.order)
}

/// What is packed.
pub(super) struct Store {
    pub sharing: Sharing,
    /// Room that each block takes on a page.
    pub rooms: Vec<u64>,
    bytes: Vec<u64>,
    pub page_bytes: u64,
}

impl Store {
    /// Numbers of the classes, similar ones near each other: by their tensors, the ones with most blocks compared
    /// first, so that classes that differ in small tensors only are neighbours. Blocks without tensors come last.
    fn similar_classes(&self) -> Vec<usize> {
        let mut blocks_of = vec![0usize; self.sharing.tensor_count];
        for class in &self.sharing.classes {
            class.tensors.iter().for_each(|&tensor| blocks_of[tensor as usize] += class.blocks.len());
        }
        let mut by_size: Vec<usize> = (0..blocks_of.len()).collect();
        by_size.sort_by_key(|&tensor| Reverse(blocks_of[tensor]));
        let mut rank = vec![0u32; blocks_of.len()];
        by_size.iter().enumerate().for_each(|(at, &tensor)| rank[tensor] = at as u32);
        let ranks = |class: usize| {
            let mut ranks: Vec<u32> =
                self.sharing.classes[class].tensors.iter().map(|&tensor| rank[tensor as usize]).collect();
            ranks.sort_unstable();
            ranks
        };
        let mut classes: Vec<(Vec<u32>, usize)> =
            (0..self.sharing.classes.len()).map(|class| (ranks(class), class)).collect();
        classes.sort_by(|(left, _), (right, _)| (left.is_empty(), left).cmp(&(right.is_empty(), right)));
        classes.into_iter().map(|(_, class)| class).collect()
    }

    /// Pages that are full of one class, and what is left of each.
    ///
    /// A class fills its pages largest block first, each block on the first page that has room. So every page starts
    /// with a block for which the pages before had none.
    fn stage_one(&self, classes: &[usize]) -> (Vec<Vec<u32>>, Vec<Group>) {
        let (mut full, mut groups) = (Vec::new(), Vec::new());
        for &class in classes {
            let mut blocks = self.sharing.classes[class].blocks.clone();
            blocks.sort_by_key(|&block| Reverse(self.rooms[block as usize]));
            let mut pages: Vec<(u64, Vec<u32>)> = Vec::new();
            for block in blocks {
                let room = self.rooms[block as usize];
                let open = pages.len().saturating_sub(OPEN_PAGES);
                match pages[open..].iter_mut().find(|(used, _)| used + room <= self.page_bytes) {
                    Some((used, page)) => {
                        *used += room;
                        page.push(block);
                    }
                    None => pages.push((room, vec![block])),
                }
            }
            for (used, blocks) in pages {
                if used + self.small() > self.page_bytes {
                    full.push(blocks);
                } else {
                    groups.push(Group { class: class as u32, used, blocks });
                }
            }
        }
        (full, groups)
    }

    /// Room on a page that is not worth a read of the page to fill it.
    pub fn small(&self) -> u64 {
        self.page_bytes / 32
    }

    /// The blocks of `full` and `mixed` pages in an order that the store cuts into these pages again, if it can be had.
    fn order_of_pages(&self, full: &[Vec<u32>], mixed: &[Vec<u32>]) -> Vec<u32> {
        let used = |page: &[u32]| page.iter().map(|&block| self.rooms[block as usize]).sum::<u64>();
        let mut mixed: Vec<Vec<u32>> = mixed.to_vec();
        for page in &mut mixed {
            page.sort_by_key(|&block| {
                (Reverse(self.rooms[block as usize]), self.sharing.class_of[block as usize], block)
            });
        }
        // A page whose largest block would not fit once more takes none from a page that starts with a larger one:
        // such pages come first, ascending. Those with room to spare come last, the fullest of them first.
        let largest = |page: &[u32]| page.first().map_or(0, |&block| self.rooms[block as usize]);
        let mut pages: Vec<&[u32]> = full.iter().chain(&mixed).map(Vec::as_slice).collect();
        pages.sort_by_cached_key(|page| match used(page) + largest(page) > self.page_bytes {
            true => (false, largest(page)),
            false => (true, u64::MAX - used(page)),
        });
        pages.concat()
    }

    /// Pages read when every tensor is read once, and pages taken.
    fn reads(&self, order: &[u32]) -> (u64, u64) {
        let mut filler = Filler::new(self.page_bytes);
        let mut seen = vec![Seen::default(); self.sharing.tensor_count];
        for &block in order {
            let place = filler.add(self.bytes[block as usize]);
            self.sharing.tensors(block).iter().for_each(|&tensor| seen[tensor as usize].see(place));
        }
        (seen.iter().map(|seen| seen.pages).sum(), filler.pages)
    }
}

/// The best order so far.
struct Best {
    reads: (u64, u64),
    order: Vec<u32>,
}

impl Best {
    fn new(store: &Store, order: Vec<u32>) -> Best {
        Best { reads: store.reads(&order), order }
    }

    fn offer(&mut self, store: &Store, order: Vec<u32>) {
        let reads = store.reads(&order);
        if reads < self.reads {
            *self = Best { reads, order };
        }
    }
}
