//! Index build over rows (after `heapam_index_build_range_scan`, heapam_handler.c), and over the blocks of a store.
//!
//! heapam's own function reads by `heap_getnext`, which refuses relations of another access method, so the loop is
//! written here: the tuple-liveness rules are heapam's, since the rows are heap rows.

use super::slot::{begin_store, end_store};
use super::{call_heapam, is_store};
use crate::pg::{error, error_context, interrupt};
use crate::store::{self, directory};
use pgrx::pg_sys;
use pgrx::pg_sys::{HTSV_Result, ScanDirection};
use pgrx::prelude::*;

/// `MaxHeapTuplesPerPage` (htup_details.h) of 8 kB pages, which has no binding.
pub(super) const ROOT_OFFSETS: usize = 291;

#[allow(clippy::too_many_arguments)]
pub unsafe extern "C-unwind" fn index_build_range_scan(
    table: pg_sys::Relation,
    index: pg_sys::Relation,
    info: *mut pg_sys::IndexInfo,
    allow_sync: bool,
    anyvisible: bool,
    progress: bool,
    start_block: pg_sys::BlockNumber,
    blocks: pg_sys::BlockNumber,
    callback: pg_sys::IndexBuildCallback,
    state: *mut std::ffi::c_void,
    scan: pg_sys::TableScanDesc,
) -> f64 {
    let body = || {
        // SAFETY: PostgreSQL passes open relations, a filled IndexInfo and its own callback.
        unsafe {
            if is_store(table) {
                if scan.is_null() {
                    return build_directory(table, index, callback, state);
                }
                // A parallel build: the first participant reads the locators, the others have nothing to add.
                let entries = if is_first(scan) { build_directory(table, index, callback, state) } else { 0.0 };
                call_heapam!(scan_end(scan));
                return entries;
            }
            let range = (!allow_sync).then_some((start_block, blocks));
            build_rows(table, index, info, range, anyvisible, progress, callback, state, scan)
        }
    };
    // SAFETY: the whole of a callback.
    unsafe { error_context::guard(body) }
}

/// True for one participant of a parallel scan.
unsafe fn is_first(scan: pg_sys::TableScanDesc) -> bool {
    // SAFETY: a parallel scan that heapam began: the counter of pages that it hands out lies in shared memory, starts at 0,
    // and is changed by atomic operations only.
    unsafe {
        let shared = (*scan).rs_parallel.cast::<pg_sys::ParallelBlockTableScanDescData>();
        let handed_out = std::sync::atomic::AtomicU64::from_ptr((&raw mut (*shared).phs_nallocated).cast());
        handed_out.fetch_add(1, std::sync::atomic::Ordering::AcqRel) == 0
    }
}

/// Builds the directory of a store anew from its locators: the same entries that insertions made.
unsafe fn build_directory(
    table: pg_sys::Relation,
    index: pg_sys::Relation,
    callback: pg_sys::IndexBuildCallback,
    state: *mut std::ffi::c_void,
) -> f64 {
    let Some(meta) = store::locators::read_meta(table) else { return 0.0 };
    let callback = callback.expect("an index access method passes its callback");
    let mut entries = 0.0;
    store::for_each_block(table, |block_id, locator| {
        let chunk_id = directory::chunk_id(&meta.hash_key, &locator.hash);
        // chunk_data is no column of the index.
        let mut values = [pg_sys::Datum::from(chunk_id), pg_sys::Datum::from(block_id as i32)];
        let mut nulls = [false; 2];
        let mut tid = directory::tid_of(block_id);
        // SAFETY: the index access method's callback, with arrays of as many entries as the index has columns.
        unsafe {
            pg_sys::ffi::pg_guard_ffi_boundary(|| {
                callback(index, &mut tid, values.as_mut_ptr(), nulls.as_mut_ptr(), true, state)
            })
        };
        entries += 1.0;
    });
    entries
}

#[allow(clippy::too_many_arguments)]
unsafe fn build_rows(
    table: pg_sys::Relation,
    index: pg_sys::Relation,
    info: *mut pg_sys::IndexInfo,
    range: Option<(pg_sys::BlockNumber, pg_sys::BlockNumber)>,
    anyvisible: bool,
    progress: bool,
    callback: pg_sys::IndexBuildCallback,
    state: *mut std::ffi::c_void,
    given_scan: pg_sys::TableScanDesc,
) -> f64 {
    // SAFETY: as for the caller. The executor state, the slot and a registered snapshot are freed at the end; on an ERROR
    // their memory contexts and the resource owner do it.
    unsafe {
        let callback = callback.expect("an index access method passes its callback");
        let checking_uniqueness = (*info).ii_Unique || !(*info).ii_ExclusionOps.is_null();
        let estate = pg_sys::CreateExecutorState();
        let econtext = per_tuple_context(estate);
        let slot = pg_sys::table_slot_create(table, std::ptr::null_mut());
        (*econtext).ecxt_scantuple = slot;
        let predicate = pg_sys::ExecPrepareQual((*info).ii_Predicate, estate);

        let oldest_xmin = if (*info).ii_Concurrent {
            pg_sys::InvalidTransactionId
        } else {
            pg_sys::GetOldestNonRemovableTransactionId(table)
        };
        let mut registered = std::ptr::null_mut();
        let scan = if given_scan.is_null() {
            let snapshot = if (*info).ii_Concurrent {
                registered = pg_sys::RegisterSnapshot(pg_sys::GetTransactionSnapshot());
                registered
            } else {
                &raw mut pg_sys::SnapshotAnyData
            };
            pg_sys::table_beginscan_strat(table, snapshot, 0, std::ptr::null_mut(), true, range.is_none())
        } else {
            given_scan
        };
        if let Some((start, blocks)) = range {
            pg_sys::heap_setscanlimits(scan, start, blocks);
        }
        let any_snapshot = (*(*scan).rs_snapshot).snapshot_type == pg_sys::SnapshotType::SNAPSHOT_ANY;
        let heap_scan = scan.cast::<pg_sys::HeapScanDescData>();
        if progress {
            let total = if (*scan).rs_parallel.is_null() {
                (*heap_scan).rs_nblocks
            } else {
                (*(*scan).rs_parallel.cast::<pg_sys::ParallelBlockTableScanDescData>()).phs_nblocks
            };
            pg_sys::pgstat_progress_update_param(pg_sys::PROGRESS_SCAN_BLOCKS_TOTAL as i32, i64::from(total));
        }

        let mut reltuples = 0.0;
        let mut root_block = pg_sys::InvalidBlockNumber;
        let mut blocks_seen = 0i64;
        let mut roots = [0 as pg_sys::OffsetNumber; ROOT_OFFSETS];
        let mut values = [pg_sys::Datum::from(0); pg_sys::INDEX_MAX_KEYS as usize];
        let mut nulls = [false; pg_sys::INDEX_MAX_KEYS as usize];

        loop {
            let inner = begin_store(slot, table);
            if !pg_sys::heap_getnextslot(scan, ScanDirection::ForwardScanDirection, inner) {
                break;
            }
            end_store(slot, table);
            interrupt::check();
            // The inner slot holds heapam's own tuple: nothing is copied.
            let tuple = pg_sys::ExecFetchSlotHeapTuple(inner, false, std::ptr::null_mut());
            let buffer = (*heap_scan).rs_cbuf;
            if (*heap_scan).rs_cblock != root_block {
                root_block = (*heap_scan).rs_cblock;
                blocks_seen += 1;
                if progress {
                    pg_sys::pgstat_progress_update_param(pg_sys::PROGRESS_SCAN_BLOCKS_DONE as i32, blocks_seen);
                }
                read_roots(buffer, &mut roots);
            }

            let mut alive = true;
            if any_snapshot {
                match judge(table, tuple, buffer, oldest_xmin, anyvisible, checking_uniqueness, info) {
                    Verdict::Skip => continue,
                    Verdict::Index { alive: a, counts } => {
                        alive = a;
                        if counts {
                            reltuples += 1.0;
                        }
                    }
                }
            } else {
                reltuples += 1.0;
            }

            pg_sys::MemoryContextReset((*econtext).ecxt_per_tuple_memory);
            if !predicate.is_null() && !pg_sys::ExecQual(predicate, econtext) {
                continue;
            }
            pg_sys::FormIndexDatum(info, slot, estate, values.as_mut_ptr(), nulls.as_mut_ptr());

            let mut tid = (*tuple).t_self;
            if pg_sys::htup::HeapTupleHeaderIsHeapOnly((*tuple).t_data) {
                // Under the TID of its HOT chain's root. A chain may have begun since the page's roots were read.
                let mut root = roots[tid.ip_posid as usize - 1];
                if root == 0 {
                    read_roots(buffer, &mut roots);
                    root = roots[tid.ip_posid as usize - 1];
                }
                if root == 0 {
                    error::raise(
                        PgSqlErrorCode::ERRCODE_DATA_CORRUPTED,
                        "failed to find parent tuple for heap-only tuple",
                        &format!("The tuple is at ({root_block},{}).", tid.ip_posid),
                        "",
                    );
                }
                tid.ip_posid = root;
            }
            let (v, n) = (values.as_mut_ptr(), nulls.as_mut_ptr());
            pg_sys::ffi::pg_guard_ffi_boundary(|| callback(index, &mut tid, v, n, alive, state));
        }

        call_heapam!(scan_end(scan));
        if !registered.is_null() {
            pg_sys::UnregisterSnapshot(registered);
        }
        pg_sys::ExecDropSingleTupleTableSlot(slot);
        pg_sys::FreeExecutorState(estate);
        // These pointed into the executor state.
        (*info).ii_ExpressionsState = std::ptr::null_mut();
        (*info).ii_PredicateState = std::ptr::null_mut();
        reltuples
    }
}

enum Verdict {
    Skip,
    Index { alive: bool, counts: bool },
}

/// Whether a row seen by SnapshotAny belongs into the index, by heapam's rules.
unsafe fn judge(
    table: pg_sys::Relation,
    tuple: pg_sys::HeapTuple,
    buffer: pg_sys::Buffer,
    oldest_xmin: pg_sys::TransactionId,
    anyvisible: bool,
    checking_uniqueness: bool,
    info: *mut pg_sys::IndexInfo,
) -> Verdict {
    // SAFETY: the scan has the buffer pinned; the content lock is let go before any wait.
    unsafe {
        let header = (*tuple).t_data;
        loop {
            pg_sys::LockBuffer(buffer, pg_sys::BUFFER_LOCK_SHARE as i32);
            let state = pg_sys::HeapTupleSatisfiesVacuum(tuple, oldest_xmin, buffer);
            let xmin = pg_sys::htup::HeapTupleHeaderGetXmin(header);
            let hot_updated = pg_sys::htup::HeapTupleHeaderIsHotUpdated(header);
            let xmax = if state == HTSV_Result::HEAPTUPLE_DELETE_IN_PROGRESS {
                update_xid(header)
            } else {
                pg_sys::InvalidTransactionId
            };
            pg_sys::LockBuffer(buffer, pg_sys::BUFFER_LOCK_UNLOCK as i32);

            let (wait_for, wait, alive) = match state {
                HTSV_Result::HEAPTUPLE_DEAD => return Verdict::Skip,
                HTSV_Result::HEAPTUPLE_LIVE => return Verdict::Index { alive: true, counts: true },
                HTSV_Result::HEAPTUPLE_RECENTLY_DEAD => {
                    if hot_updated {
                        // Only the chain's live end is indexed: wrong for snapshots older than the index.
                        (*info).ii_BrokenHotChain = true;
                        return Verdict::Skip;
                    }
                    return Verdict::Index { alive: false, counts: false };
                }
                _ if anyvisible => {
                    let inserting = state == HTSV_Result::HEAPTUPLE_INSERT_IN_PROGRESS;
                    return Verdict::Index { alive: inserting, counts: true };
                }
                HTSV_Result::HEAPTUPLE_INSERT_IN_PROGRESS => {
                    if pg_sys::TransactionIdIsCurrentTransactionId(xmin) {
                        return Verdict::Index { alive: true, counts: true };
                    }
                    (xmin, checking_uniqueness, true)
                }
                _ => {
                    if pg_sys::TransactionIdIsCurrentTransactionId(xmax) {
                        if hot_updated {
                            (*info).ii_BrokenHotChain = true;
                            return Verdict::Skip;
                        }
                        return Verdict::Index { alive: false, counts: false };
                    }
                    (xmax, checking_uniqueness || hot_updated, false)
                }
            };
            if !wait {
                return Verdict::Index { alive, counts: !alive };
            }
            // A verdict now could be wrong once that transaction ends.
            pg_sys::XactLockTableWait(wait_for, table, &mut (*tuple).t_self, pg_sys::XLTW_Oper::XLTW_InsertIndexUnique);
            interrupt::check();
        }
    }
}

/// `HeapTupleHeaderGetUpdateXid` (htup_details.h), which has no binding.
pub(super) unsafe fn update_xid(header: pg_sys::HeapTupleHeader) -> pg_sys::TransactionId {
    // SAFETY: the header of a tuple on a pinned, locked page.
    unsafe {
        let infomask = u32::from((*header).t_infomask);
        let multi = infomask & pg_sys::HEAP_XMAX_IS_MULTI != 0;
        if infomask & pg_sys::HEAP_XMAX_INVALID == 0 && multi && infomask & pg_sys::HEAP_XMAX_LOCK_ONLY == 0 {
            pg_sys::HeapTupleGetUpdateXid(header)
        } else {
            (*header).t_choice.t_heap.t_xmax
        }
    }
}

pub(super) unsafe fn read_roots(buffer: pg_sys::Buffer, roots: &mut [pg_sys::OffsetNumber; ROOT_OFFSETS]) {
    // SAFETY: the scan has the buffer pinned; the array has MaxHeapTuplesPerPage entries.
    unsafe {
        pg_sys::LockBuffer(buffer, pg_sys::BUFFER_LOCK_SHARE as i32);
        pg_sys::heap_get_root_tuples(pg_sys::BufferGetPage(buffer), roots.as_mut_ptr());
        pg_sys::LockBuffer(buffer, pg_sys::BUFFER_LOCK_UNLOCK as i32);
    }
}

/// `GetPerTupleExprContext` (executor.h), which has no binding.
pub(super) unsafe fn per_tuple_context(estate: *mut pg_sys::EState) -> *mut pg_sys::ExprContext {
    // SAFETY: a fresh executor state.
    unsafe {
        if (*estate).es_per_tuple_exprcontext.is_null() {
            (*estate).es_per_tuple_exprcontext = pg_sys::MakePerTupleExprContext(estate);
        }
        (*estate).es_per_tuple_exprcontext
    }
}
