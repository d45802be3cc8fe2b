//! Page inspection in the manner of pageinspect, for superusers: what lies where in a block store.

use super::inspect::open_store;
use crate::pg::buffer::Pinned;
use crate::pg::error;
use crate::pg::fmgr::{Call, Rows, sql_functions};
use crate::pg::relation::{self, OpenRelation};
use crate::store::format::{
    FREE_MAGIC, GAP_MAGIC, GapPage, HEAD_PAGES, LOCATOR_MAGIC, MAP_MAGIC, META_MAGIC, State, extent_of, page_magic,
};
use crate::store::{locators, tree};
use pgrx::pg_sys;
use pgrx::prelude::*;

sql_functions!(store_meta, store_blocks, store_page);

/// The block store of the table in the first argument, opened for reading.
fn open(call: &Call) -> OpenRelation {
    // SAFETY: plain question.
    if !unsafe { pg_sys::superuser() } {
        error::raise(
            PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
            "must be superuser to inspect the pages of a block store",
            "",
            "tessera.storage shows the counts of tables that you may read.",
        );
    }
    let table = OpenRelation::table(call.need(0, "relation"), pg_sys::AccessShareLock);
    match open_store(table.raw()) {
        pg_sys::InvalidOid => error::raise(
            PgSqlErrorCode::ERRCODE_WRONG_OBJECT_TYPE,
            "table has no block store",
            "None of its columns can hold wide values.",
            "Name a table with a column of variable length.",
        ),
        oid => OpenRelation::table(oid, pg_sys::AccessShareLock),
    }
}

fn number(value: impl Into<i64>) -> Option<pg_sys::Datum> {
    value.into().into_datum()
}

/// `tessera.store_meta(regclass)`: the metapage; no row for a store without one.
fn store_meta(call: &Call) -> pg_sys::Datum {
    let store = open(call);
    let mut rows = Rows::start(call);
    if let Some(meta) = locators::read_meta(store.raw()) {
        rows.push(&[
            number(meta.version),
            number(meta.next_block_id),
            // The next id is 0 when all were handed out.
            number(if meta.next_block_id == 0 { 0 } else { (1i64 << 32) - i64::from(meta.next_block_id) }),
            number(meta.next_extent),
            number(meta.stored_blocks as i64),
            number(meta.stored_bytes as i64),
            number(relation::pages(store.raw())),
            number(meta.gap_page),
        ]);
    }
    call.null()
}

/// `tessera.store_blocks(regclass)`: every locator that is in use.
fn store_blocks(call: &Call) -> pg_sys::Datum {
    let store = open(call);
    let mut rows = Rows::start(call);
    locators::for_each(store.raw(), |id, locator| {
        let state = match locator.state() {
            Some(State::Live) if locator.condemn_xid != 0 => "condemned",
            Some(State::Live) => "live",
            Some(State::Reserved) => "reserved",
            Some(State::Dying) => "dying",
            None => "unknown",
        };
        let compressed = locator.stored_len() < locator.raw_len;
        let method = match (locator.encoding(), compressed, locator.ext_info >> 30) {
            (None, ..) => Some("unknown"),
            (Some(encoding), ..) if !encoding.is_plain() => encoding.name(),
            (_, false, _) => None,
            (_, true, 0) => Some("pglz"),
            (_, true, 1) => Some("lz4"),
            (_, true, _) => Some("unknown"),
        };
        rows.push(&[
            number(id),
            state.into_datum(),
            locator.hash.as_slice().into_datum(),
            (locator.page >= HEAD_PAGES).then(|| pg_sys::Datum::from(i64::from(extent_of(locator.range().start)))),
            number(locator.page),
            number(locator.offset),
            number(locator.stored_len()),
            number(locator.raw_len),
            method.and_then(IntoDatum::into_datum),
            number(locator.version),
            (locator.condemn_xid != 0).then(|| pg_sys::Datum::from(locator.condemn_xid)),
        ]);
    });
    call.null()
}

/// `tessera.store_page(regclass, bigint)`: what a page is.
fn store_page(call: &Call) -> pg_sys::Datum {
    let store = open(call);
    let page: i64 = call.need(1, "page");
    let pages = relation::pages(store.raw());
    let Some(page) = u32::try_from(page).ok().filter(|&page| page < pages) else {
        error::raise(
            PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
            format!("block store has no page {page}"),
            &format!("It has {pages} pages."),
            "Pages are numbered from 0.",
        )
    };
    let meta = locators::read_meta(store.raw());
    let tree: Vec<u32> = if meta.is_some() { tree::tree_pages(store.raw()) } else { Vec::new() };
    let pin = Pinned::read(store.raw(), page);
    let bytes = pin.share().bytes().to_vec();
    let magic = page_magic(&bytes);
    let (kind, entries) = match magic {
        _ if crate::pg::buffer::is_new(&bytes) => ("free", None),
        Some(META_MAGIC) if page == 0 => ("metapage", None),
        Some(MAP_MAGIC) if tree.contains(&page) => ("map", Some(crate::store::format::map_entries(&bytes))),
        Some(LOCATOR_MAGIC) if tree.contains(&page) => {
            ("locators", Some(crate::store::format::locator_entries(&bytes)))
        }
        Some(FREE_MAGIC) if tree.contains(&page) => ("unused", None),
        Some(GAP_MAGIC) if page < HEAD_PAGES || !tree.contains(&page) && GapPage::read(&bytes).is_plausible(pages) => {
            ("gaps", Some(GapPage::read(&bytes).gaps.len() as i64))
        }
        _ => ("payload", None),
    };
    let lsn = u64::from(u32::from_ne_bytes(bytes[0..4].try_into().expect("four bytes"))) << 32
        | u64::from(u32::from_ne_bytes(bytes[4..8].try_into().expect("four bytes")));
    let mut rows = Rows::start(call);
    rows.push(&[
        kind.into_datum(),
        (page >= HEAD_PAGES && kind == "payload")
            .then(|| pg_sys::Datum::from(i64::from((page - HEAD_PAGES) / crate::store::format::EXTENT_PAGES))),
        entries.map(pg_sys::Datum::from),
        Some(pg_sys::Datum::from(lsn)),
    ]);
    call.null()
}
