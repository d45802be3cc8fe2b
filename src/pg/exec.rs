//! The executor's primitives without pgrx's guard.
//!
//! pgrx puts a jump buffer around each call into PostgreSQL, catches an ERROR there, and raises another one in its place at
//! the end of the callback: it has lost the CONTEXT lines, and the position and text of an internal query. Around a node of a plan
//! or the planner these are other people's errors, which users want whole. The functions here let an ERROR pass: it leaves all
//! frames between PostgreSQL's own catch and here at once, as it does in C. It also costs less, which counts in loops over rows.
//!
//! So for each caller, up to the callback that PostgreSQL has called: while one of these functions runs, no frame may hold a
//! value that has something to do when it is dropped, or a borrow flag. Such values belong to the node's state, which goes with
//! the query's memory.

use pgrx::pg_sys;

mod bare {
    use pgrx::pg_sys;
    unsafe extern "C-unwind" {
        pub fn ExecInitNode(plan: *mut pg_sys::Plan, estate: *mut pg_sys::EState, flags: i32)
        -> *mut pg_sys::PlanState;
        pub fn ExecEndNode(node: *mut pg_sys::PlanState);
        pub fn ExecReScan(node: *mut pg_sys::PlanState);
        pub fn slot_getsomeattrs_int(slot: *mut pg_sys::TupleTableSlot, attnum: i32);
        pub fn MemoryContextReset(context: pg_sys::MemoryContext);
        pub fn datumCopy(value: pg_sys::Datum, by_value: bool, len: i32) -> pg_sys::Datum;
        pub fn pg_detoast_datum(datum: *mut pg_sys::varlena) -> *mut pg_sys::varlena;
    }
}

/// Gets a plan ready.
///
/// # Safety
/// As the module says; as `ExecInitNode` (execProcnode.c).
pub unsafe fn begin(plan: *mut pg_sys::Plan, estate: *mut pg_sys::EState, flags: i32) -> *mut pg_sys::PlanState {
    // SAFETY: by the contract.
    unsafe { bare::ExecInitNode(plan, estate, flags) }
}

/// Ends a plan.
///
/// # Safety
/// As the module says; `node` is an initialised plan.
pub unsafe fn end(node: *mut pg_sys::PlanState) {
    // SAFETY: by the contract.
    unsafe { bare::ExecEndNode(node) }
}

/// Has a plan begin anew.
///
/// # Safety
/// As the module says; `node` is an initialised plan.
pub unsafe fn rescan(node: *mut pg_sys::PlanState) {
    // SAFETY: by the contract.
    unsafe { bare::ExecReScan(node) }
}

/// The next row of a plan; null or an empty slot at its end.
///
/// # Safety
/// As the module says; `node` is an initialised plan.
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
/// As the module says; the slot holds a row with that column.
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
/// As the module says; the context has the rows that the expression reads.
pub unsafe fn evaluate(expression: *mut pg_sys::ExprState, context: *mut pg_sys::ExprContext) -> Option<pg_sys::Datum> {
    // SAFETY: as ExecEvalExpr (executor.h).
    unsafe {
        let mut null = false;
        let function = (*expression).evalfunc?;
        let value = function(expression, context, &mut null);
        (!null).then_some(value)
    }
}

/// As [`evaluate`], with what is made on the way in the expression's own memory, until that is reset.
///
/// # Safety
/// As there.
pub unsafe fn evaluate_aside(
    expression: *mut pg_sys::ExprState,
    context: *mut pg_sys::ExprContext,
) -> Option<pg_sys::Datum> {
    // SAFETY: by the contract; as ExecEvalExprSwitchContext (executor.h).
    unsafe {
        let caller = pg_sys::CurrentMemoryContext;
        pg_sys::CurrentMemoryContext = (*context).ecxt_per_tuple_memory;
        let value = evaluate(expression, context);
        pg_sys::CurrentMemoryContext = caller;
        value
    }
}

/// Whether a row meets a condition made by `ExecInitQual`.
///
/// # Safety
/// As [`evaluate`].
pub unsafe fn meets(condition: *mut pg_sys::ExprState, context: *mut pg_sys::ExprContext) -> bool {
    // SAFETY: by the contract; as ExecQual (executor.h), which is never null.
    unsafe { condition.is_null() || evaluate_aside(condition, context).is_some_and(|met| met.value() != 0) }
}

/// The row of a projection.
///
/// # Safety
/// As [`evaluate`]; `projection` was made by `ExecBuildProjectionInfo`.
pub unsafe fn project(projection: *mut pg_sys::ProjectionInfo) -> *mut pg_sys::TupleTableSlot {
    // SAFETY: by the contract; as ExecProject (executor.h): the expression fills the slot.
    unsafe {
        let state = &raw mut (*projection).pi_state;
        let slot = (*state).resultslot;
        if let Some(clear) = (*(*slot).tts_ops).clear {
            clear(slot);
        }
        evaluate_aside(state, (*projection).pi_exprContext);
        (*slot).tts_flags &= !(pg_sys::TTS_FLAG_EMPTY as u16);
        (*slot).tts_nvalid = (*(*slot).tts_tupleDescriptor).natts as i16;
        slot
    }
}

/// Frees all that is in a memory context.
///
/// # Safety
/// As the module says; nothing in the context is used any more.
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
/// As the module says; the value has a type with this `typbyval` and `typlen`.
pub unsafe fn copy(value: pg_sys::Datum, by_value: bool, len: i16) -> pg_sys::Datum {
    // SAFETY: by the contract.
    unsafe { if by_value { value } else { bare::datumCopy(value, false, i32::from(len)) } }
}

/// The value with a plain header, in the current memory context if it had to be made.
///
/// # Safety
/// As the module says; `datum` points at a varlena.
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
