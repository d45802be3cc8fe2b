//! Cancellation: Ctrl-C, `statement_timeout`, termination.

use pgrx::pg_sys;

/// Serves a pending interrupt, which may raise an ERROR or end the session. Content locks must not be held.
pub fn check() {
    pgrx::check_for_interrupts!();
}

/// True when an interrupt waits to be served. Never raises.
pub fn pending() -> bool {
    // SAFETY: a flag that signal handlers set; read as the core reads it.
    unsafe { std::ptr::read_volatile(&raw const pg_sys::InterruptPending) != 0 }
}
