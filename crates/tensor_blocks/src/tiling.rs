//! The tiling of a tensor into blocks.
//!
//! Responsible for: seeing a tensor as a matrix the way its product uses it, choosing the tile's edges, and copying
//! one tile out of a tensor and back.
//!
//! ```text
//!            cols
//!      +------+------+---+
//!      | 0,0  | 0,1  |0,2|   tiles are numbered (block_row, block_col), in row-major order;
//! rows +------+------+---+   those at the right and lower edge are smaller;
//!      | 1,0  | 1,1  |1,2|   a tile's elements are row-major
//!      +------+------+---+
//! ```
//!
//! Invariants:
//! - every element of the tensor is in exactly one tile; a tensor with a dimension of 0 has no tiles;
//! - a tile's edges are powers of two that depend only on the dtype, the matrix and `block_bytes`: they are stored
//!   nowhere, so [`Tiling::new`] must go on giving the same edges for stored tensors;
//! - no full tile is larger than `block_bytes`.
//!
//! Measured (edges of 128 x 128 for 64 kB of float32): a product over such tiles runs at the speed of one over the
//! whole matrix, with one row as with a thousand, and loses from 32 kB downwards. So where a matrix is narrower or
//! lower than the square tile, the other edge grows until the tile is as large as a block may be.

use crate::transpose::{transpose, untranspose};
use crate::{DType, View};

/// Why a tensor cannot be tiled, or a tile cannot be copied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TilingError {
    /// The tensor's size does not fit this machine's address space.
    #[error("a tensor of {dtype} with dimensions {dims:?} is too large")]
    TooLarge {
        /// The element type.
        dtype: DType,
        /// The tensor's dimensions.
        dims: Vec<u64>,
    },
    /// More tiles in one direction than block numbers (31 bits).
    #[error("a matrix of {rows} x {cols} has too many tiles of {tile_rows} x {tile_cols}")]
    TooManyTiles {
        /// Rows of the matrix.
        rows: u64,
        /// Columns of the matrix.
        cols: u64,
        /// Rows of a full tile.
        tile_rows: u32,
        /// Columns of a full tile.
        tile_cols: u32,
    },
    /// [`View::Transposed`] of a tensor that is no matrix.
    #[error("a tensor of rank {0} cannot be seen transposed")]
    NoMatrix(usize),
    /// `block_bytes` outside [`Tiling::BLOCK_BYTES`].
    #[error("a block of {0} bytes is outside the range of {min} to {max} bytes",
            min = Tiling::BLOCK_BYTES.start(), max = Tiling::BLOCK_BYTES.end())]
    BlockBytes(usize),
    /// The tile is not one of this tiling.
    #[error("there is no tile ({block_row}, {block_col}) in this tensor")]
    NoSuchTile {
        /// The tile's row number.
        block_row: u32,
        /// The tile's column number.
        block_col: u32,
    },
    /// A buffer that is not as long as the tensor, or the block, must be.
    #[error("{what} has {actual} bytes instead of {expected}")]
    Length {
        /// "the tensor" or "the block".
        what: &'static str,
        /// Bytes that the tiling asks for.
        expected: usize,
        /// Bytes given.
        actual: usize,
    },
}

/// One tile of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// Row number among the tiles; fits 31 bits.
    pub block_row: u32,
    /// Column number among the tiles; fits 31 bits.
    pub block_col: u32,
    /// The first row of the matrix that is in the tile.
    pub row0: u64,
    /// The first column of the matrix that is in the tile.
    pub col0: u64,
    /// Rows in the tile, at least 1.
    pub rows: u32,
    /// Columns in the tile, at least 1.
    pub cols: u32,
}

impl Tile {
    /// Rows and columns: the shape of the block.
    pub const fn shape(&self) -> [u32; 2] {
        [self.rows, self.cols]
    }
}

/// How one tensor is cut into tiles.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tiling {
    dtype: DType,
    view: View,
    rows: u64,
    cols: u64,
    tile_rows: u32,
    tile_cols: u32,
    byte_len: usize,
}

impl Tiling {
    /// Block sizes that a tiling takes, in bytes.
    pub const BLOCK_BYTES: std::ops::RangeInclusive<usize> = 64..=256 << 20;

    /// The tiling of a tensor of `dims` and `dtype`, row-major, into blocks of at most `block_bytes` bytes.
    ///
    /// Rank 1 is a matrix of one row, rank 0 a matrix of one element. Types narrower than a byte are tiled as one row
    /// of all elements whatever the view, in tiles that end at byte borders.
    ///
    /// # Errors
    /// When the tensor's bytes do not fit `isize`, a tile number does not fit 31 bits, the view is
    /// [`View::Transposed`] and the rank is not 2, or `block_bytes` is outside [`Tiling::BLOCK_BYTES`].
    pub fn new(dims: &[u64], view: View, dtype: DType, block_bytes: usize) -> Result<Tiling, TilingError> {
        if !Tiling::BLOCK_BYTES.contains(&block_bytes) {
            return Err(TilingError::BlockBytes(block_bytes));
        }
        if view == View::Transposed && dims.len() != 2 {
            return Err(TilingError::NoMatrix(dims.len()));
        }
        let too_large = || TilingError::TooLarge { dtype, dims: dims.to_vec() };
        let elements = elements(dims).ok_or_else(too_large)?;
        let byte_len = dtype.byte_len(elements).and_then(|n| isize::try_from(n).ok()).ok_or_else(too_large)? as usize;

        let (rows, cols) = match (dtype.is_packed(), view, dims) {
            (true, ..) | (_, _, []) => (1, elements),
            _ if elements == 0 => (0, 0),
            (_, View::RowsByLast, &[.., last]) => (elements / last, last),
            (_, View::RowsByFirst, &[_]) => (1, elements),
            (_, View::RowsByFirst, &[first, ..]) => (first, elements / first),
            (_, View::Transposed, dims) => (dims[1], dims[0]),
        };
        let (tile_rows, tile_cols) = if dtype.is_packed() {
            (1, block_elements(dtype, block_bytes))
        } else {
            tile_edges(rows, cols, block_elements(dtype, block_bytes))
        };
        let tiling = Tiling { dtype, view, rows, cols, tile_rows, tile_cols, byte_len };
        if tiling.rows.div_ceil(u64::from(tile_rows)).max(tiling.cols.div_ceil(u64::from(tile_cols))) > i32::MAX as u64
        {
            return Err(TilingError::TooManyTiles { rows, cols, tile_rows, tile_cols });
        }
        Ok(tiling)
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The view that was asked for.
    pub fn view(&self) -> View {
        self.view
    }

    /// Rows of the matrix; 0 if the tensor has no elements.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Columns of the matrix; 0 if the tensor has no elements.
    pub fn cols(&self) -> u64 {
        self.cols
    }

    /// Rows of a full tile, a power of two.
    pub fn tile_rows(&self) -> u32 {
        self.tile_rows
    }

    /// Columns of a full tile, a power of two.
    pub fn tile_cols(&self) -> u32 {
        self.tile_cols
    }

    /// Number of tiles from top to bottom.
    pub fn block_rows(&self) -> u32 {
        if self.cols == 0 { 0 } else { self.rows.div_ceil(u64::from(self.tile_rows)) as u32 }
    }

    /// Number of tiles from left to right.
    pub fn block_cols(&self) -> u32 {
        if self.rows == 0 { 0 } else { self.cols.div_ceil(u64::from(self.tile_cols)) as u32 }
    }

    /// Number of tiles.
    pub fn tile_count(&self) -> u64 {
        u64::from(self.block_rows()) * u64::from(self.block_cols())
    }

    /// Bytes of the whole tensor.
    pub fn byte_len(&self) -> usize {
        self.byte_len
    }

    /// The tile with these numbers; none outside the matrix.
    pub fn tile(&self, block_row: u32, block_col: u32) -> Option<Tile> {
        if block_row >= self.block_rows() || block_col >= self.block_cols() {
            return None;
        }
        let row0 = u64::from(block_row) * u64::from(self.tile_rows);
        let col0 = u64::from(block_col) * u64::from(self.tile_cols);
        let rows = (self.rows - row0).min(u64::from(self.tile_rows)) as u32;
        let cols = (self.cols - col0).min(u64::from(self.tile_cols)) as u32;
        Some(Tile { block_row, block_col, row0, col0, rows, cols })
    }

    /// All tiles, by block_row and then by block_col.
    pub fn tiles(&self) -> impl Iterator<Item = Tile> + '_ {
        (0..self.block_rows()).flat_map(move |row| (0..self.block_cols()).filter_map(move |col| self.tile(row, col)))
    }

    /// Bytes of the block of this tile.
    pub fn tile_bytes(&self, tile: Tile) -> usize {
        let elements = u64::from(tile.rows) * u64::from(tile.cols);
        self.dtype.byte_len(elements).unwrap_or(u64::MAX) as usize
    }

    /// Replaces `out` by the block of `tile`, row-major, taken from the whole tensor `src`.
    ///
    /// # Errors
    /// When the tile is not of this tiling or `src` has another length than the tensor.
    pub fn gather(&self, tile: Tile, src: &[u8], out: &mut Vec<u8>) -> Result<(), TilingError> {
        self.check_call(tile, src.len(), None)?;
        match self.walk(tile) {
            Walk::Run { start, len } => {
                out.clear();
                out.extend_from_slice(&src[start..start + len]);
            }
            Walk::Rows { start, stride, len, rows } => {
                out.clear();
                out.reserve(len * rows);
                for row in 0..rows {
                    let at = start + row * stride;
                    out.extend_from_slice(&src[at..at + len]);
                }
            }
            Walk::Transposed { start, stride } => {
                // Every byte is written below, so what the buffer holds need not be cleared.
                out.resize(self.tile_bytes(tile), 0);
                let (lines, run) = (tile.cols as usize, tile.rows as usize);
                match self.dtype.bits() {
                    8 => transpose::<1>(&src[start..], stride, out, run, lines),
                    16 => transpose::<2>(&src[start * 2..], stride, out, run, lines),
                    32 => transpose::<4>(&src[start * 4..], stride, out, run, lines),
                    64 => transpose::<8>(&src[start * 8..], stride, out, run, lines),
                    _ => transpose::<16>(&src[start * 16..], stride, out, run, lines),
                }
            }
        }
        Ok(())
    }

    /// Copies the block of `tile` to its place in the whole tensor `dst`: the inverse of [`Tiling::gather`].
    ///
    /// # Errors
    /// When the tile is not of this tiling, or `block` or `dst` has the wrong length.
    pub fn scatter(&self, tile: Tile, block: &[u8], dst: &mut [u8]) -> Result<(), TilingError> {
        self.check_call(tile, dst.len(), Some(block.len()))?;
        match self.walk(tile) {
            Walk::Run { start, len } => dst[start..start + len].copy_from_slice(block),
            Walk::Rows { start, stride, len, rows } => {
                for (row, line) in block.chunks_exact(len).take(rows).enumerate() {
                    let at = start + row * stride;
                    dst[at..at + len].copy_from_slice(line);
                }
            }
            Walk::Transposed { start, stride } => {
                let (lines, run) = (tile.cols as usize, tile.rows as usize);
                match self.dtype.bits() {
                    8 => untranspose::<1>(block, &mut dst[start..], stride, run, lines),
                    16 => untranspose::<2>(block, &mut dst[start * 2..], stride, run, lines),
                    32 => untranspose::<4>(block, &mut dst[start * 4..], stride, run, lines),
                    64 => untranspose::<8>(block, &mut dst[start * 8..], stride, run, lines),
                    _ => untranspose::<16>(block, &mut dst[start * 16..], stride, run, lines),
                }
            }
        }
        Ok(())
    }

    fn check_call(&self, tile: Tile, tensor: usize, block: Option<usize>) -> Result<(), TilingError> {
        let Tile { block_row, block_col, .. } = tile;
        if self.tile(block_row, block_col) != Some(tile) {
            return Err(TilingError::NoSuchTile { block_row, block_col });
        }
        if tensor != self.byte_len {
            return Err(TilingError::Length { what: "the tensor", expected: self.byte_len, actual: tensor });
        }
        match block {
            Some(actual) if actual != self.tile_bytes(tile) => {
                Err(TilingError::Length { what: "the block", expected: self.tile_bytes(tile), actual })
            }
            _ => Ok(()),
        }
    }

    /// Where a tile's elements lie in the tensor. The tile is one of this tiling, so all numbers fit `usize`.
    fn walk(&self, tile: Tile) -> Walk {
        let Some(width) = self.dtype.byte_width() else {
            let start = tile.col0 as usize / 8 * self.dtype.bits() as usize;
            return Walk::Run { start, len: self.tile_bytes(tile) };
        };
        let (row0, col0) = (tile.row0 as usize, tile.col0 as usize);
        if self.view == View::Transposed {
            let stride = self.rows as usize;
            return Walk::Transposed { start: col0 * stride + row0, stride };
        }
        let stride = self.cols as usize;
        let (start, len, rows) = ((row0 * stride + col0) * width, tile.cols as usize * width, tile.rows as usize);
        if rows == 1 || tile.cols as usize == stride {
            Walk::Run { start, len: len * rows }
        } else {
            Walk::Rows { start, stride: stride * width, len, rows }
        }
    }
}

/// The way through the tensor that a tile takes.
enum Walk {
    /// Contiguous: bytes.
    Run { start: usize, len: usize },
    /// Rows of `len` bytes, `stride` bytes apart.
    Rows { start: usize, stride: usize, len: usize, rows: usize },
    /// Columns become rows; in elements.
    Transposed { start: usize, stride: usize },
}

/// Product of the dimensions; none if that of those above 0 does not fit 64 bits.
fn elements(dims: &[u64]) -> Option<u64> {
    let product = dims.iter().filter(|&&dim| dim > 0).try_fold(1u64, |product, &dim| product.checked_mul(dim))?;
    Some(if dims.contains(&0) { 0 } else { product })
}

/// Elements of a block, rounded down to a power of two. A byte of a packed type is never divided, since
/// `block_bytes` is at least 64.
fn block_elements(dtype: DType, block_bytes: usize) -> u32 {
    let elements = (block_bytes as u64 * 8 / u64::from(dtype.bits())).min(1 << 30);
    1 << elements.ilog2()
}

/// Edges of a full tile of `area` elements (a power of two): square, or twice as wide as high; where the matrix is
/// narrower or lower than that, the edge is the next power of two and the other one grows.
fn tile_edges(rows: u64, cols: u64, area: u32) -> (u32, u32) {
    let bits = area.ilog2();
    let (square_rows, square_cols) = (1u64 << (bits / 2), 1u64 << bits.div_ceil(2));
    let tile_rows = if rows < square_rows {
        rows.max(1).next_power_of_two()
    } else if cols < square_cols {
        u64::from(area) / cols.max(1).next_power_of_two()
    } else {
        square_rows
    };
    (tile_rows as u32, area / tile_rows as u32)
}

#[cfg(test)]
#[path = "tiling_tests.rs"]
mod tests;
