//! Scans: heapam's, with each row stored into the inner slot of ours.

use super::slot::{begin_store, end_store};
use super::{call_heapam, refuse_store};
use pgrx::pg_sys;
use pgrx::prelude::*;

#[pg_guard]
pub unsafe extern "C-unwind" fn scan_begin(
    rel: pg_sys::Relation,
    snapshot: pg_sys::Snapshot,
    nkeys: std::ffi::c_int,
    key: *mut pg_sys::ScanKeyData,
    parallel: pg_sys::ParallelTableScanDesc,
    flags: u32,
) -> pg_sys::TableScanDesc {
    // A parallel scan of a store is begun by the parallel build of its directory, which reads no rows (index_build.rs);
    // anybody else is refused at the first row.
    if parallel.is_null() {
        // SAFETY: PostgreSQL passes an open relation.
        unsafe { refuse_store(rel, "a scan") };
    }
    call_heapam!(scan_begin(rel, snapshot, nkeys, key, parallel, flags))
}

/// Lets heapam store the next row into the inner slot, and takes it over.
macro_rules! next_into {
    ($scan:expr, $slot:expr, |$inner:ident| $call:expr) => {{
        // SAFETY: PostgreSQL passes a running scan and a slot made by table_slot_create for its table.
        unsafe {
            let rel = (*$scan).rs_rd;
            refuse_store(rel, "a scan");
            let $inner = begin_store($slot, rel);
            let found = $call;
            if found {
                end_store($slot, rel);
            }
            found
        }
    }};
}

#[pg_guard]
pub unsafe extern "C-unwind" fn scan_getnextslot(
    scan: pg_sys::TableScanDesc,
    direction: pg_sys::ScanDirection::Type,
    slot: *mut pg_sys::TupleTableSlot,
) -> bool {
    next_into!(scan, slot, |inner| pg_sys::heap_getnextslot(scan, direction, inner))
}

#[pg_guard]
pub unsafe extern "C-unwind" fn scan_getnextslot_tidrange(
    scan: pg_sys::TableScanDesc,
    direction: pg_sys::ScanDirection::Type,
    slot: *mut pg_sys::TupleTableSlot,
) -> bool {
    next_into!(scan, slot, |inner| call_heapam!(scan_getnextslot_tidrange(scan, direction, inner)))
}

#[pg_guard]
pub unsafe extern "C-unwind" fn scan_analyze_next_tuple(
    scan: pg_sys::TableScanDesc,
    oldest_xmin: pg_sys::TransactionId,
    liverows: *mut f64,
    deadrows: *mut f64,
    slot: *mut pg_sys::TupleTableSlot,
) -> bool {
    next_into!(scan, slot, |inner| call_heapam!(scan_analyze_next_tuple(scan, oldest_xmin, liverows, deadrows, inner)))
}

#[cfg(not(feature = "pg18"))]
#[pg_guard]
pub unsafe extern "C-unwind" fn scan_bitmap_next_tuple(
    scan: pg_sys::TableScanDesc,
    tbmres: *mut pg_sys::TBMIterateResult,
    slot: *mut pg_sys::TupleTableSlot,
) -> bool {
    next_into!(scan, slot, |inner| call_heapam!(scan_bitmap_next_tuple(scan, tbmres, inner)))
}

#[cfg(feature = "pg18")]
#[pg_guard]
pub unsafe extern "C-unwind" fn scan_bitmap_next_tuple(
    scan: pg_sys::TableScanDesc,
    slot: *mut pg_sys::TupleTableSlot,
    recheck: *mut bool,
    lossy_pages: *mut u64,
    exact_pages: *mut u64,
) -> bool {
    next_into!(scan, slot, |inner| call_heapam!(scan_bitmap_next_tuple(scan, inner, recheck, lossy_pages, exact_pages)))
}

#[pg_guard]
pub unsafe extern "C-unwind" fn scan_sample_next_tuple(
    scan: pg_sys::TableScanDesc,
    state: *mut pg_sys::SampleScanState,
    slot: *mut pg_sys::TupleTableSlot,
) -> bool {
    next_into!(scan, slot, |inner| call_heapam!(scan_sample_next_tuple(scan, state, inner)))
}

#[pg_guard]
pub unsafe extern "C-unwind" fn index_fetch_tuple(
    scan: *mut pg_sys::IndexFetchTableData,
    tid: pg_sys::ItemPointer,
    snapshot: pg_sys::Snapshot,
    slot: *mut pg_sys::TupleTableSlot,
    call_again: *mut bool,
    all_dead: *mut bool,
) -> bool {
    // SAFETY: as for scans. In the middle of a HOT chain heapam goes on from its own state, not from the slot's.
    unsafe {
        let rel = (*scan).rel;
        refuse_store(rel, "an index scan");
        let inner = begin_store(slot, rel);
        let found = call_heapam!(index_fetch_tuple(scan, tid, snapshot, inner, call_again, all_dead));
        if found {
            end_store(slot, rel);
        }
        found
    }
}

#[pg_guard]
pub unsafe extern "C-unwind" fn tuple_fetch_row_version(
    rel: pg_sys::Relation,
    tid: pg_sys::ItemPointer,
    snapshot: pg_sys::Snapshot,
    slot: *mut pg_sys::TupleTableSlot,
) -> bool {
    // SAFETY: PostgreSQL passes an open relation and a slot made by table_slot_create for it.
    unsafe {
        // It may be the slot's own, which is about to be cleared.
        let mut tid = *tid;
        let inner = begin_store(slot, rel);
        let found = call_heapam!(tuple_fetch_row_version(rel, &mut tid, snapshot, inner));
        if found {
            end_store(slot, rel);
        }
        found
    }
}

#[pg_guard]
pub unsafe extern "C-unwind" fn tuple_satisfies_snapshot(
    rel: pg_sys::Relation,
    slot: *mut pg_sys::TupleTableSlot,
    snapshot: pg_sys::Snapshot,
) -> bool {
    // SAFETY: the slot holds a row that was fetched from the table.
    let inner = unsafe { super::slot::stored_row(slot) };
    call_heapam!(tuple_satisfies_snapshot(rel, inner, snapshot))
}
