//! Convolutions of our own, in the places of tract's.
//!
//! Responsible for: [`Convolution`], which takes its filters from a constant of the plan or from blocks, with what follows
//! it fused in; [`place`], which puts it where tract has a convolution that it can do; [`fuse`], which takes up
//! what follows. tract's own are kept for other element types, other orders of axes, and three spatial dimensions.
//!
//! Invariant: the operator asks for shapes only when it runs, so one compiled form serves every batch and every size of
//! picture.

mod fuse;

use super::blocks::{StoredConst, carry, short_block};
use crate::error::ModelError;
use crate::kernels::conv::{After, FilterTile, Filters, Geometry, Whole, conv};
use crate::kernels::epilogue::Activation;
use crate::weights::{StoredTensor, for_each_block};
use std::convert::Infallible;
use std::ops::Range;
use tensor_blocks::{DType, View};
use tract_onnx::tract_core::ops::cnn::{Conv, KernelFormat, PaddingSpec, PoolSpec};
use tract_onnx::tract_core::ops::nn::DataFormat;
use tract_onnx::tract_hir::internal::*;

pub(super) use fuse::fuse;

/// Most elements of scratch: 1 GB.
const SCRATCH: usize = 1 << 28;

/// A convolution of one or two spatial dimensions, channels first, in float32.
///
/// Inputs: the pictures; the filters unless they are stored; with `added`, what is added to the result.
#[derive(Clone, Debug)]
pub(super) struct Convolution {
    pool: PoolSpec,
    groups: usize,
    /// The filters, if they lie in blocks.
    stored: Option<StoredTensor>,
    /// A factor for each channel of the output.
    scale: Option<Arc<[f32]>>,
    /// What is then added to it.
    bias: Option<Arc<[f32]>>,
    added: bool,
    activation: Activation,
    /// A factor and an addition behind the activation.
    then: Option<(f32, f32)>,
}

impl PartialEq for Convolution {
    fn eq(&self, other: &Convolution) -> bool {
        let bits = |values: &Option<Arc<[f32]>>| {
            values.as_ref().map(|values| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>())
        };
        self.pool == other.pool
            && self.groups == other.groups
            && self.stored == other.stored
            && bits(&self.scale) == bits(&other.scale)
            && bits(&self.bias) == bits(&other.bias)
            && self.added == other.added
            && self.activation == other.activation
            && self.then == other.then
    }
}

impl Eq for Convolution {}

/// Puts our convolution in the places of tract's.
pub(super) fn place(model: &mut TypedModel) -> TractResult<()> {
    if !model.nodes.iter().any(|node| node.op_is::<Conv>()) {
        return Ok(());
    }
    // Biases come through casts and changes of shape.
    model.prop_consts()?;
    let mut placed = false;
    for id in 0..model.nodes.len() {
        let Some(op) = instead_of(model, id)? else { continue };
        let node = &model.nodes[id];
        let name = node.name.clone();
        let inputs = if op.stored.is_some() { 1 } else { 2 };
        let mut patch = TypedModelPatch::default();
        let taps = patch.taps(model, &node.inputs[..inputs])?;
        let wires = patch.wire_node(name, op, &taps)?;
        patch.shunt_outside(model, OutletId::new(id, 0), wires[0])?;
        patch.apply(model)?;
        placed = true;
    }
    if placed {
        model.compact()?;
    }
    Ok(())
}

/// Our operator for the convolution at this node, if there is one and it is of our kind.
fn instead_of(model: &TypedModel, id: usize) -> TractResult<Option<Convolution>> {
    let node = &model.nodes[id];
    let Some(op) = node.op_as::<Conv>() else { return Ok(None) };
    let &[picture, filters, bias] = &*node.inputs else { return Ok(None) };
    let float = f32::datum_type();
    let ours = op.q_params.is_none()
        && op.kernel_fmt == KernelFormat::OIHW
        && op.pool_spec.data_format == DataFormat::NCHW
        && (1..=2).contains(&op.pool_spec.rank())
        && [picture, filters, bias]
            .iter()
            .all(|input| model.outlet_fact(*input).is_ok_and(|fact| fact.datum_type == float && !fact.is_exotic()));
    // A kernel without taps or channels is tract's to refuse.
    let sound = op.group > 0
        && op.pool_spec.kernel_shape.iter().all(|&taps| taps > 0)
        && op.pool_spec.strides().iter().all(|&stride| stride > 0)
        && op.pool_spec.input_channels.is_multiple_of(op.group)
        && op.pool_spec.output_channels.is_multiple_of(op.group)
        && op.pool_spec.input_channels > 0;
    if !ours || !sound {
        return Ok(None);
    }
    let Some(bias) = model.outlet_fact(bias)?.konst.clone() else { return Ok(None) };
    let bias = bias.try_as_plain_ram()?;
    let bias = match bias.as_slice::<f32>()? {
        &[0.0] => None,
        &[value] => Some(vec![value; op.pool_spec.output_channels].into()),
        values if values.len() == op.pool_spec.output_channels => Some(values.into()),
        _ => return Ok(None),
    };
    let made = Convolution {
        pool: op.pool_spec.clone(),
        groups: op.group,
        stored: model.nodes[filters.node].op_as::<StoredConst>().map(|stored| stored.tensor.clone()),
        scale: None,
        bias,
        added: false,
        activation: Activation::Identity,
        then: None,
    };
    let fits = made.stored.as_ref().is_none_or(|tensor| {
        tensor.dtype() == DType::Float32
            && tensor.tiling.view() == View::RowsByFirst
            && tensor.tiling.rows() == made.pool.output_channels as u64
            && tensor.tiling.cols() == made.depth() as u64
    });
    Ok(fits.then_some(made))
}

impl Convolution {
    /// Columns of the matrix of filters.
    fn depth(&self) -> usize {
        self.pool.input_channels / self.groups * self.pool.kernel_shape.iter().product::<usize>()
    }

    /// The sizes for pictures of this shape: images, channels, and one or two spatial dimensions.
    fn geometry(&self, shape: &[usize]) -> TractResult<Geometry> {
        let channels = self.pool.input_channels;
        ensure!(shape.len() == self.pool.rank() + 2 && shape[1] == channels, "the input does not fit the filters");
        let padded = self.pool.computed_padding(&shape[2..]);
        // A row of a picture is a picture of one row.
        let pair = |one: &dyn Fn(usize) -> usize, missing: usize| match self.pool.rank() {
            1 => [missing, one(0)],
            _ => [one(0), one(1)],
        };
        Ok(Geometry {
            channels,
            filters: self.pool.output_channels,
            groups: self.groups,
            input: pair(&|axis| shape[axis + 2], 1),
            output: pair(&|axis| padded[axis].convoluted, 1),
            kernel: pair(&|axis| self.pool.kernel_shape[axis], 1),
            stride: pair(&|axis| self.pool.stride(axis), 1),
            dilation: pair(&|axis| self.pool.dilation(axis), 1),
            pad: pair(&|axis| padded[axis].pad_before, 0),
        })
    }
}

/// Filters that lie in blocks.
struct Stored<'a>(&'a StoredTensor);

impl Filters for Stored<'_> {
    type Error = ModelError;

    /// Blocks below each other come one after the other: they use the same rows of the input.
    fn walk(&mut self, rows: Range<usize>, each: &mut dyn FnMut(FilterTile<'_>)) -> Result<(), ModelError> {
        let tiling = &self.0.tiling;
        let (height, across) = (tiling.tile_rows(), tiling.block_cols());
        let down = rows.start as u32 / height..(rows.end as u32).div_ceil(height);
        let walk: Vec<u32> = (0..across).flat_map(|col| down.clone().map(move |row| row * across + col)).collect();
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
    fn whole(&mut self, rows: usize, depth: usize) -> Result<Vec<f32>, ModelError> {
        let mut whole = vec![0.0; rows * depth];
        self.walk(0..rows, &mut |tile| {
            for (row, line) in tile.data.chunks_exact(tile.cols).enumerate() {
                whole[(tile.row0 + row) * depth + tile.col0..][..tile.cols].copy_from_slice(line);
            }
        })?;
        Ok(whole)
    }
}

impl Convolution {
    /// For each input, the axis along which it is sliced where the output is sliced along `axis`; `None` where slices of the
    /// output need more than slices of the pictures.
    pub fn sliced_inputs(&self, axis: usize) -> Option<TVec<Option<usize>>> {
        let pointwise = |at: usize| {
            self.pool.kernel_shape.get(at) == Some(&1)
                && self.pool.strides().get(at) == Some(&1)
                && matches!(self.pool.padding, PaddingSpec::Valid)
        };
        if axis != 0 && !(axis >= 2 && pointwise(axis - 2)) {
            return None;
        }
        let mut inputs = tvec!(Some(axis));
        if self.stored.is_none() {
            inputs.push(None);
        }
        if self.added {
            inputs.push(Some(axis));
        }
        Some(inputs)
    }
}

impl Op for Convolution {
    fn name(&self) -> StaticName {
        "Convolution".into()
    }

    fn info(&self) -> TractResult<Vec<String>> {
        let mut info = self.pool.info();
        info.push(format!("Groups: {}, {:?}, added: {}", self.groups, self.activation, self.added));
        Ok(info)
    }

    op_as_typed_op!();
}

impl EvalOp for Convolution {
    not_out_of_plan!();

    fn eval(&self, _: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let pictures = &inputs[0];
        let geometry = self.geometry(pictures.shape())?;
        let images = pictures.shape()[0];
        if geometry.scratch(images) > SCRATCH {
            return carry(Err(ModelError::too_large(
                "a convolution's dilation or padding is too large for its pictures",
            )
            .detail(format!("It is {geometry:?}."))
            .hint("Use a model whose convolutions reach less far.")));
        }
        let shape = self.pool.output_shape(pictures.shape())?.shape;
        let mut output = Tensor::zero::<f32>(&shape)?;
        let added = match inputs.last().filter(|_| self.added) {
            Some(added) => {
                ensure!(added.shape() == &*shape, "what is added has another shape than the convolution");
                Some(added.try_as_plain_ram()?)
            }
            None => None,
        };
        let after = After {
            scale: self.scale.as_deref(),
            bias: self.bias.as_deref(),
            added: added.as_ref().map(|added| added.as_slice::<f32>()).transpose()?,
            activation: self.activation,
            then: self.then,
        };
        let pictures = pictures.try_as_plain_ram()?;
        let pictures = pictures.as_slice::<f32>()?;
        let mut out = output.try_as_plain_ram_mut()?;
        let out = out.as_slice_mut::<f32>()?;
        let depth = geometry.depth();
        match &self.stored {
            Some(tensor) if self.groups == 1 => {
                carry(conv(out, pictures, images, &geometry, &mut Stored(tensor), after))?;
            }
            Some(tensor) => {
                let data = carry(Stored(tensor).whole(geometry.filters, depth))?;
                let Ok(()) = conv(out, pictures, images, &geometry, &mut Whole { data: &data, depth }, after);
            }
            None => {
                let filters = inputs[1].try_as_plain_ram()?;
                let data = filters.as_slice::<f32>()?;
                ensure!(data.len() == geometry.filters * depth, "the filters have another shape than was declared");
                let Ok::<(), Infallible>(()) =
                    conv(out, pictures, images, &geometry, &mut Whole { data, depth }, after);
            }
        }
        Ok(tvec!(output.into_tvalue()))
    }
}

impl TypedOp for Convolution {
    as_op!();

    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        let wanted = 1 + usize::from(self.stored.is_none()) + usize::from(self.added);
        ensure!(inputs.len() == wanted, "a convolution with {} inputs instead of {wanted}", inputs.len());
        ensure!(inputs.iter().all(|fact| fact.datum_type == f32::datum_type()), "a convolution takes float32");
        self.pool.output_facts(inputs)
    }

    fn cost(&self, inputs: &[&TypedFact]) -> TractResult<TVec<(Cost, TDim)>> {
        let pixels: TDim = self.pool.output_shape(&inputs[0].shape)?.shape.iter().product();
        Ok(tvec!((Cost::FMA(f32::datum_type()), pixels * self.depth())))
    }
}
