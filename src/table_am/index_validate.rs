//! The second scan of CREATE INDEX CONCURRENTLY (after `heapam_index_validate_scan`, heapam_handler.c).

use super::index_build::{ROOT_OFFSETS, per_tuple_context, read_roots};
use super::slot::{begin_store, end_store};
use super::{call_heapam, is_store};
use crate::pg::{error, error_context, interrupt};
use crate::store::{self, directory};
use pgrx::itemptr::item_pointer_get_both;
use pgrx::pg_sys;
use pgrx::pg_sys::ScanDirection;
use pgrx::prelude::*;

/// What the index holds, in the order of TIDs: read in step with the rows.
struct Entries {
    sort: *mut pg_sys::Tuplesortstate,
    at: Option<(u32, u16)>,
    done: bool,
}

impl Entries {
    /// Goes on until the entry at hand is not below `tid`; calls `passed` with each that was left behind.
    unsafe fn reach(&mut self, tid: (u32, u16), mut passed: impl FnMut((u32, u16))) {
        // SAFETY: the sort of ValidateIndexState, sorted.
        unsafe {
            while !self.done && self.at.is_none_or(|at| at < tid) {
                if let Some(at) = self.at {
                    passed(at);
                }
                let (mut value, mut null) = (pg_sys::Datum::from(0), false);
                if pg_sys::tuplesort_getdatum(
                    self.sort,
                    true,
                    #[cfg(not(any(feature = "pg14", feature = "pg15")))]
                    false,
                    &mut value,
                    &mut null,
                    std::ptr::null_mut(),
                ) {
                    // `itemptr_encode` (index.h): block number and offset, each whole.
                    let encoded = value.value() as u64;
                    self.at = Some(((encoded >> 16) as u32, encoded as u16));
                } else {
                    self.done = true;
                    self.at = None;
                }
            }
        }
    }
}

/// Enters what `snapshot` sees and the index, built meanwhile, does not have.
pub unsafe extern "C-unwind" fn index_validate_scan(
    table: pg_sys::Relation,
    index: pg_sys::Relation,
    info: *mut pg_sys::IndexInfo,
    snapshot: pg_sys::Snapshot,
    state: *mut pg_sys::ValidateIndexState,
) {
    let body = || {
        // SAFETY: PostgreSQL passes open relations, a registered snapshot and its own state with a sort of TIDs.
        unsafe {
            let mut entries = Entries { sort: (*state).tuplesort, at: None, done: false };
            if is_store(table) {
                validate_directory(table, index, info, state, &mut entries);
            } else {
                validate_rows(table, index, info, snapshot, state, &mut entries);
            }
        }
    };
    // SAFETY: the whole of a callback.
    unsafe { error_context::guard(body) }
}

/// Rows: those visible to the snapshot, heap-only ones under the TID of their chain's root.
unsafe fn validate_rows(
    table: pg_sys::Relation,
    index: pg_sys::Relation,
    info: *mut pg_sys::IndexInfo,
    snapshot: pg_sys::Snapshot,
    state: *mut pg_sys::ValidateIndexState,
    entries: &mut Entries,
) {
    // SAFETY: as for the caller; what is made here is freed at the end, or by its context and resource owner on an ERROR.
    unsafe {
        let estate = pg_sys::CreateExecutorState();
        let econtext = per_tuple_context(estate);
        let slot = pg_sys::table_slot_create(table, std::ptr::null_mut());
        (*econtext).ecxt_scantuple = slot;
        let predicate = pg_sys::ExecPrepareQual((*info).ii_Predicate, estate);
        // No synchronized scan: the rows must come in the order of TIDs, as the entries do.
        let scan = pg_sys::table_beginscan_strat(table, snapshot, 0, std::ptr::null_mut(), true, false);
        let heap_scan = scan.cast::<pg_sys::HeapScanDescData>();
        let total = i64::from((*heap_scan).rs_nblocks);
        pg_sys::pgstat_progress_update_param(pg_sys::PROGRESS_SCAN_BLOCKS_TOTAL as i32, total);

        let mut page = pg_sys::InvalidBlockNumber;
        let mut roots = [0 as pg_sys::OffsetNumber; ROOT_OFFSETS];
        // Entries of the page at hand that were passed: roots are not in the order of the rows that they stand for.
        let mut passed = [false; ROOT_OFFSETS];
        let mut values = [pg_sys::Datum::from(0); pg_sys::INDEX_MAX_KEYS as usize];
        let mut nulls = [false; pg_sys::INDEX_MAX_KEYS as usize];
        loop {
            let inner = begin_store(slot, table);
            if !pg_sys::heap_getnextslot(scan, ScanDirection::ForwardScanDirection, inner) {
                break;
            }
            end_store(slot, table);
            interrupt::check();
            (*state).htups += 1.0;
            let tuple = pg_sys::ExecFetchSlotHeapTuple(inner, false, std::ptr::null_mut());
            if (*heap_scan).rs_cblock != page {
                page = (*heap_scan).rs_cblock;
                pg_sys::pgstat_progress_update_param(pg_sys::PROGRESS_SCAN_BLOCKS_DONE as i32, i64::from(page));
                read_roots((*heap_scan).rs_cbuf, &mut roots);
                passed = [false; ROOT_OFFSETS];
            }
            let (_, mut offset) = item_pointer_get_both((*tuple).t_self);
            if pg_sys::htup::HeapTupleHeaderIsHeapOnly((*tuple).t_data) {
                offset = roots[usize::from(offset) - 1];
                if offset == 0 {
                    error::raise(
                        PgSqlErrorCode::ERRCODE_DATA_CORRUPTED,
                        "failed to find parent tuple for heap-only tuple",
                        &format!("The tuple is at ({page},{}).", (*tuple).t_self.ip_posid),
                        "",
                    );
                }
            }
            entries.reach((page, offset), |(block, at)| {
                if block == page {
                    passed[usize::from(at) - 1] = true;
                }
            });
            if entries.at == Some((page, offset)) || passed[usize::from(offset) - 1] {
                continue;
            }
            pg_sys::MemoryContextReset((*econtext).ecxt_per_tuple_memory);
            if !predicate.is_null() && !pg_sys::ExecQual(predicate, econtext) {
                continue;
            }
            pg_sys::FormIndexDatum(info, slot, estate, values.as_mut_ptr(), nulls.as_mut_ptr());
            let mut root = (*tuple).t_self;
            root.ip_posid = offset;
            // Uniqueness is checked also for a dead row: it stands for its whole chain.
            let unique = if (*info).ii_Unique {
                pg_sys::IndexUniqueCheck::UNIQUE_CHECK_YES
            } else {
                pg_sys::IndexUniqueCheck::UNIQUE_CHECK_NO
            };
            let (v, n) = (values.as_mut_ptr(), nulls.as_mut_ptr());
            pg_sys::index_insert(index, v, n, &mut root, table, unique, false, info);
            (*state).tups_inserted += 1.0;
        }
        call_heapam!(scan_end(scan));
        pg_sys::ExecDropSingleTupleTableSlot(slot);
        pg_sys::FreeExecutorState(estate);
        // These pointed into the executor state.
        (*info).ii_ExpressionsState = std::ptr::null_mut();
        (*info).ii_PredicateState = std::ptr::null_mut();
    }
}

/// A store's directory: its entries are in the order of block ids, as the locators are.
unsafe fn validate_directory(
    table: pg_sys::Relation,
    index: pg_sys::Relation,
    info: *mut pg_sys::IndexInfo,
    state: *mut pg_sys::ValidateIndexState,
    entries: &mut Entries,
) {
    let Some(meta) = store::locators::read_meta(table) else { return };
    store::for_each_block(table, |block_id, locator| {
        let mut tid = directory::tid_of(block_id);
        // SAFETY: as for the caller. Keys are unique by construction: no check is asked for.
        unsafe {
            (*state).htups += 1.0;
            let at = item_pointer_get_both(tid);
            entries.reach(at, |_| {});
            if entries.at == Some(at) {
                return;
            }
            let chunk_id = directory::chunk_id(&meta.hash_key, &locator.hash);
            let mut values = [pg_sys::Datum::from(chunk_id), pg_sys::Datum::from(block_id as i32)];
            let mut nulls = [false; 2];
            let check = pg_sys::IndexUniqueCheck::UNIQUE_CHECK_NO;
            pg_sys::index_insert(index, values.as_mut_ptr(), nulls.as_mut_ptr(), &mut tid, table, check, false, info);
            (*state).tups_inserted += 1.0;
        }
    });
}
