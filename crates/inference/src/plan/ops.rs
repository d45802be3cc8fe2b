//! Operators of our own, for what tract lacks or computes wrongly.
//!
//! Responsible for: their reading from the graph, their shape rules and their evaluation. [`register`] puts them
//! into tract's register of operators, by ONNX's names.

use tract_onnx::model::ParsingContext;
use tract_onnx::pb::NodeProto;
use tract_onnx::tract_core::broadcast::multi_broadcast;
use tract_onnx::tract_hir::infer::helpers::infer_shape_broadcasting;
use tract_onnx::tract_hir::internal::*;
use tract_onnx::tract_hir::tract_ndarray::{ArrayD, ArrayViewD, Zip};

use super::rewrite::text;

/// Puts the operators into tract's register, over tract's own where it has one.
pub(super) fn register(framework: &mut tract_onnx::Onnx) {
    framework.op_register.insert("BitShift", bit_shift);
    framework.op_register.insert("Cast", super::cast::onnx_cast);
    framework.op_register.insert("If", super::branch::branch);
    framework.op_register.insert("Scaler", scaler);
    framework.op_register.insert("ArrayFeatureExtractor", |_, _| Ok((expand(Extract), vec![])));
    super::quantize::register(framework);
    super::classical::register(framework);
    super::recurrent::register(framework);
    super::reduce::register(framework);
    super::modulo::register(framework);
    super::norm::register(framework);
    super::conv::register(framework);
}

type Built = TractResult<(Box<dyn InferenceOp>, Vec<String>)>;

/// ONNX BitShift. tract's takes the amount modulo the width; ONNX shifts everything out.
#[derive(Clone, Debug, Hash, PartialEq, Eq)]
pub(super) struct BitShift {
    left: bool,
}

fn bit_shift(_: &ParsingContext, node: &NodeProto) -> Built {
    let left = match text(node, "direction") {
        Some("LEFT") => true,
        Some("RIGHT") => false,
        other => bail!("BitShift: direction {other:?} is not supported"),
    };
    Ok((expand(BitShift { left }), vec![]))
}

impl Expansion for BitShift {
    fn name(&self) -> StaticName {
        "BitShift".into()
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        solver: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        check_input_arity(inputs, 2)?;
        check_output_arity(outputs, 1)?;
        solver.equals(&inputs[0].datum_type, &inputs[1].datum_type)?;
        solver.equals(&inputs[0].datum_type, &outputs[0].datum_type)?;
        solver.with(&inputs[0].shape, move |solver, left| {
            solver.with(&inputs[1].shape, move |solver, right| {
                if let Some(shape) = infer_shape_broadcasting(&[&left, &right])? {
                    solver.equals(&outputs[0].shape, shape)?;
                }
                Ok(())
            })
        })
    }

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        model.wire_node(prefix, self.clone(), inputs)
    }
}

impl Op for BitShift {
    fn name(&self) -> StaticName {
        "BitShift".into()
    }

    op_as_typed_op!();
}

impl EvalOp for BitShift {
    op_out_of_plan!();

    fn eval(&self, _: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let (values, amounts) = args_2!(inputs);
        let shape = multi_broadcast(&[values.shape(), amounts.shape()])?;
        macro_rules! shift {
            ($type:ty, $bits:expr) => {{
                let values = values.to_plain_array_view::<$type>()?;
                let amounts = amounts.to_plain_array_view::<$type>()?;
                // What is left when everything has been shifted out: the sign bit, or nothing.
                let beyond = |value: $type| if self.left { 0 } else { value >> ($bits - 1) >> 1 };
                let left = self.left;
                broadcast_with(&values, &amounts, &shape, move |value: $type, amount: $type| {
                    match u32::try_from(amount) {
                        Ok(amount) if amount < $bits && left => value << amount,
                        Ok(amount) if amount < $bits => value >> amount,
                        _ => beyond(value),
                    }
                })?
                .into_tensor()
            }};
        }
        let output = match values.datum_type() {
            DatumType::U8 => shift!(u8, u8::BITS),
            DatumType::U16 => shift!(u16, u16::BITS),
            DatumType::U32 => shift!(u32, u32::BITS),
            DatumType::U64 => shift!(u64, u64::BITS),
            DatumType::I8 => shift!(i8, i8::BITS),
            DatumType::I16 => shift!(i16, i16::BITS),
            DatumType::I32 => shift!(i32, i32::BITS),
            DatumType::I64 => shift!(i64, i64::BITS),
            other => bail!("BitShift of {other:?}"),
        };
        Ok(tvec!(output.into_tvalue()))
    }
}

/// Combines two arrays of the same broadcast shape.
pub(super) fn broadcast_with<T: Datum + Copy>(
    left: &ArrayViewD<T>,
    right: &ArrayViewD<T>,
    shape: &[usize],
    combine: impl Fn(T, T) -> T,
) -> TractResult<ArrayD<T>> {
    let misfit = || format_err!("the operands' shapes do not broadcast");
    let left = left.broadcast(shape).with_context(misfit)?;
    let right = right.broadcast(shape).with_context(misfit)?;
    Ok(Zip::from(left).and(right).map_collect(|&left, &right| combine(left, right)))
}

impl TypedOp for BitShift {
    as_op!();

    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        ensure!(inputs[0].datum_type == inputs[1].datum_type, "BitShift of two element types");
        let shape = multi_broadcast(&[&inputs[0].shape, &inputs[1].shape])?;
        Ok(tvec!(inputs[0].datum_type.fact(shape)))
    }
}

/// ai.onnx.ml Scaler: (x - offset) * scale, in float32, along the last axis.
#[derive(Clone, Debug)]
struct Scaler {
    offset: Vec<f32>,
    scale: Vec<f32>,
}

fn scaler(_: &ParsingContext, node: &NodeProto) -> Built {
    let floats = |name: &str| {
        node.attribute
            .iter()
            .find(|attribute| attribute.name == name)
            .map_or(vec![], |attribute| attribute.floats.clone())
    };
    let (offset, scale) = (floats("offset"), floats("scale"));
    ensure!(!offset.is_empty() && !scale.is_empty(), "Scaler without offset or scale is not supported");
    Ok((expand(Scaler { offset, scale }), vec![]))
}

impl Expansion for Scaler {
    fn name(&self) -> StaticName {
        "Scaler".into()
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        solver: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        check_input_arity(inputs, 1)?;
        check_output_arity(outputs, 1)?;
        solver.equals(&outputs[0].datum_type, f32::datum_type())?;
        solver.equals(&inputs[0].shape, &outputs[0].shape)?;
        Ok(())
    }

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        use tract_onnx::tract_core::ops::{cast::cast, math};
        let shape = model.outlet_fact(inputs[0])?.shape.clone();
        let rank = shape.rank();
        let width = shape.last().and_then(|dim| dim.to_usize().ok());
        for values in [&self.offset, &self.scale] {
            ensure!(values.len() == 1 || Some(values.len()) == width, "Scaler: {} values for {shape:?}", values.len());
        }
        let along = |values: &[f32]| tensor1(values).broadcast_into_rank(rank);
        let offset = model.add_const(format!("{prefix}.offset"), along(&self.offset)?)?;
        let scale = model.add_const(format!("{prefix}.scale"), along(&self.scale)?)?;
        let wide = model.wire_node(format!("{prefix}.cast"), cast(f32::datum_type()), inputs)?[0];
        let centred = model.wire_node(format!("{prefix}.centre"), math::sub(), &[wide, offset])?[0];
        model.wire_node(prefix, math::mul(), &[centred, scale])
    }
}

/// ai.onnx.ml ArrayFeatureExtractor: the given columns. A single row gives a row; tract's loses that axis.
#[derive(Clone, Debug, Hash, PartialEq, Eq)]
struct Extract;

impl Expansion for Extract {
    fn name(&self) -> StaticName {
        "ArrayFeatureExtractor".into()
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        solver: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        check_input_arity(inputs, 2)?;
        check_output_arity(outputs, 1)?;
        solver.equals(&inputs[1].datum_type, i64::datum_type())?;
        solver.equals(&inputs[0].datum_type, &outputs[0].datum_type)?;
        solver.given_2(&inputs[0].shape, &inputs[1].shape, move |solver, values, columns| {
            let count: TDim = columns.iter().product();
            let mut shape: TVec<TDim> = values;
            if shape.len() == 1 {
                shape.insert(0, 1.to_dim());
            }
            let last = shape.len() - 1;
            shape[last] = count;
            solver.equals(&outputs[0].shape, shape)
        })
    }

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        let (mut values, mut columns) = (inputs[0], inputs[1]);
        while model.outlet_fact(columns)?.rank() > 1 {
            let shape = model.outlet_fact(columns)?.shape.to_tvec();
            let flat = AxisOp::Reshape(0, shape[..2].into(), tvec![shape[0].clone() * &shape[1]]);
            columns = model.wire_node(format!("{prefix}.columns-{}", shape.len()), flat, &[columns])?[0];
        }
        if model.outlet_fact(columns)?.rank() == 0 {
            columns = model.wire_node(format!("{prefix}.column"), AxisOp::Add(0), &[columns])?[0];
        }
        ensure!(model.outlet_fact(values)?.rank() > 0, "ArrayFeatureExtractor of a scalar");
        if model.outlet_fact(values)?.rank() == 1 {
            values = model.wire_node(format!("{prefix}.row"), AxisOp::Add(0), &[values])?[0];
        }
        let axis = model.outlet_fact(values)?.rank() - 1;
        model.wire_node(prefix, tract_onnx::tract_core::ops::array::Gather::new(axis), &[values, columns])
    }
}
