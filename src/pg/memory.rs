//! Memory contexts, and memory that goes back to the operating system.

use pgrx::pg_sys;
use pgrx::prelude::*;
use std::cell::Cell;
use std::ffi::CStr;
use std::sync::Once;

thread_local! {
    static SCRATCH: Cell<pg_sys::MemoryContext> = const { Cell::new(std::ptr::null_mut()) };
}

/// Runs `f` in a scratch memory context that is emptied before each use, so that what an insertion detoasts, compresses
/// and forms is gone by the next one, also when an ERROR ended the last. Not reentrant: `f` must not insert itself.
pub fn in_scratch<T>(f: impl FnOnce() -> T) -> T {
    let scratch = SCRATCH.with(|cell| {
        if cell.get().is_null() {
            // SAFETY: TopMemoryContext lives as long as the backend; the context is made once.
            let context = unsafe { new_context(pg_sys::TopMemoryContext, c"pg_tessera insertion") };
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

/// Bytes that maintenance_work_mem allows.
pub fn of_maintenance() -> usize {
    // SAFETY: a setting of PostgreSQL, in kB.
    unsafe { pg_sys::maintenance_work_mem as usize * 1024 }
}

/// A memory context below the current one, for what a call of a function keeps.
pub fn of_call(name: &'static CStr) -> pg_sys::MemoryContext {
    // SAFETY: the current memory context is one.
    unsafe { new_context(pg_sys::CurrentMemoryContext, name) }
}

/// A memory context below `parent`.
///
/// # Safety
/// `parent` is a memory context.
pub unsafe fn new_context(parent: pg_sys::MemoryContext, name: &'static CStr) -> pg_sys::MemoryContext {
    // SAFETY: by the contract; the name lives as long as the process.
    unsafe {
        pg_sys::AllocSetContextCreateExtended(
            parent,
            name.as_ptr(),
            pg_sys::ALLOCSET_DEFAULT_MINSIZE as usize,
            pg_sys::ALLOCSET_DEFAULT_INITSIZE as usize,
            pg_sys::ALLOCSET_DEFAULT_MAXSIZE as usize,
        )
    }
}

/// Drops `value` when the context is reset or deleted.
///
/// # Safety
/// `value` comes from `Box::into_raw`; dropping it calls nothing of PostgreSQL's.
pub unsafe fn drop_with<T>(context: pg_sys::MemoryContext, value: *mut T) {
    unsafe extern "C-unwind" fn drop_it<T>(value: *mut std::ffi::c_void) {
        // SAFETY: called once, with the pointer below.
        drop(unsafe { Box::from_raw(value.cast::<T>()) });
    }
    // SAFETY: the callback lives in the context that calls it.
    unsafe {
        let place = pg_sys::MemoryContextAlloc(context, std::mem::size_of::<pg_sys::MemoryContextCallback>());
        let callback = place.cast::<pg_sys::MemoryContextCallback>();
        (*callback).func = Some(drop_it::<T>);
        (*callback).arg = value.cast();
        pg_sys::MemoryContextRegisterResetCallback(context, callback);
    }
}

/// Bytes of freed memory that an idle session may keep.
const KEPT: usize = 4 << 20;

thread_local! {
    /// Whether a large run was in this transaction.
    static TO_TRIM: Cell<bool> = const { Cell::new(false) };
    /// Bytes of memory of this process's own after it was trimmed last.
    static TRIMMED: Cell<usize> = const { Cell::new(0) };
}

/// At the end of this transaction memory that was freed goes back to the operating system, if it is much: the C library
/// keeps what a large run needed, and a session may be idle for hours. Within a statement it is kept, for the next run.
pub fn trim_at_end_of_transaction() {
    static REGISTERED: Once = Once::new();
    #[pg_guard]
    unsafe extern "C-unwind" fn at_end(event: pg_sys::XactEvent::Type, _arg: *mut std::ffi::c_void) {
        use pg_sys::XactEvent::{XACT_EVENT_ABORT, XACT_EVENT_COMMIT, XACT_EVENT_PARALLEL_COMMIT, XACT_EVENT_PREPARE};
        let ended = [XACT_EVENT_ABORT, XACT_EVENT_COMMIT, XACT_EVENT_PARALLEL_COMMIT, XACT_EVENT_PREPARE];
        if ended.contains(&event) && TO_TRIM.replace(false) {
            trim();
        }
    }
    // SAFETY: the callback stays loaded and raises nothing.
    REGISTERED.call_once(|| unsafe { pg_sys::RegisterXactCallback(Some(at_end), std::ptr::null_mut()) });
    TO_TRIM.set(true);
}

/// Memory of this process's own: what is resident and not shared. `None` where the system does not tell.
fn own_bytes() -> Option<usize> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let mut pages = statm.split(' ').skip(1).map(|word| word.parse::<usize>().ok());
    let (resident, shared) = (pages.next()??, pages.next()??);
    // SAFETY: a plain call.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    Some(resident.saturating_sub(shared) * usize::try_from(page).ok()?)
}

fn trim() {
    let Some(own) = own_bytes() else { return };
    // What is in use after a trim stays: it is no reason for another one.
    if own < TRIMMED.get() + KEPT {
        return;
    }
    give_back();
    TRIMMED.set(own_bytes().unwrap_or(own));
}

/// Gives memory that was freed back to the operating system.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: a plain call, which locks what it works on.
    unsafe {
        libc::malloc_trim(0)
    };
}
