//! Tensor blocks: element types, the tiling of tensors into blocks, the content hash of a block, near-duplicate search,
//! page packing, and the parameters of models that come by the thousand.
//!
//! A tensor is seen as a matrix (a [`View`]), cut into rectangular tiles by a [`Tiling`], and each tile is a block
//! whose identity is its [`block_hash`]. This crate knows nothing of PostgreSQL and nothing of ONNX files; only the
//! codes of the element types are ONNX's.

mod block;
mod dtype;
mod hash;
pub mod members;
pub mod near;
pub mod packing;
mod random;
mod tiling;
mod transpose;
mod view;

pub use block::{Block, BlockError};
pub use dtype::DType;
pub use hash::{BlockHash, block_hash};
pub use tiling::{Tile, Tiling, TilingError};
pub use view::View;
