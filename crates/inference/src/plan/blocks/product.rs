//! Products with a constant matrix: MatMul, Gemm, EinSum with one constant side, fully connected layers. The matrix lies in
//! blocks, or the operator holds it, ready for the kernel.
//!
//! ```text
//!   x (M x K)  times  the stored matrix (K x N, or N x K)  =  out (M x N)
//!
//!   blocks are walked by groups of columns of the output, along K within a group, so that the part of the output that
//!   is summed up stays in the processor's cache
//! ```
//!
//! Invariant: a row of the output has the same bits whatever other rows there are: each element is summed up in the order of
//! K, block by block.

use super::carry;
use super::lookup::short_block;
use super::view::{MatrixAxes, Part, StoredView};
use crate::kernels::dense::Dense;
use crate::kernels::epilogue::{self, Activation, Bias};
use crate::kernels::gemm::{self, Operand};
use crate::weights::{StoredTensor, for_each_block};
use tract_onnx::tract_core::ops::einsum::EinSum;
use tract_onnx::tract_hir::internal::*;

/// Bytes of output that are summed up at a time: about an L2 cache.
const OUTPUT_BYTES: usize = 1 << 20;

/// Where a matrix is.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::plan) enum Matrix {
    /// In blocks; with true, its rows are the output's columns: out = x * matrix^T.
    Stored(StoredTensor, bool),
    /// Here, K x N.
    Held(Arc<Dense>),
}

/// The product of an input with a constant matrix.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::plan) struct BlockProduct {
    pub matrix: Matrix,
    /// The input's axes in the order that makes it M x K.
    pub input_order: TVec<usize>,
    /// How many of `input_order` are the axes of M.
    pub leading: usize,
    /// Sizes of the output's axes that N is made of, outermost first.
    pub columns: TVec<usize>,
    /// For each axis of the output, its place in M's axes followed by N's; none for an axis of size 1.
    pub output_order: TVec<Option<usize>>,
    /// N values that are added to each row.
    pub bias: Option<Arc<Tensor>>,
    /// Applied to what is then there.
    pub activation: Activation,
}

impl Eq for BlockProduct {}

/// The operator for `einsum` whose input `slot` is a view of a float32 constant, the other one being of this fact. `matrix` is
/// asked for the constant's matrix of these axes, or with true for its transpose.
pub(super) fn product(
    einsum: &EinSum,
    slot: usize,
    input: &TypedFact,
    view: &StoredView,
    (rows, cols): MatrixAxes,
    matrix: impl FnOnce(bool) -> Matrix,
) -> Option<BlockProduct> {
    let f32 = f32::datum_type();
    if einsum.q_params.is_some() || einsum.operating_dt != f32 || input.datum_type != f32 {
        return None;
    }
    // Axes of the input that are summed over, with the stored axis of each; axes of N likewise, with the output's axis.
    let mut summed: TVec<(usize, Part)> = tvec!();
    let mut kept: TVec<(usize, Part)> = tvec!();
    let mut columns: TVec<(Part, usize)> = tvec!();
    let mut leading: TVec<(usize, usize)> = tvec!();
    let mut units: TVec<usize> = tvec!();
    for axis in einsum.axes.iter_all_axes() {
        let (ours, theirs, out) = (&axis.inputs[slot], &axis.inputs[1 - slot], &axis.outputs[0]);
        if ours.len() > 1 || theirs.len() > 1 || out.len() > 1 {
            return None;
        }
        // An axis of size 1 of the stored tensor is none.
        let stored = ours.first().filter(|&&at| view.size(at) != 1).map(|&at| (view.part(at), view.size(at)));
        let one = |at: usize| input.shape[at].is_one();
        match (stored, theirs.first(), out.first()) {
            (Some((stored, _)), Some(&theirs), None) if !one(theirs) => summed.push((theirs, stored?)),
            (Some((stored, size)), None, Some(&out)) => {
                kept.push((out, stored?));
                columns.push((stored?, size));
            }
            (None, Some(&theirs), Some(&out)) => leading.push((theirs, out)),
            (None, Some(&theirs), None) if one(theirs) => leading.push((theirs, usize::MAX)),
            (None, None, Some(&out)) => units.push(out),
            (None, None, None) => {}
            _ => return None,
        }
    }
    summed.sort_by_key(|&(_, stored)| stored);
    kept.sort_by_key(|&(_, stored)| stored);
    columns.sort_by_key(|&(stored, _)| stored);
    let stored_of = |pairs: &TVec<(usize, Part)>| pairs.iter().map(|&(_, stored)| stored).collect::<TVec<_>>();
    let (rows, cols) = (view.parts_of(&rows), view.parts_of(&cols));
    let transposed = match (stored_of(&summed), stored_of(&kept)) {
        (k, n) if k == rows && n == cols => false,
        (k, n) if k == cols && n == rows => true,
        _ => return None,
    };
    leading.sort_by_key(|&(_, out)| out);
    let rank = leading.iter().filter(|(_, out)| *out != usize::MAX).count() + kept.len() + units.len();
    let mut output_order: TVec<Option<usize>> = tvec!(None; rank);
    for (place, &(out, _)) in leading.iter().filter(|(_, out)| *out != usize::MAX).enumerate() {
        *output_order.get_mut(out)? = Some(place);
    }
    let visible = leading.iter().filter(|(_, out)| *out != usize::MAX).count();
    for (place, &(out, _)) in kept.iter().enumerate() {
        *output_order.get_mut(out)? = Some(visible + place);
    }
    Some(BlockProduct {
        matrix: matrix(transposed),
        input_order: leading
            .iter()
            .map(|&(theirs, _)| theirs)
            .chain(summed.iter().map(|&(theirs, _)| theirs))
            .collect(),
        leading: visible,
        columns: columns.iter().map(|&(_, size)| size).collect(),
        output_order,
        bias: None,
        activation: Activation::Identity,
    })
}

impl BlockProduct {
    /// K and N.
    pub fn inner(&self) -> (usize, usize) {
        match &self.matrix {
            Matrix::Held(dense) => dense.sizes(),
            Matrix::Stored(tensor, transposed) => {
                let (rows, cols) = (tensor.tiling.rows() as usize, tensor.tiling.cols() as usize);
                if *transposed { (cols, rows) } else { (rows, cols) }
            }
        }
    }

    /// True where the input, as it lies in memory, is rows of K, and the output rows of N.
    pub fn is_row_by_row(&self) -> bool {
        self.input_order.is_sorted() && self.output_lies_right()
    }

    pub fn output_shape<D: DimLike>(&self, input: &[D]) -> TVec<D> {
        self.output_order
            .iter()
            .map(|place| match *place {
                None => D::one(),
                Some(place) if place < self.leading => input[self.input_order[place]].clone(),
                Some(place) => D::from(self.columns[place - self.leading]),
            })
            .collect()
    }

    /// The input's axis that this axis of the output is, if it is one of M's.
    pub fn input_axis_of(&self, output: usize) -> Option<usize> {
        let place = (*self.output_order.get(output)?)?;
        (place < self.leading).then(|| self.input_order[place])
    }

    /// True where the product's rows and columns are the output as it lies in memory.
    pub fn output_lies_right(&self) -> bool {
        self.output_order.iter().flatten().is_sorted()
    }

    pub fn multiply(&self, x: &[f32], m: usize, out: &mut [f32]) -> TractResult<()> {
        let (k, n) = self.inner();
        let bias = match &self.bias {
            Some(bias) => bias.try_as_plain_ram()?.as_slice::<f32>()?,
            None => &[],
        };
        match &self.matrix {
            Matrix::Held(dense) => dense.apply(x, m, out, bias, self.activation),
            Matrix::Stored(tensor, transposed) => {
                multiply_stored(tensor, *transposed, x, (m, n, k), out)?;
                let bias = if bias.is_empty() { Bias::None } else { Bias::PerColumn(bias) };
                epilogue::finish(out, n, (m, n), bias, self.activation);
            }
        }
        Ok(())
    }
}

fn multiply_stored(
    tensor: &StoredTensor,
    transposed: bool,
    x: &[f32],
    (m, n, k): (usize, usize, usize),
    out: &mut [f32],
) -> TractResult<()> {
    let tiling = &tensor.tiling;
    let block_cols = tiling.block_cols();
    let walk = walk(tensor, transposed, m);
    carry(for_each_block(tensor, &walk, |at, block| {
        let number = walk[at];
        let tile = tiling.tile(number / block_cols, number % block_cols).ok_or_else(|| short_block(tensor))?;
        let (row0, col0) = (tile.row0 as usize, tile.col0 as usize);
        let (rows, cols) = (tile.rows as usize, tile.cols as usize);
        let elements: &[f32] = bytemuck::try_cast_slice(block).map_err(|_| short_block(tensor))?;
        if elements.len() != rows * cols {
            return Err(short_block(tensor));
        }
        if transposed {
            let x = Operand::row_major(&x[col0..], k);
            gemm::product(&mut out[row0..], n, m, rows, cols, x, Operand::transposed(elements, cols), col0 > 0);
        } else {
            let x = Operand::row_major(&x[row0..], k);
            gemm::product(&mut out[col0..], n, m, cols, rows, x, Operand::row_major(elements, cols), row0 > 0);
        }
        Ok(())
    }))
}

/// Numbers of the blocks in the order in which they are used for M rows.
fn walk(tensor: &StoredTensor, transposed: bool, m: usize) -> Vec<u32> {
    let tiling = &tensor.tiling;
    let (block_rows, block_cols) = (tiling.block_rows(), tiling.block_cols());
    if transposed {
        return (0..block_rows * block_cols).collect();
    }
    let column_bytes = (m * tiling.tile_cols() as usize * size_of::<f32>()).max(1);
    let group = (OUTPUT_BYTES / column_bytes).clamp(1, block_cols.max(1) as usize);
    let mut walk = Vec::with_capacity((block_rows * block_cols) as usize);
    for first in (0..block_cols).step_by(group) {
        let group = first..block_cols.min(first + group as u32);
        for block_row in 0..block_rows {
            walk.extend(group.clone().map(|block_col| block_row * block_cols + block_col));
        }
    }
    walk
}

impl Op for BlockProduct {
    fn name(&self) -> StaticName {
        "BlockProduct".into()
    }

    fn info(&self) -> TractResult<Vec<String>> {
        Ok(vec![format!("{self:?}")])
    }

    op_as_typed_op!();
}

impl EvalOp for BlockProduct {
    not_out_of_plan!();

    fn eval(&self, _: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let input = args_1!(inputs);
        let input = if self.input_order.is_sorted() {
            input
        } else {
            input.into_tensor().permute_axes(&self.input_order)?.into_tvalue()
        };
        let (k, n) = self.inner();
        ensure!(input.len() % k == 0, "the input does not fit the stored matrix");
        let m = input.len() / k;
        let sizes: TVec<usize> = {
            let lead = input.shape().iter().take(self.input_order.len());
            let mut sizes: TVec<usize> = lead.copied().collect();
            // Back to the input's own order, which `output_shape` expects.
            if !self.input_order.is_sorted() {
                let moved = sizes.clone();
                for (place, &axis) in self.input_order.iter().enumerate() {
                    sizes[axis] = moved[place];
                }
            }
            sizes
        };
        let shape = self.output_shape::<usize>(&sizes);
        // A dimension that is free in the signature may be summed over: what divides by K need not be M x K.
        let leading: usize = self.input_order[..self.leading].iter().map(|&axis| sizes[axis]).product();
        ensure!(leading == m, "the input does not fit the stored matrix");
        let direct = self.output_lies_right();
        let made: TVec<usize> = if direct {
            shape.clone()
        } else {
            let mut made: TVec<usize> = self.input_order[..self.leading].iter().map(|&axis| sizes[axis]).collect();
            made.extend(self.columns.iter().copied());
            made
        };
        // Every element is written: the first block of a column does not add, it sets.
        let mut output = Tensor::zero::<f32>(&made)?;
        if m > 0 && n > 0 {
            let x = input.try_as_plain_ram()?;
            let mut out = output.try_as_plain_ram_mut()?;
            self.multiply(x.as_slice::<f32>()?, m, out.as_slice_mut::<f32>()?)?;
        }
        if !direct {
            let order: TVec<usize> = self.output_order.iter().flatten().copied().collect();
            output = output.permute_axes(&order)?;
            output.set_shape(&shape)?;
        }
        Ok(tvec!(output.into_tvalue()))
    }
}

impl TypedOp for BlockProduct {
    as_op!();

    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        ensure!(inputs[0].datum_type == f32::datum_type(), "a product with a stored matrix takes float32");
        let shape: TVec<TDim> = inputs[0].shape.iter().cloned().collect();
        Ok(tvec!(f32::fact(self.output_shape::<TDim>(&shape))))
    }

    fn cost(&self, inputs: &[&TypedFact]) -> TractResult<TVec<(Cost, TDim)>> {
        let (_, n) = self.inner();
        Ok(tvec!((Cost::FMA(f32::datum_type()), inputs[0].shape.volume() * n.to_dim())))
    }
}
