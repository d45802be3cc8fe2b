//! Progress, as `pg_stat_progress_cluster` and `tessera.progress` show it.
//!
//! Both stand in the session's entry of the server's status array, of which an ERROR takes them away.

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

/// Number of a command for which PostgreSQL has no view: `tessera.progress` shows it.
const OURS: u32 = 0x7e55;

/// What a session is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i64)]
pub enum Work {
    Load = 1,
    Predict = 2,
    Deduplicate = 3,
}

/// What of it is shown, by place in `st_progress_param`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    Work,
    /// Of a load: 0 reading, 1 compiling, 2 storing. Of a deduplication: 0 reading rows, 1 compiling, 2 reading blocks, 3
    /// comparing, 4 trying, 5 storing.
    Phase,
    /// The first 8 bytes of the model's content hash.
    Content,
    Rows,
    Blocks,
    AllBlocks,
}

/// Fields of a [`View`].
const FIELDS: usize = Field::AllBlocks as usize + 1;

/// A piece of work of this session that is under way. None is shown within another command that has a view.
pub struct Activity {
    mine: bool,
}

impl Activity {
    pub fn begin(work: Work, content_hash: Option<&[u8; 32]>) -> Activity {
        // SAFETY: reads and writes this backend's own entry.
        let mine = unsafe {
            let entry = pg_sys::MyBEEntry;
            let free = !entry.is_null()
                && (*entry).st_progress_command == pg_sys::ProgressCommandType::PROGRESS_COMMAND_INVALID;
            if free {
                pg_sys::pgstat_progress_start_command(OURS, pg_sys::InvalidOid);
            }
            free
        };
        if mine {
            set(Field::Work, work as i64);
            content_hash.inspect(|hash| set(Field::Content, content_field(hash)));
        }
        Activity { mine }
    }
}

impl Drop for Activity {
    fn drop(&mut self) {
        // After an ERROR the end of the transaction does this.
        if self.mine && is_ours() && !std::thread::panicking() {
            // SAFETY: writes to this backend's own entry.
            unsafe { pg_sys::pgstat_progress_end_command() }
        }
    }
}

fn is_ours() -> bool {
    // SAFETY: reads this backend's own entry.
    unsafe { !pg_sys::MyBEEntry.is_null() && (*pg_sys::MyBEEntry).st_progress_command == OURS }
}

/// Sets a field of the work that is under way, if there is one.
pub fn set(field: Field, value: i64) {
    if is_ours() {
        update(field as u32, value);
    }
}

/// Adds to a field of the work that is under way, if there is one.
pub fn add(field: Field, value: u64) {
    if is_ours() {
        // SAFETY: reads this backend's own entry.
        let before = unsafe { (*pg_sys::MyBEEntry).st_progress_param[field as usize] };
        update(field as u32, before.saturating_add_unsigned(value));
    }
}

/// A content hash as a field.
pub fn content_field(hash: &[u8; 32]) -> i64 {
    hash.first_chunk().map_or(0, |bytes| i64::from_le_bytes(*bytes))
}

/// What a session of this database is at.
pub struct View {
    pub pid: i32,
    /// By [`Field`]; none if the current role may not know.
    pub fields: Option<[i64; FIELDS]>,
}

/// The work of all sessions of this database.
pub fn activities() -> Vec<View> {
    // SAFETY: the entries are a copy that this transaction has made.
    unsafe {
        let mut views = Vec::new();
        let all = pg_sys::has_privs_of_role(pg_sys::GetUserId(), pg_sys::Oid::from_u32(pg_sys::ROLE_PG_READ_ALL_STATS));
        for number in 1..=pg_sys::pgstat_fetch_stat_numbackends() {
            #[cfg(any(feature = "pg14", feature = "pg15"))]
            let local = pg_sys::pgstat_fetch_stat_local_beentry(number);
            #[cfg(not(any(feature = "pg14", feature = "pg15")))]
            let local = pg_sys::pgstat_get_local_beentry_by_index(number);
            let Some(local) = local.as_ref() else { continue };
            let entry = &local.backendStatus;
            if entry.st_progress_command != OURS || entry.st_databaseid != pg_sys::MyDatabaseId {
                continue;
            }
            let may_know = all || pg_sys::has_privs_of_role(pg_sys::GetUserId(), entry.st_userid);
            let fields = entry.st_progress_param.first_chunk().copied().filter(|_| may_know);
            views.push(View { pid: entry.st_procpid, fields });
        }
        views
    }
}
