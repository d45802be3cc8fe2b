//! Recognising a feed-forward net in a stored graph.
//!
//! Responsible for: [`FeedForward::of_graph`]. Nodes are walked in the graph's order with the name of the one value that is
//! on its way; each node takes it, does one of the known things, and gives the next. Values of tensors are not looked
//! at, only their dimensions: a stored graph has no others.
//!
//! Invariants: no panic whatever the graph contains; a name stands for one value; an attribute that is not known, a type that
//! is not the attribute's, an operand that is not where it is expected: each ends it with none.

use super::{FeedForward, Function, Layer};
use crate::onnx::stored_tensors;
use crate::plan::{decode, refusals};
use crate::signature::{Dim, PortType, Signature};
use std::collections::{HashMap, HashSet};
use tensor_blocks::DType;
use tract_onnx::pb::attribute_proto::AttributeType;
use tract_onnx::pb::{AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto};

/// Older operator sets broadcast by an attribute, and their Dropout drops.
const OLDEST_OPSET: i64 = 7;
/// From this one on the default axis of Softmax is the last; before it, 1.
const SOFTMAX_ALONG_LAST: i64 = 13;
const EXTERNAL: i32 = 1;
const FLOAT: i32 = 1;
const INT64: i32 = 7;

impl FeedForward {
    /// The net that a stored graph is (what [`strip`](crate::onnx::strip) gives): Gemm, or MatMul with an Add of a vector behind it, on
    /// stored float32 tensors, with Relu, LeakyRelu, Sigmoid, Tanh or Softmax between; one input `[rows, K]` with K fixed, one
    /// output. None for every other graph, and for what is no graph.
    pub fn of_graph(graph: &[u8]) -> Option<FeedForward> {
        let model = decode(graph).ok()?;
        refusals::check(&model).ok()?;
        let (width, declared) = declared_widths(&model)?;
        let body = model.graph.as_ref()?;
        let mut walk = Walk::new(&model, body, stored_dims(graph)?, width)?;
        for node in &body.node {
            walk.node(node)?;
        }
        walk.finish(&body.output.first()?.name, declared)
    }
}

/// The length of the rows of the one input, and of the one output if that is declared; none where they are not those of a
/// net.
fn declared_widths(model: &ModelProto) -> Option<(usize, Option<usize>)> {
    let signature = Signature::of_model(model).ok()?;
    let ([input], [output]) = (&*signature.inputs, &*signature.outputs) else { return None };
    let float32 = PortType::Fixed(DType::Float32);
    let (&[ref rows, Dim::Fixed(width)], true) = (&*input.shape, input.ranked) else { return None };
    let any_rows = !matches!(rows, Dim::Fixed(size) if *size != 1);
    if !any_rows || input.dtype != float32 || output.dtype != float32 {
        return None;
    }
    let made = match &*output.shape {
        _ if !output.ranked => None,
        &[_, Dim::Fixed(made)] => Some(usize::try_from(made).ok()?),
        [_, _] => None,
        _ => return None,
    };
    Some((usize::try_from(width).ok()?, made))
}

/// Dimensions of the stored tensors by ordinal; none if one of them is not float32.
fn stored_dims(graph: &[u8]) -> Option<Vec<Vec<u64>>> {
    let mut stored = stored_tensors(graph).ok()?;
    stored.sort_by_key(|tensor| tensor.ordinal);
    let in_order = stored.iter().enumerate().all(|(place, tensor)| tensor.ordinal as usize == place);
    let float32 = stored.iter().all(|tensor| tensor.dtype == DType::Float32);
    (in_order && float32).then(|| stored.into_iter().map(|tensor| tensor.dims).collect())
}

/// A constant of the graph.
enum Constant {
    /// Stored apart, by ordinal.
    Stored(usize),
    /// Integers that stand in the graph: a shape.
    Integers(Vec<i64>),
    /// Of no use here.
    Other,
}

struct Walk<'a> {
    opset: i64,
    /// Dimensions of the stored tensors.
    dims: Vec<Vec<u64>>,
    constants: HashMap<&'a str, Constant>,
    defined: HashSet<&'a str>,
    /// The value that is on its way, and the length of its rows.
    current: &'a str,
    width: usize,
    layers: Vec<Layer>,
    /// True where a product's sums have been through something that no layer has: nothing may be added to the layer.
    closed: bool,
}

impl<'a> Walk<'a> {
    fn new(model: &ModelProto, graph: &'a GraphProto, dims: Vec<Vec<u64>>, width: usize) -> Option<Walk<'a>> {
        let opset = model.opset_import.iter().find(|set| matches!(&*set.domain, "" | "ai.onnx"))?.version;
        if opset < OLDEST_OPSET {
            return None;
        }
        let initialized = |name: &str| graph.initializer.iter().any(|tensor| tensor.name == name);
        let current = &*graph.input.iter().find(|info| !initialized(&info.name))?.name;
        let (constants, defined) = (HashMap::new(), HashSet::from([current]));
        let mut walk = Walk { opset, dims, constants, defined, current, width, layers: Vec::new(), closed: false };
        for tensor in &graph.initializer {
            let constant = walk.constant(tensor)?;
            walk.define(&tensor.name)?;
            walk.constants.insert(&tensor.name, constant);
        }
        Some(walk)
    }

    /// None if the name is taken, or is none.
    fn define(&mut self, name: &'a str) -> Option<()> {
        (!name.is_empty() && self.defined.insert(name)).then_some(())
    }

    fn constant(&self, tensor: &TensorProto) -> Option<Constant> {
        if tensor.data_location == Some(EXTERNAL) {
            let entry = |key: &str| tensor.external_data.iter().find(|entry| entry.key == key);
            let ordinal: usize = entry("offset")?.value.parse().ok()?;
            let known = entry("location")?.value == crate::onnx::LOCATION && tensor.data_type == FLOAT;
            let dims = self.dims.get(ordinal)?;
            let same = dims.len() == tensor.dims.len()
                && dims.iter().zip(&tensor.dims).all(|(known, dim)| i64::try_from(*known) == Ok(*dim));
            return (known && same).then_some(Constant::Stored(ordinal));
        }
        let &[count] = &*tensor.dims else { return Some(Constant::Other) };
        if tensor.data_type != INT64 {
            return Some(Constant::Other);
        }
        let values: Vec<i64> = match tensor.raw_data.as_chunks::<8>() {
            ([], []) => tensor.int64_data.clone(),
            (words, []) => words.iter().map(|word| i64::from_le_bytes(*word)).collect(),
            _ => return None,
        };
        (i64::try_from(values.len()) == Ok(count)).then_some(Constant::Integers(values))
    }

    /// A node's effect.
    fn node(&mut self, node: &'a NodeProto) -> Option<()> {
        if !matches!(&*node.domain, "" | "ai.onnx") {
            return None;
        }
        let output = node.output.first()?;
        self.define(output)?;
        if node.op_type == "Constant" {
            let constant = self.constant_node(node)?;
            self.constants.insert(output, constant);
            return Some(());
        }
        // A mask that Dropout gives is used by nobody: every other node takes the one value.
        if node.output.iter().skip(1).any(|name| !name.is_empty() && node.op_type != "Dropout") {
            return None;
        }
        let left_out = node.input.iter().rev().take_while(|name| name.is_empty()).count();
        let inputs: Vec<&str> = node.input[..node.input.len() - left_out].iter().map(String::as_str).collect();
        // The value on its way is used once.
        if inputs.iter().filter(|name| **name == self.current).count() != 1 {
            return None;
        }
        match (&*node.op_type, &*inputs) {
            ("Gemm", [_, weights, bias @ ..]) if inputs[0] == self.current && bias.len() <= 1 => {
                let attributes = Attributes::of(node, &["alpha", "beta", "transA", "transB"])?;
                let plain = attributes.float("alpha", 1.0)? == 1.0
                    && attributes.float("beta", 1.0)? == 1.0
                    && attributes.integer("transA", 0)? == 0;
                let transposed = match attributes.integer("transB", 0)? {
                    0 => false,
                    1 => true,
                    _ => return None,
                };
                if !plain {
                    return None;
                }
                self.product(weights, transposed)?;
                bias.first().map_or(Some(()), |bias| self.bias(bias))?;
            }
            ("MatMul", [x, weights]) if *x == self.current => {
                Attributes::of(node, &[])?;
                self.product(weights, false)?;
            }
            ("Add", [left, right]) => {
                Attributes::of(node, &[])?;
                self.bias(if *left == self.current { right } else { left })?;
            }
            ("Relu", [_]) => self.function(node, &[], |_| Some(Function::Relu))?,
            ("Sigmoid", [_]) => self.function(node, &[], |_| Some(Function::Sigmoid))?,
            ("Tanh", [_]) => self.function(node, &[], |_| Some(Function::Tanh))?,
            ("LeakyRelu", [_]) => self.function(node, &["alpha"], |attributes| {
                attributes.float("alpha", 0.01).filter(|slope| slope.is_finite()).map(Function::LeakyRelu)
            })?,
            ("Softmax", [_]) => {
                let default = if self.opset < SOFTMAX_ALONG_LAST { 1 } else { -1 };
                self.function(node, &["axis"], |attributes| {
                    matches!(attributes.integer("axis", default)?, 1 | -1).then_some(Function::Softmax)
                })?;
            }
            _ => self.passed_on(node, &inputs)?,
        }
        self.current = output;
        Some(())
    }

    /// Nodes that give what they take. They end a layer: a compiled plan fuses nothing across some of them.
    fn passed_on(&mut self, node: &NodeProto, inputs: &[&str]) -> Option<()> {
        if inputs[0] != self.current {
            return None;
        }
        let same = match (&*node.op_type, inputs) {
            ("Identity", [_]) => {
                Attributes::of(node, &[])?;
                return Some(());
            }
            // A ratio does nothing where no input says that this is training.
            ("Dropout", [_] | [_, _]) => {
                Attributes::of(node, &["ratio", "seed"])?;
                return Some(());
            }
            ("Flatten", [_]) => Attributes::of(node, &["axis"])?.integer("axis", 1)? == 1,
            ("Reshape", [_, shape]) => {
                let copies_zero = Attributes::of(node, &["allowzero"])?.integer("allowzero", 0)? == 0;
                match self.constants.get(shape)? {
                    Constant::Integers(shape) => match &**shape {
                        &[0 | -1, width] => copies_zero && usize::try_from(width) == Ok(self.width),
                        _ => false,
                    },
                    _ => false,
                }
            }
            _ => false,
        };
        self.closed = true;
        same.then_some(())
    }

    fn constant_node(&self, node: &NodeProto) -> Option<Constant> {
        let [attribute] = &*node.attribute else { return None };
        match &*attribute.name {
            "value" => self.constant(attribute.t.as_ref()?),
            "value_ints" => Some(Constant::Integers(attribute.ints.clone())),
            _ => Some(Constant::Other),
        }
    }

    fn stored(&self, name: &str) -> Option<(usize, &[u64])> {
        match self.constants.get(name)? {
            Constant::Stored(ordinal) => Some((*ordinal, self.dims.get(*ordinal)?)),
            _ => None,
        }
    }

    /// Begins a layer.
    fn product(&mut self, weights: &str, transposed: bool) -> Option<()> {
        let (weights, &[rows, columns]) = self.stored(weights)? else { return None };
        let (rows, columns) = (usize::try_from(rows).ok()?, usize::try_from(columns).ok()?);
        let (inputs, outputs) = if transposed { (columns, rows) } else { (rows, columns) };
        if inputs != self.width || inputs == 0 || outputs == 0 {
            return None;
        }
        rows.checked_mul(columns)?.checked_mul(size_of::<f32>())?;
        self.layers.push(Layer { weights, transposed, inputs, outputs, bias: None, function: Function::Identity });
        self.width = outputs;
        self.closed = false;
        Some(())
    }

    /// The layer to which something may be added.
    fn open_layer(&mut self) -> Option<&mut Layer> {
        self.layers.last_mut().filter(|layer| !self.closed && layer.function == Function::Identity)
    }

    fn bias(&mut self, name: &str) -> Option<()> {
        let (ordinal, dims) = self.stored(name)?;
        let (size, outer) = dims.split_last().map_or((1, &[][..]), |(size, outer)| (*size, outer));
        let row = outer.len() <= 1 && outer.iter().all(|&dim| dim == 1);
        let fits = row && usize::try_from(size) == Ok(self.width);
        let layer = self.open_layer().filter(|layer| fits && layer.bias.is_none())?;
        layer.bias = Some(ordinal);
        Some(())
    }

    fn function(
        &mut self,
        node: &NodeProto,
        known: &[&str],
        of: impl FnOnce(Attributes<'_>) -> Option<Function>,
    ) -> Option<()> {
        let function = of(Attributes::of(node, known)?)?;
        self.open_layer()?.function = function;
        Some(())
    }

    fn finish(self, output: &str, declared: Option<usize>) -> Option<FeedForward> {
        if self.layers.is_empty() || self.current != output || declared.is_some_and(|width| width != self.width) {
            return None;
        }
        let (_, but_last) = self.layers.split_last()?;
        let widest = but_last.iter().map(|layer| layer.outputs).max().unwrap_or(0);
        Some(FeedForward { tensors: self.dims.len(), widest, layers: self.layers })
    }
}

/// A node's attributes, each known and there once.
struct Attributes<'a>(&'a [AttributeProto]);

impl<'a> Attributes<'a> {
    fn of(node: &'a NodeProto, known: &[&str]) -> Option<Attributes<'a>> {
        let mut names = HashSet::new();
        let fine = |it: &'a AttributeProto| {
            known.contains(&&*it.name) && names.insert(it.name.as_str()) && it.ref_attr_name.is_empty()
        };
        node.attribute.iter().all(fine).then_some(Attributes(&node.attribute))
    }

    fn get(&self, name: &str, kind: AttributeType) -> Option<Option<&'a AttributeProto>> {
        match self.0.iter().find(|attribute| attribute.name == name) {
            Some(attribute) if attribute.r#type != kind as i32 => None,
            found => Some(found),
        }
    }

    fn float(&self, name: &str, default: f32) -> Option<f32> {
        Some(self.get(name, AttributeType::Float)?.map_or(default, |attribute| attribute.f))
    }

    fn integer(&self, name: &str, default: i64) -> Option<i64> {
        Some(self.get(name, AttributeType::Int)?.map_or(default, |attribute| attribute.i))
    }
}
