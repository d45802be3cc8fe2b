//! Putting the tensors back into a graph.
//!
//! Responsible for: writing a whole ONNX model from a stored graph, tensor by tensor, so that the model is never in
//! memory as a whole.
//!
//! Invariants:
//! - lengths are computed from dimensions and types before the first byte is written;
//! - every tensor comes back in `raw_data`, at the place where writers of protobuf put it: a model that had its
//!   tensors there in the usual form comes back byte for byte.

use super::source::Source;
use super::tensor_proto::{Layout, TensorProto, field};
use super::walk::{Place, Visitor, Walk};
use super::wire::{Piece, Rope, write_varint};
use super::{Fetch, LOCATION, StoredRef};
use crate::error::ModelError;
use std::io::Write;
use tensor_blocks::DType;

/// Writes the whole model of a stored `graph` to `out`.
///
/// `fetch` is called once for each tensor, in the order of the file, with the tensor's ordinal and an empty vector
/// that it fills with the tensor's little-endian bytes.
///
/// # Errors
/// Those of `fetch` and of [`Merger`].
pub fn merge(graph: &[u8], fetch: &mut Fetch<'_>, out: &mut dyn Write) -> Result<(), ModelError> {
    let mut scratch = Vec::new();
    let mut give = |ordinal: u32, out: &mut dyn Write| {
        scratch.clear();
        fetch(ordinal, &mut scratch)?;
        out.write_all(&scratch).map_err(write_error)?;
        Ok(scratch.len() as u64)
    };
    write(&merged(graph)?, graph, &mut give, out)
}

/// Writes the little-endian bytes of the tensor with this ordinal, and returns how many there are.
pub type Give<'g> = dyn FnMut(u32, &mut dyn Write) -> Result<u64, ModelError> + 'g;

/// A stored graph that was read once, for many models that differ in their tensors only.
pub struct Merger {
    graph: Vec<u8>,
    rope: Rope,
}

impl Merger {
    /// Reads a stored graph.
    ///
    /// # Errors
    /// `InvalidModel` if it is damaged.
    pub fn new(graph: &[u8]) -> Result<Merger, ModelError> {
        Ok(Merger { graph: graph.to_vec(), rope: merged(graph)? })
    }

    /// Bytes of a whole model.
    pub fn model_bytes(&self) -> u64 {
        self.rope.len()
    }

    /// Writes a whole model to `out`. `give` is called once for each tensor, in the order of the file. The parts of the model are
    /// written as they come; a writer that wants few large writes buffers.
    ///
    /// # Errors
    /// Those of `give`; `Internal` if a tensor has not the length that the graph says, or `out` fails. An error of `out` that
    /// carries a [`ModelError`] is returned as that.
    pub fn write(&self, give: &mut Give<'_>, out: &mut dyn Write) -> Result<(), ModelError> {
        write(&self.rope, &self.graph, give, out)
    }
}

fn write(rope: &Rope, graph: &[u8], give: &mut Give<'_>, out: &mut dyn Write) -> Result<(), ModelError> {
    let mut scratch = Vec::new();
    for piece in &rope.pieces {
        let bytes = match piece {
            Piece::Source(span) => &graph[span.clone()],
            Piece::Own(span) => &rope.own[span.clone()],
            Piece::Length(len) => {
                scratch.clear();
                write_varint(&mut scratch, *len);
                &scratch[..]
            }
            Piece::Tensor { ordinal, len } => {
                let given = give(*ordinal, out)?;
                if given != *len {
                    return Err(ModelError::internal(format!("tensor {ordinal} has a wrong length"))
                        .detail(format!("It has {given} bytes; the graph asks for {len}.")));
                }
                continue;
            }
        };
        out.write_all(bytes).map_err(write_error)?;
    }
    out.flush().map_err(write_error)
}

/// Bytes that [`merge`] writes for this graph.
///
/// # Errors
/// `InvalidModel` if the graph is damaged.
pub fn merged_len(graph: &[u8]) -> Result<u64, ModelError> {
    Ok(merged(graph)?.len())
}

/// The tensors that a stored graph refers to, in the order of the file, which is that of [`merge`].
///
/// # Errors
/// `InvalidModel` if the graph is damaged.
pub fn stored_tensors(graph: &[u8]) -> Result<Vec<StoredRef>, ModelError> {
    let mut check = || Ok(());
    let source = Source::new(graph, &mut check);
    let mut walk = Walk::new(&source, Merge::default());
    walk.model()?;
    Ok(walk.visitor.found)
}

fn merged(graph: &[u8]) -> Result<Rope, ModelError> {
    let mut check = || Ok(());
    let source = Source::new(graph, &mut check);
    let mut walk = Walk::new(&source, Merge::default());
    walk.model()?;
    Ok(walk.rope)
}

fn write_error(error: std::io::Error) -> ModelError {
    match error.downcast::<ModelError>() {
        Ok(error) => error,
        Err(error) => ModelError::internal("the model could not be written").detail(format!("{error}.")),
    }
}

/// The ordinal under which a tensor is stored; none for a tensor whose data stand in the graph.
fn ordinal(tensor: &TensorProto) -> Option<u32> {
    match tensor.external_place() {
        (Some(LOCATION), Some(offset)) if tensor.is_external() => offset.parse().ok(),
        _ => None,
    }
}

/// The visitor that puts tensors back.
#[derive(Default)]
struct Merge {
    found: Vec<StoredRef>,
}

impl<'a> Visitor<'a> for Merge {
    const VIEWS: bool = false;

    fn tensor(
        &mut self,
        source: &Source<'a, '_>,
        rope: &mut Rope,
        number: u32,
        tensor: &TensorProto<'a>,
        _: Place<'_, 'a>,
    ) -> Result<bool, ModelError> {
        let Some(ordinal) = ordinal(tensor) else {
            return Ok(false);
        };
        let (dtype, bytes): (DType, u64) = match tensor.layout()? {
            Layout::Fixed { dtype, bytes, .. } => (dtype, bytes),
            Layout::Strings { .. } => return Err(tensor.invalid("It has stored strings.".into())),
        };
        self.found.push(StoredRef { ordinal, dtype, dims: tensor.dims.clone(), bytes });
        tensor.rewrite(source, rope, number, field::RAW_DATA, |rope| rope.tensor(field::RAW_DATA, ordinal, bytes))?;
        Ok(true)
    }
}
