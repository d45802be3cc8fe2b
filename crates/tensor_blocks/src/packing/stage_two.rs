//! The second stage: what is left of the classes is put together on pages.
//!
//! The cost of a page is the number of tensors that have a block on it; the sum over all pages is what is to be small.
//! A page starts with one group and takes those groups that have most tensors in common with it, since each
//! common tensor is one read less. A group that does not fit is cut when nothing else fits: holes would not last,
//! the store fills them.
//!
//! Not all groups can be looked at for every page. Those that are: neighbours in the order of similarity, some
//! that share one of the rarest tensors of the first group, and the largest that fits.

use super::storage::Store;
use std::cmp::Reverse;
use std::collections::BTreeSet;

/// Neighbours looked at, to each side.
const NEIGHBOURS: usize = 24;
/// Tensors of a page's first group whose groups are looked at.
const RARE_TENSORS: usize = 8;
/// Groups of each that are looked at.
const GROUPS_PER_TENSOR: usize = 8;

/// Blocks of one class, together less than a page.
#[derive(Clone)]
pub(super) struct Group {
    pub class: u32,
    /// Room of all blocks.
    pub used: u64,
    /// Largest first.
    pub blocks: Vec<u32>,
}

/// Which group starts a page.
#[derive(Clone, Copy)]
pub(super) enum Seed {
    MostTensors,
    Largest,
    InOrder,
}

impl Seed {
    pub const ALL: [Seed; 3] = [Seed::MostTensors, Seed::Largest, Seed::InOrder];
}

/// A way to choose.
#[derive(Clone, Copy)]
pub(super) struct StageTwo {
    pub seed: Seed,
    /// Common tensors are weighed against the room that the group takes.
    pub per_byte: bool,
}

/// Pages of the blocks of `groups`, which are given in the order of similarity. `None` when `go_on` says so.
pub(super) fn pack(
    store: &Store,
    groups: Vec<Group>,
    way: StageTwo,
    go_on: &mut dyn FnMut() -> bool,
) -> Option<Vec<Vec<u32>>> {
    let mut seeds: Vec<usize> = (0..groups.len()).collect();
    match way.seed {
        Seed::MostTensors => seeds.sort_by_key(|&group| {
            Reverse((store.sharing.classes[groups[group].class as usize].tensors.len(), groups[group].used))
        }),
        Seed::Largest => seeds.sort_by_key(|&group| Reverse(groups[group].used)),
        Seed::InOrder => {}
    }
    let mut packer = Packer::new(store, groups, way);
    let mut pages = Vec::new();
    for (turn, seed) in seeds.into_iter().enumerate() {
        while !packer.groups[seed].blocks.is_empty() {
            pages.push(packer.page(seed));
        }
        if turn % 16 == 0 && !go_on() {
            return None;
        }
    }
    Some(pages)
}

struct Packer<'a> {
    store: &'a Store,
    way: StageTwo,
    groups: Vec<Group>,
    /// Neighbours among the groups that are not yet packed; the number of groups where there is none.
    before: Vec<usize>,
    after: Vec<usize>,
    /// Groups by room, for the largest one that fits.
    by_room: BTreeSet<(u64, Reverse<usize>)>,
    /// Groups of each tensor; what is before the start is packed.
    groups_of: Vec<(usize, Vec<u32>)>,
    /// The last page, counted from 1, that has a block of the tensor.
    page_of: Vec<u32>,
    page: u32,
    candidates: Vec<usize>,
}

impl<'a> Packer<'a> {
    fn new(store: &'a Store, groups: Vec<Group>, way: StageTwo) -> Packer<'a> {
        let none = groups.len();
        let mut groups_of = vec![(0, Vec::new()); store.sharing.tensor_count];
        for (at, group) in groups.iter().enumerate() {
            for &tensor in &store.sharing.classes[group.class as usize].tensors {
                groups_of[tensor as usize].1.push(at as u32);
            }
        }
        Packer {
            store,
            way,
            before: (0..none).map(|at| at.checked_sub(1).unwrap_or(none)).collect(),
            after: (1..=none).collect(),
            by_room: groups.iter().enumerate().map(|(at, group)| (group.used, Reverse(at))).collect(),
            groups_of,
            page_of: vec![0; store.sharing.tensor_count],
            page: 0,
            candidates: Vec::new(),
            groups,
        }
    }

    fn tensors(&self, group: usize) -> &'a [u32] {
        &self.store.sharing.classes[self.groups[group].class as usize].tensors
    }

    /// A page that starts with `seed`.
    fn page(&mut self, seed: usize) -> Vec<u32> {
        self.page += 1;
        self.look_around(seed);
        let mut page = Vec::new();
        let mut room = self.store.page_bytes;
        self.take(seed, &mut page, &mut room);
        while let Some(next) = self.choose(room) {
            let before = page.len();
            self.take(next, &mut page, &mut room);
            if page.len() == before {
                break;
            }
        }
        page
    }

    /// Collects the groups that may go on the page of `seed`.
    fn look_around(&mut self, seed: usize) {
        let mut candidates = std::mem::take(&mut self.candidates);
        candidates.clear();
        for links in [&self.before, &self.after] {
            let mut at = seed;
            for _ in 0..NEIGHBOURS {
                at = links[at];
                if at == self.groups.len() {
                    break;
                }
                candidates.push(at);
            }
        }
        let mut rare: Vec<(usize, u32)> =
            self.tensors(seed).iter().map(|&t| (self.groups_of[t as usize].1.len(), t)).collect();
        if rare.len() > RARE_TENSORS {
            rare.select_nth_unstable(RARE_TENSORS);
            rare.truncate(RARE_TENSORS);
        }
        for (_, tensor) in rare {
            let (start, list) = &mut self.groups_of[tensor as usize];
            while list.get(*start).is_some_and(|&group| self.groups[group as usize].blocks.is_empty()) {
                *start += 1;
            }
            // Packed groups stay in the list behind its start, so the look at it is bounded as well.
            let open = list[*start..].iter().take(8 * GROUPS_PER_TENSOR).map(|&group| group as usize);
            let open = open.filter(|&group| group != seed && !self.groups[group].blocks.is_empty());
            candidates.extend(open.take(GROUPS_PER_TENSOR));
        }
        candidates.sort_unstable();
        candidates.dedup();
        self.candidates = candidates;
    }

    /// The group to go on the page next; none if nothing fits or the rest is not worth it.
    fn choose(&self, room: u64) -> Option<usize> {
        let largest_that_fits = self.by_room.range(..=(room, Reverse(0))).next_back().map(|&(_, Reverse(at))| at);
        let mut best: Option<((i64, bool, u64), usize)> = None;
        for &group in self.candidates.iter().chain(&largest_that_fits) {
            let Group { used, blocks, .. } = &self.groups[group];
            let Some(&smallest) = blocks.last() else { continue };
            let whole = *used <= room;
            if !whole && (room <= self.store.small() || self.store.rooms[smallest as usize] > room) {
                continue;
            }
            let tensors = self.tensors(group);
            let common = tensors.iter().filter(|&&tensor| self.page_of[tensor as usize] == self.page).count();
            // Both parts of a group that is cut are read.
            let saved = common as i64 - if whole { 0 } else { tensors.len() as i64 };
            let weight = if self.way.per_byte && saved > 0 { (saved << 32) / *used as i64 } else { saved };
            let key = (weight, whole, *used);
            if best.is_none_or(|(than, _)| key > than) {
                best = Some((key, group));
            }
        }
        best.map(|(_, group)| group)
    }

    /// Puts `group` on the page, or as much of it as fits.
    fn take(&mut self, group: usize, page: &mut Vec<u32>, room: &mut u64) {
        let all = &mut self.groups[group];
        self.by_room.remove(&(all.used, Reverse(group)));
        let rooms = &self.store.rooms;
        // A block that is larger than a page is not among the groups, so the first one always fits an empty page.
        let mut left = Vec::new();
        for &block in &all.blocks {
            if rooms[block as usize] <= *room {
                *room -= rooms[block as usize];
                all.used -= rooms[block as usize];
                page.push(block);
            } else {
                left.push(block);
            }
        }
        all.blocks = left;
        if all.blocks.is_empty() {
            let (before, after) = (self.before[group], self.after[group]);
            if before < self.groups.len() {
                self.after[before] = after;
            }
            if after < self.groups.len() {
                self.before[after] = before;
            }
        } else {
            self.by_room.insert((all.used, Reverse(group)));
        }
        for &tensor in self.tensors(group) {
            self.page_of[tensor as usize] = self.page;
        }
    }
}
