//! Where the blocks of a model's tensors are stored.
//!
//! Responsible for: the blocks' hashes and places, read from rows and locators without their content, and the content of
//! one block, verified.
//!
//! Invariant: what [`read_block`] gives has the hash that was asked for. A place may be out of date, since a session keeps
//! places longer than it keeps locks; that is noticed by the hash and told as [`Stale`].

use super::read::{TensorRow, damaged, relation};
use crate::pg::relation::OpenRelation;
use crate::pg::scan::{Key, by_index};
use crate::pg::{error, varlena};
use crate::store::{self, Hash, format::State, locators};
use pgrx::pg_sys;
use pgrx::prelude::*;
use std::ffi::CStr;
use std::ops::ControlFlow;
use tensor_blocks::{Block, DType, Tile, Tiling, block_hash};

/// A block of a stored tensor.
#[derive(Clone, Debug)]
pub struct BlockRef {
    /// Its identity.
    pub hash: Hash,
    place: Place,
}

#[derive(Clone, Debug)]
enum Place {
    /// A block of the store.
    Store(varlena::StandIn),
    /// A value so small that the row has it.
    Row(Vec<u8>),
}

impl BlockRef {
    /// Bytes that the block takes in the block store; none if it is so small that rows have it themselves.
    pub fn stored_bytes(&self) -> Option<u64> {
        match &self.place {
            Place::Store(stand_in) => Some(u64::from(stand_in.stored_len())),
            Place::Row(_) => None,
        }
    }

    /// The TOAST pointer by which another row refers to the block; none if it lies in its row.
    pub(super) fn toast_pointer(&self, weights: &OpenWeights) -> Option<[u8; varlena::TOAST_POINTER_BYTES]> {
        match &self.place {
            // SAFETY: an open relation.
            Place::Store(stand_in) => Some(stand_in.to_toast_pointer(unsafe { (*weights.store.raw()).rd_id })),
            Place::Row(_) => None,
        }
    }
}

/// The place has another block now, or none.
pub struct Stale;

/// The tables in which blocks are stored, open and locked against changes of their places.
pub struct OpenWeights {
    _table: OpenRelation,
    _index: OpenRelation,
    store: OpenRelation,
}

impl OpenWeights {
    /// Opens those of models. To be done before a block is claimed in the cache: then reading it waits for no lock.
    pub fn open() -> OpenWeights {
        OpenWeights::of(c"weight", c"weight_pkey")
    }

    /// As [`OpenWeights::open`], those of sets of models.
    pub fn of_sets() -> OpenWeights {
        OpenWeights::of(c"set_block", c"set_block_pkey")
    }

    fn of(table: &CStr, index: &CStr) -> OpenWeights {
        let lock = pg_sys::AccessShareLock;
        let table = OpenRelation::table(relation(table), lock);
        let index = OpenRelation::index(relation(index), lock);
        // SAFETY: an open relation.
        let store = unsafe { (*(*table.raw()).rd_rel).reltoastrelid };
        if store == pg_sys::InvalidOid {
            damaged("the table of blocks has no block store");
        }
        OpenWeights { _table: table, _index: index, store: OpenRelation::table(store, lock) }
    }
}

/// The blocks of a tensor, in the order of their numbers: `block_row * block_cols + block_col`.
pub fn block_refs(weights: &OpenWeights, tensor: &TensorRow, tiling: &Tiling) -> Vec<BlockRef> {
    let mut refs: Vec<Option<BlockRef>> = vec![None; tiling.tile_count() as usize];
    let mut locators = locators::Finder::new(weights.store.raw());
    by_index::<()>(relation(c"weight"), relation(c"weight_pkey"), &[Key::Int8(tensor.id)], |row| {
        let (block_row, block_col) = (row.get::<i32>(2).unwrap_or(-1), row.get::<i32>(3).unwrap_or(-1));
        let Some(tile) = tiling.tile(block_row as u32, block_col as u32) else {
            damaged("a block lies outside its tensor")
        };
        let Some(datum) = row.datum(4) else { damaged("a block has no data") };
        // SAFETY: column 4 is a tensor_block, a varlena.
        let pointer = unsafe { varlena::toast_pointer(datum.cast_mut_ptr::<pg_sys::varlena>()) };
        let block = match pointer {
            Some((stand_in, _)) => {
                let locator = locators.find(stand_in.block_id);
                let Some(locator) = locator else { damaged("a block is not in the block store") };
                BlockRef { hash: locator.hash, place: Place::Store(stand_in) }
            }
            None => {
                let elements = row.with_bytes(4, |bytes| {
                    Block::decode(bytes).map(|block| block.data().to_vec()).map_err(|e| e.to_string())
                });
                let Some(Ok(elements)) = elements else { damaged("a block cannot be read") };
                BlockRef { hash: block_hash(tensor.dtype, &tile.shape(), &elements).0, place: Place::Row(elements) }
            }
        };
        refs[(tile.block_row * tiling.block_cols() + tile.block_col) as usize] = Some(block);
        ControlFlow::Continue(())
    });
    refs.into_iter().map(|block| block.unwrap_or_else(|| damaged("a tensor lacks a block"))).collect()
}

/// Fills `out` with the elements of a block. ERROR if they are damaged.
pub fn read_block(
    weights: &OpenWeights,
    tensor: &TensorRow,
    tile: Tile,
    block: &BlockRef,
    out: &mut [u8],
) -> Result<(), Stale> {
    read_elements(weights, tensor.dtype, &tile.shape(), &format!("tensor {}", tensor.id), block, out)
}

/// Fills `out` with the elements of a block, which are of this type and shape and belong to `whose`. ERROR if they are damaged.
fn read_elements(
    weights: &OpenWeights,
    dtype: DType,
    shape: &[u32],
    whose: &str,
    block: &BlockRef,
    out: &mut [u8],
) -> Result<(), Stale> {
    let rel = weights.store.raw();
    let stand_in = match &block.place {
        Place::Row(elements) if elements.len() == out.len() => {
            out.copy_from_slice(elements);
            return Ok(());
        }
        Place::Row(_) => damaged("a block has the wrong length"),
        Place::Store(stand_in) => stand_in,
    };
    let there = locators::find(rel, stand_in.block_id);
    if !there.is_some_and(|l| l.state() == Some(State::Live) && l.hash == block.hash && l.ext_info == stand_in.ext_info)
    {
        return Err(Stale);
    }
    let head = Block::HEAD_OF_MATRIX;
    if stand_in.raw_len as usize != head + out.len() {
        damaged("a block has the wrong length");
    }
    if stand_in.stored_len() == stand_in.raw_len {
        store::fetch(rel, stand_in.block_id, stand_in.stored_len(), head as u32, out);
    } else {
        let mut stored = vec![0; stand_in.stored_len() as usize];
        store::fetch(rel, stand_in.block_id, stand_in.stored_len(), 0, &mut stored);
        let plain = varlena::decompress(&stored, stand_in.raw_len).unwrap_or_else(|e| damaged(&e));
        out.copy_from_slice(&plain[head..]);
    }
    if block_hash(dtype, shape, out).0 != block.hash {
        error::raise(
            PgSqlErrorCode::ERRCODE_DATA_CORRUPTED,
            format!("block {} of {whose} does not have the content that its hash names", stand_in.block_id),
            "The block's bytes have changed since they were stored.",
            "Run check_store on the tables of tessera; restore them from a backup, or load the model again.",
        );
    }
    Ok(())
}

/// The block of a set with this number; none if there is none.
pub fn set_block(weights: &OpenWeights, number: u32) -> Option<BlockRef> {
    let key = [Key::Int8(i64::from(number))];
    by_index(relation(c"set_block"), relation(c"set_block_pkey"), &key, |row| {
        let Some(datum) = row.datum(4) else { damaged("a block of a set has no data") };
        // SAFETY: column 4 is a tensor_block, a varlena.
        let pointer = unsafe { varlena::toast_pointer(datum.cast_mut_ptr::<pg_sys::varlena>()) };
        ControlFlow::Break(match pointer {
            Some((stand_in, _)) => match locators::find(weights.store.raw(), stand_in.block_id) {
                Some(locator) => BlockRef { hash: locator.hash, place: Place::Store(stand_in) },
                None => damaged("a block is not in the block store"),
            },
            None => {
                let elements = row.with_bytes(4, |bytes| {
                    Block::decode(bytes).map(|block| block.data().to_vec()).map_err(|e| e.to_string())
                });
                let Some(Ok(elements)) = elements else { damaged("a block cannot be read") };
                let hash = block_hash(DType::Float32, &set_block_shape(elements.len()), &elements).0;
                BlockRef { hash, place: Place::Row(elements) }
            }
        })
    })
}

fn set_block_shape(bytes: usize) -> [u32; 2] {
    [1, (bytes / 4) as u32]
}

/// Fills `out`, which has [`BlockRef::bytes`], with a block of a set. ERROR if it is damaged.
pub fn read_set_block(weights: &OpenWeights, number: u32, block: &BlockRef, out: &mut [u8]) -> Result<(), Stale> {
    read_elements(weights, DType::Float32, &set_block_shape(out.len()), &format!("set block {number}"), block, out)
}

impl BlockRef {
    /// Bytes of the elements of a block that is a matrix.
    pub fn bytes(&self) -> usize {
        match &self.place {
            Place::Store(stand_in) => (stand_in.raw_len as usize).saturating_sub(Block::HEAD_OF_MATRIX),
            Place::Row(elements) => elements.len(),
        }
    }
}

/// Asks for the block's pages to be read into memory, if they are not there, without waiting for them.
pub fn prefetch_block(weights: &OpenWeights, block: &BlockRef) {
    if let Place::Store(stand_in) = &block.place {
        store::prefetch(weights.store.raw(), stand_in.block_id);
    }
}
