//! Callbacks of DDL and maintenance: TOAST relations, VACUUM, CLUSTER.

use super::{call_heapam, is_store};
use crate::pg::error;
use pgrx::pg_sys;
use pgrx::prelude::*;

/// The TOAST relation of a table with this access method has it too: it is the block store.
#[pg_guard]
pub unsafe extern "C-unwind" fn relation_toast_am(rel: pg_sys::Relation) -> pg_sys::Oid {
    // SAFETY: PostgreSQL passes an open relation.
    unsafe { (*(*rel).rd_rel).relam }
}

/// `VACUUM` of a table is heapam's. That of a store only moves its wraparound limits ahead: it holds no transaction ids
/// of rows, and if its limits stood still, wraparound protection would never end.
#[pg_guard]
pub unsafe extern "C-unwind" fn relation_vacuum(
    rel: pg_sys::Relation,
    params: *mut pg_sys::VacuumParams,
    strategy: pg_sys::BufferAccessStrategy,
) {
    // SAFETY: PostgreSQL passes an open relation, locked ShareUpdateExclusive.
    unsafe {
        if !is_store(rel) {
            call_heapam!(relation_vacuum(rel, params, strategy));
            return;
        }
        let (blocks, _, pages) = crate::store::totals(rel);
        pg_sys::vac_update_relstats(
            rel,
            pages,
            blocks as f64,
            0,
            #[cfg(feature = "pg18")]
            0,
            true,
            pg_sys::GetOldestNonRemovableTransactionId(rel),
            pg_sys::GetOldestMultiXactId(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            false,
        );
    }
}

#[pg_guard]
#[allow(clippy::too_many_arguments)]
pub unsafe extern "C-unwind" fn relation_copy_for_cluster(
    _old: pg_sys::Relation,
    _new: pg_sys::Relation,
    _old_index: pg_sys::Relation,
    _use_sort: bool,
    _oldest_xmin: pg_sys::TransactionId,
    _xid_cutoff: *mut pg_sys::TransactionId,
    _multi_cutoff: *mut pg_sys::MultiXactId,
    _num_tuples: *mut f64,
    _tups_vacuumed: *mut f64,
    _tups_recently_dead: *mut f64,
) {
    error::not_supported(
        "VACUUM FULL and CLUSTER are not supported for tables with access method tensor_block",
        "Use VACUUM, or copy the rows to a new table.",
    )
}

/// Index deletion asks the table which entries are dead. A directory entry never is: blocks live until they are swept.
#[pg_guard]
pub unsafe extern "C-unwind" fn index_delete_tuples(
    rel: pg_sys::Relation,
    state: *mut pg_sys::TM_IndexDeleteOp,
) -> pg_sys::TransactionId {
    // SAFETY: PostgreSQL passes an open relation and a filled state.
    unsafe {
        if is_store(rel) {
            (*state).ndeltids = 0;
            return pg_sys::InvalidTransactionId;
        }
        call_heapam!(index_delete_tuples(rel, state))
    }
}
