//! The table access method `tensor_block`: heap rows, payloads as deduplicated TOAST.
//!
//! Rows are heap rows in heap pages, so visibility, row locks, freezing and vacuum are heapam's own; each callback here
//! either is heapam's, or bridges to it with an inner slot of heapam's kind. What differs: a wide value goes to the block
//! store, and the row holds a stand-in for it ([`crate::pg::varlena`]). The TOAST relation of a table is its block store
//! and has this access method too; what heapam would do with its pages is refused.

mod cluster;
mod ddl;
mod fetch;
mod index_build;
mod index_validate;
mod modify;
pub mod references;
mod routine;
mod scan;
pub mod sharing;
mod slot;
pub mod toaster;
mod vacuum;

pub use routine::is_ours;

#[cfg(any(test, feature = "pg_test"))]
mod change_tests;
#[cfg(any(test, feature = "pg_test"))]
mod tests;

use pgrx::pg_sys;

/// heapam's routine, to which the callbacks bridge.
fn heapam() -> &'static pg_sys::TableAmRoutine {
    // SAFETY: returns a pointer to a constant of the server.
    unsafe { &*pg_sys::GetHeapamTableAmRoutine() }
}

/// Calls a callback of heapam's routine, with PostgreSQL's errors turned into unwinding at the boundary.
macro_rules! call_heapam {
    ($callback:ident ( $($arg:expr),* $(,)? )) => {{
        let callback = $crate::table_am::heapam().$callback.expect("heapam has every callback");
        $(let _ = &$arg;)*
        // SAFETY: heapam's own callback with the arguments of ours; `pg_guard_ffi_boundary` catches an ERROR that it
        // raises, and this is the main thread.
        #[allow(unused_unsafe)] // Most callers are in an unsafe block already, some are not.
        unsafe { pgrx::pg_sys::ffi::pg_guard_ffi_boundary(|| callback($($arg),*)) }
    }};
}
use call_heapam;

/// True for a block store: the TOAST relation of a table.
///
/// # Safety
/// `rel` is open.
unsafe fn is_store(rel: pg_sys::Relation) -> bool {
    // SAFETY: by the contract.
    unsafe { (*(*rel).rd_rel).relkind == pg_sys::RELKIND_TOASTVALUE as std::ffi::c_char }
}

/// Refuses to treat a block store as a table of rows.
///
/// # Safety
/// `rel` is open.
unsafe fn refuse_store(rel: pg_sys::Relation, what: &str) {
    // SAFETY: by the contract.
    if unsafe { is_store(rel) } {
        crate::pg::error::not_supported(
            &format!("{what} of a block store is not supported"),
            "Read the table that it belongs to; tessera.storage shows what the store holds.",
        );
    }
}
