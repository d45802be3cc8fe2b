//! Inspection: what a table's block store holds.

use crate::pg::fmgr::{Call, sql_functions};
use crate::pg::relation::OpenRelation;
use crate::pg::varlena;
use crate::store::locators::{self, Finder};
use crate::table_am;
use crate::{pg::error, pg::interrupt, store};
use pgrx::pg_sys;
use pgrx::prelude::*;

sql_functions!(store_totals, stored_bytes);

/// `tessera.store_totals(regclass)`: one row of counts, by a scan of the table's rows (not of its blocks).
fn store_totals(call: &Call) -> pg_sys::Datum {
    let oid: pg_sys::Oid = call.need(0, "relation");
    let table = OpenRelation::table(oid, pg_sys::AccessShareLock);
    check_readable(oid);
    let store_oid = open_store(table.raw());
    let store = (store_oid != pg_sys::InvalidOid).then(|| OpenRelation::table(store_oid, pg_sys::AccessShareLock));
    let totals = store.as_ref().map(|store| store::totals(store.raw()));
    let (references, referenced_bytes) = count_references(table.raw(), store.as_ref());
    let of = |count: fn(&store::Totals) -> u64| totals.as_ref().map_or(0, count) as i64;
    record(
        call,
        &[
            references as i64,
            referenced_bytes as i64,
            of(|t| t.blocks),
            of(|t| t.bytes),
            of(|t| u64::from(t.pages) * pg_sys::BLCKSZ as u64),
            of(|t| t.ids_left),
        ],
    )
}

/// `tessera.stored_bytes(value)`: what the value takes in its block store, in the form that it has there, or in the row.
fn stored_bytes(call: &Call) -> pg_sys::Datum {
    let Some(datum) = call.datum(0) else { return call.null() };
    let datum = datum.cast_mut_ptr();
    // SAFETY: the SQL declaration admits tensor_block only, a varlena; a TOAST pointer is not followed.
    let bytes = match unsafe { varlena::toast_pointer(datum) } {
        Some((reference, oid)) => {
            let toast = OpenRelation::table(oid, pg_sys::AccessShareLock);
            // In a TOAST relation of another access method the value is as its pointer says.
            let block = table_am::is_ours(&toast).then(|| locators::find(toast.raw(), reference.block_id)).flatten();
            block.map_or_else(|| reference.stored_len(), |block| block.stored_len()) as usize
        }
        // SAFETY: as above.
        None => unsafe { varlena::size_in_row(datum) },
    };
    pg_sys::Datum::from(bytes as i64)
}

/// The block store of an open table; `InvalidOid` if it has none. Tables of another access method are refused.
pub fn open_store(table: pg_sys::Relation) -> pg_sys::Oid {
    // SAFETY: open relation; syscache look-ups.
    unsafe {
        let am = pg_sys::get_am_name((*(*table).rd_rel).relam);
        let is_toast = (*(*table).rd_rel).relkind == pg_sys::RELKIND_TOASTVALUE as std::ffi::c_char;
        if am.is_null() || std::ffi::CStr::from_ptr(am) != c"tensor_block" || is_toast {
            error::raise(
                PgSqlErrorCode::ERRCODE_WRONG_OBJECT_TYPE,
                "relation has no block store",
                if is_toast { "It is one." } else { "Its access method is not tensor_block." },
                "Name a table that was created USING tensor_block.",
            );
        }
        (*(*table).rd_rel).reltoastrelid
    }
}

/// Only who may read a table learns what it holds; the extension's own are told in sum.
fn check_readable(oid: pg_sys::Oid) {
    if crate::pg::scan::relation_oid(c"tessera", c"weight") == Some(oid) {
        return;
    }
    // SAFETY: syscache look-ups in a transaction.
    let result = unsafe { pg_sys::pg_class_aclcheck(oid, pg_sys::GetUserId(), pg_sys::ACL_SELECT as pg_sys::AclMode) };
    if result != pg_sys::AclResult::ACLCHECK_OK {
        error::raise(
            PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
            "permission denied for relation",
            "Its counts are shown to roles that may read it.",
            "Ask its owner to GRANT SELECT.",
        );
    }
}

/// References from visible rows to the store, and the stored bytes that they stand for.
fn count_references(table: pg_sys::Relation, store: Option<&OpenRelation>) -> (u64, u64) {
    let (mut references, mut bytes) = (0u64, 0u64);
    let Some(store) = store else { return (0, 0) };
    let mut blocks = Finder::new(store.raw());
    // SAFETY: the table is open; scan and slot end below, or with the transaction on an ERROR.
    unsafe {
        let slot = pg_sys::table_slot_create(table, std::ptr::null_mut());
        let scan = pg_sys::table_beginscan(table, pg_sys::GetActiveSnapshot(), 0, std::ptr::null_mut());
        while pg_sys::table_scan_getnextslot(scan, pg_sys::ScanDirection::ForwardScanDirection, slot) {
            interrupt::check();
            pg_sys::slot_getallattrs(slot);
            let desc = (*slot).tts_tupleDescriptor;
            for i in 0..(*desc).natts as usize {
                if *(*slot).tts_isnull.add(i) || (*crate::pg::tuple::attribute(desc, i)).attlen != -1 {
                    continue;
                }
                let value = (*(*slot).tts_values.add(i)).cast_mut_ptr();
                if let Some((reference, oid)) = varlena::toast_pointer(value)
                    && oid == (*store.raw()).rd_id
                {
                    references += 1;
                    bytes += blocks.find(reference.block_id).map_or(0, |block| u64::from(block.stored_len()));
                }
            }
        }
        pg_sys::table_endscan(scan);
        pg_sys::ExecDropSingleTupleTableSlot(slot);
    }
    (references, bytes)
}

fn record(call: &Call, values: &[i64]) -> pg_sys::Datum {
    let values: Vec<_> = values.iter().map(|&v| Some(pg_sys::Datum::from(v))).collect();
    call.record(&values)
}
