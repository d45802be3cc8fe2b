//! Cancellation: Ctrl-C, `statement_timeout`, termination.

use super::error;
use inference::error::{ErrorKind, ModelError};
use pgrx::pg_sys;

/// Serves a pending interrupt, which may raise an ERROR or end the session. Content locks must not be held.
pub fn check() {
    pgrx::check_for_interrupts!();
}

/// True when the statement or the session is to end. Never raises, so it can be asked from inside a wait.
pub fn should_stop() -> bool {
    // SAFETY: flags that signal handlers set; read as the core reads them.
    unsafe {
        std::ptr::read_volatile(&raw const pg_sys::QueryCancelPending) != 0
            || std::ptr::read_volatile(&raw const pg_sys::ProcDiePending) != 0
    }
}

/// Raises the pending interrupt's own ERROR if work was given up because of one, else the model's.
pub fn raise_or_model(e: ModelError) -> ! {
    if e.kind == ErrorKind::Cancelled {
        check();
    }
    error::raise_model(e)
}
