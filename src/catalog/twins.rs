//! Tensors whose transpose is stored already: tied embeddings that an exporter has written out twice, W and its transpose.
//!
//! Responsible for: finding out that all blocks of a matrix, cut the other way round, are there, so that it need not be stored
//! again. Its rows then refer to those blocks, and its [`View`] says which way round they are.
//!
//! What is looked up are hashes of content that the caller brings, as storing it would do; nobody learns more of what
//! others have stored than by loading the transpose himself.

use super::read::relation;
use crate::pg::interrupt;
use crate::pg::relation::OpenRelation;
use crate::store::{Contents, Hash};
use inference::onnx::StoredTensor;
use pgrx::pg_sys;
use std::collections::HashMap;
use tensor_blocks::{Block, Tile, Tiling, View, block_hash};

/// Rows and columns that each tile must have: products with fewer columns may take dot products, which add up in another order.
/// With more, a product has the same bits whichever way round its matrix lies.
const NARROWEST: u32 = 8;

/// The tensors, by their places in `tensors`, whose blocks are all there the other way round, with that view. A tensor that is
/// stored already as it is, or is smaller than a block, is none of them.
pub fn twins(tensors: &[StoredTensor<'_>], block_bytes: usize) -> Vec<(usize, View)> {
    let table = OpenRelation::table(relation(c"weight"), pg_sys::AccessShareLock);
    // SAFETY: an open relation.
    let stored = Contents::of(unsafe { (*(*table.raw()).rd_rel).reltoastrelid });
    let have = |hash: Hash, bytes: usize| stored.as_ref().is_some_and(|stored| stored.have(&hash, bytes as u32));
    let mut twins = Vec::new();
    // Tensors of this model by the hash of their first block.
    let mut firsts: HashMap<Hash, Cut<'_>> = HashMap::new();
    for (place, tensor) in tensors.iter().enumerate() {
        interrupt::check();
        let Some(turned) = tensor.view.turned(tensor.dims.len()).filter(|_| tensor.data.len() >= block_bytes) else {
            continue;
        };
        let cut = |view| Cut::new(tensor, view, block_bytes);
        let (Some(mut plain), Some(mut turned)) = (cut(tensor.view), cut(turned)) else { continue };
        let (Some(first), Some(first_turned)) = (plain.hash(0), turned.hash(0)) else { continue };
        if firsts.contains_key(&first) || have(first, plain.bytes(0)) {
            continue;
        }
        let count = turned.tiling.tile_count();
        let found = match firsts.get_mut(&first_turned) {
            Some(other) => (1..count).all(|number| turned.block(number) == other.block(number)),
            None => (0..count).all(|number| {
                let bytes = turned.bytes(number);
                turned.hash(number).is_some_and(|hash| have(hash, bytes))
            }),
        };
        if found {
            twins.push((place, turned.tiling.view()));
        } else {
            firsts.insert(first, plain);
        }
    }
    twins
}

/// A tensor, cut into tiles of at least [`NARROWEST`] rows and columns.
struct Cut<'a> {
    data: &'a [u8],
    tiling: Tiling,
    elements: Vec<u8>,
}

impl<'a> Cut<'a> {
    fn new(tensor: &'a StoredTensor<'_>, view: View, block_bytes: usize) -> Option<Cut<'a>> {
        let tiling = Tiling::new(&tensor.dims, view, tensor.dtype, block_bytes).ok()?;
        let narrow = |whole: u64, tile: u32| (whole - 1) % u64::from(tile) + 1 < u64::from(NARROWEST);
        let usable = tiling.tile_count() > 0
            && !narrow(tiling.rows(), tiling.tile_rows())
            && !narrow(tiling.cols(), tiling.tile_cols())
            && tiling.tile_rows().min(tiling.tile_cols()) >= NARROWEST;
        usable.then_some(Cut { data: &tensor.data, tiling, elements: Vec::new() })
    }

    fn tile(&self, number: u64) -> Option<Tile> {
        let cols = u64::from(self.tiling.block_cols());
        self.tiling.tile((number / cols) as u32, (number % cols) as u32)
    }

    /// Bytes of a block's binary form.
    fn bytes(&self, number: u64) -> usize {
        self.tile(number).map_or(0, |tile| Block::HEAD_OF_MATRIX + self.tiling.tile_bytes(tile))
    }

    /// Shape and elements of a block.
    fn block(&mut self, number: u64) -> Option<([u32; 2], &[u8])> {
        interrupt::check();
        let tile = self.tile(number)?;
        self.tiling.gather(tile, self.data, &mut self.elements).ok()?;
        Some((tile.shape(), &self.elements))
    }

    fn hash(&mut self, number: u64) -> Option<Hash> {
        let dtype = self.tiling.dtype();
        self.block(number).map(|(shape, elements)| block_hash(dtype, &shape, elements).0)
    }
}
