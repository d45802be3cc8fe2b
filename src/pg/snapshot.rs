//! What the active snapshot can see, as a value that can be compared.

use pgrx::pg_sys;
use pgrx::prelude::*;
use std::cell::Cell;

thread_local! {
    static ABORTED_SUBTRANSACTIONS: Cell<u64> = const { Cell::new(0) };
}

/// Two equal identities see the same rows.
///
/// For fixed `xmin` and `xmax` the set of running transactions in a snapshot can only shrink, so equal counts mean the
/// same set; own changes are told apart by the command id, and those undone by ROLLBACK TO SAVEPOINT by counting such
/// rollbacks (the command id does not move there).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotIdentity {
    xmin: u32,
    xmax: u32,
    running: u32,
    running_sub: i32,
    command: u32,
    aborted_subtransactions: u64,
    database: u32,
}

impl SnapshotIdentity {
    /// Identity of the active snapshot.
    pub fn active() -> SnapshotIdentity {
        // SAFETY: a function called from SQL always has an active snapshot.
        let (snapshot, database) = unsafe { (&*pg_sys::GetActiveSnapshot(), pg_sys::MyDatabaseId) };
        SnapshotIdentity {
            xmin: snapshot.xmin.into_inner(),
            xmax: snapshot.xmax.into_inner(),
            running: snapshot.xcnt,
            running_sub: snapshot.subxcnt,
            command: snapshot.curcid,
            aborted_subtransactions: ABORTED_SUBTRANSACTIONS.with(Cell::get),
            database: database.to_u32(),
        }
    }
}

/// Runs `f` under a snapshot that is taken now, whatever the transaction's isolation level.
pub fn with_latest<T>(f: impl FnOnce() -> T) -> T {
    // SAFETY: in a transaction; on an ERROR the (sub)transaction's end pops the snapshot.
    unsafe {
        pg_sys::PushActiveSnapshot(pg_sys::GetLatestSnapshot());
        let result = f();
        pg_sys::PopActiveSnapshot();
        result
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn on_subtransaction(
    event: pg_sys::SubXactEvent::Type,
    _my: pg_sys::SubTransactionId,
    _parent: pg_sys::SubTransactionId,
    _arg: *mut std::ffi::c_void,
) {
    if event == pg_sys::SubXactEvent::SUBXACT_EVENT_ABORT_SUB {
        ABORTED_SUBTRANSACTIONS.with(|n| n.set(n.get() + 1));
    }
}

/// Called once, when the library is loaded.
pub fn init() {
    // SAFETY: the callback is a static function and touches nothing of PostgreSQL's.
    unsafe { pg_sys::RegisterSubXactCallback(Some(on_subtransaction), std::ptr::null_mut()) };
}
