//! From a stored graph and its tensors to what tract parses.
//!
//! Responsible for: decoding the protobuf, checking it ([`refusals`](super::refusals)), and giving it its tensors.
//! The main graph's initializers do not go through tract's own loading, which would hold every tensor twice: they
//! become inputs of the graph, and the engine's tensors stand beside it ([`Prepared::constants`]). Tensors in
//! subgraphs and attributes are small and get their bytes in place.
//!
//! Invariants:
//! - the prepared model has no tensor with external data, so that tract, which is given no folder either, never
//!   opens a file;
//! - every tensor has as many bytes as its type and shape say, whatever field they stood in;
//! - what tract would parse and we do not need is gone: declared shapes, value infos, documentation.

use super::{CompileOptions, FetchTensor, refusals};
use crate::error::ModelError;
use crate::signature::{PortType, Signature};
use crate::tensor::{element_count, engine_of_dtype, engine_tensor, unsupported_dtype};
use crate::weights::StoredTensor;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use tensor_blocks::{DType, Tiling};
use tract_onnx::pb::{AttributeProto, GraphProto, ModelProto, TensorProto, TypeProto, ValueInfoProto, type_proto};
use tract_onnx::prelude::tract_ndarray::ArrayD;
use tract_onnx::prelude::{Framework, IntoTensor, Tensor};

/// Where the stored graph says that a tensor's bytes are.
const LOCATION: &str = "tessera";
const STRING: i32 = 8;
const EXTERNAL: i32 = 1;

/// A model that tract can parse.
pub(super) struct Prepared {
    pub signature: Signature,
    pub model: ModelProto,
    /// The main graph's initializers by name; each is an input of `model`'s graph.
    pub constants: HashMap<String, Arc<Tensor>>,
    /// Initializers that stay in blocks; each is an input of `model`'s graph too.
    pub stored: HashMap<String, StoredTensor>,
    /// Bytes of the tensors that the plan holds.
    pub weights: u64,
}

/// What of a model's tensors may stay in blocks.
#[derive(Clone, Copy)]
pub(super) struct Blocks<'a> {
    /// By ordinal, how a tensor is cut into blocks; none where it has to be inline.
    pub tilings: &'a [Option<Tiling>],
    /// Tensors that no block operator can use.
    pub inline: &'a BTreeSet<u32>,
}

/// Decodes a protobuf as an ONNX model.
///
/// # Errors
/// `NotOnnx` for bytes that are no such protobuf or contain no graph.
pub(crate) fn decode(graph: &[u8]) -> Result<ModelProto, ModelError> {
    let model = tract_onnx::onnx()
        .proto_model_for_read(&mut &graph[..])
        .map_err(|error| ModelError::not_onnx("the bytes are no ONNX model").detail(format!("{error:#}")))?;
    if model.graph.is_none() {
        return Err(ModelError::not_onnx("the bytes contain no ONNX graph"));
    }
    Ok(model)
}

pub(super) fn prepare(
    graph: &[u8],
    fetch: &mut FetchTensor<'_>,
    blocks: Blocks<'_>,
    options: &CompileOptions,
) -> Result<Prepared, ModelError> {
    prepare_model(decode(graph)?, fetch, blocks, options)
}

/// The same for a model that is decoded already.
pub(super) fn prepare_model(
    mut model: ModelProto,
    fetch: &mut FetchTensor<'_>,
    blocks: Blocks<'_>,
    options: &CompileOptions,
) -> Result<Prepared, ModelError> {
    let signature = Signature::of_model(&model)?;
    for (what, port) in
        signature.inputs.iter().map(|port| ("input", port)).chain(signature.outputs.iter().map(|port| ("output", port)))
    {
        if let PortType::Fixed(dtype) = port.dtype
            && engine_of_dtype(dtype).is_none()
        {
            let mut error = unsupported_dtype(dtype);
            error.message = format!("{what} \"{}\": {}", port.name, error.message);
            return Err(error);
        }
    }
    let opset = refusals::default_opset(&model);
    if let Some(graph) = model.graph.as_mut().filter(|_| opset < 7) {
        super::legacy::broadcast(graph);
    }
    refusals::check(&model)?;
    // Nothing but the graph is of use, and the rest may be large.
    model.training_info.clear();
    model.metadata_props.clear();
    model.doc_string.clear();
    let mut store = Store { fetch, weights: 0, limit: options.memory_limit, buffer: Vec::new() };
    let (mut constants, mut stored) = (HashMap::new(), HashMap::new());
    if let Some(graph) = &mut model.graph {
        large_constants_become_initializers(graph, blocks, options);
        let usable = names_for_blocks(graph);
        let initializers = std::mem::take(&mut graph.initializer);
        let mut inputs = std::mem::take(&mut graph.input);
        for tensor in initializers {
            if tensor.name.is_empty() {
                return Err(ModelError::invalid_model("an initializer has no name"));
            }
            let in_blocks = match usable.get(tensor.name.as_str()) {
                Some(&any_type) => stored_tensor(&tensor, any_type, blocks, options)?,
                None => None,
            };
            let source = source_info(&tensor.name, tensor.data_type);
            match inputs.iter_mut().find(|info| info.name == tensor.name) {
                Some(info) => *info = source,
                None => inputs.push(source),
            }
            let name = tensor.name.clone();
            let twice = match in_blocks {
                Some(in_blocks) => stored.insert(tensor.name, in_blocks).is_some() || constants.contains_key(&name),
                None => {
                    let constant = Arc::new(store.tensor(&tensor)?);
                    constants.insert(tensor.name, constant).is_some() || stored.contains_key(&name)
                }
            };
            if twice {
                return Err(ModelError::invalid_model(format!("initializer \"{name}\" is defined twice")));
            }
        }
        graph.input = inputs;
        store.fill_graph(graph)?;
        super::rewrite::rewrite(graph);
    }
    let weights = store.weights;
    Ok(Prepared { signature, model, constants, stored, weights })
}

/// The tensor as one that stays in blocks, if it may.
fn stored_tensor(
    tensor: &TensorProto,
    any_type: bool,
    blocks: Blocks<'_>,
    options: &CompileOptions,
) -> Result<Option<StoredTensor>, ModelError> {
    if tensor.data_location != Some(EXTERNAL) {
        return Ok(None);
    }
    let ordinal = ordinal_of(tensor)?;
    let Some(Some(tiling)) = blocks.tilings.get(ordinal as usize) else { return Ok(None) };
    let dtype = tiling.dtype();
    let fits = (any_type || dtype == DType::Float32)
        && DType::from_onnx(tensor.data_type) == Some(dtype)
        && engine_of_dtype(dtype).is_some()
        && dtype != DType::Bool
        && tiling.byte_len() as u64 >= options.inline_tensor_bytes;
    if !fits || blocks.inline.contains(&ordinal) {
        return Ok(None);
    }
    let dims = shape_of(tensor)?;
    Ok(Some(StoredTensor { ordinal, dims, tiling: tiling.clone() }))
}

/// Some exporters write weights as Constant nodes: those that may stay in blocks are made initializers.
fn large_constants_become_initializers(graph: &mut GraphProto, blocks: Blocks<'_>, options: &CompileOptions) {
    let mut moved = Vec::new();
    let outputs: HashSet<&str> = graph.output.iter().map(|output| output.name.as_str()).collect();
    graph.node.retain_mut(|node| {
        let ([output], [attribute]) = (&*node.output, &mut *node.attribute) else { return true };
        let constant = node.op_type == "Constant" && matches!(node.domain.as_str(), "" | "ai.onnx");
        if !constant || attribute.name != "value" || output.is_empty() || outputs.contains(output.as_str()) {
            return true;
        }
        let Some(mut tensor) = attribute.t.take() else { return true };
        if !matches!(stored_tensor(&tensor, true, blocks, options), Ok(Some(_))) {
            attribute.t = Some(tensor);
            return true;
        }
        tensor.name.clone_from(output);
        moved.push(tensor);
        false
    });
    graph.initializer.append(&mut moved);
}

/// The initializers whose every use may be one that block operators have, and whether that is so for any element type;
/// others for float32 only.
fn names_for_blocks(graph: &GraphProto) -> HashMap<String, bool> {
    let mut usable = HashMap::new();
    let mut refused: HashSet<&str> = graph.output.iter().map(|output| output.name.as_str()).collect();
    for node in &graph.node {
        let default_domain = matches!(node.domain.as_str(), "" | "ai.onnx");
        for (place, name) in node.input.iter().enumerate() {
            let any_type = match (node.op_type.as_str(), place) {
                _ if !default_domain => None,
                ("Gather", 0) => Some(true),
                ("MatMul" | "Gemm", 0 | 1) | ("Einsum", _) | ("Transpose", 0) | ("Conv" | "ConvTranspose", 1) => {
                    Some(false)
                }
                ("LSTM" | "GRU", 1 | 2) => Some(false),
                _ => None,
            };
            match any_type {
                Some(any_type) => *usable.entry(name.clone()).or_insert(true) &= any_type,
                None => {
                    refused.insert(name);
                }
            }
        }
        for body in node.attribute.iter().flat_map(|it| it.g.iter().chain(&it.graphs)) {
            names_in(body, &mut refused);
        }
    }
    usable.retain(|name, _| !refused.contains(name.as_str()));
    usable
}

/// Every name that a subgraph uses: it may be one of the graph around it.
fn names_in<'a>(graph: &'a GraphProto, names: &mut HashSet<&'a str>) {
    names.extend(graph.output.iter().map(|output| output.name.as_str()));
    for node in &graph.node {
        names.extend(node.input.iter().map(String::as_str));
        for body in node.attribute.iter().flat_map(|it| it.g.iter().chain(&it.graphs)) {
            names_in(body, names);
        }
    }
}

/// The declaration of a graph input of this type and any shape.
fn source_info(name: &str, elem_type: i32) -> ValueInfoProto {
    let tensor = type_proto::Tensor { elem_type, shape: None };
    ValueInfoProto {
        name: name.to_owned(),
        r#type: Some(TypeProto { denotation: String::new(), value: Some(type_proto::Value::TensorType(tensor)) }),
        doc_string: String::new(),
    }
}

/// Where tensors come from, and how many bytes have come.
struct Store<'a, 'b> {
    fetch: &'a mut FetchTensor<'b>,
    weights: u64,
    limit: u64,
    buffer: Vec<u8>,
}

impl Store<'_, '_> {
    /// The shape of a tensor and its bytes, left in `buffer`.
    fn read(&mut self, tensor: &TensorProto) -> Result<(DType, Vec<usize>), ModelError> {
        let shape = shape_of(tensor)?;
        let dtype = DType::from_onnx(tensor.data_type).ok_or_else(|| unknown_type(tensor))?;
        let wanted = element_count(&shape).and_then(|count| dtype.byte_len(count as u64)).ok_or_else(|| {
            ModelError::too_large(format!("tensor \"{}\" of shape {shape:?} is too large", tensor.name))
        })?;
        self.buffer.clear();
        if tensor.data_location == Some(EXTERNAL) {
            let ordinal = ordinal_of(tensor)?;
            (self.fetch)(ordinal, &mut self.buffer)?;
        } else if !tensor.raw_data.is_empty() {
            self.buffer.extend_from_slice(&tensor.raw_data);
        } else {
            typed_bytes(dtype, tensor, &mut self.buffer);
        }
        if self.buffer.len() as u64 != wanted {
            return Err(ModelError::invalid_model(format!(
                "tensor \"{}\" does not have the size of its shape",
                tensor.name
            ))
            .detail(format!("It has {} bytes where {dtype} of shape {shape:?} takes {wanted}.", self.buffer.len())));
        }
        self.weights += wanted;
        Ok((dtype, shape))
    }

    fn tensor(&mut self, tensor: &TensorProto) -> Result<Tensor, ModelError> {
        if tensor.data_type == STRING {
            let shape = shape_of(tensor)?;
            let strings = strings_of(tensor, &shape)?;
            return Ok(ArrayD::from_shape_vec(shape, strings)
                .map_err(|error| ModelError::invalid_model(format!("tensor \"{}\": {error}", tensor.name)))?
                .into_tensor());
        }
        let (dtype, shape) = self.read(tensor)?;
        engine_tensor(dtype, &shape, &self.buffer).map_err(|mut error| {
            error.message = format!("tensor \"{}\": {}", tensor.name, error.message);
            error
        })
    }

    /// Gives a graph's attribute tensors, and the initializers of its subgraphs, their bytes, and drops what is of
    /// no use. The decoder bounds how deep graphs nest.
    fn fill_graph(&mut self, graph: &mut GraphProto) -> Result<(), ModelError> {
        graph.value_info.clear();
        graph.doc_string.clear();
        graph.quantization_annotation.clear();
        for info in graph.input.iter_mut().chain(&mut graph.output) {
            if let Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)), .. }) = &mut info.r#type
                && let Some(shape) = &mut tensor.shape
            {
                // The sizes come by another way; the rank is of use in bodies of loops.
                shape.dim.iter_mut().for_each(|dim| dim.value = None);
            }
        }
        for initializer in &mut graph.initializer {
            self.fill_tensor(initializer)?;
        }
        for node in &mut graph.node {
            node.doc_string.clear();
            for attribute in &mut node.attribute {
                self.fill_attribute(attribute)?;
            }
        }
        Ok(())
    }

    fn fill_attribute(&mut self, attribute: &mut AttributeProto) -> Result<(), ModelError> {
        for tensor in attribute.t.iter_mut().chain(&mut attribute.tensors) {
            self.fill_tensor(tensor)?;
        }
        for graph in attribute.g.iter_mut().chain(&mut attribute.graphs) {
            self.fill_graph(graph)?;
        }
        Ok(())
    }

    fn fill_tensor(&mut self, tensor: &mut TensorProto) -> Result<(), ModelError> {
        if tensor.data_type == STRING {
            let shape = shape_of(tensor)?;
            strings_of(tensor, &shape)?;
            return Ok(());
        }
        let (dtype, _) = self.read(tensor)?;
        if engine_of_dtype(dtype).is_none() {
            return Err(unsupported_dtype(dtype));
        }
        if self.weights > self.limit {
            return Err(ModelError::too_large("the tensors in attributes and subgraphs exceed the memory limit"));
        }
        *tensor = TensorProto {
            dims: std::mem::take(&mut tensor.dims),
            data_type: tensor.data_type,
            name: std::mem::take(&mut tensor.name),
            raw_data: std::mem::take(&mut self.buffer),
            ..TensorProto::default()
        };
        Ok(())
    }
}

fn shape_of(tensor: &TensorProto) -> Result<Vec<usize>, ModelError> {
    let wrong = || ModelError::invalid_model(format!("tensor \"{}\" has a negative dimension", tensor.name));
    tensor.dims.iter().map(|&size| usize::try_from(size).map_err(|_| wrong())).collect()
}

fn unknown_type(tensor: &TensorProto) -> ModelError {
    ModelError::unsupported_type(format!("tensor \"{}\" has unknown element type {}", tensor.name, tensor.data_type))
}

fn ordinal_of(tensor: &TensorProto) -> Result<u32, ModelError> {
    let entry =
        |key: &str| tensor.external_data.iter().find(|entry| entry.key == key).map(|entry| entry.value.as_str());
    match (entry("location"), entry("offset").map(str::parse)) {
        (Some(LOCATION), Some(Ok(ordinal))) => Ok(ordinal),
        (location, _) => Err(ModelError::external_data_outside(format!(
            "tensor \"{}\" refers to data outside the database",
            tensor.name
        ))
        .detail(format!("Its location is \"{}\".", location.unwrap_or("")))),
    }
}

fn strings_of(tensor: &TensorProto, shape: &[usize]) -> Result<Vec<String>, ModelError> {
    let invalid = |what: &str| ModelError::invalid_model(format!("tensor \"{}\" {what}", tensor.name));
    if element_count(shape) != Some(tensor.string_data.len()) {
        return Err(invalid("does not have the size of its shape"));
    }
    tensor
        .string_data
        .iter()
        .map(|bytes| String::from_utf8(bytes.clone()).map_err(|_| invalid("contains a string that is not UTF-8")))
        .collect()
}

/// The bytes of a tensor whose elements stand in the typed field that ONNX prescribes for its type.
fn typed_bytes(dtype: DType, tensor: &TensorProto, out: &mut Vec<u8>) {
    match dtype {
        DType::Float32 | DType::Complex64 => out.extend(tensor.float_data.iter().flat_map(|x| x.to_le_bytes())),
        DType::Float64 | DType::Complex128 => out.extend(tensor.double_data.iter().flat_map(|x| x.to_le_bytes())),
        DType::Int64 => out.extend(tensor.int64_data.iter().flat_map(|x| x.to_le_bytes())),
        DType::UInt64 => out.extend(tensor.uint64_data.iter().flat_map(|x| x.to_le_bytes())),
        DType::UInt32 => out.extend(tensor.uint64_data.iter().flat_map(|x| (*x as u32).to_le_bytes())),
        _ => {
            // One element, or for packed types one byte, in the low bytes of each int32.
            let width = dtype.byte_width().unwrap_or(1).min(4);
            out.extend(tensor.int32_data.iter().flat_map(|x| x.to_le_bytes().into_iter().take(width)));
        }
    }
}
