//! The block cache: tensor blocks in memory, each once for the whole server, ready to compute on.
//!
//! Duties: give who wants a block a *pin* on a *frame* that holds it; load what is missing, each block by one process;
//! choose what goes when there is no room. It knows hashes and bytes; where blocks are stored, and what is computed
//! with them, is others' business.
//!
//! The memory is shared by all processes of the server if the library was preloaded, else each process has its own, with
//! the same code and no locks.
//!
//! Invariants:
//! - a block is known by the hash of its content, so what a frame holds is never stale, whoever loaded it, for whichever
//!   database; the loader has verified the hash before the frame is published;
//! - a frame with pins keeps its block; a pin is noted in its process's row too, so that it can be proved whose it is,
//!   and so that it ends with the process;
//! - a frame that is being filled is pinned by its loader, which loads without waiting for another loader: what it has
//!   claimed it fills first;
//! - no heavyweight lock is taken between claim and publication, because the deadlock detector knows nothing of waits here;
//! - dropping pins and claims is atomics and a mutex of this process, so it can be done while unwinding and on any thread.
//!
//! Lock order: model slots -> replacement -> partitions in ascending order. Only the check takes more than two. Under
//! these locks nothing is called that can raise an ERROR, and no block is loaded.

mod area;
mod backend;
mod check;
mod layout;
mod models;
mod partition;
mod pin;
mod replace;
pub mod settings;
mod statistics;
mod view;

#[cfg(any(test, feature = "pg_test"))]
mod tests;

pub use area::init;
pub use check::check;
pub use models::{ModelSlot, keep, model_slot, note_run, release};
pub use pin::{Pin, is_cached, pin, session_counts};
pub use statistics::{Prediction, note, reset_statistics, statistics};
#[cfg(any(test, feature = "pg_test"))]
pub use view::Counts;
pub use view::{FrameView, frames, models, reset, totals};

/// Identity of a block: what [`tensor_blocks::block_hash`] gives, and the number of bytes of its elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockKey {
    /// The block hash.
    pub hash: [u8; 32],
    /// Bytes of its elements, above 0.
    pub bytes: u32,
}

impl BlockKey {
    fn words(&self) -> [u64; 4] {
        let word = |n: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&self.hash[n * 8..n * 8 + 8]);
            u64::from_le_bytes(bytes)
        };
        [word(0), word(1), word(2), word(3)]
    }
}
