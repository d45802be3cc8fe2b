//! Sums over many elements.
//!
//! Responsible for: [`WideSum`] in the places of tract's sums. tract adds one element after the other in float32, and loses
//! digits: the mean of a picture of four million equal pixels comes out wrong in the third one. Here sums of short runs are
//! added in float64.

use tract_onnx::tract_core::ops::nn::{Reduce, Reducer};
use tract_onnx::tract_hir::internal::*;

/// Sums of fewer elements are tract's: what they lose is within float32's own noise.
const MANY: usize = 4096;
/// Elements that are added in float32, in as many sums side by side as a vector has.
const RUN: usize = 256;
const LANES: usize = 16;

/// The sum over axes in float32.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct WideSum {
    /// What it stands for.
    pub reduce: Reduce,
}

/// Puts it in the places of tract's.
pub(super) fn place(model: &mut TypedModel) {
    for node in &mut model.nodes {
        let sum = node.op_as::<Reduce>().filter(|reduce| reduce.reducer == Reducer::Sum).cloned();
        if let (Some(reduce), true) = (sum, node.outputs[0].fact.datum_type == f32::datum_type()) {
            node.op = Box::new(WideSum { reduce });
        }
    }
}

/// The sum of contiguous values.
fn sum(values: &[f32]) -> f64 {
    let mut total = 0.0;
    for run in values.chunks(RUN) {
        let (lanes, rest) = run.as_chunks::<LANES>();
        let mut sums = [0f32; LANES];
        for lane in lanes {
            sums.iter_mut().zip(lane).for_each(|(sum, value)| *sum += value);
        }
        total += sums.iter().chain(rest).map(|&value| f64::from(value)).sum::<f64>();
    }
    total
}

impl Op for WideSum {
    fn name(&self) -> StaticName {
        "WideSum".into()
    }

    op_as_typed_op!();
}

impl EvalOp for WideSum {
    op_out_of_plan!();

    fn eval(&self, context: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let shape: TVec<usize> = inputs[0].shape().into();
        let count: usize = self.reduce.axes.iter().map(|&axis| shape[axis]).product();
        if count < MANY || inputs[0].datum_type() != f32::datum_type() {
            return self.reduce.eval(context, inputs);
        }
        let input = args_1!(inputs);
        let kept = (0..shape.len()).filter(|axis| !self.reduce.axes.contains(axis));
        let mut order: TVec<usize> = kept.collect();
        order.extend((0..shape.len()).filter(|axis| self.reduce.axes.contains(axis)));
        let input = if order.is_sorted() { input } else { input.into_tensor().permute_axes(&order)?.into_tvalue() };
        let plain = input.try_as_plain_ram()?;
        let sums: Vec<f32> = plain.as_slice::<f32>()?.chunks_exact(count).map(|row| sum(row) as f32).collect();
        let mut output = tensor1(&sums);
        let mut made = shape;
        self.reduce.axes.iter().for_each(|&axis| made[axis] = 1);
        output.set_shape(&made)?;
        Ok(tvec!(output.into_tvalue()))
    }
}

impl TypedOp for WideSum {
    as_op!();

    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        self.reduce.output_facts(inputs)
    }

    fn axes_mapping(&self, inputs: &[&TypedFact], outputs: &[&TypedFact]) -> TractResult<AxesMapping> {
        self.reduce.axes_mapping(inputs, outputs)
    }

    fn cost(&self, inputs: &[&TypedFact]) -> TractResult<TVec<(Cost, TDim)>> {
        self.reduce.cost(inputs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_of_millions_keeps_its_digits() {
        let values: Vec<f32> = (0..3_000_017).map(|n| 0.1 + (n % 7) as f32 * 1e-3).collect();
        let exact: f64 = values.iter().map(|&value| f64::from(value)).sum();
        assert!((sum(&values) - exact).abs() < exact * 1e-6);
        let op = WideSum { reduce: Reduce::new(tvec!(1, 3), Reducer::Sum) };
        let input = Tensor::from_shape(&[2, 64, 3, 128], &values[..2 * 64 * 3 * 128]).unwrap();
        let expected = op.reduce.eval(&EvalContext::out_of_plan(), tvec!(input.clone().into_tvalue())).unwrap();
        let made = op.eval(&EvalContext::out_of_plan(), tvec!(input.into_tvalue())).unwrap();
        assert_eq!(made[0].shape(), expected[0].shape());
        made[0].close_enough(&expected[0], Approximation::Approximate).unwrap();
    }
}
