//! Relations: opening, size, and locks on them.

use pgrx::pg_sys;

/// `InvalidSubTransactionId` (c.h), which has no binding.
const NO_SUBTRANSACTION: pg_sys::SubTransactionId = 0;

/// An open relation. The lock taken at opening stays until the transaction ends, as for tables in the core.
pub struct OpenRelation {
    rel: pg_sys::Relation,
    close: unsafe fn(pg_sys::Relation, pg_sys::LOCKMODE),
}

impl OpenRelation {
    /// Opens a table (or a TOAST relation) with `lockmode`.
    pub fn table(oid: pg_sys::Oid, lockmode: u32) -> OpenRelation {
        // SAFETY: plain catalog access in a transaction; raises an ERROR if the relation is gone.
        let rel = unsafe { pg_sys::table_open(oid, lockmode as pg_sys::LOCKMODE) };
        OpenRelation { rel, close: pg_sys::table_close }
    }

    /// Opens a table on which a lock is held already; `None` if it is gone.
    pub fn try_table(oid: pg_sys::Oid) -> Option<OpenRelation> {
        // SAFETY: as above.
        let rel = unsafe { pg_sys::try_table_open(oid, pg_sys::NoLock as pg_sys::LOCKMODE) };
        (!rel.is_null()).then_some(OpenRelation { rel, close: pg_sys::table_close })
    }

    /// Opens an index with `lockmode`.
    pub fn index(oid: pg_sys::Oid, lockmode: u32) -> OpenRelation {
        // SAFETY: as above.
        let rel = unsafe { pg_sys::index_open(oid, lockmode as pg_sys::LOCKMODE) };
        OpenRelation { rel, close: pg_sys::index_close }
    }

    pub fn raw(&self) -> pg_sys::Relation {
        self.rel
    }
}

impl Drop for OpenRelation {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: opened by this guard; NoLock keeps the lock until the end of the transaction.
            unsafe { (self.close)(self.rel, pg_sys::NoLock as pg_sys::LOCKMODE) }
        }
    }
}

/// `RelationNeedsWAL` (rel.h), which has no binding.
pub fn needs_wal(rel: pg_sys::Relation) -> bool {
    // SAFETY: `rel` is open, so its relcache entry and pg_class row are there.
    unsafe {
        let permanent = (*(*rel).rd_rel).relpersistence == pg_sys::RELPERSISTENCE_PERMANENT as std::ffi::c_char;
        #[cfg(any(feature = "pg14", feature = "pg15"))]
        let new_file = (*rel).rd_firstRelfilenodeSubid;
        #[cfg(not(any(feature = "pg14", feature = "pg15")))]
        let new_file = (*rel).rd_firstRelfilelocatorSubid;
        let needed = pg_sys::wal_level >= pg_sys::WalLevel::WAL_LEVEL_REPLICA as i32;
        permanent && (needed || ((*rel).rd_createSubid == NO_SUBTRANSACTION && new_file == NO_SUBTRANSACTION))
    }
}

/// Pages of the main fork.
pub fn pages(rel: pg_sys::Relation) -> pg_sys::BlockNumber {
    // SAFETY: `rel` is open.
    unsafe { pg_sys::RelationGetNumberOfBlocksInFork(rel, pg_sys::ForkNumber::MAIN_FORKNUM) }
}

/// A heavyweight lock on one number of a relation's page-lock space, released when dropped.
pub struct PageLock {
    rel: pg_sys::Relation,
    number: pg_sys::BlockNumber,
}

impl PageLock {
    /// Waits for the lock (interruptible, seen by the deadlock detector). No content lock may be held.
    pub fn exclusive(rel: pg_sys::Relation, number: pg_sys::BlockNumber) -> PageLock {
        // SAFETY: `rel` is open.
        unsafe { pg_sys::LockPage(rel, number, pg_sys::ExclusiveLock as pg_sys::LOCKMODE) };
        PageLock { rel, number }
    }
}

impl Drop for PageLock {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: taken by this guard; `rel` outlives it by the caller's contract.
            unsafe { pg_sys::UnlockPage(self.rel, self.number, pg_sys::ExclusiveLock as pg_sys::LOCKMODE) }
        }
    }
}

/// Counts `n` insertions into `rel` in the statistics, from which autovacuum judges.
pub fn count_insertions(rel: pg_sys::Relation, n: usize) {
    // SAFETY: open relation, in a transaction.
    unsafe { pg_sys::pgstat_count_heap_insert(rel, n as _) }
}

/// Counts `n` deletions.
pub fn count_deletions(rel: pg_sys::Relation, n: u64) {
    // SAFETY: open relation, in a transaction.
    (0..n).for_each(|_| unsafe { pg_sys::pgstat_count_heap_delete(rel) });
}

/// An exclusive lock on a whole relation, got without waiting.
pub struct TruncateLock(pg_sys::Relation);

impl TruncateLock {
    /// `None` if somebody else uses the relation for as long as heap's vacuum would be patient about it.
    pub fn try_acquire(rel: pg_sys::Relation) -> Option<TruncateLock> {
        for attempt in 0..20 {
            if attempt > 0 {
                super::interrupt::check();
                std::thread::sleep(std::time::Duration::from_millis(50));
            }
            // SAFETY: open relation.
            if unsafe { pg_sys::ConditionalLockRelation(rel, pg_sys::AccessExclusiveLock as pg_sys::LOCKMODE) } {
                return Some(TruncateLock(rel));
            }
        }
        None
    }
}

impl Drop for TruncateLock {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: taken by this guard.
            unsafe { pg_sys::UnlockRelation(self.0, pg_sys::AccessExclusiveLock as pg_sys::LOCKMODE) }
        }
    }
}

/// Cuts the file to `pages`, logged. The caller holds a [`TruncateLock`].
pub fn truncate(rel: pg_sys::Relation, pages: pg_sys::BlockNumber) {
    // SAFETY: open relation, locked.
    unsafe { pg_sys::RelationTruncate(rel, pages) }
}

/// A row of pg_depend (pg_depend.h), which has no binding; the layout has not changed since PostgreSQL 7.3.
#[repr(C)]
struct Dependency {
    classid: pg_sys::Oid,
    objid: pg_sys::Oid,
    objsubid: i32,
    refclassid: pg_sys::Oid,
    refobjid: pg_sys::Oid,
    refobjsubid: i32,
    deptype: u8,
}
/// `DependRelationId` and `DependDependerIndexId` (pg_depend.h).
const PG_DEPEND: u32 = 2608;
const PG_DEPEND_DEPENDER_INDEX: u32 = 2673;

/// The table whose TOAST relation `store` is: the one that it depends on.
pub fn owner_of(store: pg_sys::Oid) -> Option<pg_sys::Oid> {
    let depend = OpenRelation::table(pg_sys::Oid::from(PG_DEPEND), pg_sys::AccessShareLock);
    let mut owner = None;
    // SAFETY: a scan of pg_depend by its index on the dependent object; the keys live until it ends.
    unsafe {
        let mut keys = [pg_sys::ScanKeyData::default(); 2];
        let equal = pg_sys::BTEqualStrategyNumber as pg_sys::StrategyNumber;
        for (key, (column, value)) in keys.iter_mut().zip([
            (1, pg_sys::RelationRelationId), // classid
            (2, store),                      // objid
        ]) {
            pg_sys::ScanKeyInit(key, column, equal, pg_sys::F_OIDEQ.into(), pg_sys::Datum::from(value));
        }
        let index = pg_sys::Oid::from(PG_DEPEND_DEPENDER_INDEX);
        let scan = pg_sys::systable_beginscan(depend.raw(), index, true, std::ptr::null_mut(), 2, keys.as_mut_ptr());
        loop {
            let tuple = pg_sys::systable_getnext(scan);
            if tuple.is_null() {
                break;
            }
            let row = &*pg_sys::heap_tuple_get_struct::<Dependency>(tuple);
            if row.refclassid == pg_sys::RelationRelationId && row.deptype == b'i' {
                owner = Some(row.refobjid);
            }
        }
        pg_sys::systable_endscan(scan);
    }
    owner
}
