//! The routine: heapam's, with the callbacks of this access method in place of those that differ.

use super::{cluster, ddl, fetch, heapam, index_build, index_validate, modify, scan, slot, vacuum};
use crate::pg::relation::OpenRelation;
use once_cell::sync::OnceCell;
use pgrx::pg_sys;
use pgrx::prelude::*;

/// The routine behind a pointer that stays valid for the life of the process, as PostgreSQL demands.
struct Routine(pg_sys::TableAmRoutine);

// SAFETY: function pointers and a node tag, written once.
unsafe impl Send for Routine {}
// SAFETY: as above; read only afterwards.
unsafe impl Sync for Routine {}

static ROUTINE: OnceCell<Routine> = OnceCell::new();

fn build() -> Routine {
    let mut am = *heapam();
    am.slot_callbacks = Some(slot_callbacks);

    am.scan_begin = Some(scan::scan_begin);
    am.scan_getnextslot = Some(scan::scan_getnextslot);
    am.scan_getnextslot_tidrange = Some(scan::scan_getnextslot_tidrange);
    am.scan_analyze_next_tuple = Some(scan::scan_analyze_next_tuple);
    am.scan_bitmap_next_tuple = Some(scan::scan_bitmap_next_tuple);
    am.scan_sample_next_tuple = Some(scan::scan_sample_next_tuple);
    am.index_fetch_tuple = Some(scan::index_fetch_tuple);
    am.tuple_fetch_row_version = Some(scan::tuple_fetch_row_version);
    am.tuple_satisfies_snapshot = Some(scan::tuple_satisfies_snapshot);

    am.tuple_insert = Some(modify::tuple_insert);
    am.tuple_insert_speculative = Some(modify::tuple_insert_speculative);
    am.tuple_complete_speculative = Some(modify::tuple_complete_speculative);
    am.multi_insert = Some(modify::multi_insert);
    am.tuple_delete = Some(modify::tuple_delete);
    am.tuple_update = Some(modify::tuple_update);
    am.tuple_lock = Some(modify::tuple_lock);

    am.index_delete_tuples = Some(ddl::index_delete_tuples);
    am.index_build_range_scan = Some(index_build::index_build_range_scan);
    am.index_validate_scan = Some(index_validate::index_validate_scan);

    #[cfg(any(feature = "pg14", feature = "pg15"))]
    {
        am.relation_set_new_filenode = Some(ddl::relation_set_new_file);
    }
    #[cfg(not(any(feature = "pg14", feature = "pg15")))]
    {
        am.relation_set_new_filelocator = Some(ddl::relation_set_new_file);
    }
    am.relation_nontransactional_truncate = Some(ddl::relation_nontransactional_truncate);
    am.relation_copy_for_cluster = Some(cluster::relation_copy_for_cluster);
    am.relation_vacuum = Some(vacuum::relation_vacuum);
    am.relation_needs_toast_table = Some(ddl::relation_needs_toast_table);
    am.relation_toast_am = Some(ddl::relation_toast_am);
    am.relation_fetch_toast_slice = Some(fetch::relation_fetch_toast_slice);
    Routine(am)
}

#[pg_guard]
unsafe extern "C-unwind" fn slot_callbacks(_rel: pg_sys::Relation) -> *const pg_sys::TupleTableSlotOps {
    &raw const slot::OPS
}

#[unsafe(no_mangle)]
#[doc(hidden)]
pub extern "C-unwind" fn pg_finfo_tensor_block_handler() -> &'static pg_sys::Pg_finfo_record {
    const V1: pg_sys::Pg_finfo_record = pg_sys::Pg_finfo_record { api_version: 1 };
    &V1
}

/// True for a relation of this access method.
pub fn is_ours(rel: &OpenRelation) -> bool {
    // SAFETY: open relation.
    ROUTINE.get().is_some_and(|routine| unsafe { (*rel.raw()).rd_tableam } == &raw const routine.0)
}

/// The handler of access method `tensor_block`.
#[unsafe(no_mangle)]
#[pg_guard]
pub unsafe extern "C-unwind" fn tensor_block_handler(_fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    let routine = ROUTINE.get_or_init(build);
    pg_sys::Datum::from(&raw const routine.0)
}
