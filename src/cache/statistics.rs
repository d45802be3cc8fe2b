//! Statistics of predictions by model, beside the cache in shared memory.
//!
//! A model gets a row when it is first predicted with, and keeps it until the statistics are reset; what comes when all rows
//! are taken is not counted. Without shared memory there are none.

use super::area::existing;
use super::layout::{Area, SLOTS_LOCK, Stat, add};
use super::models::words;
use pgrx::pg_sys::Oid;
use std::sync::atomic::Ordering::Relaxed;

/// What one run of a model, or its failure, adds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Prediction {
    /// Calls of the function, as the query has them.
    pub calls: u64,
    /// Rows.
    pub rows: u64,
    /// Time of the run.
    pub nanoseconds: u64,
    /// Whether it ended with an error.
    pub failed: bool,
}

/// A model's counts.
pub struct StatView {
    /// Its database.
    pub database: Oid,
    /// Its content hash.
    pub content_hash: [u8; 32],
    /// Calls, rows, runs, nanoseconds, errors.
    pub counts: [u64; 5],
}

fn is(stat: &Stat, database: Oid, hash: [u64; 4]) -> bool {
    stat.database.load(Relaxed) == database.to_u32() && stat.hash.each_ref().map(|word| word.load(Relaxed)) == hash
}

fn row(area: &Area, database: Oid, hash: [u64; 4]) -> Option<&'static Stat> {
    let stats = &area.header.stats;
    // Rows are taken in order, so that the first free one ends the search.
    let find =
        || stats.iter().take_while(|stat| stat.database.load(Relaxed) != 0).find(|stat| is(stat, database, hash));
    if let Some(stat) = find() {
        return Some(stat);
    }
    let _lock = area.region.lock(SLOTS_LOCK, true);
    if let Some(stat) = find() {
        return Some(stat);
    }
    let stat = stats.iter().find(|stat| stat.database.load(Relaxed) == 0)?;
    for (word, value) in stat.hash.iter().zip(hash) {
        word.store(value, Relaxed);
    }
    stat.database.store(database.to_u32(), Relaxed);
    Some(stat)
}

/// Counts a prediction.
pub fn note(database: Oid, content_hash: &[u8; 32], prediction: Prediction) {
    let Some(stat) = existing().and_then(|area| row(area, database, words(content_hash))) else { return };
    let Prediction { calls, rows, nanoseconds, failed } = prediction;
    for (counter, n) in stat.counts.iter().zip([calls, rows, 1, nanoseconds, u64::from(failed)]) {
        add(counter, n);
    }
}

/// The counts of all models.
pub fn statistics() -> Vec<StatView> {
    let Some(area) = existing() else { return Vec::new() };
    let used = area.header.stats.iter().take_while(|stat| stat.database.load(Relaxed) != 0);
    used.map(|stat| {
        let mut content_hash = [0; 32];
        for (bytes, word) in content_hash.chunks_exact_mut(8).zip(&stat.hash) {
            bytes.copy_from_slice(&word.load(Relaxed).to_le_bytes());
        }
        let database = Oid::from(stat.database.load(Relaxed));
        StatView { database, content_hash, counts: stat.counts.each_ref().map(|counter| counter.load(Relaxed)) }
    })
    .collect()
}

/// Forgets all of it. What is counted at this moment may be counted for another model.
pub fn reset_statistics() {
    let Some(area) = existing() else { return };
    let _lock = area.region.lock(SLOTS_LOCK, true);
    for stat in &area.header.stats {
        stat.database.store(0, Relaxed);
        stat.counts.iter().for_each(|counter| counter.store(0, Relaxed));
    }
}
