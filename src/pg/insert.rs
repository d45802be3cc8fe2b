//! Rows that the extension inserts into tables of its own, without a plan.

use super::error;
use super::relation::OpenRelation;
use super::tuple::attribute;
use pgrx::pg_sys;
use pgrx::prelude::*;

/// Inserts rows, given with a datum for each column, none of which is null, into a table and its indexes, and makes them visible to
/// the commands that follow. As COPY (copyfrom.c) does it: the access method gets all rows at once. Nothing else is done that an
/// INSERT would do: the caller vouches for rights and constraints but uniqueness, and that the table has no triggers.
///
/// # Safety
/// The datums are values of the columns' types, and stay so during the call.
pub unsafe fn insert_rows<const N: usize>(table: pg_sys::Oid, rows: &[[pg_sys::Datum; N]]) {
    // SAFETY: in a transaction; the executor's state and the slots live until the end of the call, or until the transaction's
    // abort takes them.
    unsafe {
        let rel = OpenRelation::table(table, pg_sys::RowExclusiveLock);
        check_columns::<N>(rel.raw());
        let estate = pg_sys::CreateExecutorState();
        let info = pg_sys::MemoryContextAllocZero((*estate).es_query_cxt, size_of::<pg_sys::ResultRelInfo>())
            .cast::<pg_sys::ResultRelInfo>();
        (*info).type_ = pg_sys::NodeTag::T_ResultRelInfo;
        // There is no range table: the index into it is a dummy.
        pg_sys::InitResultRelInfo(info, rel.raw(), 0, std::ptr::null_mut(), 0);
        pg_sys::ExecOpenIndices(info, false);

        let mut slots: Vec<*mut pg_sys::TupleTableSlot> = Vec::with_capacity(rows.len());
        for row in rows {
            let slot = pg_sys::table_slot_create(rel.raw(), std::ptr::null_mut());
            std::ptr::copy_nonoverlapping(row.as_ptr(), (*slot).tts_values, N);
            std::slice::from_raw_parts_mut((*slot).tts_isnull, N).fill(false);
            slots.push(pg_sys::ExecStoreVirtualTuple(slot));
        }
        let command = pg_sys::GetCurrentCommandId(true);
        if let Some(multi_insert) = (*(*rel.raw()).rd_tableam).multi_insert {
            pg_sys::ffi::pg_guard_ffi_boundary(|| {
                multi_insert(rel.raw(), slots.as_mut_ptr(), slots.len() as i32, command, 0, std::ptr::null_mut())
            });
        }
        for slot in slots {
            insert_into_indexes(info, slot, estate);
            pg_sys::ExecDropSingleTupleTableSlot(slot);
        }
        pg_sys::ExecCloseIndices(info);
        pg_sys::FreeExecutorState(estate);
        pg_sys::CommandCounterIncrement();
    }
}

/// Enters a row that was stored into all indexes.
unsafe fn insert_into_indexes(
    info: *mut pg_sys::ResultRelInfo,
    slot: *mut pg_sys::TupleTableSlot,
    estate: *mut pg_sys::EState,
) {
    // SAFETY: indexes are open, and the slot has a row with its TID.
    unsafe {
        let none = std::ptr::null_mut();
        #[cfg(any(feature = "pg14", feature = "pg15"))]
        pg_sys::ExecInsertIndexTuples(info, slot, estate, false, false, std::ptr::null_mut(), none);
        #[cfg(not(any(feature = "pg14", feature = "pg15")))]
        pg_sys::ExecInsertIndexTuples(info, slot, estate, false, false, std::ptr::null_mut(), none, false);
    }
}

/// Raises an ERROR unless the table has `N` columns, none of them dropped.
unsafe fn check_columns<const N: usize>(rel: pg_sys::Relation) {
    // SAFETY: open relation.
    let as_made = unsafe {
        let desc = (*rel).rd_att;
        (*desc).natts as usize == N && (0..N).all(|column| !(*attribute(desc, column)).attisdropped)
    };
    if !as_made {
        error::raise(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            "a table of pg_tessera has other columns than it was made with",
            "",
            "Take the change of its columns back.",
        );
    }
}
