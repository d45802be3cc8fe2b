//! Mod with fmod = 0: the remainder that has the divisor's sign.
//!
//! tract computes C's remainder and adds the divisor where the signs differ, which leaves a zero with the dividend's
//! sign; ONNX's reference (NumPy's `mod`) gives it the divisor's.

use super::rewrite::integer;
use tract_onnx::model::ParsingContext;
use tract_onnx::pb::NodeProto;
use tract_onnx::tract_core::broadcast::multi_broadcast;
use tract_onnx::tract_core::ops::change_axes::wire_with_rank_broadcast;
use tract_onnx::tract_core::ops::math;
use tract_onnx::tract_hir::internal::*;

type Built = TractResult<(Box<dyn InferenceOp>, Vec<String>)>;

/// Puts the operator into tract's register.
pub(super) fn register(framework: &mut tract_onnx::Onnx) {
    framework.op_register.insert("Mod", modulo);
}

fn modulo(_: &ParsingContext, node: &NodeProto) -> Built {
    if integer(node, "fmod") == Some(1) {
        return Ok((tract_onnx::tract_hir::ops::math::Rem.into_hir(), vec![]));
    }
    Ok((expand(Modulo), vec![]))
}

#[derive(Clone, Debug, Hash, PartialEq, Eq)]
pub(super) struct Modulo;

impl Expansion for Modulo {
    fn name(&self) -> StaticName {
        "Mod".into()
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        solver: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        tract_onnx::tract_hir::ops::binary::rules(solver, inputs, outputs, |left, right| {
            left.common_super_type(right).with_context(|| format!("no common type of {left:?} and {right:?}"))
        })
    }

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        let types = [model.outlet_fact(inputs[0])?.datum_type, model.outlet_fact(inputs[1])?.datum_type];
        let common = types[0].common_super_type(types[1]).context("no common type")?;
        let inputs = tract_onnx::tract_hir::ops::binary::wire_cast(prefix, model, inputs, common)?;
        if common == DatumType::TDim {
            // Sizes are never negative.
            return wire_with_rank_broadcast(prefix, model, math::rem(), &inputs);
        }
        model.wire_node(prefix, Modulo, &inputs)
    }
}

impl Op for Modulo {
    fn name(&self) -> StaticName {
        "Mod".into()
    }

    op_as_typed_op!();
}

impl EvalOp for Modulo {
    op_out_of_plan!();

    fn eval(&self, _: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let (left, right) = args_2!(inputs);
        let shape = multi_broadcast(&[left.shape(), right.shape()])?;
        macro_rules! combine {
            ($type:ty, $remainder:expr) => {{
                let left = left.to_plain_array_view::<$type>()?;
                let right = right.to_plain_array_view::<$type>()?;
                super::ops::broadcast_with(&left, &right, &shape, $remainder)?.into_tensor()
            }};
        }
        macro_rules! signed {
            ($type:ty) => {{
                ensure!(!right.to_plain_array_view::<$type>()?.iter().any(|&it| it == 0), "Mod by zero");
                combine!($type, |x: $type, y: $type| {
                    let rest = x.wrapping_rem(y);
                    if rest != 0 && (rest < 0) != (y < 0) { rest + y } else { rest }
                })
            }};
        }
        macro_rules! unsigned {
            ($type:ty) => {{
                ensure!(!right.to_plain_array_view::<$type>()?.iter().any(|&it| it == 0), "Mod by zero");
                combine!($type, |x: $type, y: $type| x % y)
            }};
        }
        let output = match left.datum_type() {
            DatumType::F16 => {
                combine!(f16, |x: f16, y: f16| f16::from_f32(float(x.to_f32().into(), y.to_f32().into()) as f32))
            }
            DatumType::F32 => combine!(f32, |x: f32, y: f32| float(x.into(), y.into()) as f32),
            DatumType::F64 => combine!(f64, float),
            DatumType::U8 => unsigned!(u8),
            DatumType::U16 => unsigned!(u16),
            DatumType::U32 => unsigned!(u32),
            DatumType::U64 => unsigned!(u64),
            DatumType::I8 => signed!(i8),
            DatumType::I16 => signed!(i16),
            DatumType::I32 => signed!(i32),
            DatumType::I64 => signed!(i64),
            other => bail!("Mod of {other:?}"),
        };
        Ok(tvec!(output.into_tvalue()))
    }
}

/// NumPy's `mod`: exact for narrower floats too, since the remainder of two of them is one of them.
fn float(x: f64, y: f64) -> f64 {
    let rest = x % y;
    if rest == 0.0 {
        return 0f64.copysign(y);
    }
    if (rest < 0.0) != (y < 0.0) { rest + y } else { rest }
}

impl TypedOp for Modulo {
    as_op!();

    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        ensure!(inputs[0].datum_type == inputs[1].datum_type, "Mod of two element types");
        let shape = multi_broadcast(&[&inputs[0].shape, &inputs[1].shape])?;
        Ok(tvec!(inputs[0].datum_type.fact(shape)))
    }
}

#[cfg(test)]
mod tests {
    use super::float;

    #[test]
    fn a_remainder_has_the_sign_of_the_divisor() {
        assert_eq!((float(-7.0, 3.0), float(7.0, -3.0), float(7.0, 3.0)), (2.0, -2.0, 1.0));
        assert!(float(0.0, -2.0).is_sign_negative() && float(-6.0, 3.0).is_sign_positive());
        assert!(float(1.0, 0.0).is_nan());
    }
}
