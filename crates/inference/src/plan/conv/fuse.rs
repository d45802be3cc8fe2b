//! What follows a convolution, as a part of it.
//!
//! Responsible for: taking batch normalisation (a factor and an addition for each channel), the addition of a shortcut,
//! and a function of one value into the [`Convolution`] whose only user they are: each would be a pass over memory.

use super::Convolution;
use crate::kernels::epilogue::Activation;
use tract_onnx::tract_core::ops::binary::TypedBinOp;
use tract_onnx::tract_core::ops::element_wise::ElementWiseOp;
use tract_onnx::tract_core::ops::nn::LeakyRelu;
use tract_onnx::tract_hir::internal::*;

/// Takes up what follows the convolutions of a graph.
pub(in crate::plan) fn fuse(model: &mut TypedModel) -> TractResult<()> {
    let mut fused = false;
    let mut id = 0;
    while id < model.nodes.len() {
        if let Some((user, op, added)) = with_user(model, id)? {
            let name = model.nodes[user].name.clone();
            let mut inputs = model.nodes[id].inputs.clone();
            inputs.extend(added);
            let mut patch = TypedModelPatch::default();
            let taps = patch.taps(model, &inputs)?;
            let wires = patch.wire_node(name, op, &taps)?;
            patch.shunt_outside(model, OutletId::new(user, 0), wires[0])?;
            patch.apply(model)?;
            // The new node comes last, so it is looked at again.
            fused = true;
        }
        id += 1;
    }
    if fused {
        model.compact()?;
    }
    Ok(())
}

/// The convolution of this node with what its only user does, the user, and what has become an input.
fn with_user(model: &TypedModel, id: usize) -> TractResult<Option<(usize, Convolution, Option<OutletId>)>> {
    let node = &model.nodes[id];
    let Some(op) = node.op_as::<Convolution>() else { return Ok(None) };
    let outlet = OutletId::new(id, 0);
    if model.outputs.contains(&outlet) {
        return Ok(None);
    }
    let &[inlet] = &*node.outputs[0].successors else {
        return Ok(hard_swish(model, id)?.map(|user| {
            let op = Convolution { activation: Activation::HardSwish, then: Some((6.0, 0.0)), ..op.clone() };
            (user, op, None)
        }));
    };
    let user = &model.nodes[inlet.node];
    let same = |fact: &TypedFact| {
        fact.shape == node.outputs[0].fact.shape && fact.datum_type == node.outputs[0].fact.datum_type
    };
    if user.outputs.len() != 1 || !same(&user.outputs[0].fact) {
        return Ok(None);
    }
    let mut op = op.clone();
    if let Some(binary) = user.op_as::<TypedBinOp>() {
        let other = user.inputs[1 - inlet.slot];
        let fact = model.outlet_fact(other)?;
        let open = op.activation == Activation::Identity;
        if let Some(constant) = &fact.konst {
            let Some(values) = op.of_channels(constant)? else { return Ok(None) };
            let behind = op.activation != Activation::Identity && constant.len() == 1;
            let (scale, bias) = op.then.unwrap_or((1.0, 0.0));
            let value = values[0];
            let taken = match binary.0.name() {
                "Add" if open => op.shift(&values),
                "Sub" if open && inlet.slot == 0 => op.shift(&values.iter().map(|value| -value).collect::<Vec<_>>()),
                "Mul" if open => op.stretch(&values),
                "Div" if open && inlet.slot == 0 => {
                    op.stretch(&values.iter().map(|value| 1.0 / value).collect::<Vec<_>>())
                }
                "Max" if constant.len() == 1 && op.then.is_none() => op.at_least(value),
                "Min" if constant.len() == 1 && op.then.is_none() => op.at_most(value),
                "Add" if behind => op.finally(scale, bias + value),
                "Sub" if behind && inlet.slot == 0 => op.finally(scale, bias - value),
                "Mul" if behind => op.finally(scale * value, bias * value),
                "Div" if behind && inlet.slot == 0 => op.finally(scale / value, bias / value),
                _ => false,
            };
            return Ok(taken.then_some((inlet.node, op, None)));
        }
        // The other operand was there before: it cannot depend on what has no other user.
        if binary.0.name() == "Add" && open && !op.added && other != outlet && same(fact) {
            op.added = true;
            return Ok(Some((inlet.node, op, Some(other))));
        }
        return Ok(None);
    }
    let Some(function) = user.op_as::<ElementWiseOp>() else { return Ok(None) };
    if op.activation != Activation::Identity || op.then.is_some() {
        return Ok(None);
    }
    op.activation = match &*function.0.name() {
        "Sigmoid" => Activation::Sigmoid,
        "Tanh" => Activation::Tanh,
        "Silu" => Activation::Silu,
        "GeluExact" => Activation::Gelu,
        "HardSwish" => Activation::HardSwish,
        _ => match function.0.downcast_ref::<LeakyRelu>() {
            Some(leaky) => Activation::LeakyRelu(leaky.alpha),
            None => return Ok(None),
        },
    };
    Ok(Some((inlet.node, op, None)))
}

/// The product x * min(max(x + 3, 0), 6) of this node's value x, if that is all it is used for.
fn hard_swish(model: &TypedModel, id: usize) -> TractResult<Option<usize>> {
    let node = &model.nodes[id];
    let outlet = OutletId::new(id, 0);
    let open = |op: &Convolution| op.activation == Activation::Identity;
    let &[first, second] = &*node.outputs[0].successors else { return Ok(None) };
    if !node.op_as::<Convolution>().is_some_and(open) {
        return Ok(None);
    }
    let named = |id: usize, name: &str| model.nodes[id].op_as::<TypedBinOp>().is_some_and(|op| op.0.name() == name);
    let (sum, product) = if named(first.node, "Add") { (first.node, second.node) } else { (second.node, first.node) };
    if !named(product, "Mul") || !named(sum, "Add") {
        return Ok(None);
    }
    // The node's only user, if it is this function of it and this number.
    let step = |id: usize, name: &str, number: f32| -> TractResult<Option<usize>> {
        let constants = model.nodes[id].inputs.iter().map(|input| Ok(model.outlet_fact(*input)?.konst.clone()));
        let constants: Vec<Arc<Tensor>> = constants.filter_map(TractResult::transpose).collect::<TractResult<_>>()?;
        let [constant] = &*constants else { return Ok(None) };
        let fits = named(id, name)
            && constant.len() == 1
            && constant.datum_type() == f32::datum_type()
            && constant.try_as_plain_ram()?.as_slice::<f32>()? == [number];
        let only = match &*model.nodes[id].outputs[0].successors {
            [only] if fits && !model.outputs.contains(&OutletId::new(id, 0)) => Some(only.node),
            _ => None,
        };
        Ok(only)
    };
    let Some(low) = step(sum, "Add", 3.0)? else { return Ok(None) };
    let Some(high) = step(low, "Max", 0.0)? else { return Ok(None) };
    let Some(end) = step(high, "Min", 6.0)? else { return Ok(None) };
    let both = [outlet, OutletId::new(high, 0)];
    let whole = end == product && both.iter().all(|outlet| model.nodes[product].inputs.contains(outlet));
    Ok((whole && model.nodes[product].outputs[0].fact.shape == node.outputs[0].fact.shape).then_some(product))
}

impl Convolution {
    fn finally(&mut self, scale: f32, bias: f32) -> bool {
        self.then = Some((scale, bias));
        true
    }

    /// The constant's value for each channel of the output, if it has one for each.
    fn of_channels(&self, constant: &Tensor) -> TractResult<Option<Vec<f32>>> {
        let channels = self.pool.output_channels;
        let elsewhere = constant.shape().iter().enumerate().any(|(axis, &size)| axis != 1 && size != 1);
        let whole = constant.rank() == self.pool.rank() + 2 && constant.len() == channels && !elsewhere;
        if constant.datum_type() != f32::datum_type() || !(whole || constant.len() == 1) {
            return Ok(None);
        }
        let values = constant.try_as_plain_ram()?;
        let values = values.as_slice::<f32>()?;
        Ok(Some(if whole { values.to_vec() } else { vec![values[0]; channels] }))
    }

    fn shift(&mut self, by: &[f32]) -> bool {
        self.bias = Some(match &self.bias {
            Some(bias) => bias.iter().zip(by).map(|(bias, by)| bias + by).collect(),
            None => by.into(),
        });
        true
    }

    fn stretch(&mut self, by: &[f32]) -> bool {
        // What was added would be stretched too.
        if self.added {
            return false;
        }
        let product = |values: &Arc<[f32]>| values.iter().zip(by).map(|(value, by)| value * by).collect();
        self.bias = self.bias.as_ref().map(product);
        self.scale = Some(self.scale.as_ref().map_or_else(|| by.into(), product));
        true
    }

    fn at_least(&mut self, low: f32) -> bool {
        self.activation = match self.activation {
            Activation::Identity if low == 0.0 => Activation::Relu,
            Activation::Identity => Activation::Clip(low, f32::INFINITY),
            // Whichever comes last wins, so the order of two limits matters only if they cross.
            Activation::Clip(f32::NEG_INFINITY, high) if low <= high => Activation::Clip(low, high),
            _ => return false,
        };
        true
    }

    fn at_most(&mut self, high: f32) -> bool {
        self.activation = match self.activation {
            Activation::Identity => Activation::Clip(f32::NEG_INFINITY, high),
            Activation::Relu if high >= 0.0 => Activation::Clip(0.0, high),
            Activation::Clip(low, f32::INFINITY) if low <= high => Activation::Clip(low, high),
            _ => return false,
        };
        true
    }
}
