//! The tuple table slot: a heap slot whose stand-ins look like TOAST pointers from outside.
//!
//! A slot is in one of three states: *empty*; *stored* (`from_inner`): the inner buffer-heap slot holds the row, and
//! `tts_values` are taken from it as they are asked for; *virtual*: the executor put values into `tts_values`, and the
//! inner slot is empty or, after an insertion, holds the stored row for its system columns alone.
//!
//! The inner slot is made when it is first needed and dropped in `release`. It has a descriptor of its own, so that its
//! reference count does not tie it to the resource owner that happened to be current.

use crate::pg::error;
use crate::pg::varlena::{StandIn, TOAST_POINTER_BYTES};
use pgrx::pg_sys;
use pgrx::prelude::*;
use std::ffi::c_int;

/// The slot. Allocated, zeroed beyond the base, by PostgreSQL (`MakeTupleTableSlot`) with `base_slot_size`.
#[repr(C)]
pub struct BlockSlot {
    base: pg_sys::TupleTableSlot,
    /// Buffer-heap slot, null until needed.
    inner: *mut pg_sys::TupleTableSlot,
    /// A TOAST pointer per column, null until needed.
    pointers: *mut [u8; TOAST_POINTER_BYTES],
    /// The block store to which stand-ins of the stored row refer.
    store: pg_sys::Oid,
    /// The values come from the inner slot.
    from_inner: bool,
}

/// Operations of the slot.
pub static OPS: pg_sys::TupleTableSlotOps = pg_sys::TupleTableSlotOps {
    base_slot_size: std::mem::size_of::<BlockSlot>(),
    init: Some(init),
    release: Some(release),
    clear: Some(clear),
    getsomeattrs: Some(getsomeattrs),
    getsysattr: Some(getsysattr),
    #[cfg(any(feature = "pg17", feature = "pg18"))]
    is_current_xact_tuple: Some(is_current_xact_tuple),
    materialize: Some(materialize),
    copyslot: Some(copyslot),
    get_heap_tuple: None,
    get_minimal_tuple: None,
    copy_heap_tuple: Some(copy_heap_tuple),
    copy_minimal_tuple: Some(copy_minimal_tuple),
};

/// The slot as ours, if it is.
pub fn as_ours(slot: *mut pg_sys::TupleTableSlot) -> Option<*mut BlockSlot> {
    // SAFETY: `slot` is a slot.
    (unsafe { (*slot).tts_ops } == &raw const OPS).then_some(slot.cast())
}

/// The inner slot of `slot`, made if needed, for heapam to store a row into. The outer slot is cleared.
///
/// # Safety
/// `slot` is one of this access method's slots, and `rel` the open table whose rows it gets.
pub unsafe fn begin_store(slot: *mut pg_sys::TupleTableSlot, rel: pg_sys::Relation) -> *mut pg_sys::TupleTableSlot {
    // SAFETY: by the contract; table_slot_create made the slot from this routine's slot_callbacks.
    unsafe {
        let Some(ours) = as_ours(slot) else {
            error::raise(
                PgSqlErrorCode::ERRCODE_INTERNAL_ERROR,
                "a row of a tensor_block table was asked for in a slot of another kind",
                "",
                "",
            )
        };
        // The inner slot is not cleared: storing the next row of the same page keeps its pin, as a heap slot does.
        (*ours).from_inner = false;
        (*slot).tts_nvalid = 0;
        (*slot).tts_flags |= pg_sys::TTS_FLAG_EMPTY as u16;
        (*slot).tts_tid = crate::pg::tuple::INVALID_TID;
        (*ours).store = (*(*rel).rd_rel).reltoastrelid;
        inner_of(ours)
    }
}

/// Takes over what heapam has stored into the inner slot.
///
/// # Safety
/// As for [`begin_store`], which returned the inner slot.
pub unsafe fn end_store(slot: *mut pg_sys::TupleTableSlot, rel: pg_sys::Relation) {
    // SAFETY: by the contract.
    unsafe {
        let ours = slot.cast::<BlockSlot>();
        (*ours).from_inner = true;
        (*slot).tts_flags &= !(pg_sys::TTS_FLAG_EMPTY as u16);
        (*slot).tts_nvalid = 0;
        (*slot).tts_tid = (*(*ours).inner).tts_tid;
        (*slot).tts_tableOid = (*rel).rd_id;
    }
}

/// After an insertion: keeps the stored row for its system columns; the values stay as they are.
///
/// # Safety
/// `slot` is one of ours, and `tuple` the row that was inserted.
pub unsafe fn remember_stored(slot: *mut BlockSlot, tuple: pg_sys::HeapTuple) {
    // SAFETY: by the contract. The inner slot copies the row.
    unsafe {
        let inner = inner_of(slot);
        if !(*slot).from_inner {
            pg_sys::ExecForceStoreHeapTuple(tuple, inner, false);
            return;
        }
        // The values lie in the inner row, which stays; it only learns what the stored one's header says.
        materialize(slot.cast());
        let row = pg_sys::ExecFetchSlotHeapTuple(inner, true, std::ptr::null_mut());
        (*(*row).t_data).t_choice = (*(*tuple).t_data).t_choice;
        (*(*row).t_data).t_ctid = (*(*tuple).t_data).t_ctid;
        (*row).t_self = (*tuple).t_self;
        (*row).t_tableOid = (*tuple).t_tableOid;
    }
}

/// The inner slot of a slot that holds a stored row.
///
/// # Safety
/// `slot` is one of ours, filled by a scan or a fetch.
pub unsafe fn stored_row(slot: *mut pg_sys::TupleTableSlot) -> *mut pg_sys::TupleTableSlot {
    // SAFETY: by the contract.
    unsafe { inner_of(slot.cast()) }
}

unsafe fn is_empty(slot: *mut pg_sys::TupleTableSlot) -> bool {
    // SAFETY: a slot.
    unsafe { (*slot).tts_flags & pg_sys::TTS_FLAG_EMPTY as u16 != 0 }
}

/// The inner slot, made on first use in the slot's own memory context.
unsafe fn inner_of(slot: *mut BlockSlot) -> *mut pg_sys::TupleTableSlot {
    // SAFETY: called with one of our slots, whose descriptor is set.
    unsafe {
        if (*slot).inner.is_null() {
            let caller = pg_sys::MemoryContextSwitchTo((*slot).base.tts_mcxt);
            // With constraints: they hold the missing values of columns added later.
            let desc = pg_sys::CreateTupleDescCopyConstr((*slot).base.tts_tupleDescriptor);
            (*slot).inner = pg_sys::MakeSingleTupleTableSlot(desc, &raw const pg_sys::TTSOpsBufferHeapTuple);
            pg_sys::MemoryContextSwitchTo(caller);
        }
        (*slot).inner
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn init(slot: *mut pg_sys::TupleTableSlot) {
    // SAFETY: a slot of ours that PostgreSQL has just allocated.
    unsafe {
        let ours = slot.cast::<BlockSlot>();
        (*ours).inner = std::ptr::null_mut();
        (*ours).pointers = std::ptr::null_mut();
        (*ours).store = pg_sys::InvalidOid;
        (*ours).from_inner = false;
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn release(slot: *mut pg_sys::TupleTableSlot) {
    // SAFETY: a slot of ours; the inner one was made by this module and is dropped once.
    unsafe {
        let ours = slot.cast::<BlockSlot>();
        if !(*ours).inner.is_null() {
            let desc = (*(*ours).inner).tts_tupleDescriptor;
            pg_sys::ExecDropSingleTupleTableSlot((*ours).inner);
            pg_sys::FreeTupleDesc(desc);
            (*ours).inner = std::ptr::null_mut();
        }
        if !(*ours).pointers.is_null() {
            pg_sys::pfree((*ours).pointers.cast());
            (*ours).pointers = std::ptr::null_mut();
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn clear(slot: *mut pg_sys::TupleTableSlot) {
    // SAFETY: a slot of ours.
    unsafe {
        let ours = slot.cast::<BlockSlot>();
        if !(*ours).inner.is_null() {
            pg_sys::ExecClearTuple((*ours).inner);
        }
        (*ours).from_inner = false;
        (*slot).tts_nvalid = 0;
        (*slot).tts_flags |= pg_sys::TTS_FLAG_EMPTY as u16;
        (*slot).tts_tid = crate::pg::tuple::INVALID_TID;
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn getsomeattrs(slot: *mut pg_sys::TupleTableSlot, natts: c_int) {
    // SAFETY: a slot of ours, not empty; PostgreSQL asks for at most as many columns as the descriptor has.
    unsafe {
        let ours = slot.cast::<BlockSlot>();
        if !(*ours).from_inner {
            error::raise(
                PgSqlErrorCode::ERRCODE_INTERNAL_ERROR,
                "columns of a virtual row were asked for that it does not have",
                "",
                "",
            );
        }
        let inner = (*ours).inner;
        pg_sys::slot_getsomeattrs(inner, natts);
        for i in (*slot).tts_nvalid as usize..natts as usize {
            let isnull = *(*inner).tts_isnull.add(i);
            let value = *(*inner).tts_values.add(i);
            *(*slot).tts_isnull.add(i) = isnull;
            *(*slot).tts_values.add(i) = if isnull { value } else { outside_form(ours, i, value) };
        }
        (*slot).tts_nvalid = natts as i16;
    }
}

/// A column's value as the world outside sees it: a TOAST pointer where the row holds a stand-in.
unsafe fn outside_form(slot: *mut BlockSlot, column: usize, value: pg_sys::Datum) -> pg_sys::Datum {
    // SAFETY: called for a column that is not null, with the value that the inner slot has for it.
    unsafe {
        let desc = (*slot).base.tts_tupleDescriptor;
        if i32::from((*crate::pg::tuple::attribute(desc, column)).attlen) != -1 {
            return value;
        }
        let Some(stand_in) = StandIn::read(value.cast_mut_ptr()) else { return value };
        if (*slot).pointers.is_null() {
            let bytes = (*desc).natts as usize * TOAST_POINTER_BYTES;
            (*slot).pointers = pg_sys::MemoryContextAlloc((*slot).base.tts_mcxt, bytes).cast();
        }
        let pointer = (*slot).pointers.add(column);
        *pointer = stand_in.to_toast_pointer((*slot).store);
        pg_sys::Datum::from(pointer)
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn getsysattr(
    slot: *mut pg_sys::TupleTableSlot,
    attnum: c_int,
    isnull: *mut bool,
) -> pg_sys::Datum {
    // SAFETY: a slot of ours; the inner slot answers if it holds the stored row.
    unsafe {
        let inner = (*slot.cast::<BlockSlot>()).inner;
        if inner.is_null() || is_empty(inner) {
            error::not_supported("cannot retrieve a system column in this context", "");
        }
        pg_sys::slot_getsysattr(inner, attnum, isnull)
    }
}

#[cfg(any(feature = "pg17", feature = "pg18"))]
#[pg_guard]
unsafe extern "C-unwind" fn is_current_xact_tuple(slot: *mut pg_sys::TupleTableSlot) -> bool {
    // SAFETY: as for getsysattr.
    unsafe {
        let inner = (*slot.cast::<BlockSlot>()).inner;
        if inner.is_null() || is_empty(inner) {
            error::not_supported("don't have transaction information for this type of tuple", "");
        }
        let callback = (*(*inner).tts_ops).is_current_xact_tuple.expect("a buffer-heap slot has it");
        pg_sys::ffi::pg_guard_ffi_boundary(|| callback(inner))
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn materialize(slot: *mut pg_sys::TupleTableSlot) {
    // SAFETY: a slot of ours, not empty.
    unsafe {
        let ours = slot.cast::<BlockSlot>();
        if (*ours).from_inner {
            pg_sys::ExecMaterializeSlot((*ours).inner);
            // The values may point into the page that the inner slot has let go.
            (*slot).tts_nvalid = 0;
        } else {
            materialize_values(ours);
        }
    }
}

/// Makes a row of the values that the slot has, so that it depends on no memory but its own. The header of the stored
/// row, if there is one, is kept for the system columns.
unsafe fn materialize_values(slot: *mut BlockSlot) {
    // SAFETY: a slot of ours with all its values valid.
    unsafe {
        let base = &raw mut (*slot).base;
        let inner = inner_of(slot);
        let tid = (*base).tts_tid;
        let stored = if is_empty(inner) { std::ptr::null_mut() } else { pg_sys::ExecCopySlotHeapTuple(inner) };
        let tuple = pg_sys::heap_form_tuple((*base).tts_tupleDescriptor, (*base).tts_values, (*base).tts_isnull);
        if !stored.is_null() {
            (*(*tuple).t_data).t_choice = (*(*stored).t_data).t_choice;
            (*(*tuple).t_data).t_ctid = (*(*stored).t_data).t_ctid;
            (*tuple).t_self = (*stored).t_self;
            (*tuple).t_tableOid = (*stored).t_tableOid;
            pg_sys::heap_freetuple(stored);
        }
        pg_sys::ExecForceStoreHeapTuple(tuple, inner, true);
        (*base).tts_nvalid = 0;
        (*base).tts_tid = tid;
        (*slot).from_inner = true;
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn copyslot(dst: *mut pg_sys::TupleTableSlot, src: *mut pg_sys::TupleTableSlot) {
    // SAFETY: two slots, the first one ours; the source is not empty (ExecCopySlot).
    unsafe {
        clear(dst);
        let ours = dst.cast::<BlockSlot>();
        match as_ours(src) {
            Some(from) if (*from).from_inner => {
                let inner = inner_of(ours);
                pg_sys::ExecCopySlot(inner, (*from).inner);
                (*ours).store = (*from).store;
                (*ours).from_inner = true;
                (*dst).tts_flags &= !(pg_sys::TTS_FLAG_EMPTY as u16);
                (*dst).tts_nvalid = 0;
            }
            _ => {
                pg_sys::slot_getallattrs(src);
                let natts = (*(*src).tts_tupleDescriptor).natts as usize;
                std::ptr::copy_nonoverlapping((*src).tts_values, (*dst).tts_values, natts);
                std::ptr::copy_nonoverlapping((*src).tts_isnull, (*dst).tts_isnull, natts);
                (*dst).tts_nvalid = natts as i16;
                (*dst).tts_flags &= !(pg_sys::TTS_FLAG_EMPTY as u16);
                materialize_values(ours);
            }
        }
        (*dst).tts_tid = (*src).tts_tid;
        (*dst).tts_tableOid = (*src).tts_tableOid;
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn copy_heap_tuple(slot: *mut pg_sys::TupleTableSlot) -> pg_sys::HeapTuple {
    // SAFETY: a slot of ours, not empty.
    unsafe {
        pg_sys::slot_getallattrs(slot);
        let tuple = pg_sys::heap_form_tuple((*slot).tts_tupleDescriptor, (*slot).tts_values, (*slot).tts_isnull);
        let inner = (*slot.cast::<BlockSlot>()).inner;
        if !inner.is_null() && !is_empty(inner) {
            // System columns can be read of the copy, for example in a trigger.
            let mut copied = false;
            let stored = pg_sys::ExecFetchSlotHeapTuple(inner, false, &mut copied);
            take_header((*tuple).t_data, (*stored).t_data);
            if copied {
                pg_sys::heap_freetuple(stored);
            }
        }
        (*tuple).t_self = (*slot).tts_tid;
        (*tuple).t_tableOid = (*slot).tts_tableOid;
        tuple
    }
}

/// Gives a row the transactions of the stored row that it was made of; what the header tells of the form stays.
unsafe fn take_header(to: pg_sys::HeapTupleHeader, from: pg_sys::HeapTupleHeader) {
    // SAFETY: two headers.
    unsafe {
        (*to).t_choice = (*from).t_choice;
        (*to).t_ctid = (*from).t_ctid;
        let xact = pg_sys::HEAP_XACT_MASK as u16;
        (*to).t_infomask = (*to).t_infomask & !xact | (*from).t_infomask & xact;
        let natts = pg_sys::HEAP_NATTS_MASK as u16;
        (*to).t_infomask2 = (*to).t_infomask2 & natts | (*from).t_infomask2 & !natts;
    }
}

#[cfg(not(feature = "pg18"))]
#[pg_guard]
unsafe extern "C-unwind" fn copy_minimal_tuple(slot: *mut pg_sys::TupleTableSlot) -> pg_sys::MinimalTuple {
    // SAFETY: a slot of ours, not empty.
    unsafe {
        pg_sys::slot_getallattrs(slot);
        pg_sys::heap_form_minimal_tuple((*slot).tts_tupleDescriptor, (*slot).tts_values, (*slot).tts_isnull)
    }
}

#[cfg(feature = "pg18")]
#[pg_guard]
unsafe extern "C-unwind" fn copy_minimal_tuple(
    slot: *mut pg_sys::TupleTableSlot,
    extra: pg_sys::Size,
) -> pg_sys::MinimalTuple {
    // SAFETY: a slot of ours, not empty.
    unsafe {
        pg_sys::slot_getallattrs(slot);
        pg_sys::heap_form_minimal_tuple((*slot).tts_tupleDescriptor, (*slot).tts_values, (*slot).tts_isnull, extra)
    }
}
