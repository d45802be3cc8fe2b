//! Models in tables: rows in, rows out. Reads go straight to the tables under the active snapshot; writes go through SPI
//! with the rights of the extension's owner, after the caller's own were checked here.

mod blocks;
mod content;
mod merge;
mod names;
mod read;
pub mod sets;
mod visible;
mod write;

pub use blocks::{BlockRef, OpenWeights, block_refs, prefetch_block, read_block, read_set_block, set_block};
pub use content::ContentHash;
pub use merge::{Merge, merged_content, store_merged};
pub use names::{ModelSpec, check_name};
pub use read::{
    TensorRow, VersionRow, estimate, graph, is_usable, read_tensor, resolve, signature_of_content, tensors,
};
pub use visible::{versions, visible_contents};
pub use write::{NewVersion, activate, check_owner, declare_rows, drop_model, drop_orphans, rename, store};
