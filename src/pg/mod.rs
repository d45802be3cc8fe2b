//! Thin guards over `pg_sys`: the floor on which the rest of the extension stands.
//!
//! Duties: give buffers, WAL records, locks, relations and errors a shape that the floors above can use without
//! `unsafe`. Invariant of every guard: its `Drop` releases the resource on the normal path only. While a panic
//! unwinds (an ERROR raised by PostgreSQL travels through Rust frames as one) nothing here calls PostgreSQL:
//! transaction abort releases pins (resource owner), content locks (`LWLockReleaseAll`), heavyweight locks and memory.

pub mod array;
pub mod beside;
pub mod buffer;
pub mod compute;
pub mod error;
pub mod error_context;
pub mod exec;
pub mod extend;
pub mod fmgr;
pub mod function;
pub mod identity;
pub mod insert;
pub mod interrupt;
pub mod large_object;
pub mod memory;
pub mod nodes;
pub mod progress;
pub mod query;
pub mod relation;
pub mod scan;
pub mod shmem;
pub mod snapshot;
pub mod temp_file;
pub mod toast_index;
pub mod tuple;
pub mod vacuum;
pub mod value;
pub mod varlena;
pub mod wait;
pub mod wal;
