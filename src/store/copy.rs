//! Blocks from one store to another, under their ids and as they are stored: for VACUUM FULL and CLUSTER.

use super::format::{Locator, State};
use super::{Marks, Payload, Store, locators, payload};
use crate::pg::{error, interrupt};
use pgrx::pg_sys;
use pgrx::prelude::*;
use std::borrow::Cow;

/// Copies the blocks in `marks` to the empty store `to`, in the order of `order`. The new store goes on with the ids of the
/// old one. Both are locked so that nobody changes them.
pub fn copy_blocks(
    from: pg_sys::Relation,
    to: pg_sys::Oid,
    marks: &Marks,
    order: impl FnOnce(Vec<(u32, Locator)>) -> Vec<(u32, Locator)>,
) {
    let Some(meta) = locators::read_meta(from) else {
        if !marks.is_empty() {
            missing(marks.ids()[0]);
        }
        return;
    };
    let mut blocks: Vec<(u32, Locator)> = Vec::new();
    locators::for_each(from, |id, locator| {
        if marks.contains(id) && locator.state() == Some(State::Live) {
            blocks.push((id, *locator));
        }
    });
    let ids = marks.ids();
    if ids.len() != blocks.len() {
        let gone = ids.iter().find(|id| blocks.binary_search_by_key(*id, |(id, _)| *id).is_err());
        missing(*gone.unwrap_or(&0));
    }
    let store = Store::open_like(to, Some(&meta));
    let mut bytes = Vec::new();
    for (id, locator) in order(blocks) {
        interrupt::check();
        bytes.resize(locator.stored_len() as usize, 0);
        payload::read(from, locator.page, u64::from(locator.offset), &mut bytes);
        let Some(encoding) = locator.encoding() else { unknown_form(id, locator.encoding) };
        let payload = Payload { stored: Cow::Borrowed(&bytes), method: locator.ext_info >> 30, encoding };
        store.put_as(id, &locator.hash, locator.raw_len, payload);
    }
}

fn unknown_form(id: u32, code: u8) -> ! {
    error::raise(
        PgSqlErrorCode::ERRCODE_DATA_CORRUPTED,
        format!("block {id} is stored in form {code}, which is not known"),
        "",
        "The table is damaged, or was written by a newer version: use that, or restore the table from a backup.",
    )
}

fn missing(id: u32) -> ! {
    error::raise(
        PgSqlErrorCode::ERRCODE_DATA_CORRUPTED,
        format!("a row references block {id}, which the block store does not have"),
        "",
        "tessera.check_store tells more; restore the table from a backup.",
    )
}
