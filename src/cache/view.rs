//! What is in the cache, for views. Read without locks: each number is right by itself, at its moment.

use super::area::existing;
use super::layout::{Counters, FRAME_BYTES, NONE, SLOTS, State};
use super::settings;
use pgrx::pg_sys::Oid;
use std::sync::atomic::Ordering::Relaxed;

/// Hits, misses, loads, bytes loaded, evictions, waits, fallbacks.
pub type Counts = [u64; 7];

/// A frame that holds a block.
pub struct FrameView {
    /// Its number.
    pub frame: u32,
    /// Bytes of its block.
    pub bytes: u32,
    /// Pins.
    pub pins: u32,
    /// `valid`, `loading` or `abandoned`.
    pub state: &'static str,
    /// The models that used it: database and content hash.
    pub owners: Vec<(Oid, [u8; 32])>,
}

/// A model that was used.
pub struct ModelView {
    /// Its database.
    pub database: Oid,
    /// Its content hash.
    pub content_hash: [u8; 32],
    /// Runs.
    pub runs: u64,
    /// Whether it is marked to be kept.
    pub kept: bool,
    /// Of this model's blocks.
    pub counts: Counts,
    /// Frames with blocks of it, shared ones too.
    pub frames: u64,
    /// Bytes of these blocks.
    pub bytes: u64,
}

/// The whole cache.
#[derive(Default)]
pub struct Totals {
    /// Whether all processes share it.
    pub shared: bool,
    /// Frames that there are.
    pub frames: u64,
    /// Frames that hold a block.
    pub frames_used: u64,
    /// Frames that are pinned.
    pub frames_pinned: u64,
    /// Bytes of all frames.
    pub bytes: u64,
    /// Bytes of the blocks in them.
    pub bytes_used: u64,
    /// Since they were reset.
    pub counts: Counts,
    /// When that was, in PostgreSQL's microseconds.
    pub reset_at: Option<i64>,
}

fn counts(counters: &Counters) -> Counts {
    counters.all().map(|counter| counter.load(Relaxed))
}

fn hash_of(words: [u64; 4]) -> [u8; 32] {
    let mut hash = [0; 32];
    for (bytes, word) in hash.chunks_exact_mut(8).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    hash
}

fn identity(slot: &super::layout::Slot) -> Option<(Oid, [u8; 32])> {
    let database = slot.database.load(Relaxed);
    (database != 0).then(|| (Oid::from(database), hash_of(slot.hash.each_ref().map(|word| word.load(Relaxed)))))
}

/// The frames that hold a block. Empty if nothing was cached yet.
pub fn frames() -> Vec<FrameView> {
    let Some(area) = existing() else { return Vec::new() };
    let mut found = Vec::new();
    for (n, frame) in area.frames.iter().enumerate() {
        let (state, entry) = (frame.state(), frame.entry.load(Relaxed));
        if entry == NONE || matches!(state, State::Free | State::Taken) {
            continue;
        }
        let entry = &area.entries[entry as usize];
        let owners = entry.owners.load(Relaxed);
        found.push(FrameView {
            frame: n as u32,
            bytes: entry.bytes.load(Relaxed),
            pins: frame.pins.load(Relaxed),
            state: state.name(),
            owners: (1..SLOTS).filter(|s| owners & (1 << s) != 0).filter_map(|s| identity(&area.slots[s])).collect(),
        });
    }
    found
}

/// The models that have a slot.
pub fn models() -> Vec<ModelView> {
    let Some(area) = existing() else { return Vec::new() };
    let mut sizes = [(0u64, 0u64); SLOTS];
    for frame in area.frames {
        let entry = frame.entry.load(Relaxed);
        if entry == NONE {
            continue;
        }
        let entry = &area.entries[entry as usize];
        let (owners, bytes) = (entry.owners.load(Relaxed), entry.bytes.load(Relaxed));
        for (_, size) in sizes.iter_mut().enumerate().filter(|(s, _)| owners & (1 << s) != 0) {
            *size = (size.0 + 1, size.1 + u64::from(bytes));
        }
    }
    let kept = area.header.kept.load(Relaxed);
    let view = |s: usize| {
        let slot = &area.slots[s];
        let (database, content_hash) = identity(slot)?;
        Some(ModelView {
            database,
            content_hash,
            runs: slot.runs.load(Relaxed),
            kept: kept & (1 << s) != 0,
            counts: counts(&slot.counters),
            frames: sizes[s].0,
            bytes: sizes[s].1,
        })
    };
    (1..SLOTS).filter_map(view).collect()
}

/// Counts of the whole cache.
pub fn totals() -> Totals {
    let Some(area) = existing() else {
        // This process would have one of its own, and has none yet.
        let frames = settings::frames() as u64;
        return Totals { frames, bytes: frames * FRAME_BYTES as u64, ..Totals::default() };
    };
    let (mut used, mut pinned, mut bytes) = (0, 0, 0);
    for frame in area.frames {
        let entry = frame.entry.load(Relaxed);
        if entry != NONE {
            used += 1;
            bytes += u64::from(area.entries[entry as usize].bytes.load(Relaxed));
        }
        pinned += u64::from(frame.pins.load(Relaxed) != 0);
    }
    let reset = area.header.reset_at.load(Relaxed) as i64;
    Totals {
        shared: area.region.is_shared(),
        frames: area.frames.len() as u64,
        frames_used: used,
        frames_pinned: pinned,
        bytes: (area.frames.len() * FRAME_BYTES) as u64,
        bytes_used: bytes,
        counts: counts(&area.header.counters),
        reset_at: (reset != 0).then_some(reset),
    }
}

/// Sets the counts to zero.
pub fn reset(now: i64) {
    let Some(area) = existing() else { return };
    for counter in area.header.counters.all() {
        counter.store(0, Relaxed);
    }
    for slot in area.slots {
        for counter in slot.counters.all() {
            counter.store(0, Relaxed);
        }
    }
    area.header.reset_at.store(now as u64, Relaxed);
}
