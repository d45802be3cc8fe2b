//! Detoasting: how every reader outside the access method reaches a payload.

use super::is_store;
use crate::pg::varlena::VARHDRSZ;
use crate::{pg::error, store};
use pgrx::pg_sys;
use pgrx::prelude::*;

/// `relation_fetch_toast_slice`: bytes `offset .. offset + length` of a block, behind the header of `result`: of what is stored, or,
/// where that is a small form, of the block itself. So `stored_len` is what the block's references say.
#[pg_guard]
pub unsafe extern "C-unwind" fn relation_fetch_toast_slice(
    store_rel: pg_sys::Relation,
    block_id: pg_sys::Oid,
    stored_len: i32,
    offset: i32,
    length: i32,
    result: *mut pg_sys::varlena,
) {
    // SAFETY: detoast.c passes an open TOAST relation and a result with room for header and slice.
    unsafe {
        if !is_store(store_rel) || stored_len < 0 || offset < 0 || length < 0 {
            error::raise(PgSqlErrorCode::ERRCODE_DATA_CORRUPTED, "malformed reference to a block store", "", "");
        }
        let out = std::slice::from_raw_parts_mut(result.cast::<u8>().add(VARHDRSZ), length as usize);
        store::fetch(store_rel, block_id.to_u32(), stored_len as u32, offset as u32, out);
    }
}
