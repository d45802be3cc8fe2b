//! tract's way from a graph with known facts to one that runs, without what it does several times over.
//!
//! Responsible for: the translation into tract's core operators ([`into_typed`]), simplification ([`declutter`]) and choice
//! of kernels ([`optimize`]). The results are those of tract's own methods of these names; a session's first prediction waits
//! for them, and half of their time went into repetitions:
//! - `into_typed` infers all facts twice more, although [`analyse`](super::analyse) has left nothing to infer;
//! - each pass visits every node until no node changes, and a binary operator compares the sizes of its two inputs at each
//!   visit, which is algebra where dimensions are free.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use tract_onnx::tract_core::internal::translator::Translate;
use tract_onnx::tract_core::ops::binary::TypedBinOp;
use tract_onnx::tract_core::ops::dummy::Dummy;
use tract_onnx::tract_core::optim::{Optimizer, OptimizerSession, TypedPass};
use tract_onnx::tract_hir::infer::InferenceOp;
use tract_onnx::tract_hir::internal::*;

/// The graph in tract's core operators. Its facts are inferred already.
pub(super) fn into_typed(model: InferenceModel) -> TractResult<TypedModel> {
    for id in model.eval_order()? {
        let node = &model.nodes[id];
        if node.op.incorporate(&model, node)?.is_some() {
            // The graph has to be changed first, and then its facts inferred again.
            return model.into_typed();
        }
    }
    ToTyped.translate_model(&model.into_compact()?)
}

/// As the translator of the same name in tract's `into_typed`.
#[derive(Debug)]
struct ToTyped;

impl Translate<InferenceFact, Box<dyn InferenceOp>, TypedFact, Box<dyn TypedOp>> for ToTyped {
    fn translate_node(
        &self,
        source: &InferenceModel,
        node: &InferenceNode,
        target: &mut TypedModel,
        mapping: &HashMap<OutletId, OutletId>,
    ) -> TractResult<TVec<OutletId>> {
        let facts = source.node_output_facts(node.id)?;
        let known = || facts.iter().map(|fact| fact.value.concretize()).collect::<Option<TVec<_>>>();
        let keeps_state = node.op.state(&EvalContext::out_of_plan())?.is_some();
        if !InferenceModel::is_source(&node.op)
            && !keeps_state
            && let Some(values) = known()
        {
            let constant = |(slot, value)| target.add_const(format!("{}.{slot}", node.name), value);
            return values.into_iter().enumerate().map(constant).collect();
        }
        let outputs = node.op.to_typed(source, node, target, mapping)?;
        for &output in &outputs {
            target.outlet_fact(output)?.consistent().with_context(|| format!("translating {:?}", node.op))?;
        }
        Ok(outputs)
    }
}

/// As tract's `declutter`.
pub(super) fn declutter(model: &mut TypedModel) -> TractResult<()> {
    settling(Optimizer::declutter(), Settled::new()).session().optimize(model)
}

/// As tract's `optimize`, for a graph that is decluttered.
pub(super) fn optimize(model: &mut TypedModel) -> TractResult<()> {
    let around = |node: &TypedNode| Some((node.name.clone(), Surroundings::of(model, node)?));
    let settled = model.nodes.iter().filter_map(around).collect();
    model.optimize_with_session(&mut settling(Optimizer::codegen(), settled).session())
}

/// Exchanges the passes that ask operators. `settled` have been asked to declutter already.
fn settling(mut optimizer: Optimizer, settled: Settled) -> Optimizer {
    let mut settled = Some(settled);
    for pass in &mut optimizer.passes {
        match &*format!("{pass:?}") {
            "declutter" => {
                let settled = settled.take().unwrap_or_default();
                *pass = Box::new(AskOperators::new("declutter", declutter_node, settled));
            }
            "codegen" => {
                let codegen: Rewrite = |op, _, model, node| TypedOp::codegen(op, model, node);
                *pass = Box::new(AskOperators::new("codegen", codegen, Settled::new()));
            }
            _ => {}
        }
    }
    optimizer
}

/// As the operator's own `declutter_with_session`.
fn declutter_node(
    op: &dyn TypedOp,
    session: &mut OptimizerSession,
    model: &TypedModel,
    node: &TypedNode,
) -> TractResult<Option<TypedModelPatch>> {
    if let (Some(TypedBinOp(function, _)), &[left, right]) = (node.op_as(), &*model.node_input_facts(node.id)?)
        && left.uniform.is_none()
        && right.uniform.is_none()
        && left.shape.rank() == right.shape.rank()
        && left.shape.iter().zip(right.shape.iter()).all(|(left, right)| right.is_one() || left == right)
    {
        // No input is a neutral element, and the left one is no smaller: what is left is the function's own.
        return function.declutter(model, node);
    }
    op.declutter_with_session(session, model, node)
}

type Rewrite = fn(&dyn TypedOp, &mut OptimizerSession, &TypedModel, &TypedNode) -> TractResult<Option<TypedModelPatch>>;

/// Asks each operator whether it would be another one. A binary operator that would not is asked again only when what is
/// around it has changed.
#[derive(Clone)]
struct AskOperators {
    name: &'static str,
    rewrite: Rewrite,
    next: usize,
    /// By name of node. Shared by all clones of the pass: tract makes one for each round.
    settled: Arc<Mutex<Settled>>,
}

type Settled = HashMap<String, Surroundings>;

/// What a binary operator sees of a graph: its inputs' facts, and whether another such operator makes them.
#[derive(PartialEq)]
struct Surroundings {
    op: TypedBinOp,
    inputs: TVec<(TypedFact, bool)>,
}

impl Surroundings {
    fn of(model: &TypedModel, node: &TypedNode) -> Option<Surroundings> {
        let op = node.op_as::<TypedBinOp>()?.clone();
        let input = |&outlet: &OutletId| {
            Some((model.outlet_fact(outlet).ok()?.clone(), model.nodes[outlet.node].op_is::<TypedBinOp>()))
        };
        Some(Surroundings { op, inputs: node.inputs.iter().map(input).collect::<Option<_>>()? })
    }
}

impl AskOperators {
    fn new(name: &'static str, rewrite: Rewrite, settled: Settled) -> AskOperators {
        AskOperators { name, rewrite, next: 0, settled: Arc::new(Mutex::new(settled)) }
    }
}

impl fmt::Debug for AskOperators {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl TypedPass for AskOperators {
    fn reset(&mut self) -> TractResult<()> {
        self.next = 0;
        Ok(())
    }

    fn next(&mut self, session: &mut OptimizerSession, model: &TypedModel) -> TractResult<Option<TypedModelPatch>> {
        // Not held while an operator is asked: a loop simplifies its body with the same passes.
        let settled = || self.settled.lock().unwrap_or_else(PoisonError::into_inner);
        for node in &model.nodes[self.next..] {
            if node.op_is::<Dummy>() {
                continue;
            }
            let around = Surroundings::of(model, node);
            if around.is_some() && settled().get(&node.name) == around.as_ref() {
                continue;
            }
            let patch = (self.rewrite)(node.op.as_ref(), session, model, node)
                .with_context(|| format!("{} of node {node}", self.name))?;
            if let Some(mut patch) = patch {
                patch.push_context(format!("{} {node}", self.name));
                self.next = node.id + usize::from(patch.dont_apply_twice.is_some());
                return Ok(Some(patch));
            }
            if let Some(around) = around {
                settled().insert(node.name.clone(), around);
            }
        }
        Ok(None)
    }
}
