//! Progress, as `pg_stat_progress_cluster` shows it.

use pgrx::pg_sys;

/// The command of this session that is under way. An ERROR ends it as well.
pub struct Progress {
    shown: u64,
}

impl Progress {
    /// A command that writes `relation` anew: shown as CLUSTER, with blocks of the store in place of pages.
    pub fn cluster(relation: pg_sys::Oid) -> Progress {
        // SAFETY: writes to this backend's own entry.
        unsafe {
            pg_sys::pgstat_progress_start_command(pg_sys::ProgressCommandType::PROGRESS_COMMAND_CLUSTER, relation)
        };
        update(pg_sys::PROGRESS_CLUSTER_COMMAND, pg_sys::PROGRESS_CLUSTER_COMMAND_CLUSTER.into());
        update(pg_sys::PROGRESS_CLUSTER_PHASE, pg_sys::PROGRESS_CLUSTER_PHASE_WRITE_NEW_HEAP.into());
        Progress { shown: 0 }
    }

    /// `done` of `all` blocks were moved.
    pub fn blocks(&mut self, done: u64, all: u64) {
        if self.shown == 0 {
            update(pg_sys::PROGRESS_CLUSTER_TOTAL_HEAP_BLKS, all as i64);
        }
        self.shown = done;
        update(pg_sys::PROGRESS_CLUSTER_HEAP_BLKS_SCANNED, done as i64);
    }

    /// The command has ended.
    pub fn end(self) {
        // SAFETY: as above.
        unsafe { pg_sys::pgstat_progress_end_command() }
    }
}

/// Sets a parameter of the command that is under way.
pub fn update(parameter: u32, value: i64) {
    // SAFETY: writes to this backend's own entry.
    unsafe { pg_sys::pgstat_progress_update_param(parameter as i32, value) }
}
