//! The walk through a model's graphs.
//!
//! Responsible for: visiting every dense tensor of a `ModelProto` that can be stored apart, in the order of the file,
//! and rewriting the messages around those that a [`Visitor`] replaces. Stripping and merging take the same walk, so
//! that they agree on which tensors there are:
//!
//! ```text
//! ModelProto -+- graph 7 ----> GraphProto -+- node 1 --------> NodeProto -- attribute 5 --> AttributeProto
//!             |                            +- initializer 5                                 +- t 5, tensors 10
//!             +- functions 25 -+- node 7 (as above)                                         +- g 6, graphs 11 (again)
//!                              +- attribute_proto 11
//! ```
//!
//! Invariants:
//! - a message in which nothing was replaced is kept byte for byte, and so is every field that is not walked;
//! - the recursion is bounded by [`MAX_GRAPH_DEPTH`];
//! - sparse tensors stay where they are; external data in them are refused.

use super::source::{Source, wrong_wire_type};
use super::tensor_proto::TensorProto;
use super::views::Views;
use super::wire::{Rope, Value};
use crate::error::ModelError;
use std::ops::Range;

/// Graphs within graphs. A level is three messages, and readers of protobuf stop at 100 messages.
const MAX_GRAPH_DEPTH: usize = 30;

/// Where a tensor stands.
pub(super) enum Place<'p, 'a> {
    Initializer { views: &'p Views<'a> },
    Attribute { views: &'p Views<'a>, node: &'p NodeHead<'a>, attribute: &'a str },
}

/// What the walk does at a tensor.
pub(super) trait Visitor<'a> {
    /// Whether the visitor asks for views; else those it is given are empty.
    const VIEWS: bool;

    /// Appends field `number` with the tensor's replacement and returns true, or returns false to keep it.
    fn tensor(
        &mut self,
        source: &Source<'a, '_>,
        rope: &mut Rope,
        number: u32,
        tensor: &TensorProto<'a>,
        place: Place<'_, 'a>,
    ) -> Result<bool, ModelError>;
}

/// The scalar fields of a node.
#[derive(Default)]
pub(super) struct NodeHead<'a> {
    pub name: &'a str,
    pub op_type: &'a str,
    pub domain: &'a str,
    pub output: &'a str,
}

impl<'a> NodeHead<'a> {
    pub fn parse(source: &Source<'a, '_>, body: Range<usize>) -> Result<NodeHead<'a>, ModelError> {
        let mut node = NodeHead::default();
        let mut outputs = 0;
        for field in source.fields(body, "NodeProto") {
            let field = field?;
            match (field.number, &field.value) {
                (2, Value::Bytes(span)) => {
                    if outputs == 0 {
                        node.output = source.text(span, "node output")?;
                    }
                    outputs += 1;
                }
                (3, Value::Bytes(span)) => node.name = source.text(span, "node name")?,
                (4, Value::Bytes(span)) => node.op_type = source.text(span, "op_type")?,
                (7, Value::Bytes(span)) => node.domain = source.text(span, "domain")?,
                (1 | 5 | 6, Value::Bytes(_)) => {}
                (1..=7, _) => return Err(wrong_wire_type("NodeProto", &field)),
                _ => {}
            }
        }
        Ok(node)
    }

    /// True for an operator of ONNX's own set.
    pub fn is_onnx(&self, op_type: &str) -> bool {
        self.op_type == op_type && matches!(self.domain, "" | "ai.onnx")
    }
}

/// One walk. `rope` becomes the rewritten model.
pub(super) struct Walk<'s, 'a, 'c, V> {
    pub source: &'s Source<'a, 'c>,
    pub rope: Rope,
    pub visitor: V,
}

impl<'s, 'a, 'c, V: Visitor<'a>> Walk<'s, 'a, 'c, V> {
    pub fn new(source: &'s Source<'a, 'c>, visitor: V) -> Walk<'s, 'a, 'c, V> {
        Walk { source, rope: Rope::default(), visitor }
    }

    /// The whole model.
    pub fn model(&mut self) -> Result<(), ModelError> {
        for field in self.source.fields(0..self.source.bytes.len(), "ModelProto") {
            let field = field?;
            match (field.number, field.value) {
                (7, Value::Bytes(body)) => self.graph(7, field.span, body, 0)?,
                (25, Value::Bytes(body)) => self.function(field.span, body)?,
                _ => {
                    self.rope.source(field.span);
                    false
                }
            };
        }
        Ok(())
    }

    /// Rewrites the message `body` as field `number` with `inner`; keeps `span` if `inner` replaced nothing.
    fn message(
        &mut self,
        number: u32,
        span: Range<usize>,
        inner: impl FnOnce(&mut Self) -> Result<bool, ModelError>,
    ) -> Result<bool, ModelError> {
        let mark = self.rope.mark();
        self.rope.begin(number);
        let changed = inner(self)?;
        if changed {
            self.rope.end();
        } else {
            self.rope.rollback(mark);
            self.rope.source(span);
        }
        Ok(changed)
    }

    fn graph(&mut self, number: u32, span: Range<usize>, body: Range<usize>, depth: usize) -> Result<bool, ModelError> {
        if depth == MAX_GRAPH_DEPTH {
            return Err(ModelError::invalid_model("the ONNX model has graphs nested too deeply")
                .detail(format!("At most {MAX_GRAPH_DEPTH} levels are supported.")));
        }
        let views = match V::VIEWS {
            true => Views::of_graph(self.source, body.clone())?,
            false => Views::default(),
        };
        self.message(number, span, |walk| {
            let mut changed = false;
            for field in walk.source.fields(body, "GraphProto") {
                let field = field?;
                changed |= match (field.number, &field.value) {
                    (1, Value::Bytes(body)) => walk.node(1, field.span, body.clone(), &views, depth)?,
                    (5, Value::Bytes(body)) => {
                        walk.tensor(5, field.span, body.clone(), Place::Initializer { views: &views })?
                    }
                    (15, Value::Bytes(body)) => walk.sparse(field.span, body.clone())?,
                    (1 | 5 | 15, _) => return Err(wrong_wire_type("GraphProto", &field)),
                    _ => walk.keep(field.span),
                };
            }
            Ok(changed)
        })
    }

    fn function(&mut self, span: Range<usize>, body: Range<usize>) -> Result<bool, ModelError> {
        self.message(25, span, |walk| {
            let (views, none) = (Views::default(), NodeHead::default());
            let mut changed = false;
            for field in walk.source.fields(body, "FunctionProto") {
                let field = field?;
                changed |= match (field.number, &field.value) {
                    (7, Value::Bytes(body)) => walk.node(7, field.span, body.clone(), &views, 0)?,
                    (11, Value::Bytes(body)) => walk.attribute(11, field.span, body.clone(), &views, &none, 0)?,
                    (7 | 11, _) => return Err(wrong_wire_type("FunctionProto", &field)),
                    _ => walk.keep(field.span),
                };
            }
            Ok(changed)
        })
    }

    fn node(
        &mut self,
        number: u32,
        span: Range<usize>,
        body: Range<usize>,
        views: &Views<'a>,
        depth: usize,
    ) -> Result<bool, ModelError> {
        let node = NodeHead::parse(self.source, body.clone())?;
        self.message(number, span, |walk| {
            let mut changed = false;
            for field in walk.source.fields(body, "NodeProto") {
                let field = field?;
                changed |= match (field.number, field.value) {
                    (5, Value::Bytes(body)) => walk.attribute(5, field.span, body, views, &node, depth)?,
                    _ => walk.keep(field.span),
                };
            }
            Ok(changed)
        })
    }

    fn attribute(
        &mut self,
        number: u32,
        span: Range<usize>,
        body: Range<usize>,
        views: &Views<'a>,
        node: &NodeHead<'a>,
        depth: usize,
    ) -> Result<bool, ModelError> {
        let mut attribute = "";
        let mut values = [0; 2];
        for field in self.source.fields(body.clone(), "AttributeProto") {
            let field = field?;
            match (field.number, &field.value) {
                (1, Value::Bytes(span)) => attribute = self.source.text(span, "attribute name")?,
                (5 | 6, Value::Bytes(_)) => values[field.number as usize - 5] += 1,
                (10 | 11 | 22 | 23, Value::Bytes(_)) => {}
                (1 | 5 | 6 | 10 | 11 | 22 | 23, _) => {
                    return Err(wrong_wire_type("AttributeProto", &field));
                }
                _ => {}
            }
        }
        if values.iter().any(|&count| count > 1) {
            return Err(ModelError::invalid_model("the ONNX model has an attribute with several values")
                .detail(format!("Node \"{}\" of type {}, attribute \"{attribute}\".", node.name, node.op_type)));
        }
        self.message(number, span, |walk| {
            let mut changed = false;
            for field in walk.source.fields(body, "AttributeProto") {
                let field = field?;
                let number = field.number;
                changed |= match (number, field.value) {
                    (5 | 10, Value::Bytes(body)) => {
                        walk.tensor(number, field.span, body, Place::Attribute { views, node, attribute })?
                    }
                    (6 | 11, Value::Bytes(body)) => walk.graph(number, field.span, body, depth + 1)?,
                    (22 | 23, Value::Bytes(body)) => walk.sparse(field.span, body)?,
                    _ => walk.keep(field.span),
                };
            }
            Ok(changed)
        })
    }

    fn tensor(
        &mut self,
        number: u32,
        span: Range<usize>,
        body: Range<usize>,
        place: Place<'_, 'a>,
    ) -> Result<bool, ModelError> {
        let tensor = TensorProto::parse(self.source, body)?;
        let replaced = self.visitor.tensor(self.source, &mut self.rope, number, &tensor, place)?;
        if !replaced {
            self.rope.source(span);
        }
        Ok(replaced)
    }

    fn sparse(&mut self, span: Range<usize>, body: Range<usize>) -> Result<bool, ModelError> {
        for field in self.source.fields(body, "SparseTensorProto") {
            let field = field?;
            if let (1 | 2, Value::Bytes(body)) = (field.number, field.value) {
                let tensor = TensorProto::parse(self.source, body)?;
                if tensor.is_external() {
                    return Err(ModelError::unsupported_type("the ONNX model has a sparse tensor with external data")
                        .detail(format!("It is named \"{}\".", tensor.name))
                        .hint("Save the model as one file."));
                }
            }
        }
        Ok(self.keep(span))
    }

    fn keep(&mut self, span: Range<usize>) -> bool {
        self.rope.source(span);
        false
    }
}
