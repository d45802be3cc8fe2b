//! LSTM and GRU of our own, over all steps of a sequence.
//!
//! Responsible for: reading the operators from the graph ([`register`]), and handing those that are not of our kind to
//! tract's. The computation is in [`layer`].
//!
//! tract unrolls a recurrent layer into a loop over a graph, and some twenty operators a step; here a step is one product
//! and one pass over the gates. Ours are float32 with time first, without peepholes and lengths; with other activations
//! or clipping, [`refusals`](super::refusals) refuses the node.

pub(super) mod layer;

use super::blocks::StoredConst;
use super::rewrite::integer;
use layer::{Kind, Layer, Weights};
use std::sync::LazyLock;
use tensor_blocks::DType;
use tract_onnx::model::ParsingContext;
use tract_onnx::pb::NodeProto;
use tract_onnx::tract_hir::internal::*;

type Built = TractResult<(Box<dyn InferenceOp>, Vec<String>)>;

/// Puts the operators into tract's register, over tract's own.
pub(super) fn register(framework: &mut tract_onnx::Onnx) {
    framework.op_register.insert("LSTM", lstm);
    framework.op_register.insert("GRU", gru);
}

fn lstm(context: &ParsingContext, node: &NodeProto) -> Built {
    recurrence(context, node, "LSTM", Kind::Lstm)
}

fn gru(context: &ParsingContext, node: &NodeProto) -> Built {
    let linear_before_reset = integer(node, "linear_before_reset").unwrap_or(0) != 0;
    recurrence(context, node, "GRU", Kind::Gru { linear_before_reset })
}

fn recurrence(context: &ParsingContext, node: &NodeProto, name: &str, kind: Kind) -> Built {
    static TRACT: LazyLock<tract_onnx::Onnx> = LazyLock::new(tract_onnx::onnx);
    let builder = TRACT.op_register.0.get(name).context("tract has lost an operator")?;
    let (op, subgraphs) = builder(context, node)?;
    let given = |names: &[String], at: usize| names.get(at).is_some_and(|name| !name.is_empty());
    // Places among those inputs and outputs that are not left out.
    let place = |at: usize| given(&node.input, at).then(|| (0..at).filter(|&it| given(&node.input, it)).count());
    let ours = integer(node, "layout").unwrap_or(0) == 0
        && place(4).is_none()
        && place(7).is_none()
        && [0, 1, 2].iter().all(|&at| place(at).is_some());
    let Some(tract) = op.as_op().downcast_ref::<Box<dyn Expansion>>().filter(|_| ours) else {
        return Ok((op, subgraphs));
    };
    let made = Recurrence {
        tract: tract.clone(),
        kind,
        bias: place(3),
        initial: [place(5), place(6)],
        outputs: [given(&node.output, 0), given(&node.output, 1), given(&node.output, 2)],
    };
    Ok((expand(made), subgraphs))
}

/// A recurrent layer as the graph has it.
#[derive(Clone, Debug)]
struct Recurrence {
    /// tract's own, which has the rules, and which serves what is not of our kind.
    tract: Box<dyn Expansion>,
    kind: Kind,
    bias: Option<usize>,
    /// Inputs with the initial output and, for LSTM, the initial cell.
    initial: [Option<usize>; 2],
    /// Which of the sequence, the last output and the last cell are asked for.
    outputs: [bool; 3],
}

impl Expansion for Recurrence {
    fn name(&self) -> StaticName {
        Expansion::name(&*self.tract)
    }

    fn nboutputs(&self) -> TractResult<usize> {
        Expansion::nboutputs(&*self.tract)
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        solver: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        Expansion::rules(&*self.tract, solver, inputs, outputs)
    }

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        match self.layer(model, inputs)? {
            Some((layer, inputs)) => model.wire_node(prefix, layer, &inputs),
            None => Expansion::wire(&*self.tract, prefix, model, inputs),
        }
    }
}

impl Recurrence {
    /// Our operator and its inputs, if this layer is of our kind.
    fn layer(&self, model: &TypedModel, inputs: &[OutletId]) -> TractResult<Option<(Layer, TVec<OutletId>)>> {
        for &input in inputs {
            if model.outlet_fact(input)?.datum_type != f32::datum_type() {
                return Ok(None);
            }
        }
        let recurrent = model.outlet_fact(inputs[2])?;
        let Some(&[directions, sums, size]) = recurrent.shape.as_concrete() else { return Ok(None) };
        let Some(&[_, _, features]) = model.outlet_fact(inputs[1])?.shape.as_concrete() else { return Ok(None) };
        if !(1..=2).contains(&directions) || sums != self.kind.gates() * size || sums == 0 || features == 0 {
            return Ok(None);
        }
        let mut wired: TVec<OutletId> = tvec!(inputs[0]);
        let mut weights = |outlet: OutletId, width: usize| -> TractResult<Option<Weights>> {
            if let Some(stored) = model.nodes[outlet.node].op_as::<StoredConst>() {
                let tensor = stored.tensor.clone();
                let lies = tensor.dtype() == DType::Float32
                    && tensor.tiling.rows() == (directions * sums) as u64
                    && tensor.tiling.cols() == width as u64;
                return Ok(lies.then_some(Weights::Stored(tensor)));
            }
            if let Some(constant) = &model.outlet_fact(outlet)?.konst {
                return Ok(Some(Weights::turned(constant)?));
            }
            wired.push(outlet);
            Ok(Some(Weights::Input(wired.len() - 1)))
        };
        let (Some(input), Some(recurrent)) = (weights(inputs[1], features)?, weights(inputs[2], size)?) else {
            return Ok(None);
        };
        let mut wire = |place: Option<usize>| {
            place.map(|place| {
                wired.push(inputs[place]);
                wired.len() - 1
            })
        };
        let layer = Layer {
            kind: self.kind,
            directions,
            size,
            features,
            input,
            recurrent,
            bias: wire(self.bias),
            initial: [wire(self.initial[0]), wire(self.initial[1])],
            outputs: self.outputs,
        };
        Ok(Some((layer, wired)))
    }
}
