//! Where convolutions have their filters from.
//!
//! Responsible for: the words between a convolution, which needs a matrix of filters tile by tile, and whoever has it: in
//! one piece ([`Whole`]) or in blocks.

use std::ops::Range;

/// A piece of the matrix of filters, row-major.
#[derive(Clone, Copy, Debug)]
pub struct FilterTile<'a> {
    /// The first filter.
    pub row0: usize,
    /// The first column.
    pub col0: usize,
    /// Filters.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// The elements.
    pub data: &'a [f32],
}

/// Who has the filters.
pub trait Filters {
    /// What may go wrong.
    type Error;

    /// Calls `each` with tiles that together cover these rows and columns of the matrix once, and may go beyond them. Of
    /// tiles with the same columns, those of the upper rows come first.
    ///
    /// # Errors
    /// What reading them may raise.
    fn walk(
        &mut self,
        rows: Range<usize>,
        cols: Range<usize>,
        each: &mut dyn FnMut(FilterTile<'_>),
    ) -> Result<(), Self::Error>;
}

/// Filters in one piece.
#[derive(Clone, Copy, Debug)]
pub struct Whole<'a> {
    /// All filters, row-major.
    pub data: &'a [f32],
    /// Columns of the matrix.
    pub depth: usize,
}

impl Filters for Whole<'_> {
    type Error = std::convert::Infallible;

    fn walk(
        &mut self,
        rows: Range<usize>,
        _: Range<usize>,
        each: &mut dyn FnMut(FilterTile<'_>),
    ) -> Result<(), Self::Error> {
        let data = &self.data[rows.start * self.depth..rows.end * self.depth];
        each(FilterTile { row0: rows.start, col0: 0, rows: rows.len(), cols: self.depth, data });
        Ok(())
    }
}
