//! The executor's primitives without a guard of their own, for loops that fetch or copy many rows.
//!
//! pgrx guards each call into PostgreSQL by a jump buffer, which costs more than most of these calls. Here the loop as a
//! whole is guarded ([`guarded`]): an ERROR in it leaves the closure at once, and then goes on as a panic.

use pgrx::pg_sys;

mod bare {
    use pgrx::pg_sys;
    unsafe extern "C-unwind" {
        pub fn ExecReScan(node: *mut pg_sys::PlanState);
        pub fn slot_getsomeattrs_int(slot: *mut pg_sys::TupleTableSlot, attnum: i32);
        pub fn MemoryContextReset(context: pg_sys::MemoryContext);
        pub fn datumCopy(value: pg_sys::Datum, by_value: bool, len: i32) -> pg_sys::Datum;
        pub fn pg_detoast_datum(datum: *mut pg_sys::varlena) -> *mut pg_sys::varlena;
    }
}

/// Runs `work`, in which the functions of this module may be called.
///
/// # Safety
/// An ERROR leaves `work` without running destructors: while one of these functions runs, no value of `work`'s own may be
/// alive that has one, and what `work` borrows must be fit to be dropped at that point.
pub unsafe fn guarded<T>(work: impl FnOnce() -> T) -> T {
    // SAFETY: by the contract; called on the backend's one thread.
    unsafe { pg_sys::ffi::pg_guard_ffi_boundary(work) }
}

/// The next row of a plan; null or an empty slot at its end.
///
/// # Safety
/// Within [`guarded`]; `node` is an initialised plan.
pub unsafe fn next_row(node: *mut pg_sys::PlanState) -> *mut pg_sys::TupleTableSlot {
    // SAFETY: as ExecProcNode (executor.h).
    unsafe {
        if !(*node).chgParam.is_null() {
            bare::ExecReScan(node);
        }
        let Some(next) = (*node).ExecProcNode else { return std::ptr::null_mut() };
        next(node)
    }
}

/// True if a slot holds no row.
///
/// # Safety
/// `slot` is a slot or null.
pub unsafe fn is_empty(slot: *mut pg_sys::TupleTableSlot) -> bool {
    // SAFETY: by the contract.
    slot.is_null() || unsafe { u32::from((*slot).tts_flags) & pg_sys::TTS_FLAG_EMPTY != 0 }
}

/// A column (from 1) of the row in a slot; none for NULL.
///
/// # Safety
/// Within [`guarded`]; the slot holds a row with that column.
pub unsafe fn column(slot: *mut pg_sys::TupleTableSlot, column: usize) -> Option<pg_sys::Datum> {
    // SAFETY: as slot_getattr (tuptable.h).
    unsafe {
        if ((*slot).tts_nvalid as usize) < column {
            bare::slot_getsomeattrs_int(slot, column as i32);
        }
        (!*(*slot).tts_isnull.add(column - 1)).then(|| *(*slot).tts_values.add(column - 1))
    }
}

/// The value of an expression; none for NULL. It lives in the current memory context, or where its parts do.
///
/// # Safety
/// Within [`guarded`]; the context has the rows that the expression reads.
pub unsafe fn evaluate(expression: *mut pg_sys::ExprState, context: *mut pg_sys::ExprContext) -> Option<pg_sys::Datum> {
    // SAFETY: as ExecEvalExpr (executor.h).
    unsafe {
        let mut null = false;
        let function = (*expression).evalfunc?;
        let value = function(expression, context, &mut null);
        (!null).then_some(value)
    }
}

/// Frees all that is in a memory context.
///
/// # Safety
/// Within [`guarded`]; nothing in the context is used any more.
pub unsafe fn reset(context: pg_sys::MemoryContext) {
    // SAFETY: by the contract.
    unsafe {
        if !(*context).isReset {
            bare::MemoryContextReset(context);
        }
    }
}

/// A copy of a value in the current memory context.
///
/// # Safety
/// Within [`guarded`]; the value has a type with this `typbyval` and `typlen`.
pub unsafe fn copy(value: pg_sys::Datum, by_value: bool, len: i16) -> pg_sys::Datum {
    // SAFETY: by the contract.
    unsafe { if by_value { value } else { bare::datumCopy(value, false, i32::from(len)) } }
}

/// The value with a plain header, in the current memory context if it had to be made.
///
/// # Safety
/// Within [`guarded`]; `datum` points at a varlena.
pub unsafe fn plain(datum: *mut pg_sys::varlena) -> *mut pg_sys::varlena {
    // SAFETY: by the contract.
    unsafe { bare::pg_detoast_datum(datum) }
}

/// Fills a slot for computed rows.
///
/// # Safety
/// `slot` is a virtual slot with as many columns as there are values and nulls.
pub unsafe fn store(slot: *mut pg_sys::TupleTableSlot, values: &[pg_sys::Datum], nulls: &[bool]) {
    // SAFETY: by the contract; as ExecStoreVirtualTuple (execTuples.c).
    unsafe {
        std::ptr::copy_nonoverlapping(values.as_ptr(), (*slot).tts_values, values.len());
        std::ptr::copy_nonoverlapping(nulls.as_ptr(), (*slot).tts_isnull, nulls.len());
        (*slot).tts_flags &= !(pg_sys::TTS_FLAG_EMPTY as u16);
        (*slot).tts_nvalid = values.len() as i16;
    }
}
