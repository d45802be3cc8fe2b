//! The walk through the graph, from the inputs' axes to the outputs'.

use super::operators::rule;
use super::shapes::{has, same};
use super::{Operators, Run, State};
use crate::signature::Signature;
use std::collections::HashMap;
use tract_onnx::tract_core::ops::scan::{InputMapping, Scan};
use tract_onnx::tract_core::ops::source::TypedSource;
use tract_onnx::tract_hir::internal::*;

/// Bodies of loops may have loops.
const DEPTH: usize = 8;

/// By output, the axis of its rows.
///
/// # Errors
/// Why the rows are not independent.
pub(super) fn outputs(
    model: &TypedModel,
    symbol: &Symbol,
    inputs: &[usize],
    signature: &Signature,
    operators: &Operators,
) -> Result<Vec<usize>, String> {
    let given = inputs.iter().map(|&axis| State::Rows(Run::at(axis))).collect();
    let states = Walk { symbol, operators, depth: 0 }.model(model, given)?;
    let axis = |(state, port): (State, &crate::signature::Port)| match state {
        State::Rows(run) if run.is_plain() => Ok(run.axis),
        State::Rows(_) => Err(format!("output \"{}\" has more indices than rows", port.name)),
        State::Free | State::Count => Err(format!("output \"{}\" does not depend on the rows", port.name)),
    };
    states.into_iter().zip(&signature.outputs).map(axis).collect()
}

/// A walk for one dimension.
pub(super) struct Walk<'a> {
    pub symbol: &'a Symbol,
    operators: &'a Operators,
    depth: usize,
}

impl Walk<'_> {
    /// The outputs' states for these of the inputs.
    fn model(&self, model: &TypedModel, inputs: Vec<State>) -> Result<Vec<State>, String> {
        let misread = |error: TractError| format!("the graph cannot be followed: {error}");
        if inputs.len() != model.inputs.len() {
            return Err("the graph has other inputs than its signature".into());
        }
        let mut states: HashMap<OutletId, State> = model.inputs.iter().copied().zip(inputs).collect();
        for (outlet, state) in &states {
            self.check(state, model.outlet_fact(*outlet).map_err(misread)?)
                .map_err(|why| format!("input \"{}\" {why}", model.nodes[outlet.node].name))?;
        }
        for id in model.eval_order().map_err(misread)? {
            let node = &model.nodes[id];
            if node.op_is::<TypedSource>() {
                continue;
            }
            let given: Option<Vec<State>> = node.inputs.iter().map(|outlet| states.get(outlet).cloned()).collect();
            let given = given.ok_or("the graph is in no order")?;
            let facts = model.node_input_facts(id).map_err(misread)?;
            let made = self.node(node, &given, &facts).map_err(|why| self.reason(node, &why))?;
            for (slot, state) in made.into_iter().enumerate() {
                self.check(&state, &node.outputs[slot].fact).map_err(|why| self.reason(node, &why))?;
                states.insert(OutletId::new(id, slot), state);
            }
        }
        let state = |outlet| states.get(outlet).cloned().ok_or_else(|| "an output is not computed".to_owned());
        model.outputs.iter().map(state).collect()
    }

    fn node(&self, node: &TypedNode, given: &[State], facts: &[&TypedFact]) -> Result<Vec<State>, String> {
        let made = match node.op_as::<Scan>() {
            Some(scan) => self.scan(scan, node.outputs.len(), given)?,
            None => rule(self.symbol, node, given, facts)?,
        };
        if made.len() == node.outputs.len() { Ok(made) } else { Err("has other outputs than are known".into()) }
    }

    /// What was derived, compared with the shape that was inferred.
    fn check(&self, state: &State, fact: &TypedFact) -> Result<(), String> {
        let axis = match state {
            State::Rows(run) => {
                let size = run.before.clone() * self.symbol.to_dim() * &run.after;
                if !fact.shape.get(run.axis).is_some_and(|dim| same(dim, &size)) {
                    return Err("makes a shape that is not understood".into());
                }
                Some(run.axis)
            }
            State::Free | State::Count => None,
        };
        let twice = fact.shape.iter().enumerate().any(|(at, dim)| Some(at) != axis && has(dim, self.symbol));
        if twice { Err("has a dimension that grows with the number of rows".into()) } else { Ok(()) }
    }

    /// A loop: rows go through its body side by side if it does not loop over them.
    fn scan(&self, scan: &Scan, outputs: usize, given: &[State]) -> Result<Vec<State>, String> {
        if self.depth >= DEPTH || given.len() != scan.input_mapping.len() {
            return Err("is a loop that is not followed".into());
        }
        for (state, mapping) in given.iter().zip(&scan.input_mapping) {
            match (state, mapping) {
                (State::Count, _) => return Err("takes the number of rows as a value".into()),
                (State::Rows(run), InputMapping::Scan(info)) if info.axis == run.axis => {
                    return Err("loops over the rows".into());
                }
                _ => {}
            }
        }
        let inside = Walk { depth: self.depth + 1, ..*self };
        let made = inside.model(&scan.body, given.to_vec())?;
        // What a step hands to the next must be what it expects of the one before.
        let before = given.iter().zip(&scan.input_mapping).filter(|(_, mapping)| mapping.is_state());
        let after = made.iter().zip(&scan.output_mapping).filter(|(_, mapping)| mapping.state);
        let (before, after): (Vec<_>, Vec<_>) = (before.map(|it| it.0).collect(), after.map(|it| it.0).collect());
        if before != after {
            return Err("has a state that depends on the rows in another way after a step than before".into());
        }
        let mut states = vec![None; outputs];
        for (state, mapping) in made.iter().zip(&scan.output_mapping) {
            if let Some((slot, info)) = mapping.scan {
                if matches!(state, State::Rows(run) if run.axis == info.axis) {
                    return Err("stacks its steps along the axis of the rows".into());
                }
                *states.get_mut(slot).ok_or("has other outputs than are known")? = Some(state.clone());
            }
            if let Some(slot) = mapping.last_value_slot {
                *states.get_mut(slot).ok_or("has other outputs than are known")? = Some(state.clone());
            }
        }
        states.into_iter().collect::<Option<Vec<_>>>().ok_or_else(|| "has other outputs than are known".into())
    }

    /// Operator, node and reason, the operator being ONNX's where the node can be told.
    fn reason(&self, node: &TypedNode, why: &str) -> String {
        let mut name = node.name.as_str();
        let operator = loop {
            match (self.operators.get(name), name.rfind('.')) {
                (Some(operator), _) => break Some(operator),
                (None, Some(end)) => name = &name[..end],
                (None, None) => break None,
            }
        };
        match operator {
            Some(operator) => format!("{operator} \"{name}\" {why}"),
            // A reason from inside of a loop has its node already.
            None => format!("{} \"{}\" {why}", node.op.name(), node.name),
        }
    }
}
