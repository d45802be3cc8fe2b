//! What an ERROR says beside SQLSTATE, message, detail and hint, kept on its way through Rust.
//!
//! pgrx catches an ERROR of PostgreSQL where Rust calls C, unwinds, and raises a new one where C had called Rust. The new
//! one lacks the CONTEXT of what ran inside ("while updating tuple (0,1) in relation ..."), the names of table and
//! constraint, the inner query, and a SQLSTATE of the user's own. So a callback in which that matters has a frame on `error_context_stack`: PostgreSQL
//! calls it while the ERROR is finished, after those of what ran inside, and it keeps a copy; it is called once more when
//! the ERROR is raised anew, and then puts back what is missing. Callbacks further out add their part to the new one.

use pgrx::PgSqlErrorCode;
use pgrx::pg_sys;
use std::ffi::{CStr, c_char, c_int, c_void};

unsafe extern "C-unwind" {
    // utils/elog.h, without the guards of the bindings: these are called while an ERROR is being finished.
    fn CopyErrorData() -> *mut pg_sys::ErrorData;
    fn FreeErrorData(data: *mut pg_sys::ErrorData);
    fn errcontext_msg(format: *const c_char, ...) -> c_int;
    fn err_generic_string(field: c_int, text: *const c_char) -> c_int;
    fn internalerrquery(query: *const c_char) -> c_int;
    fn internalerrposition(position: c_int) -> c_int;
    fn errposition(position: c_int) -> c_int;
    fn errcode(code: c_int) -> c_int;
}

/// Without a destructor: an ERROR that is raised anew jumps over it.
struct Frame {
    entry: pg_sys::ErrorContextCallback,
    /// The caller's: what ran inside may have ended a subtransaction, with its memory, and gone on.
    memory: pg_sys::MemoryContext,
    kept: *mut pg_sys::ErrorData,
}

/// Runs the body of a callback in place of `#[pg_guard]`: panics become ERRORs, and those of PostgreSQL stay whole.
///
/// # Safety
/// Called first by a function that PostgreSQL calls, which has nothing with a destructor; on the main thread.
pub unsafe fn guard<R>(body: impl FnOnce() -> R) -> R {
    // SAFETY: the frame stays in place until it is taken off the stack here, or by whoever catches the ERROR.
    unsafe {
        let outer = pg_sys::error_context_stack;
        let mut frame = Frame {
            entry: pg_sys::ErrorContextCallback::default(),
            memory: pg_sys::CurrentMemoryContext,
            kept: std::ptr::null_mut(),
        };
        let frame = &raw mut frame;
        (*frame).entry = pg_sys::ErrorContextCallback { previous: outer, callback: Some(finishing), arg: frame.cast() };
        pg_sys::error_context_stack = &raw mut (*frame).entry;
        let result = pgrx::pgrx_extern_c_guard(body);
        pg_sys::error_context_stack = outer;
        forget(&mut *frame);
        result
    }
}

fn forget(frame: &mut Frame) {
    if !frame.kept.is_null() {
        // SAFETY: made by CopyErrorData, and freed once.
        unsafe { FreeErrorData(frame.kept) };
        frame.kept = std::ptr::null_mut();
    }
}

/// Called while a message is being finished, in its memory context. It must not fail: nothing here is guarded.
unsafe extern "C-unwind" fn finishing(frame: *mut c_void) {
    // SAFETY: PostgreSQL passes the frame that `guard` has put on the stack. In a critical section there is no
    // ERROR but a PANIC, and no memory.
    unsafe {
        if pg_sys::CritSectionCount > 0 {
            return;
        }
        let frame = &mut *frame.cast::<Frame>();
        let caller = pg_sys::CurrentMemoryContext;
        pg_sys::CurrentMemoryContext = frame.memory;
        let data = CopyErrorData();
        pg_sys::CurrentMemoryContext = caller;
        if (*data).elevel < pgrx::PgLogLevel::ERROR as c_int {
            FreeErrorData(data);
        } else if !frame.kept.is_null() && is_anew(&*data, &*frame.kept) {
            put_back(&*frame.kept);
            forget(frame);
            FreeErrorData(data);
        } else {
            forget(frame);
            frame.kept = data;
        }
    }
}

/// True if `data` is what pgrx made of `kept`.
unsafe fn is_anew(data: &pg_sys::ErrorData, kept: &pg_sys::ErrorData) -> bool {
    // SAFETY: null or a string.
    let same = |a: *mut c_char, b: *mut c_char| unsafe {
        !a.is_null() && !b.is_null() && CStr::from_ptr(a) == CStr::from_ptr(b)
    };
    // A SQLSTATE that pgrx does not know has become internal_error.
    let same_code =
        data.sqlerrcode == kept.sqlerrcode || data.sqlerrcode == PgSqlErrorCode::ERRCODE_INTERNAL_ERROR as c_int;
    data.context.is_null() && same_code && same(data.message, kept.message)
}

unsafe fn put_back(kept: &pg_sys::ErrorData) {
    // SAFETY: strings, or null; they are copied.
    unsafe {
        errcode(kept.sqlerrcode);
        if !kept.context.is_null() {
            errcontext_msg(c"%s".as_ptr(), kept.context);
        }
        for (field, text) in [
            (pg_sys::PG_DIAG_SCHEMA_NAME, kept.schema_name),
            (pg_sys::PG_DIAG_TABLE_NAME, kept.table_name),
            (pg_sys::PG_DIAG_COLUMN_NAME, kept.column_name),
            (pg_sys::PG_DIAG_DATATYPE_NAME, kept.datatype_name),
            (pg_sys::PG_DIAG_CONSTRAINT_NAME, kept.constraint_name),
        ] {
            if !text.is_null() {
                err_generic_string(c_int::from(field), text);
            }
        }
        if !kept.internalquery.is_null() {
            internalerrquery(kept.internalquery);
            internalerrposition(kept.internalpos);
        }
        if kept.cursorpos > 0 {
            errposition(kept.cursorpos);
        }
    }
}
