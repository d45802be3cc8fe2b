//! Filters that lie in blocks.

use super::super::blocks::short_block;
use crate::error::ModelError;
use crate::kernels::filters::{FilterTile, Filters};
use crate::weights::{StoredTensor, for_each_block};
use std::ops::Range;

/// A matrix of filters that is a stored tensor.
pub(super) struct Stored<'a>(pub &'a StoredTensor);

impl Filters for Stored<'_> {
    type Error = ModelError;

    /// Blocks below each other come one after the other: in a convolution they use the same rows of the input, in a
    /// transposed one they add to the same sums.
    fn walk(
        &mut self,
        rows: Range<usize>,
        cols: Range<usize>,
        each: &mut dyn FnMut(FilterTile<'_>),
    ) -> Result<(), ModelError> {
        let tiling = &self.0.tiling;
        let blocks = |range: &Range<usize>, edge: u32| range.start as u32 / edge..(range.end as u32).div_ceil(edge);
        let (down, right) = (blocks(&rows, tiling.tile_rows()), blocks(&cols, tiling.tile_cols()));
        let across = tiling.block_cols();
        let walk: Vec<u32> = right.flat_map(|col| down.clone().map(move |row| row * across + col)).collect();
        for_each_block(self.0, &walk, |at, block| {
            let number = walk[at];
            let tile = tiling.tile(number / across, number % across).ok_or_else(|| short_block(self.0))?;
            let (rows, cols) = (tile.rows as usize, tile.cols as usize);
            let data: &[f32] = bytemuck::try_cast_slice(block).map_err(|_| short_block(self.0))?;
            if data.len() != rows * cols {
                return Err(short_block(self.0));
            }
            each(FilterTile { row0: tile.row0 as usize, col0: tile.col0 as usize, rows, cols, data });
            Ok(())
        })
    }
}

impl Stored<'_> {
    /// All filters, put together: for many groups, each of which uses a few rows of the matrix.
    pub fn whole(&mut self, rows: usize, depth: usize) -> Result<Vec<f32>, ModelError> {
        let mut whole = vec![0.0; rows * depth];
        self.walk(0..rows, 0..depth, &mut |tile| {
            for (row, line) in tile.data.chunks_exact(tile.cols).enumerate() {
                whole[(tile.row0 + row) * depth + tile.col0..][..tile.cols].copy_from_slice(line);
            }
        })?;
        Ok(whole)
    }
}
