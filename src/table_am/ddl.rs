//! Callbacks of DDL and maintenance: TOAST relations, VACUUM, CLUSTER.

use super::{call_heapam, is_store};
use pgrx::pg_sys;
use pgrx::prelude::*;

/// The TOAST relation of a table with this access method has it too: it is the block store.
#[pg_guard]
pub unsafe extern "C-unwind" fn relation_toast_am(rel: pg_sys::Relation) -> pg_sys::Oid {
    // SAFETY: PostgreSQL passes an open relation.
    unsafe { (*(*rel).rd_rel).relam }
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
