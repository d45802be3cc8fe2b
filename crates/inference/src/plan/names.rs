//! Names of free dimensions, on the way from a signature to tract's symbols.
//!
//! Responsible for: one symbol per name and model. A name that is no plain identifier (exporters write expressions
//! such as `2*seq + 1`) is a symbol of its own: equal texts mean equal sizes, and nothing is derived from the text.

use crate::signature::{Dim, Signature};
use std::collections::HashMap;
use tract_onnx::tract_core::internal::{Symbol, SymbolScope, TDim, ToDim};

/// The symbols of a model's free input dimensions.
#[derive(Clone, Debug, Default)]
pub(super) struct Names {
    by_name: HashMap<String, Symbol>,
    /// For each input and axis, the symbol of a free dimension.
    pub inputs: Vec<Vec<Option<Symbol>>>,
}

impl Names {
    /// Makes the symbols of this signature in the model's scope.
    pub fn new(signature: &Signature, scope: &SymbolScope) -> Names {
        let mut names = Names::default();
        for (input, port) in signature.inputs.iter().enumerate() {
            let mut axes = Vec::with_capacity(port.shape.len());
            for (axis, dim) in port.shape.iter().enumerate() {
                axes.push(match dim {
                    Dim::Fixed(_) => None,
                    Dim::Symbol(name) => Some(names.named(name, scope)),
                    Dim::Unknown => Some(scope.sym(&format!("free_{input}_{axis}"))),
                });
            }
            names.inputs.push(axes);
        }
        if let Some(batch) = names.batch() {
            let _ = scope.add_assertion(format!("{batch}>=1"));
        }
        names
    }

    /// The symbol that is the first dimension of every input, and no other dimension.
    pub fn batch(&self) -> Option<&Symbol> {
        let batch = self.inputs.first()?.first()?.as_ref()?;
        let fits = |axes: &Vec<Option<Symbol>>| {
            axes.first() == Some(&Some(batch.clone())) && axes[1..].iter().flatten().all(|symbol| symbol != batch)
        };
        self.inputs.iter().all(fits).then_some(batch)
    }

    /// The same with no other symbol than the batch, if there is one.
    pub fn of_batch_only(&self) -> Names {
        let batch = self.batch().cloned();
        let keep = |symbol: &Option<Symbol>| symbol.clone().filter(|symbol| batch.as_ref() == Some(symbol));
        let inputs = self.inputs.iter().map(|axes| axes.iter().map(keep).collect()).collect();
        Names { by_name: HashMap::new(), inputs }
    }

    fn named(&mut self, name: &str, scope: &SymbolScope) -> Symbol {
        let next = self.by_name.len();
        self.by_name
            .entry(name.to_owned())
            .or_insert_with(|| {
                let plain = name.starts_with(|c: char| c.is_ascii_alphabetic())
                    && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
                    && name.len() <= 40;
                scope.sym(&if plain { format!("d_{name}") } else { format!("named_{next}") })
            })
            .clone()
    }

    /// The dimensions of this input, free ones as symbols.
    pub fn dims(&self, signature: &Signature, input: usize) -> Vec<TDim> {
        signature.inputs[input]
            .shape
            .iter()
            .zip(&self.inputs[input])
            .map(|(dim, symbol)| match (dim, symbol) {
                (_, Some(symbol)) => symbol.to_dim(),
                (Dim::Fixed(size), None) => TDim::Val(*size as i64),
                _ => TDim::Val(1),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::signature::Port;
    use tensor_blocks::DType;

    #[test]
    fn equal_names_are_one_symbol() {
        let free = |name: &str| Dim::Symbol(name.into());
        let port = |name: &str, shape| Port::new(name, DType::Float32.into(), shape);
        let signature = Signature {
            inputs: vec![
                port("a", vec![free("n"), Dim::Fixed(3), Dim::Unknown]),
                port("b", vec![free("n"), free("2*n + (m)"), Dim::Unknown]),
            ],
            outputs: vec![],
            opsets: vec![],
            ir_version: 8,
            producer: String::new(),
        };
        let scope = SymbolScope::default();
        let names = Names::new(&signature, &scope);
        let (a, b) = (names.dims(&signature, 0), names.dims(&signature, 1));
        assert_eq!((a[0].clone(), a[1].clone()), (b[0].clone(), TDim::Val(3)));
        assert_ne!(a[0], b[1]);
        assert_ne!(a[2], b[2]);
    }
}
