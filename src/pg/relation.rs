//! Relations: opening, size, extension, and locks on them.

use super::buffer::Pinned;
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

/// Appends zeroed pages until the relation has `wanted` of them.
///
/// The extension lock is held for the whole run, so that the pages of a tensor page follow each other in the file and
/// two backends never interleave. It is a heavyweight lock: no content lock may be held by the caller.
pub fn extend_to(rel: pg_sys::Relation, wanted: pg_sys::BlockNumber) {
    if pages(rel) >= wanted {
        return;
    }
    // SAFETY: `rel` is open and locked by the caller for writing; released on the normal path below, by abort otherwise.
    unsafe {
        pg_sys::LockRelationForExtension(rel, pg_sys::ExclusiveLock as pg_sys::LOCKMODE);
        for _ in pages(rel)..wanted {
            drop(Pinned::extend(rel));
        }
        pg_sys::UnlockRelationForExtension(rel, pg_sys::ExclusiveLock as pg_sys::LOCKMODE);
    }
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
