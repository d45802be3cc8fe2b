//! Taking the tensors out of a model.
//!
//! Responsible for: telling an ONNX model from other bytes, and dividing it into a graph without weights and the
//! tensors.
//!
//! Invariants:
//! - the input is hostile: nothing panics, and no allocation is sized by an unchecked number;
//! - the stored graph does not depend on the values of weights, nor on the fields in which they stood;
//! - after stripping, every external tensor on the walk is a stored one: a model that says "tessera" itself is read
//!   through [`ExternalData`] like any other.

use super::external::ExternalData;
use super::source::{Source, reserve};
use super::tensor_proto::{Layout, TensorProto, field};
use super::walk::{Place, Visitor, Walk};
use super::wire::{Fields, Piece, Rope, Value, WireError, write_bytes, write_varint};
use super::{LOCATION, StoredTensor, Stripped};
use crate::error::ModelError;
use std::borrow::Cow;
use std::collections::HashMap;
use tensor_blocks::{DType, View};

/// Tensors of one model: far above any real one, so that a small file cannot take much memory.
const MAX_TENSORS: usize = 1 << 20;
/// Values of Constant nodes up to this size stay in the graph: they are its shape, not its weights.
const SMALL_CONSTANT: u64 = 64;

/// Divides an ONNX model into its graph and its tensors.
///
/// Taken out are all initializers of fixed width, also those of subgraphs, and the values of Constant nodes above 64
/// bytes. `external` gives the data of tensors that are said to stand in other files. `check` is called at least
/// every few MB; its error ends the work.
///
/// # Errors
/// `NotOnnx`, `Truncated`, `InvalidModel`, `UnsupportedType`, `UnsupportedOpset`, `TooLarge`, and those of `external`
/// and `check`.
pub fn strip<'a>(
    model: &'a [u8],
    external: &mut dyn ExternalData,
    check: &mut dyn FnMut() -> Result<(), ModelError>,
) -> Result<Stripped<'a>, ModelError> {
    let source = Source::new(model, check);
    check_model(&source)?;
    let strip = Strip { external, tensors: Vec::new(), names: HashMap::new() };
    let mut walk = Walk::new(&source, strip);
    walk.model()?;
    let graph = concatenate(&source, &walk.rope)?;
    Ok(Stripped { graph, tensors: walk.visitor.tensors })
}

/// The rope as bytes; it has no stored tensors as pieces.
fn concatenate(source: &Source, rope: &Rope) -> Result<Vec<u8>, ModelError> {
    let mut out = Vec::new();
    reserve(&mut out, rope.len() as usize)?;
    for piece in &rope.pieces {
        match piece {
            Piece::Source(span) => out.extend_from_slice(&source.bytes[span.clone()]),
            Piece::Own(span) => out.extend_from_slice(&rope.own[span.clone()]),
            Piece::Length(len) => write_varint(&mut out, *len),
            Piece::Tensor { .. } => {
                return Err(ModelError::internal("a stripped graph has tensor bytes"));
            }
        }
        source.advance(64)?;
    }
    Ok(out)
}

/// What strangers' files begin with, and what to say about them.
const STRANGERS: [(&[u8], &str); 5] = [
    (b"version https://git-lfs", "It is a pointer of Git LFS: fetch the file itself with \"git lfs pull\"."),
    (b"PK\x03\x04", "It is a ZIP archive, as PyTorch and Keras write: export the model to ONNX."),
    (b"\x89HDF", "It is an HDF5 file, as Keras writes: convert the model to ONNX, for instance with tf2onnx."),
    (b"\x80\x04", "It is a Python pickle: convert the model to ONNX, for instance with skl2onnx."),
    (b"ORTM", "It is in ONNX Runtime's own format: load the .onnx file that it was made from."),
];

/// Checks the outermost message, by which ONNX is told from other bytes.
fn check_model(source: &Source) -> Result<(), ModelError> {
    let model = source.bytes;
    let not_onnx = |detail: String| {
        let stranger = STRANGERS.iter().find(|(magic, _)| model.starts_with(magic) || model.get(4..8) == Some(magic));
        ModelError::not_onnx("this is not an ONNX model").detail(detail).hint(
            stranger
                .map_or("Give the bytes of a .onnx file, as torch.onnx.export and other exporters write it.", |s| s.1),
        )
    };
    if model.is_empty() {
        return Err(not_onnx("It has no bytes.".into()));
    }
    let (mut ir_version, mut opsets, mut graph) = (0i64, 0u64, None);
    for field in Fields::new(model, 0..model.len()) {
        source.advance(32)?;
        let field = match field {
            Ok(field) => field,
            Err(WireError::Overrun { number, declared, .. })
                if ir_version > 0 && number.is_none_or(|number| matches!(number, 1..=8 | 14 | 20 | 25)) =>
            {
                let declared = declared.map_or(String::new(), |len| format!(", within a part of {len} bytes"));
                return Err(ModelError::truncated("the ONNX model is cut off")
                    .detail(format!("It ends after {} bytes{declared}.", model.len()))
                    .hint("Copy the file again, in binary mode and to its end."));
            }
            Err(WireError::Overrun { at, .. } | WireError::Malformed { at }) => {
                return Err(not_onnx(format!("It has {} bytes; those from {at} are no ModelProto.", model.len())));
            }
        };
        match (field.number, field.value) {
            (1, Value::Varint(version)) => ir_version = version as i64,
            (7, Value::Bytes(_)) if graph.is_some() => {
                return Err(ModelError::invalid_model("the ONNX model has several graphs"));
            }
            (7, Value::Bytes(body)) => graph = Some(body),
            (8, Value::Bytes(_)) => opsets += 1,
            (5, Value::Varint(_)) | (2 | 3 | 4 | 6 | 14 | 20 | 25, Value::Bytes(_)) => {}
            (number @ (1..=8 | 14 | 20 | 25), _) => {
                return Err(not_onnx(format!("Field {number} of a ModelProto has another wire type.")));
            }
            _ => {}
        }
    }
    let cut = "The file may be cut off, or be no ONNX model: export or copy it again.";
    let Some(graph) = graph.filter(|_| ir_version > 0) else {
        let missing = if ir_version > 0 { "graph" } else { "ir_version" };
        return Err(not_onnx(format!("It can be read as protobuf, but has no {missing}.")));
    };
    if ir_version < 3 {
        return Err(ModelError::unsupported_opset(format!("ONNX IR version {ir_version} is not supported"))
            .detail("The oldest supported is 3, of 2017.")
            .hint("Convert the model with onnx.version_converter."));
    }
    if opsets == 0 {
        return Err(ModelError::invalid_model("the ONNX model names no operator set").hint(cut));
    }
    let (mut nodes, mut outputs) = (0, 0);
    for field in source.fields(graph, "GraphProto") {
        let field = field?;
        nodes += u64::from(field.number == 1);
        outputs += u64::from(field.number == 12);
    }
    if nodes == 0 || outputs == 0 {
        return Err(ModelError::invalid_model("the graph of the ONNX model is empty")
            .detail(format!("It has {nodes} nodes and {outputs} outputs."))
            .hint(cut));
    }
    Ok(())
}

/// The visitor that stores tensors.
struct Strip<'c, 'a> {
    external: &'c mut dyn ExternalData,
    tensors: Vec<StoredTensor<'a>>,
    /// Names given so far, and the last number that was appended to each.
    names: HashMap<String, u32>,
}

impl<'a> Visitor<'a> for Strip<'_, 'a> {
    const VIEWS: bool = true;

    fn tensor(
        &mut self,
        source: &Source<'a, '_>,
        rope: &mut Rope,
        number: u32,
        tensor: &TensorProto<'a>,
        place: Place<'_, 'a>,
    ) -> Result<bool, ModelError> {
        let (dtype, elements, bytes) = match tensor.layout()? {
            Layout::Strings { elements } => {
                tensor.check_strings(source, elements)?;
                return Ok(false);
            }
            Layout::Fixed { dtype, elements, bytes } => (dtype, elements, bytes),
        };
        let data = tensor.data(source, (dtype, elements, bytes), self.external)?;
        match place {
            Place::Initializer { .. } if tensor.name.is_empty() => {
                Err(ModelError::invalid_model("the ONNX model has an initializer without a name")
                    .detail(format!("Its dimensions are {:?}.", tensor.dims)))
            }
            Place::Initializer { views } => {
                let view = views.view(tensor.name, tensor.dims.len());
                self.store(source, rope, number, tensor, tensor.name.into(), dtype, view, data)
            }
            Place::Attribute { views, node, attribute }
                if node.is_onnx("Constant") && attribute == "value" && number == 5 && bytes > SMALL_CONSTANT =>
            {
                let name = if node.name.is_empty() { node.output } else { node.name };
                let view = views.view(node.output, tensor.dims.len());
                self.store(source, rope, number, tensor, format!("{name}/{attribute}"), dtype, view, data)
            }
            Place::Attribute { .. } if tensor.is_external() => {
                tensor.rewrite(source, rope, number, field::RAW_DATA, |rope| {
                    rope.own(|own| write_bytes(own, field::RAW_DATA, &data));
                })?;
                Ok(true)
            }
            Place::Attribute { .. } => Ok(false),
        }
    }
}

impl<'a> Strip<'_, 'a> {
    /// Puts a tensor among the stored ones, and its header into the graph.
    #[allow(clippy::too_many_arguments)]
    fn store(
        &mut self,
        source: &Source<'a, '_>,
        rope: &mut Rope,
        number: u32,
        tensor: &TensorProto<'a>,
        name: String,
        dtype: DType,
        view: View,
        data: Cow<'a, [u8]>,
    ) -> Result<bool, ModelError> {
        if self.tensors.len() == MAX_TENSORS {
            return Err(ModelError::too_large("the ONNX model has too many tensors")
                .detail(format!("At most {MAX_TENSORS} are supported.")));
        }
        let ordinal = self.tensors.len() as u32;
        let name = self.unique(name);
        tensor.rewrite(source, rope, number, field::DATA_LOCATION, |rope| {
            rope.own(|own| {
                write_entry(own, "location", LOCATION);
                write_entry(own, "offset", &ordinal.to_string());
                write_varint(own, u64::from(field::DATA_LOCATION) << 3);
                write_varint(own, 1);
            });
        })?;
        self.tensors.push(StoredTensor { ordinal, name, dtype, dims: tensor.dims.clone(), view, data });
        Ok(true)
    }

    /// `name`, or if that is taken, the name with the first free number: subgraphs may repeat a name.
    fn unique(&mut self, name: String) -> String {
        let Some(mut number) = self.names.get(&name).copied() else {
            self.names.insert(name.clone(), 1);
            return name;
        };
        let free = loop {
            number += 1;
            let candidate = format!("{name}#{number}");
            if !self.names.contains_key(&candidate) {
                break candidate;
            }
        };
        self.names.insert(name, number);
        self.names.insert(free.clone(), 1);
        free
    }
}

/// Appends a `StringStringEntryProto` of external_data.
fn write_entry(out: &mut Vec<u8>, key: &str, value: &str) {
    let mut entry = Vec::with_capacity(4 + key.len() + value.len());
    write_bytes(&mut entry, 1, key.as_bytes());
    write_bytes(&mut entry, 2, value.as_bytes());
    write_bytes(out, field::EXTERNAL_DATA, &entry);
}
