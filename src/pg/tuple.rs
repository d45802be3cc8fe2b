//! Tuple descriptors and TIDs.

use pgrx::pg_sys;

/// `ItemPointerSetInvalid` (itemptr.h), which has no binding.
pub const INVALID_TID: pg_sys::ItemPointerData =
    pg_sys::ItemPointerData { ip_blkid: pg_sys::BlockIdData { bi_hi: 0xffff, bi_lo: 0xffff }, ip_posid: 0 };

/// Column `column` (from 0) of a descriptor.
///
/// # Safety
/// `desc` is a descriptor with more columns than that.
pub unsafe fn attribute(desc: pg_sys::TupleDesc, column: usize) -> *const pg_sys::FormData_pg_attribute {
    // SAFETY: by the contract.
    unsafe {
        #[cfg(not(feature = "pg18"))]
        return (*desc).attrs.as_ptr().add(column);
        #[cfg(feature = "pg18")]
        return pg_sys::TupleDescAttr(desc, column as i32);
    }
}
