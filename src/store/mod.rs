//! The block store: immutable, content-addressed payloads in the TOAST relation of a `tensor_block` table.
//!
//! Duties: give equal content one block id, keep payloads in tensor pages, find them again by id. The formats are in
//! [`format`] and drawn in `README.md`.
//!
//! Invariants: (1) a live block's payload is complete and the directory has it, because these are logged in the order
//! locator (reserved), payload, directory entry, locator (live), and WAL is replayed in order; (2) block ids only grow and
//! are never reused; (3) what no locator, tree page or gap page takes is free; (4) what a crash or an ERROR between two
//! steps leaves behind is a reserved block, which the sweep removes, never a wrong answer.
//!
//! Lock order: hash locks (heavyweight, ascending by number) -> extension lock -> nothing; hash locks -> metapage -> gap page, or
//! metapage -> upper map page -> lower map page -> locator page (or free page), by content locks. Payload pages are locked alone. No
//! heavyweight lock is waited for under a content lock.

pub mod check;
pub mod copy;
pub mod directory;
pub mod fault;
pub mod format;
pub mod locators;
pub mod marks;
pub mod payload;
pub mod repack;
pub mod reserve;
pub mod settings;
mod small;
mod space;
pub mod sweep;
pub mod tree;
pub mod uses;

use crate::pg::relation::{OpenRelation, PageLock};
use crate::pg::toast_index::ToastIndexes;
use crate::pg::varlena::StandIn;
use crate::pg::{error, interrupt, relation};
use format::{Locator, State};
pub use marks::Marks;
use pgrx::pg_sys;
use pgrx::prelude::*;
use reserve::Reservation;
use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use tensor_blocks::encoding::Encoding;
pub use uses::Uses;

/// Identity of a value's decompressed bytes: `tensor_blocks::block_hash` of a block, [`value_hash`] of any other value.
pub type Hash = [u8; 32];

/// BLAKE3 of a value that is no tensor block, in a domain of its own.
pub fn value_hash(bytes: &[u8]) -> Hash {
    let mut hasher = blake3::Hasher::new_derive_key("pg_tessera wide value v1");
    hasher.update(bytes);
    *hasher.finalize().as_bytes()
}

/// What a payload looks like in the store: bytes behind a varlena's four-byte header, and their compression method
/// (`InvalidCompressionId` is told by `stored.len() == raw_len`, as in a TOAST pointer).
pub struct Payload<'a> {
    /// The bytes to store.
    pub stored: Cow<'a, [u8]>,
    /// Compression method id; 0 for none, which is told from pglz by the length.
    pub method: u32,
    /// The small form that the bytes are.
    pub encoding: Encoding,
}

/// Hashes that are locked at a time by one that stores blocks, and bytes of their contents, beyond the first.
const GROUP: usize = 32;
const GROUP_BYTES: u64 = 16 << 20;

/// How many contents of these lengths, at least one, are stored at a time: their payloads are held together.
fn group_len(lens: impl Iterator<Item = u32>) -> usize {
    let mut bytes = 0;
    let fits = |len: &u32| {
        bytes += u64::from(*len);
        bytes <= GROUP_BYTES
    };
    lens.take(GROUP).take_while(fits).count().max(1)
}

/// A block that is to be stored.
struct New<'a> {
    hash: Hash,
    raw_len: u32,
    chunk_id: u32,
    payload: Payload<'a>,
}

impl New<'_> {
    /// Its locator, but for its place.
    fn locator(&self) -> Locator {
        let ext_info = self.payload.stored.len() as u32 | self.payload.method << 30;
        let encoding = self.payload.encoding.code();
        Locator { hash: self.hash, ext_info, raw_len: self.raw_len, encoding, ..Locator::NONE }
    }
}

/// The locator of a block that may be referenced from now on: live, not condemned. None if it is being removed, or is another's.
fn kept(mut locator: Locator, hash: &Hash, reserved_too: bool) -> Option<Locator> {
    let there = match locator.state() {
        Some(State::Live) => true,
        Some(State::Reserved) => reserved_too,
        _ => false,
    };
    locator.set_state(State::Live);
    locator.condemn_xid = 0;
    (there && locator.hash == *hash).then_some(locator)
}

/// A block store that is open for writing.
pub struct Store {
    rel: OpenRelation,
    indexes: ToastIndexes,
    key: [u8; 32],
}

impl Store {
    /// Opens the store `toast_oid` for writing, and makes its metapage if it has none. Locks on the relation and its
    /// indexes last until the transaction ends, so that neither can be swapped while references to them are fresh.
    ///
    /// The transaction gets its id now: whoever places a reference has one before it looks at a locator. Therefore a
    /// block that is condemned after that look is not removed before the transaction has ended (see [`sweep`]).
    pub fn open_for_write(toast_oid: pg_sys::Oid) -> Store {
        Store::open_like(toast_oid, None)
    }

    /// As [`Store::open_for_write`]; a new metapage goes on with the ids and the key of `model`.
    fn open_like(toast_oid: pg_sys::Oid, model: Option<&format::Meta>) -> Store {
        let rel = OpenRelation::table(toast_oid, pg_sys::RowExclusiveLock);
        let indexes = ToastIndexes::open(rel.raw(), pg_sys::RowExclusiveLock);
        // SAFETY: in a transaction.
        unsafe { pg_sys::GetCurrentTransactionId() };
        let key = locators::ensure_meta(rel.raw(), model).hash_key;
        Store { rel, indexes, key }
    }

    /// The blocks with these contents, given as hash and bytes; those that are new are stored now. `make` gives the payload of one
    /// by its place in `contents` and is called only then.
    ///
    /// Concurrent callers with equal content wait for each other by a heavyweight lock on the hash, so that content is
    /// stored once; the lock ends with this call, since blocks belong to no transaction: an aborted one leaves a block
    /// that the next insertion of that content finds.
    pub fn put_all<'a>(&self, contents: &[(Hash, u32)], mut make: impl FnMut(usize) -> Payload<'a>) -> Vec<StandIn> {
        let mut found: HashMap<(Hash, u32), StandIn> = HashMap::with_capacity(contents.len());
        let mut missing: Vec<(usize, u32)> = Vec::new();
        let mut seen = HashSet::with_capacity(contents.len());
        for (i, content) in contents.iter().enumerate().filter(|(_, content)| seen.insert(**content)) {
            interrupt::check();
            let chunk_id = directory::chunk_id(&self.key, &content.0);
            match self.find(chunk_id, &content.0, content.1, false) {
                Some(there) => drop(found.insert(*content, there)),
                None => missing.push((i, chunk_id)),
            }
        }
        let mut left = &missing[..];
        while !left.is_empty() {
            let (group, others) = left.split_at(group_len(left.iter().map(|(i, _)| contents[*i].1)));
            left = others;
            let _locks = self.lock_hashes(group.iter().map(|(_, chunk_id)| chunk_id & 0x7fff_ffff).collect());
            let mut new = Vec::with_capacity(group.len());
            for &(i, chunk_id) in group {
                interrupt::check();
                let (hash, raw_len) = contents[i];
                match self.find(chunk_id, &hash, raw_len, true) {
                    Some(there) => drop(found.insert(contents[i], there)),
                    None => new.push(New { hash, raw_len, chunk_id, payload: make(i) }),
                }
            }
            let stored = self.add(&new, None);
            found.extend(new.iter().map(|new| (new.hash, new.raw_len)).zip(stored));
        }
        contents.iter().map(|content| found[content]).collect()
    }

    /// Locks on hashes, in one order for all: so nobody waits in a circle.
    fn lock_hashes(&self, mut numbers: Vec<u32>) -> Vec<PageLock> {
        numbers.sort_unstable();
        numbers.dedup();
        numbers.into_iter().map(|number| PageLock::exclusive(self.rel.raw(), number)).collect()
    }

    /// Stores a block under its own id in a copy of another store, which nobody else sees yet.
    fn put_as(&self, block_id: u32, hash: &Hash, raw_len: u32, payload: Payload<'_>) {
        let chunk_id = directory::chunk_id(&self.key, hash);
        self.add(&[New { hash: *hash, raw_len, chunk_id, payload }], Some(block_id));
    }

    /// Stores blocks whose hashes are locked, in runs of neighbours: with the next ids, or one with `given`.
    fn add(&self, new: &[New<'_>], given: Option<u32>) -> Vec<StandIn> {
        let rel = self.rel.raw();
        let locators: Vec<Locator> = new.iter().map(New::locator).collect();
        let mut stored = Vec::with_capacity(new.len());
        while stored.len() < new.len() {
            let left = stored.len()..;
            let run = locators::reserve(rel, &locators[left.clone()], given);
            fault::point("store after reserve");
            let new = &new[left][..run.len()];
            let (first, page, offset) = (run[0].block_id, run[0].page, run[0].offset);
            let behind = |at: &Reservation| (at.position() - run[0].position()) as usize;
            let parts: Vec<_> = run.iter().zip(new).map(|(at, new)| (behind(at), &*new.payload.stored)).collect();
            payload::write(rel, page, offset, &parts);
            fault::point("store after payload");
            let entry =
                |(new, at): (&New<'_>, &Reservation)| (new.chunk_id, at.block_id, directory::tid_of(at.block_id));
            self.indexes.insert(new.iter().zip(&run).map(entry));
            fault::point("store after directory");
            locators::edit_run(rel, first, run.len(), |i, locator| kept(locator, &new[i].hash, true));
            // Aborted insertions count as dead: so autovacuum learns of blocks that no row came to reference.
            relation::count_insertions(rel, run.len());
            stored.extend(new.iter().zip(&run).map(|(new, at)| new.locator().reference(at.block_id)));
        }
        stored
    }

    /// True if a reference that some row has may be stored again: the block is there, with this size. A condemnation is
    /// taken back.
    pub fn holds(&self, reference: &StandIn) -> bool {
        locators::find(self.rel.raw(), reference.block_id).is_some_and(|l| {
            l.reference(reference.block_id) == *reference
                && l.state() == Some(State::Live)
                && (l.condemn_xid == 0 || self.keep(reference.block_id, &l.hash, false))
        })
    }

    /// The block with this content, if it is there, for a new reference: a condemnation is taken back. `locked`: the caller
    /// has the hash lock, so a block that is still only reserved belongs to nobody any more; as the directory has it, its
    /// payload is complete.
    fn find(&self, chunk_id: u32, hash: &Hash, raw_len: u32, locked: bool) -> Option<StandIn> {
        self.indexes.find(chunk_id, |tid| {
            let block_id = directory::block_id_of(tid);
            let locator = locators::find(self.rel.raw(), block_id)?;
            if locator.hash != *hash || locator.raw_len != raw_len {
                return None;
            }
            let ready = match locator.state() {
                Some(State::Live) => locator.condemn_xid == 0 || self.keep(block_id, hash, false),
                Some(State::Reserved) => locked && self.keep(block_id, hash, true),
                _ => false,
            };
            ready.then(|| locator.reference(block_id))
        })
    }

    /// Makes a block one that may be referenced: live, not condemned. False if it is being removed, or another.
    fn keep(&self, block_id: u32, hash: &Hash, reserved_too: bool) -> bool {
        let mut found = false;
        locators::edit(self.rel.raw(), block_id, |locator| {
            let kept = kept(locator, hash, reserved_too);
            found = kept.is_some();
            kept
        });
        found
    }

    /// The block with the content of block `block_id` of another store, if this one has it: nothing is read but locators.
    pub fn find_like(&self, other: pg_sys::Relation, reference: &StandIn) -> Option<StandIn> {
        let theirs = locators::find(other, reference.block_id)?;
        if theirs.state() != Some(State::Live) || theirs.reference(reference.block_id) != *reference {
            return None;
        }
        let chunk_id = directory::chunk_id(&self.key, &theirs.hash);
        self.find(chunk_id, &theirs.hash, theirs.raw_len, false)
    }
}

/// A store in which contents are looked up, and nothing is changed.
pub struct Contents {
    rel: OpenRelation,
    indexes: ToastIndexes,
    key: [u8; 32],
}

impl Contents {
    /// Of the store `toast_oid`; `None` if it is empty.
    pub fn of(toast_oid: pg_sys::Oid) -> Option<Contents> {
        if toast_oid == pg_sys::InvalidOid {
            return None;
        }
        let rel = OpenRelation::table(toast_oid, pg_sys::AccessShareLock);
        let key = locators::read_meta(rel.raw())?.hash_key;
        let indexes = ToastIndexes::open(rel.raw(), pg_sys::AccessShareLock);
        Some(Contents { rel, indexes, key })
    }

    /// True if a live block has this content now. It may be gone when it is asked for.
    pub fn have(&self, hash: &Hash, raw_len: u32) -> bool {
        let is_it = |tid| {
            let locator = locators::find(self.rel.raw(), directory::block_id_of(tid))?;
            (locator.state() == Some(State::Live) && locator.hash == *hash && locator.raw_len == raw_len).then_some(())
        };
        self.indexes.find(directory::chunk_id(&self.key, hash), is_it).is_some()
    }
}

/// Copies bytes `offset ..` of block `block_id`, as it is seen from outside, into `out`: of the value if its form is small, else
/// of what is stored.
///
/// `len` is how many the reference says that it has; an ERROR is raised if the store disagrees or has no such block,
/// so that a stale reference fails cleanly and never shows another tensor.
pub fn fetch(rel: pg_sys::Relation, block_id: u32, len: u32, offset: u32, out: &mut [u8]) {
    if out.is_empty() {
        return;
    }
    let Some(place) = locators::Place::of(rel, block_id) else { no_such_block(rel, block_id) };
    loop {
        let Some(locator) = place.read().filter(|l| l.state() == Some(State::Live)) else {
            no_such_block(rel, block_id)
        };
        let end = u64::from(offset) + out.len() as u64;
        let there = locator.reference(block_id).stored_len();
        if there != len || end > u64::from(len) {
            error::raise(
                PgSqlErrorCode::ERRCODE_DATA_CORRUPTED,
                format!("block {block_id} has {there} bytes where a row expects {len}"),
                &format!("Bytes {offset} to {end} were asked for."),
                "The table is damaged; restore it from a backup.",
            );
        }
        let mut small = Vec::new();
        if locator.encoding == 0 {
            payload::read(rel, locator.page, u64::from(locator.offset) + u64::from(offset), out);
        } else {
            small = small_form(rel, block_id, &locator);
        }
        // A block may be moved when pages are packed anew: what was copied counts only if the locator still says so.
        if place.read().is_some_and(|now| now.version == locator.version && now.page == locator.page) {
            if locator.encoding != 0 {
                small::slice(&locator, &small, offset as usize, out).unwrap_or_else(|e| no_small_form(block_id, &e));
            }
            return;
        }
        interrupt::check();
    }
}

/// The stored bytes of a block in a small form.
fn small_form(rel: pg_sys::Relation, block_id: u32, locator: &Locator) -> Vec<u8> {
    let len = locator.stored_len();
    if len >= locator.raw_len {
        no_small_form(block_id, &format!("It has {len} bytes, and the block itself {}.", locator.raw_len));
    }
    let mut stored = vec![0; len as usize];
    payload::read(rel, locator.page, u64::from(locator.offset), &mut stored);
    stored
}

fn no_small_form(block_id: u32, detail: &str) -> ! {
    error::raise(
        PgSqlErrorCode::ERRCODE_DATA_CORRUPTED,
        format!("the small form of block {block_id} is damaged"),
        detail,
        "check_store tells more; restore the table from a backup.",
    )
}

/// Asks for the pages of a block to be read ahead, without waiting for them. Nothing happens for a block that is not there.
pub fn prefetch(rel: pg_sys::Relation, block_id: u32) {
    if let Some(locator) = locators::find(rel, block_id).filter(|l| l.state() == Some(State::Live)) {
        payload::prefetch(rel, locator.page, u64::from(locator.offset), locator.stored_len() as usize);
    }
}

fn no_such_block(rel: pg_sys::Relation, block_id: u32) -> ! {
    // SAFETY: open relation.
    let oid = unsafe { (*rel).rd_id };
    error::raise(
        PgSqlErrorCode::ERRCODE_DATA_CORRUPTED,
        format!("no block {block_id} in block store {}", oid.to_u32()),
        "The reference is stale, or the store is damaged.",
        "If a row of a table says this, restore the table from a backup.",
    )
}

/// Counts of a store, from its metapage.
pub struct Totals {
    /// Blocks that have a locator, also those that no row references any more.
    pub blocks: u64,
    /// Their stored bytes.
    pub bytes: u64,
    /// Pages of the file.
    pub pages: u32,
    /// Block ids that were not handed out yet.
    pub ids_left: u64,
}

/// The counts of a store. One of no pages is legal and empty.
pub fn totals(rel: pg_sys::Relation) -> Totals {
    let pages = relation::pages(rel);
    let last = u64::from(u32::MAX);
    match locators::read_meta(rel) {
        Some(meta) => Totals {
            blocks: meta.stored_blocks,
            bytes: meta.stored_bytes,
            pages,
            ids_left: if meta.next_block_id == 0 { 0 } else { last - u64::from(meta.next_block_id) + 1 },
        },
        None => Totals { blocks: 0, bytes: 0, pages, ids_left: last },
    }
}

/// Calls `f` with every block that has, or is about to have, an entry in the directory, in the order of ids.
pub fn for_each_block(rel: pg_sys::Relation, mut f: impl FnMut(u32, &Locator)) {
    locators::for_each(rel, |id, locator| {
        if locator.state() == Some(State::Live) {
            f(id, locator);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_bounded_in_number_and_in_bytes() {
        let of = |lens: &[u32]| group_len(lens.iter().copied());
        assert_eq!([of(&[40_000; 100]), of(&[40_000; 5])], [GROUP, 5]);
        assert_eq!([of(&[u32::MAX; 3]), of(&[4 << 20; 9]), of(&[1, u32::MAX, 1])], [1, 4, 1]);
    }
}
