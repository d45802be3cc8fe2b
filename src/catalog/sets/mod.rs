//! Sets of models of one architecture in tables: rows in, rows out.
//!
//! ```text
//!   model_set  --architecture-->  architecture  --hash-->  graph
//!       |                              ^
//!   set_map (512 members a row)        |
//!       |  places: block, offset       |
//!       +------------------------>  set_block (segments of many members, 64 kB)
//! ```
//!
//! Invariants:
//! - a set's map is complete: reading a member never looks at the sets that its own is based on, save where it has to be
//!   trained from them;
//! - a block stays as long as a map has a place in it. Who saves a set shares a lock on its architecture until the transaction
//!   ends, who drops one has that lock alone: so what is removed is used by nobody who cannot be seen yet.

mod read;
mod write;

pub use read::{
    Architecture, SetRow, Storage, architecture, check_member, chunk, chunk_starts, look_up_set, no_such_member,
    resolve_set, set_blocks, set_content, set_of_id, signature_of_graph, split_member,
};
pub use write::{NewSet, SetWriter, drop_orphan_sets, drop_set, lock_set_name};
