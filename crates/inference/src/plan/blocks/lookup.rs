//! Rows of a stored table by number: embeddings.

use super::carry;
use super::view::{StoredView, matrix_axes};
use crate::error::ModelError;
use crate::tensor::engine_of_dtype;
use crate::weights::{StoredTensor, for_each_block};
use tract_onnx::tract_core::ops::array::Gather;
use tract_onnx::tract_hir::internal::*;

/// Takes rows of a table (rows x width) that lies in blocks: indices of any shape S give S x (the table's other axes).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BlockLookup {
    tensor: StoredTensor,
}

/// The operator for a Gather of this view, if the gathered axis is the one whose numbers count the matrix's rows.
pub(super) fn lookup(gather: &Gather, tensor: &StoredTensor, view: &StoredView) -> Option<BlockLookup> {
    let (rows, _) = matrix_axes(tensor)?;
    // Row 0 of a table of one row has no axis that walks it.
    let by_first =
        rows.iter().all(|&axis| axis == 0 || tensor.dims[axis] == 1) && tensor.tiling.rows() == tensor.dims[0] as u64;
    let output = gather.output_type.is_none_or(|wanted| Some(wanted) == engine_of_dtype(tensor.dtype()));
    (view.is_plain() && by_first && gather.axis == 0 && output && tensor.tiling.dtype().byte_width().is_some())
        .then(|| BlockLookup { tensor: tensor.clone() })
}

impl Op for BlockLookup {
    fn name(&self) -> StaticName {
        "BlockLookup".into()
    }

    op_as_typed_op!();
}

impl EvalOp for BlockLookup {
    not_out_of_plan!();

    fn eval(&self, _: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let indices = args_1!(inputs);
        let tiling = &self.tensor.tiling;
        let count = self.tensor.dims[0] as i64;
        let numbers = indices.cast_to::<i64>()?;
        let numbers = numbers.try_as_plain_ram()?;
        let mut wanted_rows = Vec::with_capacity(indices.len());
        for (place, &number) in numbers.as_slice::<i64>()?.iter().enumerate() {
            let row = if number < 0 { number + count } else { number };
            ensure!((0..count).contains(&row), "index {number} is outside of a table of {count} rows");
            wanted_rows.push((row as usize, place));
        }
        wanted_rows.sort_unstable();

        let mut shape: TVec<usize> = indices.shape().into();
        shape.extend(self.tensor.dims[1..].iter().copied());
        let datum_type = engine_of_dtype(tiling.dtype()).context("an element type that cannot be computed with")?;
        let mut output = Tensor::zero_dt(datum_type, &shape)?;
        let width = tiling.dtype().byte_width().context("a packed element type")?;
        let row_bytes = tiling.cols() as usize * width;
        if row_bytes == 0 || wanted_rows.is_empty() {
            return Ok(tvec!(output.into_tvalue()));
        }
        let (tile_rows, tile_cols) = (tiling.tile_rows() as usize, tiling.tile_cols() as usize);
        // The blocks that hold a wanted row, with the part of `wanted_rows` that lies in each.
        let mut blocks = Vec::new();
        let mut parts = Vec::new();
        let mut start = 0;
        while start < wanted_rows.len() {
            let block_row = wanted_rows[start].0 / tile_rows;
            let end = start + wanted_rows[start..].partition_point(|(row, _)| row / tile_rows == block_row);
            for block_col in 0..tiling.block_cols() {
                blocks.push(block_row as u32 * tiling.block_cols() + block_col);
                parts.push((start..end, block_col as usize));
            }
            start = end;
        }
        let mut plain = output.try_as_plain_ram_mut()?;
        let out = plain.as_bytes_mut();
        carry(for_each_block(&self.tensor, &blocks, |at, block| {
            let (part, block_col) = parts[at].clone();
            let from = block_col * tile_cols * width;
            let line = (row_bytes - from).min(tile_cols * width);
            for &(row, place) in &wanted_rows[part] {
                let source = (row % tile_rows) * line;
                let line_of_block = block.get(source..source + line).ok_or_else(|| short_block(&self.tensor))?;
                let target = place * row_bytes + from;
                out[target..target + line].copy_from_slice(line_of_block);
            }
            Ok(())
        }))?;
        Ok(tvec!(output.into_tvalue()))
    }
}

/// The error for a block that is not as long as its tile.
pub(in crate::plan) fn short_block(tensor: &StoredTensor) -> ModelError {
    ModelError::internal(format!("a block of tensor {} has the wrong length", tensor.ordinal))
}

impl TypedOp for BlockLookup {
    as_op!();

    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        let mut shape: TVec<TDim> = inputs[0].shape.iter().cloned().collect();
        shape.extend(self.tensor.dims[1..].iter().map(|dim| dim.to_dim()));
        let datum_type =
            engine_of_dtype(self.tensor.dtype()).context("an element type that cannot be computed with")?;
        Ok(tvec!(datum_type.fact(shape)))
    }
}
