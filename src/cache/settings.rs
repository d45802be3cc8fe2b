//! Settings of the block cache.

use super::layout::FRAME_BYTES;
use crate::pg::shmem;
use pgrx::PostgresGucEnum;
use pgrx::guc::{GucContext, GucFlags, GucRegistry, GucSetting};

/// Which block goes when there is no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PostgresGucEnum)]
pub enum Policy {
    /// The one that is least likely to be used again, by the access rates of the models that share it.
    #[name = c"sharing"]
    Sharing,
    /// One that was not used since the hand passed it.
    #[name = c"clock"]
    Clock,
    /// The one that was used least recently.
    #[name = c"lru"]
    Lru,
}

const SMALLEST_KB: i32 = 2 * (FRAME_BYTES / 1024) as i32;
const DEFAULT_KB: i32 = 256 * 1024;

static SIZE: GucSetting<i32> = GucSetting::<i32>::new(DEFAULT_KB);
static POLICY: GucSetting<Policy> = GucSetting::<Policy>::new(Policy::Sharing);

/// Registers the settings. Called once, when the library is loaded.
pub fn init() {
    // The server's shared memory has one size; memory of a session can be sized by the session.
    let context = if shmem::preloading() { GucContext::Postmaster } else { GucContext::Suset };
    GucRegistry::define_int_guc(
        c"tessera.block_cache_size",
        c"Sets the memory in which models' tensor blocks are kept to compute on.",
        c"Shared by all sessions if pg_tessera is in shared_preload_libraries, else of each session. Best is the size of the models that are in use, as tessera.models shows it; below that, blocks are read again from the tables, which tessera.block_cache_stats shows as misses.",
        &SIZE,
        SMALLEST_KB,
        i32::MAX,
        context,
        GucFlags::UNIT_KB,
    );
    GucRegistry::define_enum_guc(
        c"tessera.cache_policy",
        c"Sets which tensor block leaves the block cache when there is no room.",
        c"sharing: the one that is least likely to be used again, by the access rates of the models that share it. clock and lru know nothing of models; they are there to compare with.",
        &POLICY,
        GucContext::Sighup,
        GucFlags::default(),
    );
}

/// Number of frames.
pub fn frames() -> usize {
    SIZE.get() as usize * 1024 / FRAME_BYTES
}

/// The policy.
pub fn policy() -> Policy {
    #[cfg(any(test, feature = "pg_test"))]
    if let Some(policy) = WISHED.get() {
        return *policy;
    }
    POLICY.get()
}

/// Of a test that wants another policy in its own process.
#[cfg(any(test, feature = "pg_test"))]
pub static WISHED: std::sync::OnceLock<Policy> = std::sync::OnceLock::new();
