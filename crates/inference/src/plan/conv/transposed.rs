//! ONNX ConvTranspose.
//!
//! Responsible for: reading it from the graph, the sizes of its output, and wiring a [`Convolution`] for it. tract's own
//! is kept for what that one cannot do: it moves the weights around, computes with a copy of them, and wants all shapes.
//!
//! Invariant: sizes and paddings are ONNX Runtime's where the attributes leave a choice: a padding that is not even goes
//! in front unless it is SAME_UPPER, and none is negative.

use super::super::blocks::StoredConst;
use super::Convolution;
use crate::kernels::epilogue::Activation;
use std::sync::LazyLock;
use tract_onnx::model::ParsingContext;
use tract_onnx::pb::NodeProto;
use tract_onnx::tract_core::ops::cnn::{PaddingSpec, PoolSpec};
use tract_onnx::tract_core::ops::math::add;
use tract_onnx::tract_core::ops::nn::DataFormat;
use tract_onnx::tract_hir::internal::*;

/// Puts it into tract's register, over tract's own.
pub(in crate::plan) fn register(framework: &mut tract_onnx::Onnx) {
    framework.op_register.insert("ConvTranspose", read);
}

/// Elements along an axis that a kernel may reach: with more, sizes would not be numbers any longer.
const REACH: usize = 1 << 40;

/// What a transposed convolution has beside what a convolution has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Transposed {
    /// Output pixels behind the last tap, by axis.
    more: TVec<usize>,
    /// The size of the output, if it is given: the padding follows from it.
    sizes: Option<TVec<usize>>,
}

impl Transposed {
    /// Output pixels that one input pixel reaches, and those that are added.
    fn extent(&self, pool: &PoolSpec, axis: usize) -> TractResult<usize> {
        let reach = (pool.kernel_shape[axis] - 1).checked_mul(pool.dilation(axis));
        let extent = reach.and_then(|reach| reach.checked_add(1)?.checked_add(self.more[axis]));
        extent.filter(|extent| *extent <= REACH).context("a transposed convolution reaches too far")
    }

    /// The output's size before anything is cut off.
    fn full(&self, pool: &PoolSpec, axis: usize, input: usize) -> TractResult<usize> {
        let last = input.checked_sub(1).context("a transposed convolution of pictures without pixels")?;
        let full = last.checked_mul(pool.stride(axis)).and_then(|at| at.checked_add(self.extent(pool, axis).ok()?));
        full.filter(|full| *full <= REACH).context("a transposed convolution reaches too far")
    }

    /// Pixels that padding cuts off, at both ends together, where the output's size is not given.
    fn cut(&self, pool: &PoolSpec, axis: usize) -> TractResult<usize> {
        Ok(match &pool.padding {
            PaddingSpec::Explicit(before, after) => before[axis].saturating_add(after[axis]).min(REACH),
            // So that the output is as large as the input times the stride.
            PaddingSpec::SameUpper | PaddingSpec::SameLower => {
                self.extent(pool, axis)?.saturating_sub(pool.stride(axis))
            }
            _ => 0,
        })
    }

    /// Pixels that are cut off at the beginning of an axis.
    pub fn pad_before(&self, pool: &PoolSpec, axis: usize, input: usize) -> TractResult<usize> {
        let total = match (&self.sizes, &pool.padding) {
            (Some(sizes), _) => self.full(pool, axis, input)?.saturating_sub(sizes[axis]),
            (None, PaddingSpec::Explicit(before, _)) => return Ok(before[axis]),
            _ => self.cut(pool, axis)?,
        };
        Ok(if pool.padding == PaddingSpec::SameUpper { total / 2 } else { total - total / 2 })
    }

    /// Images, channels and pixels of the output for pictures of this shape.
    pub fn output_shape(&self, pool: &PoolSpec, input: &[usize]) -> TractResult<TVec<usize>> {
        let mut shape = tvec!(input[0], pool.output_channels);
        for (axis, &size) in input[2..].iter().enumerate() {
            shape.push(match &self.sizes {
                Some(sizes) => sizes[axis],
                None => self
                    .full(pool, axis, size)?
                    .checked_sub(self.cut(pool, axis)?)
                    .context("the padding of a transposed convolution leaves no pixels")?,
            });
        }
        Ok(shape)
    }

    /// As [`output_shape`](Transposed::output_shape), with free dimensions.
    pub fn output_dims(&self, pool: &PoolSpec, input: &[TDim]) -> TractResult<TVec<TDim>> {
        if let Ok(sizes) = input[2..].iter().map(TDim::to_usize).collect::<Result<TVec<usize>, _>>() {
            let shape: TVec<usize> = [1, 1].into_iter().chain(sizes).collect();
            let mut shape: TVec<TDim> = self.output_shape(pool, &shape)?.iter().map(|size| size.to_dim()).collect();
            shape[0] = input[0].clone();
            return Ok(shape);
        }
        let mut shape = tvec!(input[0].clone(), pool.output_channels.to_dim());
        for (axis, size) in input[2..].iter().enumerate() {
            shape.push(match &self.sizes {
                Some(sizes) => sizes[axis].to_dim(),
                None => {
                    let rest = self.extent(pool, axis)? as i64 - self.cut(pool, axis)? as i64;
                    (size.clone() - 1) * pool.stride(axis) + rest
                }
            });
        }
        Ok(shape)
    }
}

/// The node as it stands in the graph.
#[derive(Clone, Debug)]
struct Read {
    padding: PaddingSpec,
    strides: Option<TVec<usize>>,
    dilations: Option<TVec<usize>>,
    more: Option<TVec<usize>>,
    sizes: Option<TVec<usize>>,
    groups: usize,
    /// tract's.
    other: Box<dyn Expansion>,
}

fn read(context: &ParsingContext, node: &NodeProto) -> TractResult<(Box<dyn InferenceOp>, Vec<String>)> {
    static TRACTS: LazyLock<tract_onnx::Onnx> = LazyLock::new(tract_onnx::onnx);
    let tracts = TRACTS.op_register.0.get("ConvTranspose").context("tract has no ConvTranspose")?;
    let (other, outputs) = tracts(context, node)?;
    let operator: &dyn Op = (*other).as_ref();
    let Some(expansion) = operator.downcast_ref::<Box<dyn Expansion>>().cloned() else { return Ok((other, outputs)) };
    let pads = node.get_attr_opt_tvec::<usize>("pads")?.filter(|pads| !pads.is_empty());
    let padding = match (node.get_attr_opt::<&str>("auto_pad")?, pads) {
        (Some("SAME_UPPER"), _) => PaddingSpec::SameUpper,
        (Some("SAME_LOWER"), _) => PaddingSpec::SameLower,
        (Some("VALID"), _) | (_, None) => PaddingSpec::Valid,
        (_, Some(pads)) => {
            let (before, after) = pads.split_at(pads.len() / 2);
            PaddingSpec::Explicit(before.into(), after.into())
        }
    };
    let sizes = |name: &str| -> TractResult<Option<TVec<usize>>> {
        Ok(node.get_attr_opt_tvec::<usize>(name)?.filter(|values| !values.is_empty()))
    };
    let read = Read {
        padding,
        strides: sizes("strides")?,
        dilations: sizes("dilations")?,
        more: sizes("output_padding")?,
        sizes: sizes("output_shape")?,
        groups: node.get_attr_opt("group")?.unwrap_or(1),
        other: expansion,
    };
    Ok((expand(read), outputs))
}

impl Read {
    /// The operator without its bias for filters of this shape: channels, filters of a group, taps. None if it is not of
    /// our kind.
    fn operator(&self, filters: &[usize]) -> Option<Convolution> {
        let (&[channels, count], taps) = filters.split_first_chunk::<2>()?;
        let rank = taps.len();
        let fits = |values: &Option<TVec<usize>>| values.as_ref().is_none_or(|values| values.len() == rank);
        let positive = |values: &Option<TVec<usize>>| values.iter().flatten().all(|&value| value > 0);
        let padded = match &self.padding {
            PaddingSpec::Explicit(before, after) => before.len() == rank && after.len() == rank,
            _ => true,
        };
        // The sizes of images and channels may stand before those of the axes.
        let sizes = match &self.sizes {
            Some(sizes) => Some(sizes.get(sizes.len().checked_sub(rank)?..)?.into()),
            None => None,
        };
        let sound = (1..=2).contains(&rank)
            && padded
            && [&self.strides, &self.dilations, &self.more].into_iter().all(fits)
            && [&self.strides, &self.dilations].into_iter().all(positive)
            && self.groups > 0
            && channels > 0
            && channels.is_multiple_of(self.groups)
            && taps.iter().all(|&taps| taps > 0);
        if !sound {
            return None;
        }
        let pool = PoolSpec::new(
            DataFormat::NCHW,
            taps.into(),
            self.padding.clone(),
            self.dilations.clone(),
            self.strides.clone(),
            channels,
            count * self.groups,
        );
        let more = self.more.clone().unwrap_or_else(|| tvec!(0; rank));
        Some(Convolution {
            pool,
            groups: self.groups,
            transposed: Some(Transposed { more, sizes }),
            stored: None,
            scale: None,
            bias: None,
            added: false,
            activation: Activation::Identity,
            then: None,
        })
    }
}

impl Expansion for Read {
    fn name(&self) -> StaticName {
        "ConvTranspose".into()
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        solver: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        ensure!((2..=3).contains(&inputs.len()), "a transposed convolution with {} inputs", inputs.len());
        check_output_arity(outputs, 1)?;
        for input in inputs {
            solver.equals(&input.datum_type, &outputs[0].datum_type)?;
        }
        solver.equals(&inputs[0].rank, &inputs[1].rank)?;
        solver.equals(&inputs[0].rank, &outputs[0].rank)?;
        solver.equals(&inputs[0].shape[0], &outputs[0].shape[0])?;
        solver.equals(&inputs[0].shape[1], &inputs[1].shape[0])?;
        if let Some(bias) = inputs.get(2) {
            solver.equals(&bias.rank, 1)?;
            solver.equals(&bias.shape[0], &outputs[0].shape[1])?;
        }
        solver.given_2(&inputs[0].shape, &inputs[1].shape, move |solver, pictures, filters| {
            let filters = filters.iter().map(TDim::to_usize).collect::<Result<TVec<usize>, _>>()?;
            match self.operator(&filters) {
                Some(Convolution { pool, transposed: Some(transposed), .. }) => {
                    ensure!(pictures.len() == pool.rank() + 2, "filters of another rank than the pictures");
                    solver.equals(&outputs[0].shape, transposed.output_dims(&pool, &pictures)?)
                }
                _ => self.other.rules(solver, inputs, outputs),
            }
        })
    }

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        let float = |outlet: &OutletId| {
            model.outlet_fact(*outlet).is_ok_and(|fact| fact.datum_type == f32::datum_type() && !fact.is_exotic())
        };
        let ours = if inputs.iter().all(float) {
            let filters = &model.outlet_fact(inputs[1])?.shape;
            filters.as_concrete().and_then(|filters| self.operator(filters))
        } else {
            None
        };
        let Some(mut op) = ours else {
            // tract cuts off nothing for a given size, and counts what is added behind as part of what SAME cuts off.
            let same = matches!(self.padding, PaddingSpec::SameUpper | PaddingSpec::SameLower);
            let more = self.more.iter().flatten().any(|&more| more > 0);
            if self.sizes.is_some() || (same && more) {
                bail!(
                    "a ConvTranspose of this kind with output_shape, or with auto_pad and output_padding, is not supported"
                );
            }
            return self.other.wire(prefix, model, inputs);
        };
        let stored = model.nodes[inputs[1].node].op_as::<StoredConst>().map(|stored| stored.tensor.clone());
        op.stored = stored;
        if !op.filters_fit() {
            op.stored = None;
        }
        let wired = if op.stored.is_some() { &inputs[..1] } else { &inputs[..2] };
        let Some(&bias) = inputs.get(2) else { return model.wire_node(prefix, op, wired) };
        if let Some(values) = &model.outlet_fact(bias)?.konst {
            op.bias = Some(values.try_as_plain_ram()?.as_slice::<f32>()?.into());
            ensure!(values.len() == op.pool.output_channels, "a bias of another length than there are filters");
            return model.wire_node(prefix, op, wired);
        }
        let mut bias = tvec!(bias);
        for (number, axis) in [0].into_iter().chain(2..op.pool.rank() + 2).enumerate() {
            bias = model.wire_node(format!("{prefix}.bias.{number}"), AxisOp::Add(axis), &bias)?;
        }
        let made = model.wire_node(format!("{prefix}.without_bias"), op, wired)?;
        model.wire_node(prefix, add(), &[made[0], bias[0]])
    }

    fn runs_out_of_plan(&self) -> bool {
        false
    }
}
