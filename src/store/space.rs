//! Free space in tensor pages.
//!
//! The locators are the truth: what no locator, tree page or gap page takes is free. VACUUM computes the free runs
//! (*gaps*) from them and writes a list; who reserves space takes runs from the list, then fresh extents. What an ERROR
//! or a crash loses of the list, the next VACUUM finds again.

use super::fault;
use super::format::{
    EXTENT_PAGES, GAP_MAGIC, GAPS, Gap, GapPage, HEAD_PAGES, Meta, check_map_header, extent_of, extent_start,
    position_of,
};
use super::locators::{self, META_PAGE, check, meta_of};
use super::reserve::{place, set_maps_aside};
use super::tree;
use crate::pg::buffer::{Exclusive, PAGE_BYTES, Pinned, init_page};
use crate::pg::extend::extend_to;
use crate::pg::wal::GenericRecord;
use crate::pg::{interrupt, relation};
use pgrx::pg_sys;
use std::collections::HashSet;

/// Pages of gaps in which a run is looked for before a fresh extent is taken.
const PAGES_TRIED: usize = 8;
/// Shorter gaps are not listed.
const SHORTEST: u64 = 64;

/// Makes a gap that fits `len` bytes the run that is being filled, if the list has one near its beginning. What is left
/// of the old run goes to the list in its place. Called, and returns, under the metapage's exclusive lock.
pub fn take_gap(rel: pg_sys::Relation, meta_page: &mut Exclusive<'_>, meta: Meta, len: u32) -> Meta {
    let mut number = meta.gap_page;
    for _ in 0..PAGES_TRIED {
        if number == 0 {
            break;
        }
        let pages = relation::pages(rel);
        let pin = (META_PAGE + 1..pages).contains(&number).then(|| Pinned::read(rel, number));
        let page = pin.as_ref().map(Pinned::exclusive);
        let Some(mut page) = page.filter(|page| check_map_header(page.bytes(), GAP_MAGIC, 0).is_ok()) else {
            // Damage that the next VACUUM mends: until then there is no list.
            return Meta { gap_page: 0, ..meta };
        };
        let mut list = GapPage::read(page.bytes());
        let fits = list.usable(meta.next_extent).find_map(|(i, gap)| Some((i, place(gap.start, gap.end, len)?)));
        let Some((at, start)) = fits else {
            number = list.next;
            continue;
        };
        let gap = list.gaps.remove(at);
        for left in [Gap { start: gap.start, end: start }, Gap { start: meta.fill_at, end: meta.fill_end }] {
            if left.end.saturating_sub(left.start) >= SHORTEST && list.gaps.len() < GAPS {
                let at = list.gaps.partition_point(|other| other.start < left.start);
                list.gaps.insert(at, left);
            }
        }
        let mut after = Meta { fill_at: start, fill_end: gap.end, ..meta };
        if list.gaps.is_empty() && number == meta.gap_page {
            after.gap_page = list.next;
        }
        let record = GenericRecord::start(rel);
        list.write(record.page(&mut page, false));
        after.write(record.page(meta_page, false));
        record.finish();
        return after;
    }
    meta
}

/// Takes the list and the run that is being filled away from writers, so that whatever they reserve from now on lies in
/// extents from the result's `next_extent` on.
pub fn detach(rel: pg_sys::Relation) -> Meta {
    locators::edit_meta(rel, |meta| {
        meta.gap_page = 0;
        (meta.fill_at, meta.fill_end) = (0, 0);
    })
}

/// What is in use below the extents of a detached metapage.
pub struct Occupied {
    /// Free runs, lowest first.
    pub gaps: Vec<Gap>,
    /// One past the last page that is in use.
    pub end_page: u32,
    /// Blocks that have a locator, and their stored bytes.
    pub blocks: u64,
    pub bytes: u64,
}

/// Computes the free runs from the locators.
pub fn survey(rel: pg_sys::Relation, detached: &Meta) -> Occupied {
    let limit = position_of(extent_start(detached.next_extent));
    let mut taken: Vec<(u64, u64)> = Vec::new();
    let (mut blocks, mut bytes) = (0, 0);
    locators::for_each(rel, |id, locator| {
        let range = locator.range();
        // Ids and extents that writers took meanwhile are counted by them.
        if range.end <= limit {
            taken.push((range.start, range.end));
        }
        if detached.next_block_id == 0 || id < detached.next_block_id {
            blocks += 1;
            bytes += u64::from(locator.stored_len());
        }
    });
    // Extents with pages of the tree or of gaps are theirs whole.
    let meta = locators::read_meta(rel).unwrap_or(*detached);
    let mut maps = tree::tree_pages(rel);
    maps.extend(chain(rel, &meta));
    if detached.map_end > HEAD_PAGES {
        maps.push(detached.map_end - 1);
    }
    let mut extents: Vec<u32> =
        maps.iter().filter(|&&page| page >= HEAD_PAGES).map(|&page| extent_of(position_of(page.into()))).collect();
    extents.sort_unstable();
    extents.dedup();
    let extent_range = |extent: u32| (position_of(extent_start(extent)), position_of(extent_start(extent + 1)));
    taken.extend(extents.into_iter().map(extent_range).filter(|range| range.1 <= limit));
    taken.sort_unstable();

    let mut gaps = Vec::new();
    let mut at = position_of(u64::from(HEAD_PAGES));
    for (start, end) in taken.into_iter().chain([(limit, limit)]) {
        let gap = Gap { start: at.next_multiple_of(8), end: start };
        if gap.end >= gap.start + SHORTEST {
            gaps.push(gap);
        }
        at = at.max(end);
    }
    let end_page = match gaps.last() {
        Some(gap) if gap.end == limit => gap.start.div_ceil(PAGE_BYTES as u64),
        _ => limit / PAGE_BYTES as u64,
    };
    Occupied { gaps, end_page: end_page as u32, blocks, bytes }
}

/// Pages of the chain of gaps. It ends where it is damaged: the list is written anew anyway.
fn chain(rel: pg_sys::Relation, meta: &Meta) -> Vec<u32> {
    let mut pages = Vec::new();
    let mut seen = HashSet::new();
    let mut number = meta.gap_first;
    while (META_PAGE + 1..relation::pages(rel)).contains(&number) && seen.insert(number) {
        interrupt::check();
        let pin = Pinned::read(rel, number);
        let page = pin.share();
        if check_map_header(page.bytes(), GAP_MAGIC, 0).is_err() {
            break;
        }
        pages.push(number);
        number = GapPage::read(page.bytes()).next;
    }
    pages
}

/// Writes the list of gaps and gives it to writers. `before` is the metapage as it was when it was detached.
///
/// Where the list needs more pages than the file has for it, the largest gaps are given first, and then the file grows: if
/// the disk is full, that much can be used. A page is written before the one that points to it.
pub fn attach(rel: pg_sys::Relation, before: &Meta, occupied: &Occupied) {
    let mut pages = chain(rel, before);
    let wanted = occupied.gaps.len().div_ceil(GAPS);
    while pages.len() < wanted
        && let Some(page) = take_map_page(rel, false)
    {
        pages.push(page);
    }
    let (first, rest) = largest(&occupied.gaps, pages.len() * GAPS);
    write_chain(rel, &pages, &first);
    locators::edit_meta(rel, |meta| {
        meta.gap_first = pages.first().copied().unwrap_or(0);
        meta.gap_page = if first.is_empty() { 0 } else { meta.gap_first };
        // Exact again, whatever a crash has left out.
        meta.stored_blocks = occupied.blocks + meta.stored_blocks.saturating_sub(before.stored_blocks);
        meta.stored_bytes = occupied.bytes + meta.stored_bytes.saturating_sub(before.stored_bytes);
    });
    if rest.is_empty() {
        return;
    }

    let mut more: Vec<u32> = Vec::new();
    while more.len() < rest.len().div_ceil(GAPS) {
        more.extend(take_map_page(rel, true));
    }
    write_chain(rel, &more, &rest);
    if let Some(&last) = pages.last() {
        // Writers may have taken gaps off it.
        let pin = Pinned::read(rel, last);
        let mut page = pin.exclusive();
        check(rel, last, check_map_header(page.bytes(), GAP_MAGIC, 0));
        let list = GapPage { next: more[0], ..GapPage::read(page.bytes()) };
        let record = GenericRecord::start(rel);
        list.write(record.page(&mut page, false));
        record.finish();
    }
    locators::edit_meta(rel, |meta| {
        for place in [&mut meta.gap_first, &mut meta.gap_page] {
            if *place == 0 {
                *place = more[0];
            }
        }
    });
}

/// The `count` largest gaps and the others, each lowest first.
fn largest(gaps: &[Gap], count: usize) -> (Vec<Gap>, Vec<Gap>) {
    if gaps.len() <= count {
        return (gaps.to_vec(), Vec::new());
    }
    let mut first = gaps.to_vec();
    first.sort_unstable_by_key(|gap| std::cmp::Reverse(gap.end - gap.start));
    let mut rest = first.split_off(count);
    first.sort_unstable_by_key(|gap| gap.start);
    rest.sort_unstable_by_key(|gap| gap.start);
    (first, rest)
}

/// Writes `gaps` to `pages`, which follow each other, the last one first.
fn write_chain(rel: pg_sys::Relation, pages: &[u32], gaps: &[Gap]) {
    let mut next = 0;
    for (i, &number) in pages.iter().enumerate().rev() {
        interrupt::check();
        let first = (i * GAPS).min(gaps.len());
        let last = (first + GAPS).min(gaps.len());
        let list = GapPage { next, gaps: gaps[first..last].to_vec() };
        let pin = Pinned::read(rel, number);
        let mut page = pin.exclusive();
        let record = GenericRecord::start(rel);
        let copy = record.page(&mut page, true);
        init_page(copy);
        list.write(copy);
        record.finish();
        next = number;
        fault::point("gap page");
    }
}

/// A page for the chain of gaps, from those set aside for maps. `None` if the file would have to grow for it and may not.
fn take_map_page(rel: pg_sys::Relation, may_extend: bool) -> Option<u32> {
    let mut have = relation::pages(rel);
    loop {
        let pin = Pinned::read(rel, META_PAGE);
        let mut page = pin.exclusive();
        let mut meta = meta_of(rel, page.bytes());
        let freed = tree::take_free_pages(rel, &mut meta, 1).first().copied();
        let number =
            freed.unwrap_or_else(|| set_maps_aside(&mut meta, 1).unwrap_or_else(|full| locators::full_store(full)));
        if number >= have {
            if !may_extend {
                return None;
            }
            drop(page);
            drop(pin);
            extend_to(rel, number + 1);
            have = relation::pages(rel);
            continue;
        }
        if freed.is_none() {
            meta.map_next += 1;
        }
        let record = GenericRecord::start(rel);
        meta.write(record.page(&mut page, false));
        record.finish();
        return Some(number);
    }
}

/// Cuts free pages off the end of the file, if they are many (as heap's vacuum judges: 1,000, or a sixteenth) and nobody
/// uses the store at the moment. Returns what is left of `occupied`, and whether anything was cut.
pub fn truncate(rel: pg_sys::Relation, detached: &Meta, mut occupied: Occupied) -> (Occupied, bool) {
    let pages = relation::pages(rel);
    let end = occupied.end_page.max(HEAD_PAGES);
    let free = pages.saturating_sub(end);
    if free == 0 || (free < 1000 && free < pages / 16) {
        return (occupied, false);
    }
    let Some(_lock) = relation::TruncateLock::try_acquire(rel) else { return (occupied, false) };
    let extents = (end - HEAD_PAGES).div_ceil(EXTENT_PAGES);
    let mut done = false;
    let meta = locators::edit_meta(rel, |meta| {
        // Somebody may have taken extents between the survey and the lock.
        if meta.next_extent == detached.next_extent && meta.fill_end == 0 {
            meta.next_extent = extents;
            done = true;
        }
    });
    if !done {
        return (occupied, false);
    }
    relation::truncate(rel, end);
    let limit = position_of(extent_start(meta.next_extent));
    occupied.gaps.retain_mut(|gap| {
        gap.end = gap.end.min(limit);
        gap.end >= gap.start + SHORTEST
    });
    (occupied, true)
}
