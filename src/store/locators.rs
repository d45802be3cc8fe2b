//! Metapage, map pages and locators: reading, and the one place that changes them.

use super::format::{
    FormatError, LOCATOR_MAGIC, LOCATORS, Locator, MAP_FANOUT, MAP_MAGIC, Meta, Path, check_map_header, map_entry,
    set_map_entry, write_map_header,
};
use super::reserve::{Full, Reservation, plan};
use crate::pg::buffer::{Exclusive, Pinned, init_page, is_new};
use crate::pg::wal::GenericRecord;
use crate::pg::{error, relation};
use pgrx::pg_sys;
use pgrx::prelude::*;

const META_PAGE: u32 = 0;
const UPPER: u16 = 2;
const LOWER: u16 = 1;
const LEAF: u16 = 0;

/// The metapage's content; `None` in a store without pages or whose metapage was never written.
pub fn read_meta(rel: pg_sys::Relation) -> Option<Meta> {
    if relation::pages(rel) == 0 {
        return None;
    }
    let pin = Pinned::read(rel, META_PAGE);
    let page = pin.share();
    (!is_new(page.bytes())).then(|| meta_of(rel, page.bytes()))
}

/// The metapage's content, made with a fresh random key if there is none.
pub fn ensure_meta(rel: pg_sys::Relation) -> Meta {
    if let Some(meta) = read_meta(rel) {
        return meta;
    }
    relation::extend_to(rel, META_PAGE + 1);
    let pin = Pinned::read(rel, META_PAGE);
    let mut page = pin.exclusive();
    if !is_new(page.bytes()) {
        return meta_of(rel, page.bytes()); // somebody else was faster
    }
    let mut key = [0u8; 32];
    // SAFETY: fills the array; false means that the system has no randomness to give.
    if !unsafe { pg_sys::pg_strong_random(key.as_mut_ptr().cast(), key.len()) } {
        error::raise(PgSqlErrorCode::ERRCODE_INTERNAL_ERROR, "could not generate the key of a block store", "", "");
    }
    let meta = Meta::new(key);
    let record = GenericRecord::start(rel);
    let copy = record.page(&mut page, true);
    init_page(copy);
    meta.write(copy);
    record.finish();
    meta
}

/// The locator of a block; `None` if the store has no such block.
pub fn find(rel: pg_sys::Relation, block_id: u32) -> Option<Locator> {
    let meta = read_meta(rel)?;
    let path = Path::of(block_id);
    let leaf = leaf_page(rel, &meta, &path)?;
    let pin = Pinned::read(rel, leaf);
    let page = pin.share();
    check(rel, leaf, check_map_header(page.bytes(), LOCATOR_MAGIC, LEAF));
    let locator = Locator::read(page.bytes(), path.slot);
    (locator.stored_len() > 0).then_some(locator)
}

/// Writes the locator of a block whose id was reserved.
pub fn write(rel: pg_sys::Relation, block_id: u32, locator: &Locator) {
    let meta = ensure_meta(rel);
    let path = Path::of(block_id);
    let Some(leaf) = leaf_page(rel, &meta, &path) else {
        error::raise(
            PgSqlErrorCode::ERRCODE_DATA_CORRUPTED,
            format!("block store has no locator page for block {block_id}"),
            "",
            "The table is damaged; restore it from a backup.",
        )
    };
    let pin = Pinned::read(rel, leaf);
    let mut page = pin.exclusive();
    check(rel, leaf, check_map_header(page.bytes(), LOCATOR_MAGIC, LEAF));
    let record = GenericRecord::start(rel);
    locator.write(record.page(&mut page, false), path.slot);
    record.finish();
}

/// Calls `f` with every block, in the order of ids.
pub fn for_each(rel: pg_sys::Relation, mut f: impl FnMut(u32, &Locator)) {
    let Some(meta) = read_meta(rel) else { return };
    let end = if meta.next_block_id == 0 { 1u64 << 32 } else { u64::from(meta.next_block_id) };
    let mut first = 0u64;
    while first < end {
        crate::pg::interrupt::check();
        if let Some(leaf) = leaf_page(rel, &meta, &Path::of(first as u32)) {
            let locators: Vec<Locator> = {
                let pin = Pinned::read(rel, leaf);
                let page = pin.share();
                check(rel, leaf, check_map_header(page.bytes(), LOCATOR_MAGIC, LEAF));
                (0..LOCATORS).map(|slot| Locator::read(page.bytes(), slot)).collect()
            };
            for (slot, locator) in locators.iter().enumerate().filter(|(_, l)| l.stored_len() > 0) {
                f(first as u32 + slot as u32, locator);
            }
        }
        first += u64::from(LOCATORS);
    }
}

/// Reserves a block id, space for `len` bytes and the id's place among the locators.
///
/// The file is extended before the metapage is changed, and never under its lock.
pub fn reserve(rel: pg_sys::Relation, len: u32) -> Reservation {
    let mut have = relation::pages(rel);
    loop {
        let pin = Pinned::read(rel, META_PAGE);
        let mut page = pin.exclusive();
        let meta = meta_of(rel, page.bytes());
        let path = Path::of(meta.next_block_id);
        // Ids come in order, so a locator page is missing only for the first id that it would hold.
        let new_maps = if path.slot == 0 || meta.next_block_id == 1 { missing_maps(rel, &meta, &path) } else { 0 };
        let reservation = match plan(&meta, len, new_maps) {
            Ok(reservation) => reservation,
            Err(full) => full_store(full),
        };
        if reservation.pages_needed > have {
            drop(page);
            drop(pin);
            relation::extend_to(rel, reservation.pages_needed);
            have = relation::pages(rel);
            continue;
        }
        return apply(rel, &mut page, reservation, &path, new_maps);
    }
}

/// Writes the metapage of a reservation, and makes the map and locator pages that it needs, in one record.
fn apply(
    rel: pg_sys::Relation,
    meta_page: &mut Exclusive<'_>,
    mut reservation: Reservation,
    path: &Path,
    new_maps: u32,
) -> Reservation {
    let meta = &mut reservation.meta;
    let first_new = meta.map_next;
    meta.map_next += new_maps;
    // From the top down: what is new is the lower end of the path.
    let numbers: Vec<u32> = (first_new..first_new + new_maps).collect();
    let pins: Vec<Pinned> = numbers.iter().map(|&number| Pinned::read(rel, number)).collect();
    let mut pages: Vec<Exclusive<'_>> = pins.iter().map(Pinned::exclusive).collect();

    // The lowest page of the path that exists already takes the entry for the first new one.
    let parent_pin = match new_maps {
        1 => Some(Pinned::read(rel, existing_lower(rel, meta, path))),
        2 => Some(Pinned::read(rel, meta.roots[path.root as usize])),
        _ => None,
    };
    let mut parent = parent_pin.as_ref().map(Pinned::exclusive);
    if new_maps == 3 {
        meta.roots[path.root as usize] = numbers[0];
    }

    let record = GenericRecord::start(rel);
    if let Some(parent) = &mut parent {
        let entry = if new_maps == 1 { path.lower } else { path.upper };
        set_map_entry(record.page(parent, false), entry, numbers[0]);
    }
    for (i, page) in pages.iter_mut().enumerate() {
        let level = (new_maps as usize - 1 - i) as u16;
        let copy = record.page(page, true);
        init_page(copy);
        write_map_header(copy, if level == LEAF { LOCATOR_MAGIC } else { MAP_MAGIC }, level);
        if level > LEAF {
            let entry = if level == UPPER { path.upper } else { path.lower };
            set_map_entry(copy, entry, numbers[i + 1]);
        }
    }
    meta.write(record.page(meta_page, false));
    record.finish();
    reservation
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

fn existing_lower(rel: pg_sys::Relation, meta: &Meta, path: &Path) -> u32 {
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

fn meta_of(rel: pg_sys::Relation, page: &[u8]) -> Meta {
    match Meta::read(page) {
        Ok(meta) => meta,
        Err(e) => check_failed(rel, META_PAGE, e),
    }
}

fn check(rel: pg_sys::Relation, page: u32, result: Result<(), FormatError>) {
    if let Err(e) = result {
        check_failed(rel, page, e)
    }
}

fn check_failed(rel: pg_sys::Relation, page: u32, e: FormatError) -> ! {
    // SAFETY: open relation.
    let oid = unsafe { (*rel).rd_id }.to_u32();
    match e {
        FormatError::Newer { found } => error::raise(
            PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
            format!("block store {oid} has format version {found}, which this library does not know"),
            &format!("This library reads versions up to {}.", super::format::FORMAT_VERSION),
            "Install a newer version of pg_tessera and restart the server.",
        ),
        FormatError::Magic { found, expected } => error::raise(
            PgSqlErrorCode::ERRCODE_DATA_CORRUPTED,
            format!("page {page} of block store {oid} is not what it should be"),
            &format!("Magic {found:#010x} was found and {expected:#010x} expected."),
            "The table is damaged; restore it from a backup.",
        ),
    }
}

fn full_store(full: Full) -> ! {
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
