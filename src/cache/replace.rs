//! Which frame the next block gets: a free one, else a victim of the policy.
//!
//! Victims are chosen several at a time, under one lock, and stand in a queue. A candidate that was pinned meanwhile is
//! passed over, under `lru` also one that was used meanwhile, which keeps it exact.

use super::layout::{Area, Entry, NONE, REPLACEMENT_LOCK, SLOTS, State, add};
use super::models;
use super::partition::{self, Partition};
use super::settings::{self, Policy};
use std::collections::BinaryHeap;
use std::sync::atomic::Ordering::{self, Relaxed};

/// How often victims are chosen anew because others have pinned all that were.
const TURNS: usize = 16;

/// Runs of its models after which what was observed of a block counts half.
const FORGET: u32 = 2048;

/// Gives a frame back. Atomics only.
pub fn set_free(area: &Area, frame: u32) {
    let word = frame / 64;
    area.free[word as usize].fetch_or(1 << (frame % 64), Ordering::AcqRel);
    area.header.free_hint.fetch_min(word, Relaxed);
}

/// The first free frame, so that the blocks of one walk lie one behind the other.
fn take_free(area: &Area) -> Option<u32> {
    let words = area.free.len();
    let hint = (area.header.free_hint.load(Relaxed) as usize).min(words);
    for word in (hint..words).chain(0..hint) {
        let mut bits = area.free[word].load(Ordering::Acquire);
        while bits != 0 {
            let bit = bits.trailing_zeros();
            bits = area.free[word].fetch_and(!(1 << bit), Ordering::AcqRel);
            if bits & (1 << bit) != 0 {
                area.header.free_hint.store(word as u32, Relaxed);
                let frame = (word * 64) as u32 + bit;
                area.frames[frame as usize].pins.store(1, Ordering::Release);
                area.frames[frame as usize].state.store(State::Taken as u32, Ordering::Release);
                return Some(frame);
            }
            bits = area.free[word].load(Ordering::Acquire);
        }
    }
    area.header.free_hint.store(words as u32, Relaxed);
    None
}

/// A frame for a block: taken, with one pin that is not noted yet. `None` if all frames are pinned. No lock is held.
pub fn take_frame(area: &Area) -> Option<u32> {
    if let Some(frame) = take_free(area) {
        return Some(frame);
    }
    let mut choice = Choice::new(area);
    for _ in 0..2 * area.frames.len() + 16 {
        let Some((frame, entry)) = choice.next() else { return take_free(area) };
        let partition = Partition::lock(area, partition::of_entry(area, entry), true);
        if partition.detach(entry, frame) {
            drop(partition);
            add(&area.header.counters.evictions, 1);
            return Some(frame);
        }
        drop(partition);
        if let Some(frame) = take_free(area) {
            return Some(frame);
        }
    }
    None
}

/// A candidate: the lowest goes first.
type Candidate = (u64, u64, u32, u32); // what the policy says; last use; frame; entry

/// Choosing victims. Memory for it is allocated before the lock is taken.
struct Choice<'a> {
    area: &'a Area,
    policy: Policy,
    heap: BinaryHeap<Candidate>,
    most: usize,
}

impl<'a> Choice<'a> {
    fn new(area: &'a Area) -> Choice<'a> {
        let policy = settings::policy();
        let most = match policy {
            Policy::Lru => area.plan.victims,
            // Not exact after the first one: what was loaded meanwhile may be worth less than the rest of the queue.
            Policy::Sharing => (area.frames.len() / 64).clamp(1, area.plan.victims),
            Policy::Clock => 1,
        };
        Choice { area, policy, heap: BinaryHeap::with_capacity(most + 1), most }
    }

    /// The next victim and its entry; `None` if all frames are pinned.
    fn next(&mut self) -> Option<(u32, u32)> {
        let header = self.area.header;
        let _lock = self.area.region.lock(REPLACEMENT_LOCK, true);
        if header.victims_policy.swap(self.policy as u32, Relaxed) != self.policy as u32 {
            header.victims_next.store(header.victims_len.load(Relaxed), Relaxed);
        }
        if self.policy == Policy::Clock {
            return self.clock();
        }
        // Others may pin the few that were chosen before they are taken: then others are chosen.
        for _ in 0..TURNS {
            while let Some((frame, entry, last_used)) = self.queued() {
                let state = &self.area.frames[frame as usize];
                let used = self.policy == Policy::Lru && state.last_used.load(Relaxed) != last_used;
                if !used && state.entry.load(Relaxed) == entry && state.pins.load(Relaxed) == 0 {
                    return Some((frame, entry));
                }
            }
            if !self.choose() {
                break;
            }
        }
        None
    }

    fn queued(&self) -> Option<(u32, u32, u64)> {
        let header = self.area.header;
        let next = header.victims_next.load(Relaxed);
        if next >= header.victims_len.load(Relaxed) {
            return None;
        }
        header.victims_next.store(next + 1, Relaxed);
        let victim = self.area.victims.get(next as usize)?;
        Some((victim.frame.load(Relaxed), victim.entry.load(Relaxed), victim.last_used.load(Relaxed)))
    }

    /// Fills the queue with those that the policy gives up first. False if all frames are pinned.
    fn choose(&mut self) -> bool {
        let area = self.area;
        let rates = models::rates(area);
        let kept = Kept::count(area);
        let mut class = Class::new(area, 0, &rates);
        self.heap.clear();
        for (number, frame) in area.frames.iter().enumerate() {
            let entry = frame.entry.load(Relaxed);
            let state = frame.state();
            if entry == NONE || frame.pins.load(Relaxed) != 0 || !matches!(state, State::Valid | State::Abandoned) {
                continue;
            }
            let block = &area.entries[entry as usize];
            let last_used = frame.last_used.load(Relaxed);
            let worth = match self.policy {
                _ if state == State::Abandoned => 0,
                Policy::Sharing => {
                    let owners = block.owners.load(Relaxed);
                    if owners != class.owners {
                        class = Class::new(area, owners, &rates);
                    }
                    sharing(block, &class)
                }
                _ => last_used,
            };
            let worth = if kept.protects(block) { worth | 1 << 63 } else { worth };
            let candidate = (worth, last_used, number as u32, entry);
            if self.heap.len() < self.most {
                self.heap.push(candidate);
            } else if self.heap.peek().is_some_and(|last| candidate < *last) {
                self.heap.pop();
                self.heap.push(candidate);
            }
        }
        let mut n = self.heap.len();
        area.header.victims_next.store(0, Relaxed);
        area.header.victims_len.store(n as u32, Relaxed);
        while let Some((_, last_used, frame, entry)) = self.heap.pop() {
            n -= 1;
            let victim = &area.victims[n];
            victim.frame.store(frame, Relaxed);
            victim.entry.store(entry, Relaxed);
            victim.last_used.store(last_used, Relaxed);
        }
        area.header.victims_len.load(Relaxed) > 0
    }

    fn clock(&self) -> Option<(u32, u32)> {
        let (area, hand) = (self.area, &self.area.header.hand);
        let kept = Kept::count(area);
        let count = area.frames.len();
        // Two rounds clear all bits; in the third, kept ones go as well.
        for step in 0..3 * count {
            let at = hand.load(Relaxed) as usize % count;
            hand.store(((at + 1) % count) as u32, Relaxed);
            let frame = &area.frames[at];
            let entry = frame.entry.load(Relaxed);
            if entry == NONE || frame.pins.load(Relaxed) != 0 || frame.state() == State::Loading {
                continue;
            }
            if step < 2 * count && (frame.used.swap(0, Relaxed) != 0 || kept.protects(&area.entries[entry as usize])) {
                continue;
            }
            return Some((at as u32, entry));
        }
        None
    }
}

/// The models that are kept, and whether their blocks still fit in half of the cache.
struct Kept {
    slots: u64,
}

impl Kept {
    fn count(area: &Area) -> Kept {
        let slots = area.header.kept.load(Relaxed);
        if slots == 0 {
            return Kept { slots };
        }
        let blocks = area.frames.iter().filter(|frame| {
            let entry = frame.entry.load(Relaxed);
            entry != NONE && area.entries[entry as usize].owners.load(Relaxed) & slots != 0
        });
        // With more than half, none is protected, until some have gone.
        let fits = blocks.count() <= area.frames.len() / 2;
        Kept { slots: if fits { slots } else { 0 } }
    }

    fn protects(&self, entry: &Entry) -> bool {
        entry.owners.load(Relaxed) & self.slots != 0
    }
}

/// Runs of the models in `owners`, all together (wrapping).
pub fn runs_of(area: &Area, owners: u64) -> u32 {
    ones(owners).fold(0, |sum: u32, n| sum.wrapping_add(area.slots[n].runs.load(Relaxed) as u32))
}

/// The slots of a mask.
fn ones(mut mask: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let first = mask.trailing_zeros() as usize;
        mask &= mask.wrapping_sub(1);
        (first < SLOTS).then_some(first)
    })
}

/// How often a block was used, and how many runs its owners made since it is known.
pub fn observed(area: &Area, entry: &Entry) -> (u32, u32) {
    since(entry, runs_of(area, entry.owners.load(Relaxed)))
}

fn since(entry: &Entry, runs: u32) -> (u32, u32) {
    let runs = runs.wrapping_sub(entry.runs_before.load(Relaxed));
    // Counters that are read one after the other can come out just below zero.
    (entry.accesses.load(Relaxed), if runs > u32::MAX / 2 { 0 } else { runs })
}

/// What the blocks of one sharing class have in common. Neighbours nearly always are of one class.
struct Class {
    owners: u64,
    rate: f32,
    runs: u32,
}

impl Class {
    fn new(area: &Area, owners: u64, rates: &[f32; SLOTS]) -> Class {
        Class { owners, rate: ones(owners).map(|n| rates[n]).sum(), runs: runs_of(area, owners) }
    }
}

/// The worth of a block under `sharing`: the expected number of its uses. That is the summed access rate of the models
/// that own it, times how likely a run of one touches it. Ties go by the hash, not by recency: models are walked from begin
/// to end, and on a walk that is longer than the cache recency is the worst of all orders.
fn sharing(entry: &Entry, class: &Class) -> u64 {
    let tie = entry.hash[1].load(Relaxed) >> 32;
    // A float that is not negative orders as its bits do; the sign bit is left for blocks that are kept.
    u64::from((class.rate * likelihood(entry, class)).max(0.0).to_bits()) << 32 | tie
}

/// How likely a run of one of its models touches a block, as was observed.
fn likelihood(entry: &Entry, class: &Class) -> f32 {
    let (accesses, runs) = since(entry, class.runs);
    if runs > FORGET {
        // Two processes that use the block meanwhile can lose a use: it is an estimate.
        entry.accesses.fetch_sub(accesses / 2, Relaxed);
        entry.runs_before.fetch_add(runs / 2, Relaxed);
    }
    // Runs that are going on have not come to the block yet; that must not make it worth less than those behind it.
    let likely = (accesses as f32 + 2.0) / (runs as f32 + 1.0);
    if likely > 0.8 { 1.0 } else { likely }
}
