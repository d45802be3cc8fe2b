//! How a tensor is seen as a matrix.
//!
//! Responsible for: the views and their names, which are stored with each tensor: a released name keeps its meaning.

use serde::{Deserialize, Serialize};
use std::fmt;

/// How a tensor is seen as a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum View {
    /// (product of all dimensions but the last) x last: MatMul's K x N, embeddings, LSTM.
    RowsByLast,
    /// first x (product of the rest): Conv's O x (I kh kw).
    RowsByFirst,
    /// A rank-2 tensor stored N x K and seen as K x N: Gemm with transB = 1.
    Transposed,
}

impl View {
    /// "rows_by_last", "rows_by_first", "transposed".
    pub const fn name(self) -> &'static str {
        match self {
            View::RowsByLast => "rows_by_last",
            View::RowsByFirst => "rows_by_first",
            View::Transposed => "transposed",
        }
    }

    /// The view of a tensor of this rank in which rows and columns of its matrix are exchanged; none if there is none.
    pub const fn turned(self, rank: usize) -> Option<View> {
        match (self, rank) {
            (View::RowsByLast | View::RowsByFirst, 2) => Some(View::Transposed),
            (View::Transposed, 2) => Some(View::RowsByLast),
            _ => None,
        }
    }

    /// The view with this [`name`](View::name).
    pub fn from_name(name: &str) -> Option<View> {
        [View::RowsByLast, View::RowsByFirst, View::Transposed].into_iter().find(|view| view.name() == name)
    }
}

impl fmt::Display for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
