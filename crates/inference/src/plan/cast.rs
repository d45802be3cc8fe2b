//! Casts to integers, exactly.
//!
//! Responsible for: ONNX Cast to int64, which tract reads as a cast to its symbolic dimensions so that computed shapes
//! stay symbolic; that conversion goes through 32 bits and loses what lies beyond. Here dimensions stay dimensions,
//! and data become int64. [`ToDim`] does the same for the casts to dimensions that tract puts in by itself.

use std::any::Any;
use tract_onnx::model::ParsingContext;
use tract_onnx::pb::{NodeProto, tensor_proto::DataType};
use tract_onnx::tract_core::ops::cast::{Cast, cast};
use tract_onnx::tract_hir::internal::*;

use super::rewrite::integer;

/// Reads a Cast node.
pub(super) fn onnx_cast(_: &ParsingContext, node: &NodeProto) -> TractResult<(Box<dyn InferenceOp>, Vec<String>)> {
    let code = integer(node, "to").and_then(|code| i32::try_from(code).ok()).context("Cast without type")?;
    let to = DataType::try_from(code).ok().and_then(|to| DatumType::try_from(to).ok());
    let to = to.with_context(|| format!("Cast to type {code} is not supported"))?;
    Ok((expand(OnnxCast { to, keeps: false }), vec![]))
}

#[derive(Clone, Debug, Hash, PartialEq, Eq)]
struct OnnxCast {
    to: DatumType,
    /// Dimensions stay dimensions where int32 is asked for, too.
    keeps: bool,
}

impl OnnxCast {
    /// What comes out for what goes in: dimensions stay dimensions when int64 is asked for.
    fn output(&self, from: DatumType) -> DatumType {
        let keeps = self.to == DatumType::I64 || (self.keeps && self.to == DatumType::I32);
        if keeps && from == DatumType::TDim { DatumType::TDim } else { self.to }
    }
}

/// Has shapes stay symbolic that are computed in int32. The numbers are the same as long as they fit; other operators may see
/// another type than the graph says, so this is for following shapes, not for running.
pub(super) fn keep_dimensions(model: &mut InferenceModel) {
    for node in &mut model.nodes {
        let op = node.op.as_op().downcast_ref::<Box<dyn Expansion>>();
        let cast = op.and_then(|op| (&**op as &dyn Any).downcast_ref::<OnnxCast>());
        if let Some(cast) = cast {
            node.op = expand(OnnxCast { keeps: true, ..cast.clone() });
        }
    }
}

impl Expansion for OnnxCast {
    fn name(&self) -> StaticName {
        "Cast".into()
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        solver: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        check_input_arity(inputs, 1)?;
        check_output_arity(outputs, 1)?;
        solver.given(&inputs[0].datum_type, move |solver, from| {
            solver.equals(&outputs[0].datum_type, self.output(from))
        })?;
        solver.equals(&outputs[0].shape, &inputs[0].shape)
    }

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        let from = model.outlet_fact(inputs[0])?.datum_type;
        let to = self.output(from);
        if from == to {
            return Ok(inputs.into());
        }
        if from == DatumType::String {
            return model.wire_node(prefix, Parse { to }, inputs);
        }
        model.wire_node(prefix, cast(to), inputs)
    }
}

/// Numbers from their text.
#[derive(Clone, Debug, Hash, PartialEq, Eq)]
pub(super) struct Parse {
    to: DatumType,
}

impl Op for Parse {
    fn name(&self) -> StaticName {
        "Parse".into()
    }

    op_as_typed_op!();
}

impl EvalOp for Parse {
    op_out_of_plan!();

    fn eval(&self, _: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let input = args_1!(inputs);
        let texts = input.try_as_plain_ram()?;
        let texts = texts.as_slice::<String>()?;
        let real = |text: &String| -> TractResult<f64> {
            match text.trim() {
                "INF" | "+INF" => Ok(f64::INFINITY),
                "-INF" => Ok(f64::NEG_INFINITY),
                text => text.parse().with_context(|| format!("\"{text}\" is no number")),
            }
        };
        let output = if self.to.is_float() {
            Tensor::from_shape(input.shape(), &texts.iter().map(real).collect::<TractResult<Vec<f64>>>()?)?
        } else if self.to.is_integer() {
            let whole = |text: &String| -> TractResult<i64> {
                text.trim().parse().with_context(|| format!("\"{text}\" is no integer"))
            };
            Tensor::from_shape(input.shape(), &texts.iter().map(whole).collect::<TractResult<Vec<i64>>>()?)?
        } else {
            bail!("a cast of strings to {:?} is not supported", self.to)
        };
        Ok(tvec!(output.cast_to_dt(self.to)?.into_owned().into_tvalue()))
    }
}

impl TypedOp for Parse {
    as_op!();

    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        Ok(tvec!(self.to.fact(inputs[0].shape.clone())))
    }
}

/// A cast of numbers to dimensions.
#[derive(Clone, Debug, Hash, PartialEq, Eq)]
pub(super) struct ToDim(Cast);

impl ToDim {
    /// The exact form of this cast, if it is one from numbers to dimensions.
    pub fn instead_of(op: &Cast, from: DatumType) -> Option<ToDim> {
        (op.to == DatumType::TDim && from != DatumType::TDim).then(|| ToDim(op.clone()))
    }
}

impl Op for ToDim {
    fn name(&self) -> StaticName {
        "Cast".into()
    }

    op_as_typed_op!();
}

impl EvalOp for ToDim {
    op_out_of_plan!();

    fn eval(&self, _: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let input = args_1!(inputs);
        let whole = input.cast_to::<i64>()?;
        let whole = whole.try_as_plain_ram()?;
        let dims: Vec<TDim> = whole.as_slice::<i64>()?.iter().map(|&size| TDim::Val(size)).collect();
        let dims = tract_onnx::tract_hir::tract_ndarray::ArrayD::from_shape_vec(input.shape(), dims)?;
        Ok(tvec!(dims.into_tensor().into_tvalue()))
    }
}

impl TypedOp for ToDim {
    as_op!();

    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        self.0.output_facts(inputs)
    }
}
