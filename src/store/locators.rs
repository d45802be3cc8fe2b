//! Metapage, map pages and locators: reading and changing.

use super::format::{
    EXTENT_PAGES, FormatError, HEAD_PAGES, LOCATORS, Locator, MAP_FANOUT, MAP_MAGIC, Meta, Path, State, check_leaf,
    check_map_header, map_entry, set_map_entry, write_leaf_header, write_map_header,
};
use super::reserve::{Full, Reservation, place, plan, plan_neighbours};
use super::{space, tree};
use crate::pg::buffer::{BLCKSZ, Exclusive, Pinned, init_page, is_new};
use crate::pg::extend::extend_to;
use crate::pg::wal::GenericRecord;
use crate::pg::{error, relation};
use pgrx::pg_sys;
use pgrx::prelude::*;

pub const META_PAGE: u32 = 0;
pub(super) const UPPER: u16 = 2;
pub(super) const LOWER: u16 = 1;
pub(super) const LEAF: u16 = 0;

/// The metapage's content; `None` in a store without pages or whose metapage was never written.
pub fn read_meta(rel: pg_sys::Relation) -> Option<Meta> {
    if relation::pages(rel) == 0 {
        return None;
    }
    let pin = Pinned::read(rel, META_PAGE);
    let page = pin.share();
    (!is_new(page.bytes())).then(|| meta_of(rel, page.bytes()))
}

/// The metapage's content, made if there is none: with a fresh random key, or going on with the block ids and the key of
/// `model`, so that no id is used twice.
pub fn ensure_meta(rel: pg_sys::Relation, model: Option<&Meta>) -> Meta {
    if let Some(meta) = read_meta(rel) {
        return meta;
    }
    extend_to(rel, META_PAGE + 1);
    let pin = Pinned::read(rel, META_PAGE);
    let mut page = pin.exclusive();
    if !is_new(page.bytes()) {
        return meta_of(rel, page.bytes()); // somebody else was faster
    }
    let meta = model.map_or_else(|| Meta::new(random_key()), successor);
    let record = GenericRecord::start(rel);
    let copy = record.page(&mut page, true);
    init_page(copy);
    meta.write(copy);
    record.finish();
    meta
}

/// The metapage of an empty store that goes on where `old` is.
fn successor(old: &Meta) -> Meta {
    Meta { next_block_id: old.next_block_id, ..Meta::new(old.hash_key) }
}

/// The metapage, as bytes, of an empty store that goes on where `old` is. Aligned as the storage manager wants it.
pub fn first_page(old: &Meta) -> Box<AlignedPage> {
    let mut page = Box::new(AlignedPage([0; BLCKSZ]));
    init_page(&mut page.0);
    successor(old).write(&mut page.0);
    page
}

/// Bytes of a page at an address that direct I/O could use.
#[repr(align(4096))]
pub struct AlignedPage([u8; BLCKSZ]);

impl AlignedPage {
    /// The bytes, for calls into PostgreSQL.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.0.as_mut_ptr()
    }
}

fn random_key() -> [u8; 32] {
    let mut key = [0u8; 32];
    // SAFETY: fills the array; false means that the system has no randomness to give.
    if !unsafe { pg_sys::pg_strong_random(key.as_mut_ptr().cast(), key.len()) } {
        error::raise(PgSqlErrorCode::ERRCODE_INTERNAL_ERROR, "could not generate the key of a block store", "", "");
    }
    key
}

/// Changes the metapage under its exclusive lock.
pub fn edit_meta(rel: pg_sys::Relation, f: impl FnOnce(&mut Meta)) -> Meta {
    let pin = Pinned::read(rel, META_PAGE);
    let mut page = pin.exclusive();
    let mut meta = meta_of(rel, page.bytes());
    f(&mut meta);
    write_meta(rel, &mut page, &meta);
    meta
}

fn write_meta(rel: pg_sys::Relation, page: &mut Exclusive<'_>, meta: &Meta) {
    let record = GenericRecord::start(rel);
    meta.write(record.page(page, false));
    record.finish();
}

/// The place of a block's locator, its page pinned: it can be read again without a way through the tree.
pub struct Place {
    pin: Pinned,
    leaf: u32,
    slot: u32,
}

impl Place {
    /// The place of the locator of block `block_id`; `None` if the store has no page for it.
    pub fn of(rel: pg_sys::Relation, block_id: u32) -> Option<Place> {
        let meta = read_meta(rel)?;
        let path = Path::of(block_id);
        let leaf = leaf_page(rel, &meta, &path)?;
        let pin = Pinned::read(rel, leaf);
        let found = check_leaf(pin.share().bytes(), path.leaf);
        still_there(rel, leaf, path.leaf, found).then_some(Place { pin, leaf: path.leaf, slot: path.slot })
    }

    /// The locator as it is now; `None` if there is no block.
    pub fn read(&self) -> Option<Locator> {
        let page = self.pin.share();
        // A page of locators is freed when none is in use.
        check_leaf(page.bytes(), self.leaf).ok()?;
        let locator = Locator::read(page.bytes(), self.slot);
        (locator.stored_len() > 0).then_some(locator)
    }
}

/// The locator of a block, whatever its state; `None` if the store has no such block.
pub fn find(rel: pg_sys::Relation, block_id: u32) -> Option<Locator> {
    Place::of(rel, block_id)?.read()
}

/// As [`find`], of many blocks: blocks that were stored together have their locators on one page, which is found once.
pub struct Finder {
    rel: pg_sys::Relation,
    last: Option<Place>,
}

impl Finder {
    /// Of this store, which stays open meanwhile.
    pub fn new(rel: pg_sys::Relation) -> Finder {
        Finder { rel, last: None }
    }

    /// The locator of a block, whatever its state; `None` if the store has no such block.
    pub fn find(&mut self, block_id: u32) -> Option<Locator> {
        let path = Path::of(block_id);
        if let Some(place) = self.last.as_mut().filter(|place| place.leaf == path.leaf) {
            place.slot = path.slot;
            if let Some(locator) = place.read() {
                return Some(locator);
            }
        }
        self.last = Place::of(self.rel, block_id);
        self.last.as_ref()?.read()
    }
}

/// Changes the locator of a block under its page's exclusive lock: `f` returns the new one, or `None` to leave it. Returns
/// what the locator is afterwards; `None` if the store has no page for it.
pub fn edit(rel: pg_sys::Relation, block_id: u32, f: impl FnOnce(Locator) -> Option<Locator>) -> Option<Locator> {
    let mut f = Some(f);
    edit_run(rel, block_id, 1, |_, locator| f.take().and_then(|f| f(locator)))?.pop()
}

/// As [`edit`], of `count` neighbouring blocks whose locators are on one page, in one record. `f` also gets which it is, from 0.
pub fn edit_run(
    rel: pg_sys::Relation,
    block_id: u32,
    count: usize,
    mut f: impl FnMut(usize, Locator) -> Option<Locator>,
) -> Option<Vec<Locator>> {
    let meta = read_meta(rel)?;
    let path = Path::of(block_id);
    debug_assert!(path.slot as usize + count <= LOCATORS as usize);
    let leaf = leaf_page(rel, &meta, &path)?;
    let pin = Pinned::read(rel, leaf);
    let mut page = pin.exclusive();
    if let Err(e) = check_leaf(page.bytes(), path.leaf) {
        drop(page);
        still_there(rel, leaf, path.leaf, Err(e));
        return None;
    }
    let slots = path.slot..path.slot + count as u32;
    let old: Vec<Locator> = slots.clone().map(|slot| Locator::read(page.bytes(), slot)).collect();
    let new: Vec<Locator> = old.iter().enumerate().map(|(i, old)| f(i, *old).unwrap_or(*old)).collect();
    if new != old {
        let record = GenericRecord::start(rel);
        let copy = record.page(&mut page, false);
        new.iter().zip(slots).for_each(|(locator, slot)| locator.write(copy, slot));
        record.finish();
    }
    Some(new)
}

/// Changes the locators of each page in one record, where `decide` gives another one than there is. It is asked under the
/// share lock first, and counts under the exclusive one. `seen` is then told what each block's locator is, without a lock.
/// The caller holds ShareUpdateExclusive on the store.
pub fn edit_all(rel: pg_sys::Relation, decide: impl Fn(u32, &Locator) -> Locator, mut seen: impl FnMut(u32, &Locator)) {
    let Some(meta) = read_meta(rel) else { return };
    for_each_leaf(rel, &meta, |first, leaf| {
        let pin = Pinned::read(rel, leaf);
        let all = |page: &[u8]| -> Vec<(u32, Locator, Locator)> {
            (0..LOCATORS)
                .map(|slot| (slot, Locator::read(page, slot)))
                .filter(|(_, old)| old.stored_len() > 0)
                .map(|(slot, old)| (slot, old, decide(first.wrapping_add(slot), &old)))
                .collect()
        };
        let mut decided = {
            let page = pin.share();
            check(rel, leaf, check_leaf(page.bytes(), first / LOCATORS));
            all(page.bytes())
        };
        if decided.iter().any(|(_, old, new)| old != new) {
            let mut page = pin.exclusive();
            decided = all(page.bytes());
            if decided.iter().any(|(_, old, new)| old != new) {
                let record = GenericRecord::start(rel);
                let copy = record.page(&mut page, false);
                for (slot, _, new) in decided.iter().filter(|(_, old, new)| old != new) {
                    new.write(copy, *slot);
                }
                record.finish();
            }
        }
        for (slot, _, new) in &decided {
            seen(first.wrapping_add(*slot), new);
        }
    });
}

/// Calls `f` with every locator that is in use, whatever its state, in the order of ids.
pub fn for_each(rel: pg_sys::Relation, mut f: impl FnMut(u32, &Locator)) {
    let Some(meta) = read_meta(rel) else { return };
    for_each_leaf(rel, &meta, |first, leaf| {
        let found = {
            let pin = Pinned::read(rel, leaf);
            let page = pin.share();
            check_leaf(page.bytes(), first / LOCATORS)
                .map(|()| (0..LOCATORS).map(|slot| Locator::read(page.bytes(), slot)).collect::<Vec<_>>())
        };
        let locators = match found {
            Ok(locators) => locators,
            Err(e) => {
                still_there(rel, leaf, first / LOCATORS, Err(e));
                return;
            }
        };
        for (slot, locator) in locators.iter().enumerate().filter(|(_, l)| l.stored_len() > 0) {
            f(first.wrapping_add(slot as u32), locator);
        }
    });
}

/// What to make of a page that was reached as that of the locators `number`, and of what it was found to be: false if it was
/// freed meanwhile, so that it has no block. An ERROR if the tree still leads there.
fn still_there(rel: pg_sys::Relation, page: u32, number: u32, found: Result<(), FormatError>) -> bool {
    let Err(e) = found else { return true };
    let now = read_meta(rel).and_then(|meta| leaf_page(rel, &meta, &Path::of(number * LOCATORS)));
    if now == Some(page) {
        // It may have been freed and taken for the same number again between the two looks.
        let pin = Pinned::read(rel, page);
        let again = check_leaf(pin.share().bytes(), number);
        if again.is_err() {
            check_failed(rel, page, e);
        }
    }
    false
}

/// Calls `f` with each locator page and the first id on it, in the order of ids.
pub(super) fn for_each_leaf(rel: pg_sys::Relation, meta: &Meta, mut f: impl FnMut(u32, u32)) {
    for (root, &upper) in meta.roots.iter().enumerate().filter(|(_, page)| **page != 0) {
        for (u, lower) in entries(rel, upper, UPPER) {
            for (l, leaf) in entries(rel, lower, LOWER) {
                crate::pg::interrupt::check();
                let index = (root as u64 * u64::from(MAP_FANOUT) + u64::from(u)) * u64::from(MAP_FANOUT) + u64::from(l);
                f((index * u64::from(LOCATORS)) as u32, leaf);
            }
        }
    }
}

/// Entries of a map page that are in use: `(entry, page)`.
pub(super) fn entries(rel: pg_sys::Relation, page_number: u32, level: u16) -> Vec<(u32, u32)> {
    let pin = Pinned::read(rel, page_number);
    let page = pin.share();
    check(rel, page_number, check_map_header(page.bytes(), MAP_MAGIC, level));
    (0..MAP_FANOUT).map(|entry| (entry, map_entry(page.bytes(), entry))).filter(|(_, page)| *page != 0).collect()
}

/// Reserves a block id (the next one, or `given`), space for the payload and the id's place among the locators, and writes
/// the locator, as reserved, in the same record: what is taken is always seen there. So it does for the first of `what`, which
/// gives hash and lengths, and for as many of the others as get the ids, the space and the locators next to it. They are
/// returned, at least one, in the order of `what`.
///
/// The file is extended before the metapage is changed, and never under its lock.
pub fn reserve(rel: pg_sys::Relation, what: &[Locator], given: Option<u32>) -> Vec<Reservation> {
    let len = what[0].stored_len();
    let mut have = relation::pages(rel);
    loop {
        let pin = Pinned::read(rel, META_PAGE);
        let mut page = pin.exclusive();
        let mut meta = meta_of(rel, page.bytes());
        if place(meta.fill_at, meta.fill_end, len).is_none() && meta.gap_page != 0 {
            meta = space::take_gap(rel, &mut page, meta, len);
        }
        let path = Path::of(given.unwrap_or(meta.next_block_id));
        let new_maps = missing_maps(rel, &meta, &path) as usize;
        let mut maps = tree::take_free_pages(rel, &mut meta, new_maps);
        let fresh = (new_maps - maps.len()) as u32;
        let mut run = match plan(&meta, len, fresh, given) {
            Ok(reservation) => vec![reservation],
            Err(full) => full_store(full),
        };
        if given.is_none() {
            plan_neighbours(&mut run, &what[1..]);
        }
        let needed = run.iter().map(|reservation| reservation.pages_needed).max().unwrap_or(0);
        if needed > have {
            drop(page);
            drop(pin);
            extend_to(rel, file_pages(needed));
            have = relation::pages(rel);
            continue;
        }
        maps.extend((0..fresh).map(|i| run[0].meta.map_next + i));
        apply(rel, &mut page, &run, &path, &maps, fresh, what);
        return run;
    }
}

/// How many pages a file gets that needs `pages`: one that is not small is extended by whole tensor pages, which is then less
/// than a sixty-fourth of it.
fn file_pages(pages: u32) -> u32 {
    const SMALL: u32 = HEAD_PAGES + 64 * EXTENT_PAGES;
    match pages {
        SMALL.. => (pages - HEAD_PAGES).next_multiple_of(EXTENT_PAGES).saturating_add(HEAD_PAGES),
        _ => pages,
    }
}

/// Writes the metapage of the reservations of a run, their locators, which are on one page, and the map and locator pages `numbers`
/// that it needs, the last of which are `fresh`, in one record: of four pages at most, which is what a generic record can hold.
fn apply(
    rel: pg_sys::Relation,
    meta_page: &mut Exclusive<'_>,
    run: &[Reservation],
    path: &Path,
    numbers: &[u32],
    fresh: u32,
    what: &[Locator],
) {
    let write_locators = |page: &mut [u8]| {
        for (slot, (at, what)) in (path.slot..).zip(run.iter().zip(what)) {
            let mut locator = Locator { page: at.page, offset: at.offset, version: 1, condemn_xid: 0, ..*what };
            locator.set_state(State::Reserved);
            locator.write(page, slot);
        }
    };
    let mut meta = run[run.len() - 1].meta;
    meta.map_next += fresh;
    // From the top down: what is new is the lower end of the path.
    let new_maps = numbers.len();
    // The lowest page of the path that exists already takes the entry for the first new one, or the locator itself.
    let existing_number = match new_maps {
        0 => leaf_page(rel, &meta, path),
        1 => Some(existing_lower(rel, &meta, path)),
        2 => Some(meta.roots[path.root as usize]),
        _ => None,
    };
    if existing_number.is_some_and(|number| number == META_PAGE || numbers.contains(&number)) {
        check_failed(rel, META_PAGE, FormatError::Unsound); // no page can be locked twice
    }
    let existing_pin = existing_number.map(|number| Pinned::read(rel, number));
    let pins: Vec<Pinned> = numbers.iter().map(|&number| Pinned::read(rel, number)).collect();
    let mut pages: Vec<Exclusive<'_>> = pins.iter().map(Pinned::exclusive).collect();

    let mut existing = existing_pin.as_ref().map(Pinned::exclusive);
    if let (0, Some(leaf), Some(number)) = (new_maps, &existing, existing_number) {
        check(rel, number, check_leaf(leaf.bytes(), path.leaf));
    }
    if new_maps == 3 {
        meta.roots[path.root as usize] = numbers[0];
    }

    let record = GenericRecord::start(rel);
    if let Some(existing) = &mut existing {
        let copy = record.page(existing, false);
        match new_maps {
            0 => write_locators(copy),
            1 => set_map_entry(copy, path.lower, numbers[0]),
            _ => set_map_entry(copy, path.upper, numbers[0]),
        }
    }
    for (i, page) in pages.iter_mut().enumerate() {
        let level = (new_maps - 1 - i) as u16;
        let copy = record.page(page, true);
        init_page(copy);
        if level == LEAF {
            write_leaf_header(copy, path.leaf);
            write_locators(copy);
        } else {
            write_map_header(copy, MAP_MAGIC, level);
            set_map_entry(copy, if level == LOWER { path.lower } else { path.upper }, numbers[i + 1]);
        }
    }
    meta.write(record.page(meta_page, false));
    record.finish();
}

/// How many pages of the path do not exist yet: 0 to 3.
fn missing_maps(rel: pg_sys::Relation, meta: &Meta, path: &Path) -> u32 {
    let upper = meta.roots[path.root as usize];
    if upper == 0 {
        return 3;
    }
    let lower = entry_of(rel, upper, UPPER, path.upper);
    if lower == 0 {
        return 2;
    }
    u32::from(entry_of(rel, lower, LOWER, path.lower) == 0)
}

pub(super) fn existing_lower(rel: pg_sys::Relation, meta: &Meta, path: &Path) -> u32 {
    entry_of(rel, meta.roots[path.root as usize], UPPER, path.upper)
}

fn leaf_page(rel: pg_sys::Relation, meta: &Meta, path: &Path) -> Option<u32> {
    let mut page = meta.roots[path.root as usize];
    for (level, entry) in [(UPPER, path.upper), (LOWER, path.lower)] {
        if page == 0 {
            return None;
        }
        page = entry_of(rel, page, level, entry);
    }
    (page != 0).then_some(page)
}

fn entry_of(rel: pg_sys::Relation, page_number: u32, level: u16, entry: u32) -> u32 {
    debug_assert!(entry < MAP_FANOUT);
    let pin = Pinned::read(rel, page_number);
    let page = pin.share();
    check(rel, page_number, check_map_header(page.bytes(), MAP_MAGIC, level));
    map_entry(page.bytes(), entry)
}

pub(super) fn meta_of(rel: pg_sys::Relation, page: &[u8]) -> Meta {
    match Meta::read(page) {
        Ok(meta) => meta,
        Err(e) => check_failed(rel, META_PAGE, e),
    }
}

pub(super) fn check(rel: pg_sys::Relation, page: u32, result: Result<(), FormatError>) {
    if let Err(e) = result {
        check_failed(rel, page, e)
    }
}

pub(super) fn check_failed(rel: pg_sys::Relation, page: u32, e: FormatError) -> ! {
    // SAFETY: open relation.
    let oid = unsafe { (*rel).rd_id }.to_u32();
    match e {
        FormatError::Newer { found } => error::raise(
            PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
            format!("block store {oid} has format version {found}, which this library does not know"),
            &format!("This library reads versions up to {}.", super::format::FORMAT_VERSION),
            "Install a newer version of pg_tessera and restart the server.",
        ),
        FormatError::Unsound => error::raise(
            PgSqlErrorCode::ERRCODE_DATA_CORRUPTED,
            format!("page {page} of block store {oid} is not what it should be"),
            "Its fields contradict each other.",
            "The table is damaged; restore it from a backup.",
        ),
        FormatError::Magic { found, expected } => error::raise(
            PgSqlErrorCode::ERRCODE_DATA_CORRUPTED,
            format!("page {page} of block store {oid} is not what it should be"),
            &format!("Magic {found:#010x} was found and {expected:#010x} expected."),
            "The table is damaged; restore it from a backup.",
        ),
    }
}

pub(super) fn full_store(full: Full) -> ! {
    let what = match full {
        Full::BlockIds => "all 2^32 - 1 block ids of the table were used",
        Full::Pages => "the table's block store has reached PostgreSQL's limit of 32 TB",
    };
    error::raise(
        PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
        "block store is full",
        what,
        "Copy the rows to a new table, or partition the table.",
    )
}
