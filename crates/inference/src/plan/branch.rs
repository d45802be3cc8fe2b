//! ONNX If, resolved where its condition is known.
//!
//! Responsible for: exports that branch on shapes. Their condition is known once the input shapes are, and the
//! branch that is not taken often contradicts those shapes, so it must not even be looked at; tract looks at both and
//! keeps both. Here a known condition puts the taken branch in the place of the node. An unknown one becomes tract's
//! own operator.

use super::analyse::analyse;
use super::build::CONSTANT_LIMIT;
use std::sync::atomic::AtomicBool;
use tract_onnx::model::{ParseResult, ParsingContext};
use tract_onnx::pb::{GraphProto, NodeProto};
use tract_onnx::tract_core::ops::logic::IfThenElse;
use tract_onnx::tract_hir::internal::*;

/// A subgraph and, for each of its inputs, the node's input that it stands for.
#[derive(Clone, Debug)]
struct Body {
    model: InferenceModel,
    mapping: Vec<usize>,
}

#[derive(Clone, Debug)]
pub(super) struct Branch {
    then_body: Body,
    else_body: Body,
}

impl PartialEq for Branch {
    fn eq(&self, _: &Branch) -> bool {
        false
    }
}

impl Eq for Branch {}

/// Reads an If node; what its branches use from outside become further inputs of the node.
pub(super) fn branch(context: &ParsingContext, node: &NodeProto) -> TractResult<(Box<dyn InferenceOp>, Vec<String>)> {
    let graph = |name: &str| -> TractResult<&GraphProto> {
        let attribute = node.attribute.iter().find(|attribute| attribute.name == name);
        attribute.and_then(|attribute| attribute.g.as_ref()).with_context(|| format!("If without {name}"))
    };
    let mut closures: Vec<String> = vec![];
    let mut body = |graph: &GraphProto| -> TractResult<Body> {
        let ParseResult { model, unresolved_inputs, .. } = context.parse_graph(graph)?;
        ensure!(model.inputs.len() == unresolved_inputs.len(), "a branch of If has inputs");
        let mapping = unresolved_inputs
            .into_iter()
            .map(|name| {
                let place = closures.iter().position(|known| *known == name).unwrap_or_else(|| {
                    closures.push(name);
                    closures.len() - 1
                });
                // The condition is the node's first input.
                place + 1
            })
            .collect();
        Ok(Body { model, mapping })
    };
    let then_body = body(graph("then_branch")?)?;
    let else_body = body(graph("else_branch")?)?;
    let outputs = node.output.iter().filter(|name| !name.is_empty()).count();
    for body in [&then_body, &else_body] {
        ensure!(body.model.outputs.len() == outputs, "a branch of If has not the outputs of its node");
    }
    Ok((Box::new(Branch { then_body, else_body }), closures))
}

fn truth(fact: &InferenceFact) -> TractResult<Option<bool>> {
    fact.value.concretize().map(|value| value.cast_to_scalar::<bool>()).transpose()
}

impl Body {
    /// Exchanges what is known inside with what is known outside.
    fn infer(&mut self, inputs: &mut [InferenceFact], outputs: &mut [InferenceFact]) -> TractResult<()> {
        loop {
            let mut changed = false;
            for (inner, &outer) in self.mapping.iter().enumerate() {
                changed |= self.model.input_fact_mut(inner)?.unify_with_mut(&mut inputs[outer])?;
            }
            for (slot, output) in outputs.iter_mut().enumerate() {
                changed |= self.model.output_fact_mut(slot)?.unify_with_mut(output)?;
            }
            if !changed {
                return Ok(());
            }
            analyse(&mut self.model, CONSTANT_LIMIT, &AtomicBool::new(false))
                .map_err(|error| format_err!("{error}"))?;
        }
    }

    /// Puts the nodes of this body into the target.
    fn splice(&self, prefix: &str, target: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        let body = self.model.clone().into_typed()?;
        let mut places: HashMap<OutletId, OutletId> = HashMap::new();
        for (inner, &outer) in body.inputs.iter().zip(&self.mapping) {
            places.insert(*inner, inputs[outer]);
        }
        for id in body.eval_order()? {
            if places.contains_key(&OutletId::new(id, 0)) {
                continue;
            }
            let node = &body.nodes[id];
            let wires: TVec<OutletId> = node.inputs.iter().map(|input| places[input]).collect();
            let made = target.wire_node(format!("{prefix}.{}", node.name), node.op.clone(), &wires)?;
            places.extend(made.iter().enumerate().map(|(slot, outlet)| (OutletId::new(id, slot), *outlet)));
        }
        Ok(body.outputs.iter().map(|output| places[output]).collect())
    }
}

impl Branch {
    /// Both branches.
    pub fn bodies(&self) -> [&InferenceModel; 2] {
        [&self.then_body.model, &self.else_body.model]
    }
}

impl Op for Branch {
    fn name(&self) -> StaticName {
        "If".into()
    }

    not_a_typed_op!();
}

impl EvalOp for Branch {
    not_out_of_plan!();
}

impl InferenceOp for Branch {
    fn infer_facts(
        &mut self,
        inputs: TVec<&InferenceFact>,
        outputs: TVec<&InferenceFact>,
        observed: TVec<&InferenceFact>,
    ) -> TractResult<(TVec<InferenceFact>, TVec<InferenceFact>, TVec<InferenceFact>)> {
        let mut inputs: TVec<InferenceFact> = inputs.into_iter().cloned().collect();
        let mut outputs: TVec<InferenceFact> = outputs.into_iter().cloned().collect();
        match truth(&inputs[0])? {
            Some(true) => self.then_body.infer(&mut inputs, &mut outputs)?,
            Some(false) => self.else_body.infer(&mut inputs, &mut outputs)?,
            // Nothing yet: the condition may come to be known, and one branch's shapes must not be imposed then.
            None => {}
        }
        Ok((inputs, outputs, observed.into_iter().cloned().collect()))
    }

    fn nboutputs(&self) -> TractResult<usize> {
        Ok(self.then_body.model.outputs.len())
    }

    fn to_typed(
        &self,
        source: &InferenceModel,
        node: &InferenceNode,
        target: &mut TypedModel,
        mapping: &HashMap<OutletId, OutletId>,
    ) -> TractResult<TVec<OutletId>> {
        let inputs: TVec<OutletId> = node.inputs.iter().map(|input| mapping[input]).collect();
        let mut bodies = [self.then_body.clone(), self.else_body.clone()];
        let mut facts = source.node_input_facts(node.id)?.into_iter().cloned().collect::<TVec<InferenceFact>>();
        if let Some(truth) = truth(&facts[0])? {
            return bodies[usize::from(!truth)].splice(&node.name, target, &inputs);
        }
        let whole = || -> TractResult<TVec<OutletId>> {
            for body in &mut bodies {
                let mut outputs: TVec<InferenceFact> = body.model.outputs.iter().map(|_| Default::default()).collect();
                body.infer(&mut facts, &mut outputs)?;
            }
            let [then_body, else_body] = bodies;
            let op = IfThenElse {
                then_body: then_body.model.into_typed()?,
                then_input_mapping: then_body.mapping,
                else_body: else_body.model.into_typed()?,
                else_input_mapping: else_body.mapping,
            };
            target.wire_node(&*node.name, op, &inputs)
        };
        whole().context("the condition of If is not a constant")
    }

    as_op!();
}
