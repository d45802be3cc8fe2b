//! QuantizeLinear and DequantizeLinear as ONNX defines them.
//!
//! Responsible for: exact rounding (tract multiplies by the reciprocal of the scale, and is off by one where the
//! product falls on the other side of a half), 16-bit and float16 forms, and scales that are computed at run time.
//! Blocks (`block_size`) and types below 8 bits are refused.

use super::rewrite::integer;
use tract_onnx::model::ParsingContext;
use tract_onnx::pb::NodeProto;
use tract_onnx::tract_hir::internal::*;

/// Puts the operators into tract's register.
pub(super) fn register(framework: &mut tract_onnx::Onnx) {
    framework.op_register.insert("QuantizeLinear", |_: &ParsingContext, node| linear(node, true));
    framework.op_register.insert("DequantizeLinear", |_: &ParsingContext, node| linear(node, false));
}

fn linear(node: &NodeProto, quantize: bool) -> TractResult<(Box<dyn InferenceOp>, Vec<String>)> {
    ensure!(integer(node, "block_size").unwrap_or(0) == 0, "blocked quantization is not supported");
    let axis = integer(node, "axis").unwrap_or(1);
    Ok((expand(Linear { quantize, axis, zero_point: node.input.len() == 3 }), vec![]))
}

/// `saturate(round_half_even(x / scale) + zero_point)`, or its inverse `(x - zero_point) * scale`. Scale and zero
/// point are one number, or one for each index of the axis.
#[derive(Clone, Debug, Hash, PartialEq, Eq)]
pub(super) struct Linear {
    quantize: bool,
    axis: i64,
    zero_point: bool,
}

impl Linear {
    /// The axis along which there are several scales, for inputs of these facts.
    pub fn scaled_axis(&self, inputs: &[&TypedFact]) -> Option<usize> {
        let rank = inputs[0].rank() as i64;
        let axis = if self.axis < 0 { self.axis + rank } else { self.axis };
        (!inputs[1].shape.volume().is_one()).then_some(axis as usize)
    }

    fn inputs(&self) -> usize {
        2 + usize::from(self.zero_point)
    }

    fn label(&self) -> StaticName {
        if self.quantize { "QuantizeLinear".into() } else { "DequantizeLinear".into() }
    }

    /// How the input splits around the axis: elements before, along, and after it; all before for one number.
    fn split(&self, shape: &[usize], parameters: usize) -> TractResult<(usize, usize, usize)> {
        if parameters == 1 {
            return Ok((1, 1, shape.iter().product()));
        }
        let rank = shape.len() as i64;
        let axis = if self.axis < 0 { self.axis + rank } else { self.axis };
        ensure!((0..rank).contains(&axis), "the quantization axis {} is not in {shape:?}", self.axis);
        let axis = axis as usize;
        ensure!(shape[axis] == parameters, "{parameters} scales along an axis of {}", shape[axis]);
        Ok((shape[..axis].iter().product(), parameters, shape[axis + 1..].iter().product()))
    }
}

impl Expansion for Linear {
    fn name(&self) -> StaticName {
        self.label()
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        solver: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        check_input_arity(inputs, self.inputs())?;
        check_output_arity(outputs, 1)?;
        match (self.quantize, self.zero_point) {
            (true, true) => solver.equals(&outputs[0].datum_type, &inputs[2].datum_type)?,
            (true, false) => solver.equals(&outputs[0].datum_type, u8::datum_type())?,
            (false, _) => solver.equals(&outputs[0].datum_type, &inputs[1].datum_type)?,
        }
        if self.zero_point && !self.quantize {
            solver.equals(&inputs[0].datum_type, &inputs[2].datum_type)?;
        }
        solver.equals(&inputs[0].shape, &outputs[0].shape)?;
        Ok(())
    }

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        model.wire_node(prefix, self.clone(), inputs)
    }
}

impl Op for Linear {
    fn name(&self) -> StaticName {
        self.label()
    }

    op_as_typed_op!();
}

impl EvalOp for Linear {
    op_out_of_plan!();

    fn eval(&self, _: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let shape = inputs[0].shape().to_vec();
        let scale_type = inputs[1].datum_type();
        let scales = inputs[1].cast_to::<f32>()?;
        let scales = scales.try_as_plain_ram()?;
        let scales = scales.as_slice::<f32>()?;
        let zeros = match inputs.get(2) {
            Some(zeros) => zeros.cast_to::<i32>()?.try_as_plain_ram()?.as_slice::<i32>()?.to_vec(),
            None => vec![0; scales.len()],
        };
        ensure!(zeros.len() == scales.len(), "{} zero points for {} scales", zeros.len(), scales.len());
        let (before, along, after) = self.split(&shape, scales.len())?;
        let mut place = 0;
        if self.quantize {
            let values = inputs[0].cast_to::<f32>()?;
            let values = values.try_as_plain_ram()?;
            let values = values.as_slice::<f32>()?;
            macro_rules! quantize {
                ($type:ty) => {{
                    let mut output = Vec::with_capacity(values.len());
                    for _ in 0..before {
                        for index in 0..along {
                            let (scale, zero) = (scales[index], zeros[index] as f32);
                            // A conversion from float saturates, and takes NaN to 0.
                            let quantized = |x: &f32| ((x / scale).round_ties_even() + zero) as $type;
                            output.extend(values[place..place + after].iter().map(quantized));
                            place += after;
                        }
                    }
                    Tensor::from_shape(&shape, &output)?
                }};
            }
            let output = match inputs.get(2).map_or(DatumType::U8, |zeros| zeros.datum_type()) {
                DatumType::U8 => quantize!(u8),
                DatumType::I8 => quantize!(i8),
                DatumType::U16 => quantize!(u16),
                DatumType::I16 => quantize!(i16),
                other => bail!("QuantizeLinear to {other:?} is not supported"),
            };
            return Ok(tvec!(output.into_tvalue()));
        }
        let mut output = Vec::with_capacity(inputs[0].len());
        macro_rules! dequantize {
            ($type:ty) => {{
                let values = inputs[0].try_as_plain_ram()?;
                let values = values.as_slice::<$type>()?;
                for _ in 0..before {
                    for index in 0..along {
                        let (scale, zero) = (scales[index], zeros[index]);
                        let real = |x: &$type| i32::from(*x).wrapping_sub(zero) as f32 * scale;
                        output.extend(values[place..place + after].iter().map(real));
                        place += after;
                    }
                }
            }};
        }
        match inputs[0].datum_type() {
            DatumType::U8 => dequantize!(u8),
            DatumType::I8 => dequantize!(i8),
            DatumType::U16 => dequantize!(u16),
            DatumType::I16 => dequantize!(i16),
            DatumType::I32 => dequantize!(i32),
            other => bail!("DequantizeLinear of {other:?} is not supported"),
        }
        let output = Tensor::from_shape(&shape, &output)?.cast_to_dt(scale_type)?.into_owned();
        Ok(tvec!(output.into_tvalue()))
    }
}

impl TypedOp for Linear {
    as_op!();

    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        ensure!(inputs.len() == self.inputs(), "{} has {} inputs", self.label(), self.inputs());
        let datum_type = match (self.quantize, inputs.get(2)) {
            (true, zeros) => zeros.map_or(DatumType::U8, |zeros| zeros.datum_type),
            (false, _) => inputs[1].datum_type,
        };
        Ok(tvec!(datum_type.fact(inputs[0].shape.clone())))
    }
}
