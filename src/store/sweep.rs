//! The sweep: reclaims blocks that no row version references, in two phases, without a lock on writers.
//!
//! VACUUM n marks the blocks that are referenced by any tuple that is physically in the owner's pages, and writes into the
//! others `condemn_xid` = the next full transaction id. VACUUM n+1 takes the oldest transaction H that anybody may still
//! see as running *before* it marks, and removes what is still unmarked and was condemned at or before H.
//!
//! Why nothing is lost: who places a reference (a new block, a hit in the directory, or one carried along by UPDATE) has a
//! transaction id, then reads the locator, and takes a condemnation back under the locator page's exclusive lock. So a
//! reference that a marking scan overlooked, because it went to a page that was scanned already, was placed either before
//! the condemnation, by a transaction below `condemn_xid`, which has ended when H >= `condemn_xid`, so that the second
//! scan meets the row; or after it, and then there is no condemnation any more.
//!
//! A block on its way out is *dying* from the decision on: no new reference is given to it. Its directory entry goes next,
//! then its locator, then its space is free. A crash between these leaves dying blocks, which the next VACUUM finishes.
//! A standby needs no conflict record: the removal of the rows had one, and comes first.

use super::format::{Locator, State};
use super::{Hash, Marks, directory, fault, locators, space, tree};
use crate::pg::toast_index::ToastIndexes;
use crate::pg::vacuum::{self, FullXid};
use crate::pg::{interrupt, relation};
use pgrx::pg_sys;
use std::collections::HashSet;

/// What a sweep found and did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Blocks that rows reference, or that are too new to tell.
    pub live: u64,
    /// Blocks that wait for the next sweep.
    pub condemned: u64,
    /// Blocks that were removed.
    pub removed: u64,
    /// Pages that were cut off the end of the file.
    pub pages_cut: u32,
}

/// Sweeps the store `rel`. `marks` are the blocks that rows reference, and `horizon` the oldest transaction that anybody
/// may see as running, taken before the rows were read. The caller holds ShareUpdateExclusive on the store.
pub fn sweep(rel: pg_sys::Relation, marks: &Marks, horizon: FullXid, may_truncate: bool) -> Swept {
    let mut swept = Swept::default();
    if locators::read_meta(rel).is_none() {
        return swept;
    }
    let mut dying: HashSet<u32> = HashSet::new();
    let mut marked_dying: Vec<(u32, Hash)> = Vec::new();
    locators::edit_all(
        rel,
        |id, locator| judge(marks.contains(id), locator, horizon),
        |id, locator| match locator.state() {
            Some(State::Dying) if marks.contains(id) => marked_dying.push((id, locator.hash)),
            Some(State::Dying) => {
                dying.insert(id);
            }
            _ if locator.condemn_xid != 0 => swept.condemned += 1,
            _ => swept.live += 1,
        },
    );
    vacuum::delay();
    for (id, _) in &marked_dying {
        // Cannot be, by the argument above. To keep the block is right whatever the reason.
        pgrx::warning!("block {id} of a block store was about to be removed, but a row references it; it is kept");
    }
    revive(rel, &marked_dying);
    swept.live += marked_dying.len() as u64;

    if !dying.is_empty() {
        fault::point("sweep before directory");
        ToastIndexes::open(rel, pg_sys::RowExclusiveLock).delete(|tid| dying.contains(&directory::block_id_of(tid)));
        fault::point("sweep before locators");
        let gone = |id: u32, locator: &Locator| dying.contains(&id) && locator.state() == Some(State::Dying);
        locators::edit_all(rel, |id, l| if gone(id, l) { Locator::NONE } else { *l }, |_, _| {});
        swept.removed = dying.len() as u64;
        fault::point("sweep before pages of locators");
    }
    tree::free_empty_leaves(rel);

    fault::point("sweep before space");
    let before = space::detach(rel);
    let occupied = space::survey(rel, &before);
    interrupt::check();
    let pages = relation::pages(rel);
    let (occupied, cut) = if may_truncate { space::truncate(rel, &before, occupied) } else { (occupied, false) };
    if cut {
        swept.pages_cut = pages.saturating_sub(relation::pages(rel));
    }
    fault::point("sweep before gaps");
    space::attach(rel, &before, &occupied);
    swept
}

/// What a locator is to become. Asked under the exclusive lock of its page, as the transaction id for a condemnation must
/// be taken after everyone who looked at the locator before got theirs.
fn judge(marked: bool, locator: &Locator, horizon: FullXid) -> Locator {
    let mut after = *locator;
    match locator.state() {
        Some(State::Dying) | None => {}
        _ if marked => after.condemn_xid = 0,
        _ if locator.condemn_xid == 0 => after.condemn_xid = vacuum::next_full_xid().0,
        _ if locator.condemn_xid <= horizon.0 => after.set_state(State::Dying),
        _ => {}
    }
    after
}

/// Makes blocks live again, with an entry in the directory.
fn revive(rel: pg_sys::Relation, blocks: &[(u32, Hash)]) {
    let Some(meta) = locators::read_meta(rel).filter(|_| !blocks.is_empty()) else { return };
    let indexes = ToastIndexes::open(rel, pg_sys::RowExclusiveLock);
    for (id, hash) in blocks {
        let chunk_id = directory::chunk_id(&meta.hash_key, hash);
        let tid = directory::tid_of(*id);
        if indexes.find(chunk_id, |found| (directory::block_id_of(found) == *id).then_some(())).is_none() {
            indexes.insert(std::iter::once((chunk_id, *id, tid)));
        }
        locators::edit(rel, *id, |mut locator| {
            locator.set_state(State::Live);
            locator.condemn_xid = 0;
            Some(locator)
        });
    }
}
