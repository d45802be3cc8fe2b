//! Lookup: from a block's hash to its entry. A partition has entries and chains of its own, under one lock.
//!
//! An entry without a frame is a *ghost*: it remembers who uses a block that was evicted. When a block is new, the ghosts'
//! clock chooses the entry that is forgotten.

use super::layout::{Area, Entry, NONE, PARTITIONS, State};
use super::replace;
use crate::pg::shmem::LockGuard;
use std::sync::atomic::Ordering::Relaxed;

/// Number of the partition of a hash.
pub fn number_of(key: [u64; 4]) -> usize {
    (key[0] % PARTITIONS as u64) as usize
}

/// Number of the partition that an entry belongs to.
pub fn of_entry(area: &Area, entry: u32) -> usize {
    entry as usize / area.plan.entries
}

/// A partition whose lock is held.
pub struct Partition<'a> {
    area: &'a Area,
    number: usize,
    _lock: LockGuard,
}

impl<'a> Partition<'a> {
    /// Locks a partition.
    pub fn lock(area: &'a Area, number: usize, exclusive: bool) -> Partition<'a> {
        Partition { area, number, _lock: area.region.lock(number, exclusive) }
    }

    fn chain(&self, key: [u64; 4]) -> usize {
        self.number * self.area.plan.chains + (key[0] / PARTITIONS as u64) as usize % self.area.plan.chains
    }

    /// The entry of a block.
    pub fn find(&self, key: [u64; 4], bytes: u32) -> Option<u32> {
        let mut at = self.area.chains[self.chain(key)].load(Relaxed);
        while at != NONE {
            let entry = &self.area.entries[at as usize];
            if entry.key() == key && entry.bytes.load(Relaxed) == bytes {
                return Some(at);
            }
            at = entry.next.load(Relaxed);
        }
        None
    }

    /// Makes an entry without a frame; needs the exclusive lock. `None` if all the partition's entries have frames that
    /// are pinned.
    pub fn insert(&self, key: [u64; 4], bytes: u32) -> Option<u32> {
        let number = self.vacate()?;
        let entry = &self.area.entries[number as usize];
        for (word, value) in entry.hash.iter().zip(key) {
            word.store(value, Relaxed);
        }
        entry.frame.store(NONE, Relaxed);
        entry.touched.store(0, Relaxed);
        entry.owners.store(0, Relaxed);
        entry.accesses.store(0, Relaxed);
        entry.runs_before.store(0, Relaxed);
        entry.bytes.store(bytes, Relaxed);
        let chain = &self.area.chains[self.chain(key)];
        entry.next.store(chain.load(Relaxed), Relaxed);
        chain.store(number, Relaxed);
        Some(number)
    }

    /// Finds an entry that can be used anew: one that never was, a ghost that was not touched, any ghost, and at last one
    /// with a frame that nobody pins.
    fn vacate(&self) -> Option<u32> {
        let (count, hand) = (self.area.plan.entries, &self.area.header.ghost_hands[self.number]);
        let first = self.number * count;
        for step in 0..3 * count {
            let at = hand.load(Relaxed) as usize % count;
            hand.store(((at + 1) % count) as u32, Relaxed);
            let number = (first + at) as u32;
            let entry = &self.area.entries[number as usize];
            if entry.bytes.load(Relaxed) == 0 {
                return Some(number);
            }
            let frame = entry.frame.load(Relaxed);
            if frame == NONE {
                if entry.touched.swap(0, Relaxed) != 0 {
                    continue;
                }
            } else if step < 2 * count || !self.detach(number, frame) {
                continue;
            } else {
                let_free(self.area, frame);
            }
            self.unlink(number, entry);
            return Some(number);
        }
        None
    }

    /// Takes a frame that nobody pins away from its entry; needs the exclusive lock. The frame is then the caller's:
    /// taken, with one pin.
    pub fn detach(&self, entry: u32, frame: u32) -> bool {
        let state = &self.area.frames[frame as usize];
        if state.entry.load(Relaxed) != entry
            || !matches!(state.state(), State::Valid | State::Abandoned)
            || !state.take()
        {
            return false;
        }
        state.state.store(State::Taken as u32, Relaxed);
        state.entry.store(NONE, Relaxed);
        self.area.entries[entry as usize].frame.store(NONE, Relaxed);
        true
    }

    /// Gives a taken frame to an entry without one; needs the exclusive lock. The frame is then being loaded.
    pub fn attach(&self, entry: u32, frame: u32) {
        let state = &self.area.frames[frame as usize];
        state.entry.store(entry, Relaxed);
        state.state.store(State::Loading as u32, Relaxed);
        self.area.entries[entry as usize].frame.store(frame, Relaxed);
    }

    fn unlink(&self, number: u32, entry: &Entry) {
        let mut from = &self.area.chains[self.chain(entry.key())];
        loop {
            let at = from.load(Relaxed);
            if at == number {
                break;
            }
            if at == NONE {
                return; // the check would tell
            }
            from = &self.area.entries[at as usize].next;
        }
        from.store(entry.next.load(Relaxed), Relaxed);
        entry.bytes.store(0, Relaxed);
    }
}

fn let_free(area: &Area, frame: u32) {
    let state = &area.frames[frame as usize];
    state.state.store(State::Free as u32, Relaxed);
    state.pins.store(0, std::sync::atomic::Ordering::Release);
    replace::set_free(area, frame);
}
