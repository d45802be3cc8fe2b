//! Memory contexts and detoasting.

use pgrx::pg_sys;
use std::cell::Cell;

thread_local! {
    static SCRATCH: Cell<pg_sys::MemoryContext> = const { Cell::new(std::ptr::null_mut()) };
}

/// Runs `f` in a scratch memory context that is emptied before each use, so that what an insertion detoasts, compresses
/// and forms is gone by the next one, also when an ERROR ended the last. Not reentrant: `f` must not insert itself.
pub fn in_scratch<T>(f: impl FnOnce() -> T) -> T {
    let scratch = SCRATCH.with(|cell| {
        if cell.get().is_null() {
            // SAFETY: TopMemoryContext lives as long as the backend; the context is made once.
            let context = unsafe {
                pg_sys::AllocSetContextCreateExtended(
                    pg_sys::TopMemoryContext,
                    c"pg_tessera insertion".as_ptr(),
                    pg_sys::ALLOCSET_DEFAULT_MINSIZE as usize,
                    pg_sys::ALLOCSET_DEFAULT_INITSIZE as usize,
                    pg_sys::ALLOCSET_DEFAULT_MAXSIZE as usize,
                )
            };
            cell.set(context);
        }
        cell.get()
    });
    // SAFETY: nothing of an earlier use is referenced any more. On an ERROR, PostgreSQL switches the context itself.
    unsafe {
        pg_sys::MemoryContextReset(scratch);
        let caller = pg_sys::MemoryContextSwitchTo(scratch);
        let result = f();
        pg_sys::MemoryContextSwitchTo(caller);
        result
    }
}
