//! What a row costs.

use super::super::names::Names;
use tract_onnx::tract_hir::internal::*;

/// Multiply-adds and divisions of the operators of a graph, as algebra over its free dimensions.
pub(in crate::plan) struct Work {
    counts: Vec<TDim>,
    /// The dimension that counts the rows.
    rows: Option<Symbol>,
    free: Vec<Symbol>,
}

impl Work {
    /// Adds up what the operators say of themselves.
    pub fn of(model: &TypedModel, names: &Names, rows: Option<Symbol>) -> Work {
        let mut counts = Vec::new();
        for id in model.eval_order().unwrap_or_default() {
            let node = &model.nodes[id];
            let Ok(facts) = model.node_input_facts(id) else { continue };
            let costs = node.op.cost(&facts).unwrap_or_default();
            counts.extend(costs.into_iter().filter(|(cost, _)| cost.is_compute()).map(|(_, count)| count));
        }
        Work { counts, rows, free: names.inputs.iter().flatten().flatten().cloned().collect() }
    }

    /// Floating-point operations of a run of one row, two for a multiply-add, where the other free dimensions have this size.
    pub fn flops(&self, other: u64) -> f64 {
        let other = i64::try_from(other).unwrap_or(i64::MAX);
        let mut sizes = SymbolValues::default();
        for symbol in &self.free {
            sizes.set(symbol, if Some(symbol) == self.rows.as_ref() { 1 } else { other });
        }
        let counts = self.counts.iter().filter_map(|count| count.eval(&sizes).to_i64().ok());
        2.0 * counts.map(|count| count.max(0) as f64).fold(0.0, |sum, count| sum + count)
    }
}
