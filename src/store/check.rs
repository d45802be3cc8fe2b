//! What must hold in a block store, looked at block by block.

use super::format::{HEAD_PAGES, Locator, State, position_of};
use super::{directory, locators, payload, small, tree, value_hash};
use crate::pg::toast_index::ToastIndexes;
use crate::pg::varlena;
use crate::pg::{interrupt, relation};
use pgrx::pg_sys;
use std::collections::{HashMap, HashSet};
use tensor_blocks::Block;

/// Blocks that rows may reference: id to the `(ext_info, raw_len)` of their references.
pub type LiveBlocks = HashMap<u32, (u32, u32)>;

/// Calls `report(problem, block id, detail)` for each broken invariant of the store `rel`, and returns its live blocks.
///
/// What a crash or an ERROR leaves behind by design is not reported: blocks that are still reserved or dying, and live
/// ones that no row references. Nobody else may change the store meanwhile.
pub fn check(rel: pg_sys::Relation, report: &mut dyn FnMut(&str, Option<u32>, String)) -> LiveBlocks {
    let mut live = LiveBlocks::new();
    let Some(meta) = locators::read_meta(rel) else { return live };
    let pages = relation::pages(rel);
    let indexes = ToastIndexes::open(rel, pg_sys::AccessShareLock);

    let mut ranges: Vec<(u64, u64, u32)> = Vec::new();
    let mut contents: HashMap<([u8; 32], u32), u32> = HashMap::new();
    let mut all: HashMap<u32, Locator> = HashMap::new();
    locators::for_each(rel, |id, locator| {
        all.insert(id, *locator);
    });
    let mut ids: Vec<u32> = all.keys().copied().collect();
    ids.sort_unstable();
    let mut bytes = Vec::new();
    for id in ids {
        interrupt::check();
        let locator = &all[&id];
        if id == 0 || (meta.next_block_id != 0 && id >= meta.next_block_id) {
            report("block id not handed out", Some(id), format!("The next id is {}.", meta.next_block_id));
        }
        let range = locator.range();
        let limit = position_of(u64::from(pages));
        let Some(state) = locator.state() else {
            report("unknown state", Some(id), format!("State {}.", locator.state));
            continue;
        };
        // A reservation may lie beyond the file's end if the crash came before the pages.
        if range.start < position_of(u64::from(HEAD_PAGES)) || (range.end > limit && state == State::Live) {
            report(
                "payload outside the file",
                Some(id),
                format!("Page {}, {} bytes.", locator.page, locator.stored_len()),
            );
            continue;
        }
        ranges.push((range.start, range.end, id));
        if state != State::Live {
            continue;
        }
        live.insert(id, (locator.reference(id).ext_info, locator.raw_len));
        if let Some(other) = contents.insert((locator.hash, locator.raw_len), id) {
            report("duplicate content", Some(id), format!("Block {other} has the same hash."));
        }
        let chunk_id = directory::chunk_id(&meta.hash_key, &locator.hash);
        if indexes.find(chunk_id, |tid| (directory::block_id_of(tid) == id).then_some(())).is_none() {
            report("not in the directory", Some(id), "REINDEX of the block store mends it.".into());
        }
        bytes.resize(locator.stored_len() as usize, 0);
        match payload::try_read(rel, locator.page, u64::from(locator.offset), &mut bytes) {
            Err(page) => report("empty page", Some(id), format!("Page {page} should hold the block.")),
            Ok(()) => {
                if let Some(detail) = hash_fault(locator, &bytes) {
                    report("hash mismatch", Some(id), detail);
                }
            }
        }
    }

    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        if pair[1].0 < pair[0].1 {
            report("overlapping blocks", Some(pair[1].2), format!("It overlaps block {}.", pair[0].2));
        }
    }
    for page in tree::tree_pages(rel) {
        let (start, end) = (position_of(page.into()), position_of(u64::from(page) + 1));
        let after = ranges.partition_point(|range| range.1 <= start);
        if let Some(range) = ranges.get(after).filter(|range| range.0 < end) {
            report("overlapping blocks", Some(range.2), format!("It overlaps page {page} of the locators."));
        }
    }

    let mut seen = HashSet::new();
    indexes.for_each(|tid| {
        let id = directory::block_id_of(tid);
        if !all.contains_key(&id) {
            report("directory entry without a block", Some(id), String::new());
        }
        if !seen.insert(id) {
            report("two directory entries", Some(id), String::new());
        }
    });
    live
}

/// What is wrong with the stored bytes of a block; `None` if they have the locator's hash.
fn hash_fault(locator: &Locator, stored: &[u8]) -> Option<String> {
    let plain = if locator.encoding != 0 {
        match small::value(locator, stored) {
            Ok(plain) => plain,
            Err(message) => return Some(message),
        }
    } else if locator.stored_len() < locator.raw_len {
        match varlena::decompress(stored, locator.raw_len) {
            Ok(plain) => plain,
            Err(message) => return Some(message),
        }
    } else {
        stored.to_vec()
    };
    if plain.len() != locator.raw_len as usize {
        return Some(format!("{} bytes where {} are expected.", plain.len(), locator.raw_len));
    }
    // The locator does not say which of the two kinds of hash it has.
    let is_block = || Block::decode(&plain).is_ok_and(|block| block.hash().0 == locator.hash);
    (value_hash(&plain) != locator.hash && !is_block()).then(|| "The bytes have another hash.".into())
}
