//! Maxima, minima, and what is built on them.
//!
//! Responsible for: ReduceMax and ReduceMin (tract starts from the largest finite number, and so finds that one where
//! all are infinite) and LogSoftmax (tract takes the logarithm of the softmax, which underflows).

use super::rewrite::{attribute, integer};
use tract_onnx::model::ParsingContext;
use tract_onnx::pb::NodeProto;
use tract_onnx::tract_core::ops::change_axes::wire_with_rank_broadcast;
use tract_onnx::tract_core::ops::math;
use tract_onnx::tract_core::ops::nn::{Reduce, Reducer};
use tract_onnx::tract_hir::internal::*;
use tract_onnx::tract_hir::tract_ndarray::Axis;

type Built = TractResult<(Box<dyn InferenceOp>, Vec<String>)>;

/// Puts the operators into tract's register.
pub(super) fn register(framework: &mut tract_onnx::Onnx) {
    framework.op_register.insert("ReduceMax", |context, node| reduction(context, node, Reducer::Max));
    framework.op_register.insert("ReduceMin", |context, node| reduction(context, node, Reducer::Min));
    framework.op_register.insert("LogSoftmax", log_softmax);
}

fn reduction(_: &ParsingContext, node: &NodeProto, reducer: Reducer) -> Built {
    let axes = attribute(node, "axes").map(|it| it.ints.clone());
    let keep = integer(node, "keepdims").unwrap_or(1) == 1;
    let noop = integer(node, "noop_with_empty_axes").unwrap_or(0) != 0;
    Ok((expand(Reduction { reducer, axes, input: node.input.len() == 2, keep, noop }), vec![]))
}

/// ReduceMax or ReduceMin of any operator set: axes as an attribute or as an input.
#[derive(Clone, Debug)]
struct Reduction {
    reducer: Reducer,
    axes: Option<Vec<i64>>,
    input: bool,
    keep: bool,
    noop: bool,
}

impl Reduction {
    /// The axes, ascending.
    fn axes(&self, rank: usize, given: Option<&Tensor>) -> TractResult<TVec<usize>> {
        let given = match given {
            Some(given) => given.cast_to::<i64>()?.try_as_plain_ram()?.as_slice::<i64>()?.to_vec(),
            None => self.axes.clone().unwrap_or_default(),
        };
        if given.is_empty() {
            return Ok(if self.noop { tvec!() } else { (0..rank).collect() });
        }
        let mut axes: TVec<usize> = tvec!();
        for axis in given {
            let axis = if axis < 0 { axis + rank as i64 } else { axis };
            ensure!((0..rank as i64).contains(&axis), "axis {axis} of a tensor of {rank} dimensions");
            axes.push(axis as usize);
        }
        axes.sort_unstable();
        axes.dedup();
        Ok(axes)
    }

    fn shape(&self, input: &[TDim], axes: &[usize]) -> TVec<TDim> {
        let kept = |(axis, dim): (usize, &TDim)| match (axes.contains(&axis), self.keep) {
            (false, _) => Some(dim.clone()),
            (true, true) => Some(1.to_dim()),
            (true, false) => None,
        };
        input.iter().enumerate().filter_map(kept).collect()
    }
}

impl Expansion for Reduction {
    fn name(&self) -> StaticName {
        format!("Reduce{:?}", self.reducer).into()
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        solver: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        check_input_arity(inputs, 1 + usize::from(self.input))?;
        check_output_arity(outputs, 1)?;
        solver.equals(&inputs[0].datum_type, &outputs[0].datum_type)?;
        let infer = move |solver: &mut Solver<'r>, axes: Option<Arc<Tensor>>| {
            solver.given(&inputs[0].shape, move |solver, shape| {
                let axes = self.axes(shape.len(), axes.as_deref())?;
                solver.equals(&outputs[0].shape, self.shape(&shape, &axes))
            })
        };
        if self.input {
            solver.given(&inputs[1].value, move |solver, axes| infer(solver, Some(axes)))
        } else {
            infer(solver, None)
        }
    }

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        let given = match inputs.get(1) {
            Some(axes) => Some(model.outlet_fact(*axes)?.konst.clone().context("axes must be a constant")?),
            None => None,
        };
        let axes = self.axes(model.outlet_fact(inputs[0])?.rank(), given.as_deref())?;
        if axes.is_empty() {
            return Ok(tvec!(inputs[0]));
        }
        let op = Extreme(Reduce { axes: axes.clone(), reducer: self.reducer });
        let mut wire = model.wire_node(prefix, op, &inputs[..1])?;
        if !self.keep {
            for axis in axes.into_iter().rev() {
                wire = model.wire_node(format!("{prefix}.drop-{axis}"), AxisOp::Rm(axis), &wire)?;
            }
        }
        Ok(wire)
    }
}

/// LogSoftmax: x - max - log(sum(exp(x - max))) along one axis, or before opset 13 along all from one on.
#[derive(Clone, Debug)]
struct LogSoftmax {
    axis: i64,
    flattens: bool,
}

fn log_softmax(context: &ParsingContext, node: &NodeProto) -> Built {
    let flattens = context.onnx_operator_set_version < 13;
    let axis = integer(node, "axis").unwrap_or(if flattens { 1 } else { -1 });
    Ok((expand(LogSoftmax { axis, flattens }), vec![]))
}

impl Expansion for LogSoftmax {
    fn name(&self) -> StaticName {
        "LogSoftmax".into()
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        solver: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        check_input_arity(inputs, 1)?;
        check_output_arity(outputs, 1)?;
        solver.equals(&inputs[0].datum_type, &outputs[0].datum_type)?;
        solver.equals(&inputs[0].shape, &outputs[0].shape)
    }

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        let rank = model.outlet_fact(inputs[0])?.rank();
        let axis = if self.axis < 0 { self.axis + rank as i64 } else { self.axis };
        ensure!((0..=rank as i64).contains(&axis), "LogSoftmax along axis {axis} of {rank}");
        let axis = axis as usize;
        let axes: TVec<usize> = if self.flattens { (axis..rank).collect() } else { tvec!(axis) };
        let max = Extreme(Reduce { axes: axes.clone(), reducer: Reducer::Max });
        let max = model.wire_node(format!("{prefix}.max"), max, inputs)?[0];
        let centred = wire_with_rank_broadcast(format!("{prefix}.centred"), model, math::sub(), &[inputs[0], max])?;
        let powers = model.wire_node(format!("{prefix}.exp"), math::exp(), &centred)?;
        let sum = Reduce { axes, reducer: Reducer::Sum };
        let sum = model.wire_node(format!("{prefix}.sum"), sum, &powers)?;
        let log = model.wire_node(format!("{prefix}.log"), math::ln(), &sum)?[0];
        wire_with_rank_broadcast(prefix, model, math::sub(), &[centred[0], log])
    }
}

/// The maximum or minimum of floating-point numbers.

#[derive(Clone, Debug, Hash, PartialEq, Eq)]
pub(super) struct Extreme(pub Reduce);

impl Op for Extreme {
    fn name(&self) -> StaticName {
        self.0.name()
    }

    op_as_typed_op!();
}

impl EvalOp for Extreme {
    op_out_of_plan!();

    fn eval(&self, _: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let input = args_1!(inputs);
        let mut output = self.0.reducer.reduce(&self.0.axes, &input)?;
        let max = self.0.reducer == Reducer::Max;
        macro_rules! mend {
            ($type:ty) => {{
                let (start, infinite) =
                    if max { (<$type>::MIN, <$type>::NEG_INFINITY) } else { (<$type>::MAX, <$type>::INFINITY) };
                let mut mended = output.clone().into_plain_array::<$type>()?;
                if mended.iter().any(|value| *value == start) {
                    let mut found = input.to_plain_array_view::<$type>()?.to_owned();
                    for &axis in &self.0.axes {
                        found = found
                            .fold_axis(Axis(axis), infinite, |&best, &value| {
                                if (max && best > value) || (!max && best < value) { best } else { value }
                            })
                            .insert_axis(Axis(axis));
                    }
                    mended.zip_mut_with(&found, |value, found| {
                        if *value == start {
                            *value = *found;
                        }
                    });
                    output = mended.into_tensor();
                }
            }};
        }
        match input.datum_type() {
            DatumType::F32 => mend!(f32),
            DatumType::F64 => mend!(f64),
            DatumType::F16 => mend!(f16),
            _ => {}
        }
        Ok(tvec!(output.into_tvalue()))
    }
}

impl TypedOp for Extreme {
    as_op!();

    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        self.0.output_facts(inputs)
    }

    fn axes_mapping(&self, inputs: &[&TypedFact], outputs: &[&TypedFact]) -> TractResult<AxesMapping> {
        self.0.axes_mapping(inputs, outputs)
    }

    fn cost(&self, inputs: &[&TypedFact]) -> TractResult<TVec<(Cost, TDim)>> {
        self.0.cost(inputs)
    }
}
