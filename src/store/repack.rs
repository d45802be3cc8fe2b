//! Repacking: blocks are moved so that a tensor's lie in as few tensor pages as possible.
//!
//! A move is: copy the payload to free space, then change the locator (place and version) in one record. Before it the
//! block is at its old place, after it at the new one; the old space is free at once, because a reader looks at the
//! version after copying. So repacking needs no lock against readers or writers, can stop at any block, and what a crash
//! leaves is free space that the next VACUUM finds.

use super::format::{
    EXTENT_BYTES, EXTENT_PAGES, HEAD_PAGES, Locator, Meta, State, extent_of, extent_start, position_of,
};
use super::reserve::{place, take_extents};
use super::{fault, locators, payload, space};
use crate::pg::buffer::PAGE_BYTES;
use crate::pg::extend::extend_to;
use crate::pg::{error, interrupt, relation};
use pgrx::pg_sys;
use pgrx::prelude::*;
use std::collections::VecDeque;

/// Puts the live blocks of the store into the order that `order` gives, from the beginning of free tensor pages on. Returns
/// how many were moved. `moved` is told after each. The caller holds ShareUpdateExclusive on the store.
pub fn repack(
    rel: pg_sys::Relation,
    order: impl FnOnce(Vec<(u32, Locator)>) -> Vec<(u32, Locator)>,
    mut moved: impl FnMut(u64, u64),
) -> u64 {
    if locators::read_meta(rel).is_none() {
        return 0;
    }
    let mut blocks = Vec::new();
    locators::for_each(rel, |id, locator| {
        if locator.state() == Some(State::Live) {
            blocks.push((id, *locator));
        }
    });
    let file = position_of(u64::from(HEAD_PAGES))..=position_of(relation::pages(rel).into());
    if let Some((id, _)) =
        blocks.iter().find(|(_, l)| !file.contains(&l.range().start) || !file.contains(&l.range().end))
    {
        error::raise(
            PgSqlErrorCode::ERRCODE_DATA_CORRUPTED,
            format!("block {id} lies outside its block store"),
            "",
            "check_store tells more; restore the table from a backup.",
        );
    }
    let ids: Vec<(u32, u32)> = order(blocks).into_iter().map(|(id, l)| (id, l.stored_len())).collect();
    let mut count = 0;
    // The first pass may have to go behind the blocks that it moves; the second brings them to the file's beginning.
    for _pass in 0..2 {
        let detached = space::detach(rel);
        let survey = space::survey(rel, &detached);
        let target = Target::new(free_extents(&survey, &detached));
        if !worth_it(rel, &ids, &target) {
            let (survey, _) = space::truncate(rel, &detached, survey);
            space::attach(rel, &detached, &survey);
            break;
        }
        count += move_all(rel, &ids, target, &mut moved);
        let detached = space::detach(rel);
        let survey = space::survey(rel, &detached);
        let (survey, _) = space::truncate(rel, &detached, survey);
        space::attach(rel, &detached, &survey);
    }
    count
}

/// Extents that hold nothing, lowest first.
fn free_extents(survey: &space::Occupied, detached: &Meta) -> VecDeque<u32> {
    (0..detached.next_extent)
        .filter(|&extent| {
            let (start, end) = (position_of(extent_start(extent)), position_of(extent_start(extent + 1)));
            let at = survey.gaps.partition_point(|gap| gap.end < end);
            survey.gaps.get(at).is_some_and(|gap| gap.start <= start && gap.end >= end)
        })
        .collect()
}

/// Free extents that are filled one after the other.
#[derive(Clone)]
struct Target {
    free: VecDeque<u32>,
    at: u64,
    end: u64,
}

impl Target {
    fn new(free: VecDeque<u32>) -> Target {
        Target { free, at: 0, end: 0 }
    }

    /// The place of the next payload; `fresh(n)` gives the first of `n` consecutive new extents.
    fn next(&mut self, len: u32, mut fresh: impl FnMut(u32) -> u32) -> u64 {
        let position = place(self.at, self.end, len).unwrap_or_else(|| {
            let wanted = u64::from(len).div_ceil(EXTENT_BYTES) as u32;
            let first = self.take(wanted).unwrap_or_else(|| fresh(wanted));
            self.end = position_of(extent_start(first + wanted));
            position_of(extent_start(first))
        });
        self.at = (position + u64::from(len)).next_multiple_of(8);
        position
    }

    /// The first of `wanted` consecutive free extents.
    fn take(&mut self, wanted: u32) -> Option<u32> {
        let free = self.free.make_contiguous();
        let wanted = wanted as usize;
        let at = (0..(free.len() + 1).saturating_sub(wanted))
            .find(|&i| free[i + wanted - 1] - free[i] == wanted as u32 - 1)?;
        let first = free[at];
        self.free.drain(at..at + wanted);
        Some(first)
    }
}

/// True if the blocks are not packed in this order already, or would lie further in front.
fn worth_it(rel: pg_sys::Relation, ids: &[(u32, u32)], target: &Target) -> bool {
    let place_of = |id: u32| locators::find(rel, id).map(|l| l.range().start);
    let (mut previous, mut extents, mut last, mut ordered) = (0, 0u32, None, true);
    for (id, _) in ids {
        interrupt::check();
        let Some(at) = place_of(*id) else { continue };
        ordered &= at > previous;
        if last != Some(extent_of(at)) {
            extents += 1;
            last = Some(extent_of(at));
        }
        previous = at;
    }
    let mut trial = target.clone();
    let (mut beyond, mut highest, mut fewest, mut trial_last) = (0u32, 0u32, 0u32, None);
    for (_, len) in ids {
        let at = trial.next(*len, |n| {
            beyond += n;
            1_000_000_000 + beyond
        });
        if trial_last != Some(extent_of(at)) {
            fewest += 1;
            trial_last = Some(extent_of(at));
        }
        highest = highest.max(extent_of(at));
    }
    !ordered || extents > fewest || last.is_some_and(|last| highest < last)
}

fn move_all(rel: pg_sys::Relation, ids: &[(u32, u32)], mut target: Target, moved: &mut impl FnMut(u64, u64)) -> u64 {
    let mut count = 0;
    let mut bytes = Vec::new();
    for &(id, len) in ids {
        interrupt::check();
        let Some(old) = locators::find(rel, id).filter(|l| l.state() == Some(State::Live) && l.stored_len() == len)
        else {
            continue;
        };
        let position = target.next(len, |extents| {
            let mut first = 0;
            locators::edit_meta(rel, |meta| {
                first = take_extents(meta, extents).unwrap_or_else(|full| locators::full_store(full));
            });
            (first - extent_start(0) as u32) / EXTENT_PAGES
        });
        let page = (position / PAGE_BYTES as u64) as u32;
        let offset = (position % PAGE_BYTES as u64) as u32;
        extend_to(rel, ((position + u64::from(len) - 1) / PAGE_BYTES as u64) as u32 + 1);
        bytes.resize(len as usize, 0);
        payload::read(rel, old.page, u64::from(old.offset), &mut bytes);
        payload::write(rel, page, offset, &[(0, &bytes)]);
        fault::point("repack before locator");
        locators::edit(rel, id, |locator| {
            (locator.state() == Some(State::Live) && locator.version == old.version).then_some(Locator {
                page,
                offset,
                version: locator.version.wrapping_add(1),
                ..locator
            })
        });
        count += 1;
        moved(count, ids.len() as u64);
    }
    count
}
