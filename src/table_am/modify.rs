//! Insertions, updates, deletions and row locks. A payload outlives the row: the sweep removes what no row references.

use super::refuse_store;
use super::slot::{as_ours, begin_store, remember_stored};
use super::toaster::Toaster;
use crate::pg::{error, error_context, memory};
use pgrx::pg_sys;
use pgrx::prelude::*;
use std::ffi::c_int;

/// `TABLE_INSERT_NO_LOGICAL` (tableam.h), which has no binding.
const NO_LOGICAL: c_int = 0x0008;

/// `HEAP_INSERT_SPECULATIVE` (heapam.h), which has no binding.
const HEAP_INSERT_SPECULATIVE: c_int = 0x0010;

/// True if changes of rows may be decoded.
fn logical() -> bool {
    // SAFETY: set once, when the server starts.
    unsafe { pg_sys::wal_level >= pg_sys::WalLevel::WAL_LEVEL_LOGICAL as c_int }
}

/// Keeps new rows out of logical decoding, which sees stand-ins and not the payloads: it would fail on them.
unsafe fn insert_options(rel: pg_sys::Relation, options: c_int) -> c_int {
    if !logical() {
        return options;
    }
    // SAFETY: an open relation, in a transaction.
    unsafe { refuse_published(rel, |actions| actions.pubinsert) };
    options | NO_LOGICAL
}

/// A table that is published refuses the change instead of losing it silently; the extension's own table of blocks is
/// exempt, so that a publication FOR ALL TABLES does not block `load_model`.
unsafe fn refuse_published(rel: pg_sys::Relation, published: impl FnOnce(&pg_sys::PublicationActions) -> bool) {
    if !logical() {
        return;
    }
    // SAFETY: an open relation, in a transaction.
    unsafe {
        if crate::pg::scan::relation_oid(c"tessera", c"weight") == Some((*rel).rd_id) {
            return;
        }
        #[cfg(not(feature = "pg14"))]
        {
            let mut publication = pg_sys::PublicationDesc::default();
            pg_sys::RelationBuildPublicationDesc(rel, &mut publication);
            if published(&publication.pubactions) {
                error::not_supported(
                    "logical replication of tables with access method tensor_block is not supported",
                    "Take the table out of the publication, or copy its rows to a heap table and publish that.",
                );
            }
        }
        #[cfg(feature = "pg14")]
        let _ = published;
    }
}

/// While it lives, heapam logs nothing for logical decoding: for updates, deletions and insertions of many rows it has no
/// option like `TABLE_INSERT_NO_LOGICAL`, but asks `wal_level`. Between `replica` and `logical` nothing else differs for a row.
struct Quiet(c_int);

impl Quiet {
    fn new() -> Quiet {
        // SAFETY: a variable of this process, changed on its one thread; put back by Drop, also while unwinding, which
        // calls nothing of PostgreSQL.
        unsafe {
            let level = pg_sys::wal_level;
            pg_sys::wal_level = level.min(pg_sys::WalLevel::WAL_LEVEL_REPLICA as c_int);
            Quiet(level)
        }
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        // SAFETY: as in `new`.
        unsafe { pg_sys::wal_level = self.0 }
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
        refuse_published(rel, |actions| actions.pubinsert);
        let slots = std::slice::from_raw_parts(slots, nslots as usize);
        memory::in_scratch(|| {
            let mut toaster = Toaster::new(rel);
            // A descriptor without a reference count, which would be tied to the current resource owner.
            let desc = pg_sys::CreateTupleDescCopyConstr((*rel).rd_att);
            let mut rows: Vec<*mut pg_sys::TupleTableSlot> = Vec::with_capacity(slots.len());
            let values = slots.iter().map(|&slot| {
                pg_sys::slot_getallattrs(slot);
                ((*slot).tts_values.cast_const(), (*slot).tts_isnull.cast_const())
            });
            for tuple in toaster.form_all(&values.collect::<Vec<_>>()) {
                let row = pg_sys::MakeSingleTupleTableSlot(desc, &raw const pg_sys::TTSOpsHeapTuple);
                pg_sys::ExecStoreHeapTuple(tuple, row, false);
                rows.push(row);
            }
            let quiet = Quiet::new();
            pg_sys::heap_multi_insert(rel, rows.as_mut_ptr(), nslots, cid, options, bistate);
            drop(quiet);
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
    rel: pg_sys::Relation,
    slot: *mut pg_sys::TupleTableSlot,
    cid: pg_sys::CommandId,
    options: c_int,
    bistate: *mut pg_sys::BulkInsertStateData,
    token: u32,
) {
    // SAFETY: as for tuple_insert. The header of a speculative row has the token in place of its own TID
    // (`HeapTupleHeaderSetSpeculativeToken`).
    unsafe {
        refuse_store(rel, "insertion into");
        if logical() {
            // The confirmation of a speculative row is always decoded, and decoding stops if it did not see the row.
            error::not_supported(
                "INSERT ... ON CONFLICT into a table with access method tensor_block is not supported with wal_level = logical",
                "Delete the conflicting rows first, or use MERGE.",
            );
        }
        pg_sys::slot_getallattrs(slot);
        (*slot).tts_tableOid = (*rel).rd_id;
        memory::in_scratch(|| {
            let tuple = Toaster::new(rel).form((*slot).tts_values, (*slot).tts_isnull);
            let tid = &mut (*(*tuple).t_data).t_ctid;
            tid.ip_blkid = pg_sys::BlockIdData { bi_hi: (token >> 16) as u16, bi_lo: token as u16 };
            tid.ip_posid = pg_sys::SpecTokenOffsetNumber as u16;
            pg_sys::heap_insert(rel, tuple, cid, options | HEAP_INSERT_SPECULATIVE, bistate);
            if let Some(ours) = as_ours(slot) {
                remember_stored(ours, tuple);
            }
            (*slot).tts_tid = (*tuple).t_self;
        });
    }
}

#[pg_guard]
pub unsafe extern "C-unwind" fn tuple_complete_speculative(
    rel: pg_sys::Relation,
    slot: *mut pg_sys::TupleTableSlot,
    _token: u32,
    succeeded: bool,
) {
    // SAFETY: the slot's TID is that of the row that tuple_insert_speculative stored.
    unsafe {
        if succeeded {
            pg_sys::heap_finish_speculative(rel, &mut (*slot).tts_tid);
        } else {
            // The block stays in the store: the next sweep finds that no row references it.
            pg_sys::heap_abort_speculative(rel, &mut (*slot).tts_tid);
        }
    }
}

#[allow(clippy::too_many_arguments)]
pub unsafe extern "C-unwind" fn tuple_delete(
    rel: pg_sys::Relation,
    tid: pg_sys::ItemPointer,
    cid: pg_sys::CommandId,
    snapshot: pg_sys::Snapshot,
    crosscheck: pg_sys::Snapshot,
    wait: bool,
    tmfd: *mut pg_sys::TM_FailureData,
    changing_partition: bool,
) -> pg_sys::TM_Result::Type {
    let body = || {
        // SAFETY: PostgreSQL passes an open relation.
        unsafe {
            refuse_store(rel, "deletion from");
            refuse_published(rel, |actions| actions.pubdelete);
        }
        let _quiet = Quiet::new();
        super::call_heapam!(tuple_delete(rel, tid, cid, snapshot, crosscheck, wait, tmfd, changing_partition))
    };
    // SAFETY: the whole of a callback.
    unsafe { error_context::guard(body) }
}

#[cfg(any(feature = "pg14", feature = "pg15"))]
type UpdateIndexes = bool;
#[cfg(not(any(feature = "pg14", feature = "pg15")))]
type UpdateIndexes = pg_sys::TU_UpdateIndexes::Type;

/// After `heapam_tuple_update` (heapam_handler.c). A column that keeps its value keeps its stand-in, so its payload is
/// neither read nor written; and heap_update, which compares the stored bytes, sees that an indexed one did not change.
#[allow(clippy::too_many_arguments)]
pub unsafe extern "C-unwind" fn tuple_update(
    rel: pg_sys::Relation,
    otid: pg_sys::ItemPointer,
    slot: *mut pg_sys::TupleTableSlot,
    cid: pg_sys::CommandId,
    _snapshot: pg_sys::Snapshot,
    crosscheck: pg_sys::Snapshot,
    wait: bool,
    tmfd: *mut pg_sys::TM_FailureData,
    lockmode: *mut pg_sys::LockTupleMode::Type,
    update_indexes: *mut UpdateIndexes,
) -> pg_sys::TM_Result::Type {
    let body = || {
        // SAFETY: PostgreSQL passes an open relation and a filled slot of any kind.
        unsafe {
            refuse_store(rel, "an update of");
            refuse_published(rel, |actions| actions.pubupdate);
            pg_sys::slot_getallattrs(slot);
            (*slot).tts_tableOid = (*rel).rd_id;
            memory::in_scratch(|| {
                let tuple = Toaster::new(rel).form((*slot).tts_values, (*slot).tts_isnull);
                let quiet = Quiet::new();
                #[cfg(any(feature = "pg14", feature = "pg15"))]
                let result = pg_sys::heap_update(rel, otid, tuple, cid, crosscheck, wait, tmfd, lockmode);
                #[cfg(not(any(feature = "pg14", feature = "pg15")))]
                let result =
                    pg_sys::heap_update(rel, otid, tuple, cid, crosscheck, wait, tmfd, lockmode, update_indexes);
                drop(quiet);
                #[cfg(any(feature = "pg14", feature = "pg15"))]
                {
                    // A heap-only row needs no index entries.
                    let heap_only = pg_sys::htup::HeapTupleHeaderIsHeapOnly((*tuple).t_data);
                    *update_indexes = result == pg_sys::TM_Result::TM_Ok && !heap_only;
                }
                #[cfg(not(any(feature = "pg14", feature = "pg15")))]
                if result != pg_sys::TM_Result::TM_Ok {
                    *update_indexes = pg_sys::TU_UpdateIndexes::TU_None;
                }
                (*slot).tts_tid = (*tuple).t_self;
                if result == pg_sys::TM_Result::TM_Ok
                    && let Some(ours) = as_ours(slot)
                {
                    remember_stored(ours, tuple);
                    (*slot).tts_tid = (*tuple).t_self;
                }
                result
            })
        }
    };
    // SAFETY: the whole of a callback.
    unsafe { error_context::guard(body) }
}

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
    let body = || {
        // SAFETY: PostgreSQL passes an open relation and a slot made by table_slot_create.
        unsafe {
            // Logical replication passes the slot's own TID, which is about to be cleared. heapam writes the version's that
            // it locked.
            let mut locked = *tid;
            let at = &raw mut locked;
            let inner = begin_store(slot, rel);
            pg_sys::ExecClearTuple(inner);
            let result = super::call_heapam!(tuple_lock(rel, at, snapshot, inner, cid, mode, wait_policy, flags, tmfd));
            *tid = locked;
            // heapam stores the row whatever the result is, unless it says that there is none.
            if (*inner).tts_flags & pg_sys::TTS_FLAG_EMPTY as u16 == 0 {
                super::slot::end_store(slot, rel);
            }
            result
        }
    };
    // SAFETY: the whole of a callback.
    unsafe { error_context::guard(body) }
}
