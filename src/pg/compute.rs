//! The compute thread of this backend, and others for a while: they know no PostgreSQL.

use super::{error, memory};

/// Makes the thread if there is none, with every signal blocked in it: PostgreSQL's handlers belong to the main thread.
pub fn start() {
    share_arena();
    memory::trim_at_end_of_transaction();
    let result = with_signals_blocked(inference::worker::start);
    if let Err(e) = result {
        error::raise_model(e);
    }
}

/// Runs `work`, which knows no PostgreSQL, on a thread of its own, with every signal blocked. False if there is none to be had.
pub fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> bool {
    share_arena();
    with_signals_blocked(|| std::thread::Builder::new().name(name.into()).spawn(work)).is_ok()
}

/// All threads get their memory from one arena, before there are several: the C library gives only the main one back to the
/// operating system whole, and the threads work in turns.
fn share_arena() {
    #[cfg(target_env = "gnu")]
    {
        static ONCE: std::sync::Once = std::sync::Once::new();
        // SAFETY: a plain call.
        ONCE.call_once(|| unsafe {
            libc::mallopt(libc::M_ARENA_MAX, 1);
        });
    }
}

/// A new thread inherits the mask of the one that makes it.
fn with_signals_blocked<T>(f: impl FnOnce() -> T) -> T {
    // SAFETY: plain calls on this thread's mask, restored before returning; `f` neither raises nor calls PostgreSQL.
    unsafe {
        let mut all = std::mem::zeroed::<libc::sigset_t>();
        let mut before = std::mem::zeroed::<libc::sigset_t>();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        let result = f();
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut());
        result
    }
}
