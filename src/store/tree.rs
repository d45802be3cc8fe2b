//! Pages of the tree of locators as pages: which there are, and those that are free.
//!
//! A locator page none of whose locators is in use is taken out of the tree and goes to a chain of free pages, from which the
//! tree and the list of gaps are served first. A reader that was on its way to it sees by the page's own number that it is no
//! longer what it came for.

use super::format::{
    FREE_MAGIC, LOCATORS, Locator, MAP_MAGIC, Meta, Path, check_leaf, check_map_header, map_entry, next_free_page,
    set_map_entry, write_free_page,
};
use super::locators::{
    LEAF, LOWER, META_PAGE, UPPER, check, entries, existing_lower, for_each_leaf, meta_of, read_meta,
};
use crate::pg::buffer::{Pinned, init_page};
use crate::pg::relation;
use crate::pg::wal::GenericRecord;
use pgrx::pg_sys;
use std::collections::HashSet;

/// Frees the pages of locators none of which is in use, but for those to which new ids will come. The caller holds
/// ShareUpdateExclusive on the store.
pub fn free_empty_leaves(rel: pg_sys::Relation) {
    let Some(meta) = read_meta(rel) else { return };
    let mut empty: Vec<u32> = Vec::new();
    for_each_leaf(rel, &meta, |first, leaf| {
        let past = meta.next_block_id == 0 || u64::from(first) + u64::from(LOCATORS) <= u64::from(meta.next_block_id);
        if past && is_empty(Pinned::read(rel, leaf).share().bytes()) {
            empty.push(first / LOCATORS);
        }
    });
    for number in empty {
        crate::pg::interrupt::check();
        let path = Path::of(number * LOCATORS);
        // Metapage, map page, locator page: the order in which a reservation locks them.
        let meta_pin = Pinned::read(rel, META_PAGE);
        let mut meta_page = meta_pin.exclusive();
        let mut meta = meta_of(rel, meta_page.bytes());
        let lower_number = existing_lower(rel, &meta, &path);
        if lower_number == META_PAGE {
            continue; // damage: no page can be locked twice
        }
        let lower_pin = Pinned::read(rel, lower_number);
        let mut lower = lower_pin.exclusive();
        check(rel, lower_number, check_map_header(lower.bytes(), MAP_MAGIC, LOWER));
        let leaf = map_entry(lower.bytes(), path.lower);
        if leaf == META_PAGE || leaf == lower_number {
            continue;
        }
        let leaf_pin = Pinned::read(rel, leaf);
        let mut leaf_page = leaf_pin.exclusive();
        check(rel, leaf, check_leaf(leaf_page.bytes(), number));
        if !is_empty(leaf_page.bytes()) {
            continue;
        }
        let record = GenericRecord::start(rel);
        set_map_entry(record.page(&mut lower, false), path.lower, 0);
        let copy = record.page(&mut leaf_page, true);
        init_page(copy);
        write_free_page(copy, meta.map_free);
        meta.map_free = leaf;
        meta.write(record.page(&mut meta_page, false));
        record.finish();
    }
}

fn is_empty(page: &[u8]) -> bool {
    (0..LOCATORS).all(|slot| Locator::read(page, slot).stored_len() == 0)
}

/// Pages of the chain of free ones, at most `count`. It ends where it is damaged: then these pages stay unused. The caller
/// keeps the metapage from changing.
pub fn free_pages(rel: pg_sys::Relation, meta: &Meta, count: usize) -> Vec<u32> {
    if meta.map_free == 0 || count == 0 {
        return Vec::new();
    }
    let (mut pages, mut seen, mut next) = (Vec::new(), HashSet::new(), meta.map_free);
    let end = relation::pages(rel);
    while (META_PAGE + 1..end).contains(&next) && pages.len() < count && seen.insert(next) {
        let pin = Pinned::read(rel, next);
        let page = pin.share();
        if check_map_header(page.bytes(), FREE_MAGIC, LEAF).is_err() {
            break;
        }
        pages.push(next);
        next = next_free_page(page.bytes());
    }
    pages
}

/// Takes up to `count` pages off the chain of free ones, in `meta`; the caller writes it.
pub fn take_free_pages(rel: pg_sys::Relation, meta: &mut Meta, count: usize) -> Vec<u32> {
    let pages = free_pages(rel, meta, count);
    match pages.last() {
        Some(&last) => meta.map_free = next_free_page(Pinned::read(rel, last).share().bytes()),
        None if count > 0 => meta.map_free = 0,
        None => {}
    }
    pages
}

/// Every page of the tree below the metapage, also the free ones: as one look at the metapage has them.
pub fn tree_pages(rel: pg_sys::Relation) -> Vec<u32> {
    let (meta, mut pages) = {
        let pin = Pinned::read(rel, META_PAGE);
        let page = pin.share();
        let meta = meta_of(rel, page.bytes());
        // The chain changes under the metapage's lock only.
        (meta, free_pages(rel, &meta, usize::MAX))
    };
    for &upper in meta.roots.iter().filter(|page| **page != 0) {
        pages.push(upper);
        for (_, lower) in entries(rel, upper, UPPER) {
            pages.push(lower);
            pages.extend(entries(rel, lower, LOWER).into_iter().map(|(_, leaf)| leaf));
        }
    }
    pages
}
