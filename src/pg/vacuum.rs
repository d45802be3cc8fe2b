//! What VACUUM asks of PostgreSQL: transaction horizons, its cost-based delay, statistics.

use pgrx::pg_sys;

/// A transaction id with its epoch: never reused, so an old one stays comparable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FullXid(pub u64);

/// The id that the next transaction gets.
pub fn next_full_xid() -> FullXid {
    // SAFETY: reads shared memory under its own lightweight lock.
    FullXid(unsafe { pg_sys::ReadNextFullTransactionId() }.value)
}

/// The oldest transaction that somebody may see as running: every one below it has ended for all snapshots of `rel`'s
/// rows, those of prepared transactions and standbys' feedback included.
pub fn horizon(rel: pg_sys::Relation) -> (FullXid, pg_sys::TransactionId) {
    // SAFETY: open relation.
    let oldest = unsafe { pg_sys::GetOldestNonRemovableTransactionId(rel) };
    let next = next_full_xid().0;
    // The horizon is at most 2^31 behind the next id, so its epoch is that of the next id or the one before.
    let xid = u64::from(oldest.into_inner());
    let mut full = next & !0xffff_ffff | xid;
    if full > next {
        full = full.saturating_sub(1 << 32);
    }
    (FullXid(full), oldest)
}

/// VACUUM's place to be cancelled and to wait, as `vacuum_cost_delay` asks.
pub fn delay() {
    // SAFETY: no content lock is held by the callers.
    unsafe {
        #[cfg(not(feature = "pg18"))]
        pg_sys::vacuum_delay_point();
        #[cfg(feature = "pg18")]
        pg_sys::vacuum_delay_point(false);
    }
}

/// Dead rows that the statistics know of; 0 if they know nothing.
pub fn dead_rows(table: pg_sys::Oid) -> u64 {
    // SAFETY: a pointer to a copy of the entry in this backend's memory, or null.
    unsafe {
        let entry = pg_sys::pgstat_fetch_stat_tabentry(table);
        if entry.is_null() {
            return 0;
        }
        #[cfg(any(feature = "pg14", feature = "pg15"))]
        let dead = (*entry).n_dead_tuples;
        #[cfg(not(any(feature = "pg14", feature = "pg15")))]
        let dead = (*entry).dead_tuples;
        dead.max(0) as u64
    }
}

/// Tells the statistics what a vacuum of `rel` left.
pub fn report(rel: pg_sys::Relation, live: u64, dead: u64) {
    // SAFETY: open relation.
    unsafe {
        let (oid, shared) = ((*rel).rd_id, (*(*rel).rd_rel).relisshared);
        #[cfg(not(feature = "pg18"))]
        pg_sys::pgstat_report_vacuum(oid, shared, live as i64, dead as i64);
        #[cfg(feature = "pg18")]
        pg_sys::pgstat_report_vacuum(oid, shared, live as i64, dead as i64, pg_sys::GetCurrentTimestamp());
    }
}

/// Writes pages, rows and the wraparound limits of a vacuumed relation to pg_class.
pub fn update_relation(rel: pg_sys::Relation, pages: u32, rows: u64, oldest: pg_sys::TransactionId) {
    // SAFETY: open relation, locked ShareUpdateExclusive.
    unsafe {
        pg_sys::vac_update_relstats(
            rel,
            pages,
            rows as f64,
            0,
            #[cfg(feature = "pg18")]
            0,
            true,
            oldest,
            pg_sys::GetOldestMultiXactId(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            false,
        );
    }
}
