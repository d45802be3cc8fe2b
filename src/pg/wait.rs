//! What sessions wait for, as `pg_stat_activity` shows it.

use pgrx::pg_sys;

/// The wait event for a block that another session loads: an event of its own where PostgreSQL has them for extensions
/// (from 17 on), else `Extension`.
pub fn block_load() -> u32 {
    #[cfg(any(feature = "pg14", feature = "pg15", feature = "pg16"))]
    {
        pg_sys::PG_WAIT_EXTENSION
    }
    #[cfg(not(any(feature = "pg14", feature = "pg15", feature = "pg16")))]
    {
        use std::sync::OnceLock;
        static EVENT: OnceLock<u32> = OnceLock::new();
        // SAFETY: called in a backend; the name is copied to shared memory.
        *EVENT.get_or_init(|| unsafe { pg_sys::WaitEventExtensionNew(c"TesseraBlockLoad".as_ptr()) })
    }
}
