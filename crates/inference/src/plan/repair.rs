//! Operators of a typed graph that tract computes wrongly for some values.
//!
//! Responsible for: putting corrected operators in their places. [`rewrite`](super::rewrite) does what can be said
//! with ONNX's own operators; here is what needs to know element types.

use super::cast::ToDim;
use tract_onnx::tract_core::ops::cast::Cast;
use tract_onnx::tract_core::ops::nn::{Reduce, Reducer};
use tract_onnx::tract_hir::internal::*;
use tract_onnx::tract_hir::tract_ndarray::Axis;

/// Replaces operators in place.
pub(super) fn repair(model: &mut TypedModel) {
    for id in 0..model.nodes.len() {
        let exact = model.nodes[id].op_as::<Cast>().and_then(|op| {
            let from = model.outlet_fact(model.nodes[id].inputs[0]).ok()?.datum_type;
            ToDim::instead_of(op, from)
        });
        let node = &mut model.nodes[id];
        if let Some(exact) = exact {
            node.op = Box::new(exact);
            continue;
        }
        if let Some(reduce) = node.op_as::<Reduce>()
            && matches!(reduce.reducer, Reducer::Max | Reducer::Min)
            && node.outputs.iter().all(|outlet| outlet.fact.datum_type.is_float())
        {
            let extreme = Extreme(reduce.clone());
            node.op = Box::new(extreme);
        }
    }
}

/// The maximum or minimum of floating-point numbers. tract starts from the largest finite number, and so finds that
/// one where all are infinite.
#[derive(Clone, Debug, Hash, PartialEq, Eq)]
struct Extreme(Reduce);

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
