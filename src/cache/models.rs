//! Models that are being used: who owns a block, and how often each runs.
//!
//! A model has one of 64 slots, so that a block's owners are a bit mask. Access rates are numbers of runs that decay by
//! runs of all models, not by the clock: what counts is how often a model runs beside the others.
//!
//! The slot of a model that did not run for long goes to the next one; with more active models than slots those that
//! come late share slot 0, where a block's own accesses tell how likely it is to be used (see `replace`).

use super::area::{area, existing};
use super::layout::{Area, NONE, PARTITIONS, SLOTS, SLOTS_LOCK, Slot};
use super::partition::Partition;
use pgrx::pg_sys::Oid;
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::Ordering::Relaxed;

/// Runs after which a run counts half.
const HALF_LIFE: f64 = 512.0;
/// What the rates of all models add up to in the long run.
const WINDOW: f64 = HALF_LIFE / std::f64::consts::LN_2;
/// Average gaps between its runs for which a model may be silent: by chance it is so once in 55 times.
const PATIENCE: f64 = 4.0;
/// Runs without one of its own after which a model loses its slot, if another needs one.
const IDLE: u64 = 1024;
/// Most models that can be kept.
const KEPT: u32 = 32;

/// A model that is being used. Ask for it anew in each run: the slot may have been given to another model, and then it
/// counts for nobody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelSlot {
    index: u32,
    generation: u32,
}

thread_local! {
    static KNOWN: RefCell<HashMap<(Oid, [u8; 32]), ModelSlot>> = RefCell::new(HashMap::new());
}

impl ModelSlot {
    /// Its number and the slot, if it still is this model's.
    pub(super) fn of(self, area: &Area) -> Option<(usize, &'static Slot)> {
        let slot = &area.slots[self.index as usize];
        (slot.generation.load(Relaxed) == self.generation).then_some((self.index as usize, slot))
    }
}

pub(super) fn words(hash: &[u8; 32]) -> [u64; 4] {
    super::BlockKey { hash: *hash, bytes: 0 }.words()
}

fn find(area: &Area, database: Oid, hash: [u64; 4]) -> Option<usize> {
    (1..SLOTS).find(|&n| {
        let slot = &area.slots[n];
        slot.database.load(Relaxed) == database.to_u32() && slot.hash.each_ref().map(|w| w.load(Relaxed)) == hash
    })
}

/// The slot of a model, by its content hash. Cheap when it was asked for before.
pub fn model_slot(database: Oid, content_hash: &[u8; 32]) -> ModelSlot {
    let area = area();
    let key = (database, *content_hash);
    let known = KNOWN.with_borrow(|known| known.get(&key).copied());
    if let Some(slot) = known.filter(|slot| slot.index != 0 && slot.of(area).is_some()) {
        return slot;
    }
    let slot = register(area, database, words(content_hash));
    KNOWN.with_borrow_mut(|known| {
        if known.len() >= 4 * SLOTS {
            known.clear();
        }
        known.insert(key, slot);
    });
    slot
}

fn register(area: &Area, database: Oid, hash: [u64; 4]) -> ModelSlot {
    let _lock = area.region.lock(SLOTS_LOCK, true);
    let of = |n: usize| ModelSlot { index: n as u32, generation: area.slots[n].generation.load(Relaxed) };
    if let Some(n) = find(area, database, hash) {
        return of(n);
    }
    let Some(n) = vacant(area) else { return of(0) };
    let slot = &area.slots[n];
    if slot.database.load(Relaxed) != 0 {
        forget(area, n);
    }
    slot.generation.fetch_add(1, Relaxed);
    for (word, value) in slot.hash.iter().zip(hash) {
        word.store(value, Relaxed);
    }
    slot.rate.store(0, Relaxed);
    slot.rated_at.store(area.header.runs.load(Relaxed), Relaxed);
    slot.runs.store(0, Relaxed);
    for counter in slot.counters.all() {
        counter.store(0, Relaxed);
    }
    slot.database.store(database.to_u32(), Relaxed);
    of(n)
}

/// A slot that is not used, or that of the model that did not run for longest. Under the slots lock.
fn vacant(area: &Area) -> Option<usize> {
    if let Some(n) = (1..SLOTS).find(|&n| area.slots[n].database.load(Relaxed) == 0) {
        return Some(n);
    }
    let (now, kept) = (area.header.runs.load(Relaxed), area.header.kept.load(Relaxed));
    let last_run = |n: &usize| area.slots[*n].rated_at.load(Relaxed);
    let oldest = (1..SLOTS).filter(|n| kept & (1 << n) == 0).min_by_key(last_run)?;
    (now.saturating_sub(last_run(&oldest)) >= IDLE).then_some(oldest)
}

/// Takes a model out of the owners of all blocks. Under the slots lock.
fn forget(area: &Area, n: usize) {
    for number in 0..PARTITIONS {
        let _partition = Partition::lock(area, number, true);
        for entry in &area.entries[number * area.plan.entries..(number + 1) * area.plan.entries] {
            if entry.owners.load(Relaxed) & (1 << n) == 0 {
                continue;
            }
            // Of the runs that were counted, those of the other models stay; how likely the block is used in one too.
            let (accesses, runs) = super::replace::observed(area, entry);
            let left = entry.owners.fetch_and(!(1 << n), Relaxed) & !(1 << n);
            let seen = runs.clamp(1, 16);
            let likely = u64::from(accesses.min(runs.max(1))) * u64::from(seen) / u64::from(runs.max(1));
            entry.accesses.store(likely as u32, Relaxed);
            entry.runs_before.store(super::replace::runs_of(area, left).wrapping_sub(seen), Relaxed);
        }
    }
}

/// One run of a model, for the access rates.
pub fn note_run(slot: ModelSlot) {
    let area = area();
    let now = area.header.runs.fetch_add(1, Relaxed) + 1;
    let Some((_, slot)) = slot.of(area) else { return };
    slot.runs.fetch_add(1, Relaxed);
    let rate = rate_at(slot, now) + 1.0;
    // Two processes at the same moment can lose a run of one: it is an estimate.
    slot.rate.store(rate.to_bits(), Relaxed);
    slot.rated_at.store(now, Relaxed);
}

/// The access rate of a model, in runs per `WINDOW` runs of all. One that did not run for several times as long as it used
/// to wait between two runs has probably stopped, and loses its rate at once instead of by decay.
fn expected_rate(slot: &Slot, now: u64) -> f64 {
    let rate = rate_at(slot, now);
    let gaps = now.saturating_sub(slot.rated_at.load(Relaxed)) as f64 * rate / WINDOW;
    rate * (PATIENCE - gaps).min(0.0).exp()
}

/// The decayed number of a model's runs.
fn rate_at(slot: &Slot, now: u64) -> f64 {
    let age = now.saturating_sub(slot.rated_at.load(Relaxed)) as f64;
    f64::from_bits(slot.rate.load(Relaxed)) * (-age / HALF_LIFE).exp2()
}

/// The access rates of all slots.
pub(super) fn rates(area: &Area) -> [f32; SLOTS] {
    let now = area.header.runs.load(Relaxed);
    std::array::from_fn(|n| expected_rate(&area.slots[n], now) as f32)
}

/// Marks a model: its blocks are evicted last, for at most half of the cache. False if too many are marked already.
pub fn keep(database: Oid, content_hash: &[u8; 32]) -> bool {
    let area = area();
    let slot = model_slot(database, content_hash);
    let _lock = area.region.lock(SLOTS_LOCK, true);
    let Some((n, _)) = slot.of(area).filter(|(n, _)| *n != 0) else { return false };
    let kept = area.header.kept.load(Relaxed) | 1 << n;
    if kept.count_ones() > KEPT {
        return false;
    }
    area.header.kept.store(kept, Relaxed);
    true
}

/// Takes the mark away. False if there was none.
pub fn release(database: Oid, content_hash: &[u8; 32]) -> bool {
    let Some(area) = existing() else { return false };
    let _lock = area.region.lock(SLOTS_LOCK, true);
    let Some(n) = find(area, database, words(content_hash)) else { return false };
    area.header.kept.fetch_and(!(1 << n), Relaxed) & (1 << n) != 0
}

const _: () = assert!(NONE == u32::MAX && SLOTS == u64::BITS as usize);
