//! Convolutions of our own, in the places of tract's.
//!
//! Responsible for: [`Convolution`], which takes its filters from a constant of the plan or from blocks, with what follows
//! it fused in; [`place`], which puts it where tract has a convolution that it can do; [`transposed`], which reads
//! transposed ones from the graph; [`fuse`], which takes up what follows. tract's own are kept for other element types, other
//! orders of axes, and three spatial dimensions.
//!
//! Invariant: the operator asks for shapes only when it runs, so one compiled form serves every batch and every size of
//! picture.

mod fuse;
mod stored;
mod transposed;

use super::blocks::{StoredConst, carry};
use super::pool;
use crate::error::ModelError;
use crate::kernels::conv::{After, Geometry, conv};
use crate::kernels::epilogue::Activation;
use crate::kernels::filters::{Filters, Whole};
use crate::kernels::transposed::{conv as transposed_conv, scratch as transposed_scratch};
use crate::weights::StoredTensor;
use tensor_blocks::{DType, View};
use tract_onnx::tract_core::ops::cnn::{Conv, KernelFormat, PaddingSpec, PoolSpec};
use tract_onnx::tract_core::ops::nn::DataFormat;
use tract_onnx::tract_hir::internal::*;

pub(super) use fuse::fuse;
use stored::Stored;
use transposed::Transposed;
pub(super) use transposed::register;

/// Most elements of scratch: 1 GB.
const SCRATCH: usize = 1 << 28;

/// A convolution of one or two spatial dimensions, or a transposed one, channels first, in float32.
///
/// Inputs: the pictures; the filters unless they are stored; with `added`, what is added to the result.
#[derive(Clone, Debug)]
pub(super) struct Convolution {
    pool: PoolSpec,
    groups: usize,
    /// What a transposed convolution has beside; none for a convolution.
    transposed: Option<Transposed>,
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
            && self.transposed == other.transposed
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
        transposed: None,
        stored: model.nodes[filters.node].op_as::<StoredConst>().map(|stored| stored.tensor.clone()),
        scale: None,
        bias,
        added: false,
        activation: Activation::Identity,
        then: None,
    };
    Ok(made.filters_fit().then_some(made))
}

impl Convolution {
    /// Rows and columns of the matrix of filters.
    fn matrix(&self) -> (usize, usize) {
        let taps = self.pool.kernel_shape.iter().product::<usize>();
        match self.transposed {
            None => (self.pool.output_channels, self.pool.input_channels / self.groups * taps),
            Some(_) => (self.pool.input_channels, self.pool.output_channels / self.groups * taps),
        }
    }

    /// Whether the filters are tiled as the kernels use them, if they are stored.
    fn filters_fit(&self) -> bool {
        let (rows, cols) = self.matrix();
        self.stored.as_ref().is_none_or(|tensor| {
            tensor.dtype() == DType::Float32
                && tensor.tiling.view() == View::RowsByFirst
                && (tensor.tiling.rows(), tensor.tiling.cols()) == (rows as u64, cols as u64)
        })
    }

    /// The shape of the output for pictures of this shape.
    fn output_shape(&self, shape: &[usize]) -> TractResult<TVec<usize>> {
        match &self.transposed {
            None => Ok(self.pool.output_shape(shape)?.shape),
            Some(transposed) => transposed.output_shape(&self.pool, shape),
        }
    }

    /// The sizes for pictures of this shape: images, channels, and one or two spatial dimensions.
    fn geometry(&self, shape: &[usize]) -> TractResult<Geometry> {
        let channels = self.pool.input_channels;
        ensure!(shape.len() == self.pool.rank() + 2 && shape[1] == channels, "the input does not fit the filters");
        let output = self.output_shape(shape)?;
        let pads: TVec<usize> = match &self.transposed {
            None => self.pool.computed_padding(&shape[2..]).iter().map(|axis| axis.pad_before).collect(),
            Some(transposed) => (0..self.pool.rank())
                .map(|axis| transposed.pad_before(&self.pool, axis, shape[axis + 2]))
                .collect::<TractResult<_>>()?,
        };
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
            output: pair(&|axis| output[axis + 2], 1),
            kernel: pair(&|axis| self.pool.kernel_shape[axis], 1),
            stride: pair(&|axis| self.pool.stride(axis), 1),
            dilation: pair(&|axis| self.pool.dilation(axis), 1),
            pad: pair(&|axis| pads[axis], 0),
        })
    }
}

impl Convolution {
    /// For each input, the axis along which it is sliced where the output is sliced along `axis`; `None` where slices of the
    /// output need more than slices of the pictures.
    pub fn sliced_inputs(&self, axis: usize) -> Option<TVec<Option<usize>>> {
        let pointwise = |at: usize| {
            self.transposed.is_none()
                && self.pool.kernel_shape.get(at) == Some(&1)
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

impl Convolution {
    fn compute<F: Filters>(
        &self,
        out: &mut [f32],
        pictures: &[f32],
        images: usize,
        geometry: &Geometry,
        filters: &mut F,
        after: After<'_>,
    ) -> Result<(), F::Error> {
        match self.transposed {
            None => conv(out, pictures, images, geometry, filters, after),
            Some(_) => transposed_conv(out, pictures, images, geometry, filters, after),
        }
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
        let scratch = match self.transposed {
            None => geometry.scratch(images),
            Some(_) => transposed_scratch(&geometry, images),
        };
        if scratch > SCRATCH {
            return carry(Err(ModelError::too_large(
                "a convolution's dilation or padding is too large for its pictures",
            )
            .detail(format!("It is {geometry:?}."))
            .hint("Use a model whose convolutions reach less far.")));
        }
        let shape = self.output_shape(pictures.shape())?;
        let mut output = pool::output(&shape)?;
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
        let (rows, depth) = self.matrix();
        match &self.stored {
            Some(tensor) if self.groups == 1 => {
                carry(self.compute(out, pictures, images, &geometry, &mut Stored(tensor), after))?;
            }
            Some(tensor) => {
                let data = carry(Stored(tensor).whole(rows, depth))?;
                let Ok(()) = self.compute(out, pictures, images, &geometry, &mut Whole { data: &data, depth }, after);
            }
            None => {
                let filters = inputs[1].try_as_plain_ram()?;
                let data = filters.as_slice::<f32>()?;
                ensure!(data.len() == rows * depth, "the filters have another shape than was declared");
                let Ok(()) = self.compute(out, pictures, images, &geometry, &mut Whole { data, depth }, after);
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
        match &self.transposed {
            None => self.pool.output_facts(inputs),
            Some(transposed) => Ok(tvec!(f32::fact(transposed.output_dims(&self.pool, &inputs[0].shape)?))),
        }
    }

    fn cost(&self, inputs: &[&TypedFact]) -> TractResult<TVec<(Cost, TDim)>> {
        let rows: TDim = match self.transposed {
            None => self.pool.output_shape(&inputs[0].shape)?.shape.iter().product(),
            Some(_) => inputs[0].shape.iter().product(),
        };
        Ok(tvec!((Cost::FMA(f32::datum_type()), rows * self.matrix().1)))
    }
}
