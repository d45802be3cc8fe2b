//! Insertions and row locks. Deletion is heapam's own callback: the payload stays in the store.

use super::refuse_store;
use super::slot::{as_ours, begin_store, remember_stored};
use super::toaster::Toaster;
use crate::pg::{error, memory};
use pgrx::pg_sys;
use pgrx::prelude::*;
use std::ffi::c_int;

/// `TABLE_INSERT_NO_LOGICAL` (tableam.h), which has no binding.
const NO_LOGICAL: c_int = 0x0008;

/// Keeps rows out of logical decoding, which sees stand-ins and not the payloads: it would fail on them. A table that is
/// published refuses the insertion instead of losing it silently; the extension's own table of blocks is exempt, so that
/// a publication FOR ALL TABLES does not block `load_model`.
unsafe fn insert_options(rel: pg_sys::Relation, options: c_int) -> c_int {
    // SAFETY: an open relation, in a transaction.
    unsafe {
        if pg_sys::wal_level < pg_sys::WalLevel::WAL_LEVEL_LOGICAL as i32 {
            return options;
        }
        let own = crate::pg::scan::relation_oid(c"tessera", c"weight") == Some((*rel).rd_id);
        #[cfg(not(feature = "pg14"))]
        if !own {
            let mut publication = pg_sys::PublicationDesc::default();
            pg_sys::RelationBuildPublicationDesc(rel, &mut publication);
            if publication.pubactions.pubinsert {
                error::not_supported(
                    "logical replication of tables with access method tensor_block is not supported",
                    "Take the table out of the publication, or copy its rows to a heap table and publish that.",
                );
            }
        }
        let _ = own;
        options | NO_LOGICAL
    }
}

#[pg_guard]
pub unsafe extern "C-unwind" fn tuple_insert(
    rel: pg_sys::Relation,
    slot: *mut pg_sys::TupleTableSlot,
    cid: pg_sys::CommandId,
    options: c_int,
    bistate: *mut pg_sys::BulkInsertStateData,
) {
    // SAFETY: PostgreSQL passes an open relation and a filled slot of any kind (CREATE TABLE AS passes its own).
    unsafe {
        refuse_store(rel, "insertion into");
        let options = insert_options(rel, options);
        pg_sys::slot_getallattrs(slot);
        (*slot).tts_tableOid = (*rel).rd_id;
        memory::in_scratch(|| {
            let tuple = Toaster::new(rel).form((*slot).tts_values, (*slot).tts_isnull);
            pg_sys::heap_insert(rel, tuple, cid, options, bistate);
            (*slot).tts_tid = (*tuple).t_self;
            if let Some(ours) = as_ours(slot) {
                remember_stored(ours, tuple);
                (*slot).tts_tid = (*tuple).t_self;
            }
        });
    }
}

#[pg_guard]
pub unsafe extern "C-unwind" fn multi_insert(
    rel: pg_sys::Relation,
    slots: *mut *mut pg_sys::TupleTableSlot,
    nslots: c_int,
    cid: pg_sys::CommandId,
    options: c_int,
    bistate: *mut pg_sys::BulkInsertStateData,
) {
    // SAFETY: as above, for an array of slots. heap_multi_insert wants slots that can give a heap tuple, so each row is
    // stored into a heap slot of the scratch context for the call.
    unsafe {
        refuse_store(rel, "insertion into");
        let options = insert_options(rel, options);
        let slots = std::slice::from_raw_parts(slots, nslots as usize);
        memory::in_scratch(|| {
            let mut toaster = Toaster::new(rel);
            // A descriptor without a reference count, which would be tied to the current resource owner.
            let desc = pg_sys::CreateTupleDescCopyConstr((*rel).rd_att);
            let mut rows: Vec<*mut pg_sys::TupleTableSlot> = Vec::with_capacity(slots.len());
            for &slot in slots {
                pg_sys::slot_getallattrs(slot);
                let tuple = toaster.form((*slot).tts_values, (*slot).tts_isnull);
                let row = pg_sys::MakeSingleTupleTableSlot(desc, &raw const pg_sys::TTSOpsHeapTuple);
                pg_sys::ExecStoreHeapTuple(tuple, row, false);
                rows.push(row);
            }
            pg_sys::heap_multi_insert(rel, rows.as_mut_ptr(), nslots, cid, options, bistate);
            for (&slot, &row) in slots.iter().zip(&rows) {
                if let Some(ours) = as_ours(slot) {
                    let stored = pg_sys::ExecFetchSlotHeapTuple(row, false, std::ptr::null_mut());
                    remember_stored(ours, stored);
                }
                (*slot).tts_tid = (*row).tts_tid;
                (*slot).tts_tableOid = (*rel).rd_id;
            }
            // The slots go with the scratch context; they hold no pin.
        });
    }
}

#[pg_guard]
pub unsafe extern "C-unwind" fn tuple_insert_speculative(
    _rel: pg_sys::Relation,
    _slot: *mut pg_sys::TupleTableSlot,
    _cid: pg_sys::CommandId,
    _options: c_int,
    _bistate: *mut pg_sys::BulkInsertStateData,
    _token: u32,
) {
    error::not_supported(
        "INSERT ... ON CONFLICT is not supported for tables with access method tensor_block",
        "Delete the conflicting rows first, or use a plain INSERT.",
    )
}

#[pg_guard]
pub unsafe extern "C-unwind" fn tuple_complete_speculative(
    _rel: pg_sys::Relation,
    _slot: *mut pg_sys::TupleTableSlot,
    _token: u32,
    _succeeded: bool,
) {
    error::not_supported(
        "INSERT ... ON CONFLICT is not supported for tables with access method tensor_block",
        "Delete the conflicting rows first, or use a plain INSERT.",
    )
}

#[cfg(any(feature = "pg14", feature = "pg15"))]
type UpdateIndexes = bool;
#[cfg(not(any(feature = "pg14", feature = "pg15")))]
type UpdateIndexes = pg_sys::TU_UpdateIndexes::Type;

#[pg_guard]
#[allow(clippy::too_many_arguments)]
pub unsafe extern "C-unwind" fn tuple_update(
    _rel: pg_sys::Relation,
    _otid: pg_sys::ItemPointer,
    _slot: *mut pg_sys::TupleTableSlot,
    _cid: pg_sys::CommandId,
    _snapshot: pg_sys::Snapshot,
    _crosscheck: pg_sys::Snapshot,
    _wait: bool,
    _tmfd: *mut pg_sys::TM_FailureData,
    _lockmode: *mut pg_sys::LockTupleMode::Type,
    _update_indexes: *mut UpdateIndexes,
) -> pg_sys::TM_Result::Type {
    error::not_supported(
        "UPDATE is not supported for tables with access method tensor_block",
        "Delete the row and insert the new one.",
    )
}

#[pg_guard]
#[allow(clippy::too_many_arguments)]
pub unsafe extern "C-unwind" fn tuple_lock(
    rel: pg_sys::Relation,
    tid: pg_sys::ItemPointer,
    snapshot: pg_sys::Snapshot,
    slot: *mut pg_sys::TupleTableSlot,
    cid: pg_sys::CommandId,
    mode: pg_sys::LockTupleMode::Type,
    wait_policy: pg_sys::LockWaitPolicy::Type,
    flags: u8,
    tmfd: *mut pg_sys::TM_FailureData,
) -> pg_sys::TM_Result::Type {
    // SAFETY: PostgreSQL passes an open relation and a slot made by table_slot_create.
    unsafe {
        let inner = begin_store(slot, rel);
        pg_sys::ExecClearTuple(inner);
        let result = super::call_heapam!(tuple_lock(rel, tid, snapshot, inner, cid, mode, wait_policy, flags, tmfd));
        // heapam stores the row whatever the result is, unless it says that there is none.
        if (*inner).tts_flags & pg_sys::TTS_FLAG_EMPTY as u16 == 0 {
            super::slot::end_store(slot, rel);
        }
        result
    }
}
