//! ONNX models on the wire: divided into a graph and tensors, and put together again.
//!
//! Responsible for: [`strip`], which takes the weights out of an ONNX file so that they can be stored as blocks;
//! [`merge`], which gives the file back; and where external data may come from. Running models is not done here.
//!
//! Everything works on the wire format, without decoding messages into structs: what this version of the code does
//! not know is kept byte for byte, weights are not copied, and files above protobuf's limit of 2 GiB work.
//!
//! The stored graph is valid ONNX. A tensor that was taken out keeps its dimensions, type, name and all else, and
//! refers to itself as external data:
//!
//! ```text
//! TensorProto { dims, data_type, name, ..., data_location: EXTERNAL,
//!               external_data: [("location", "tessera"), ("offset", "<ordinal>")] }
//! ```
//!
//! Invariants:
//! - graphs that differ in the values of weights only are stored as the same bytes;
//! - `merge` after `strip` gives every tensor the bytes that it had;
//! - after `strip`, every external tensor on the walk (see `walk`) is a stored one.

mod external;
mod merge;
mod source;
mod strip;
mod tensor_data;
mod tensor_proto;
mod views;
mod walk;
mod wire;

pub use external::{ExternalData, FolderExternalData, NoExternalData};
pub use merge::{Merger, merge, merged_len, stored_tensors};
pub use strip::strip;

use crate::error::ModelError;
use std::borrow::Cow;
use tensor_blocks::{DType, View};

/// The `location` of tensors that are stored apart from their graph.
pub const LOCATION: &str = "tessera";

/// A model, divided.
#[derive(Clone, Debug)]
pub struct Stripped<'a> {
    /// The stored graph: ONNX without the data of `tensors`.
    pub graph: Vec<u8>,
    /// The tensors, by ascending ordinal from 0.
    pub tensors: Vec<StoredTensor<'a>>,
}

/// One tensor of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTensor<'a> {
    /// Its number within the model, by which the graph refers to it.
    pub ordinal: u32,
    /// Its name, unique within the model: an initializer's, or "node/attribute"; "#2" and so on where that is taken.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Dimensions; empty for a scalar.
    pub dims: Vec<u64>,
    /// How the graph uses it as a matrix.
    pub view: View,
    /// The elements, row-major and little-endian, `dtype.byte_len(product of dims)` bytes.
    pub data: Cow<'a, [u8]>,
}

/// Fills an empty vector with the little-endian bytes of the tensor with this ordinal.
pub type Fetch<'f> = dyn FnMut(u32, &mut Vec<u8>) -> Result<(), ModelError> + 'f;

/// A stored graph's reference to one of its tensors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredRef {
    /// The tensor's number within the model.
    pub ordinal: u32,
    /// Element type.
    pub dtype: DType,
    /// Dimensions; empty for a scalar.
    pub dims: Vec<u64>,
    /// Bytes of the elements.
    pub bytes: u64,
}

#[cfg(test)]
mod data_tests;
#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod tests;
