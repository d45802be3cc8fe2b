//! VACUUM. Of a table it is heapam's; of a block store it is the sweep.
//!
//! Autovacuum treats the two apart, each by its own statistics. So a table's vacuum tells its store's statistics how many
//! rows went, and a sweep leaves the blocks that it condemned counted as dead, so that a second one comes.

use super::references::for_each_reference;
use super::{call_heapam, is_store};
use crate::pg::relation::{self, OpenRelation};
use crate::pg::{error_context, vacuum};
use crate::store::sweep::{self, Swept};
use crate::store::{self, Marks};
use pgrx::pg_sys;

pub unsafe extern "C-unwind" fn relation_vacuum(
    rel: pg_sys::Relation,
    params: *mut pg_sys::VacuumParams,
    strategy: pg_sys::BufferAccessStrategy,
) {
    let body = || {
        // SAFETY: PostgreSQL passes an open relation, locked ShareUpdateExclusive.
        unsafe {
            if is_store(rel) {
                let may_truncate = (*params).truncate != pg_sys::VacOptValue::VACOPTVALUE_DISABLED;
                vacuum_store(rel, may_truncate);
                return;
            }
            let dead_before = vacuum::dead_rows((*rel).rd_id);
            call_heapam!(relation_vacuum(rel, params, strategy));
            pg_sys::pgstat_clear_snapshot();
            let gone = dead_before.saturating_sub(vacuum::dead_rows((*rel).rd_id));
            let store = (*(*rel).rd_rel).reltoastrelid;
            if gone > 0 && store != pg_sys::InvalidOid {
                let store = OpenRelation::table(store, pg_sys::AccessShareLock);
                let blocks = store::totals(store.raw()).blocks;
                relation::count_deletions(store.raw(), gone.min(blocks));
            }
        }
    };
    // SAFETY: the whole of a callback.
    unsafe { error_context::guard(body) }
}

/// The sweep, and what every vacuum does: the wraparound limits go ahead, also when nothing could be swept. A store holds
/// no transaction ids of rows; if its limits stood still, wraparound protection would never end.
unsafe fn vacuum_store(rel: pg_sys::Relation, may_truncate: bool) {
    // SAFETY: open relation, locked ShareUpdateExclusive.
    unsafe {
        let swept = sweep_store(rel, may_truncate);
        let pages = relation::pages(rel);
        match swept {
            Some((swept, oldest)) => {
                vacuum::update_relation(rel, pages, swept.live, oldest);
                vacuum::report(rel, swept.live, swept.condemned);
                if swept.removed > 0 || swept.condemned > 0 {
                    pgrx::debug1!(
                        "block store {}: {} blocks live, {} condemned, {} removed, {} pages cut off",
                        (*rel).rd_id.to_u32(),
                        swept.live,
                        swept.condemned,
                        swept.removed,
                        swept.pages_cut
                    );
                }
            }
            None => {
                let blocks = store::totals(rel).blocks;
                vacuum::update_relation(rel, pages, blocks, vacuum::horizon(rel).1);
            }
        }
    }
}

/// `None` if the owner is not there, or is locked: the lock order is table first, so it is not waited for.
unsafe fn sweep_store(rel: pg_sys::Relation, may_truncate: bool) -> Option<(Swept, pg_sys::TransactionId)> {
    // SAFETY: open relation.
    unsafe {
        let owner = relation::owner_of((*rel).rd_id)?;
        let share = pg_sys::AccessShareLock as pg_sys::LOCKMODE;
        if !pg_sys::ConditionalLockRelationOid(owner, share) {
            return None;
        }
        let owner = OpenRelation::try_table(owner)?;
        if (*(*owner.raw()).rd_rel).reltoastrelid != (*rel).rd_id {
            return None;
        }
        // Before the first row is read.
        let (horizon, oldest) = vacuum::horizon(owner.raw());
        let mut marks = Marks::default();
        for_each_reference(owner.raw(), vacuum::delay, |reference| marks.insert(reference.stand_in.block_id));
        Some((sweep::sweep(rel, &marks, horizon, may_truncate), oldest))
    }
}
