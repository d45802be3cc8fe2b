//! Feed-forward nets whose parameters come from outside: one net for thousands of models of one architecture.
//!
//! Responsible for: [`FeedForward`], which is recognised from a stored graph ([`graph`]) and computes with tensors that a
//! caller hands in where they lie ([`run`]), and which is trained in memory ([`train()`]). A set of models has one graph and one such net; a member is a list of tensors.
//!
//! ```text
//!   stored graph  --of_graph-->  FeedForward { layers }        params[ordinal]: the member's tensors, in memory
//!                                     |                              |
//!                                     +----------- run(params, x) ---+-->  out
//! ```
//!
//! Invariants:
//! - what is recognised gives the same bits as the [`Plan`](crate::plan::Plan) of the same graph with the same tensors inline,
//!   for any number of rows; what would not is not recognised;
//! - recognising a graph of a stranger ends with a net or with none, whatever the graph contains;
//! - a run packs and copies no tensor (but up to four columns of a narrow one), and allocates nothing once its scratch has grown.

mod graph;
mod loss;
mod options;
mod run;
mod train;

#[cfg(test)]
mod graph_tests;
#[cfg(test)]
mod models;
#[cfg(test)]
mod run_tests;
#[cfg(test)]
mod train_tests;

pub use options::{Loss, TrainOptions};
pub use run::Scratch;
pub use train::{TrainReport, train, train_onnx};

/// A chain of products with constant matrices, with what follows each.
#[derive(Clone, Debug, PartialEq)]
pub struct FeedForward {
    layers: Vec<Layer>,
    /// Tensors of the graph: ordinals are below it.
    tensors: usize,
    /// Of outputs of layers but the last one, the longest row.
    widest: usize,
}

/// One layer: `function(x (m x K) times the weights (K x N) + bias)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Layer {
    /// Ordinal of the weights' tensor.
    pub weights: usize,
    /// True where that tensor is N x K, false where it is K x N.
    pub transposed: bool,
    /// K: length of the rows that come in.
    pub inputs: usize,
    /// N: length of the rows that go out.
    pub outputs: usize,
    /// Ordinal of the tensor of N values that are added to each row.
    pub bias: Option<usize>,
    /// Applied to what is then there.
    pub function: Function,
}

/// What a layer does to its sums.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Function {
    /// Nothing.
    #[default]
    Identity,
    /// max(x, 0).
    Relu,
    /// x, or `x * slope` below 0.
    LeakyRelu(f32),
    /// 1 / (1 + e^-x).
    Sigmoid,
    /// (e^x - e^-x) / (e^x + e^-x).
    Tanh,
    /// e^x / sum(e^x) along each row.
    Softmax,
}

impl FeedForward {
    /// The layers, in the order in which rows go through them; at least one.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Lengths of an input's and of an output's rows.
    pub fn widths(&self) -> (usize, usize) {
        (self.layers.first().map_or(0, |layer| layer.inputs), self.layers.last().map_or(0, |layer| layer.outputs))
    }

    /// Bytes of the largest weights. A plan that keeps weights of this size in blocks adds the bias after the sums, and its results
    /// differ from those of [`FeedForward::run`] by rounding.
    pub fn largest_weights(&self) -> usize {
        self.layers.iter().map(|layer| layer.inputs * layer.outputs * size_of::<f32>()).max().unwrap_or(0)
    }

    /// The graph's tensors: [`FeedForward::run`] takes one for each ordinal below this.
    pub fn tensors(&self) -> usize {
        self.tensors
    }
}
