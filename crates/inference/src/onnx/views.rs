//! How a graph uses its tensors as matrices.
//!
//! Responsible for: the [`View`] in which a tensor is tiled, from the operators that consume it in the same graph.
//!
//! Invariant: the view of a tensor follows from its graph alone, never from weights, so that equal architectures are
//! tiled alike. Where consumers disagree, or there are none, it is rows by the last dimension.

use super::source::Source;
use super::walk::NodeHead;
use super::wire::Value;
use crate::error::ModelError;
use std::collections::HashMap;
use std::ops::Range;
use tensor_blocks::View;

/// The names in a graph whose consumers want another view than rows by the last dimension.
#[derive(Default)]
pub(super) struct Views<'a> {
    wanted: HashMap<&'a str, View>,
}

impl<'a> Views<'a> {
    /// Looks at the nodes of the graph that is `body`.
    pub fn of_graph(source: &Source<'a, '_>, body: Range<usize>) -> Result<Views<'a>, ModelError> {
        let mut views = Views::default();
        // First the wishes, which are few, then who disagrees with one.
        for pass in 0..2 {
            for field in source.fields(body.clone(), "GraphProto") {
                let field = field?;
                let (1, Value::Bytes(node)) = (field.number, field.value) else {
                    continue;
                };
                let wish = Wish::of_node(source, node.clone())?;
                views.inputs(source, node, wish, pass == 1)?;
            }
            if views.wanted.is_empty() {
                break;
            }
        }
        Ok(views)
    }

    fn inputs(
        &mut self,
        source: &Source<'a, '_>,
        node: Range<usize>,
        wish: Option<Wish>,
        last_pass: bool,
    ) -> Result<(), ModelError> {
        if wish.is_none() && !last_pass {
            return Ok(());
        }
        let mut index = 0;
        for field in source.fields(node, "NodeProto") {
            let field = field?;
            let (1, Value::Bytes(name)) = (field.number, field.value) else {
                continue;
            };
            let view = wish.as_ref().filter(|wish| wish.input == index).map(|wish| wish.view);
            index += 1;
            let name = source.text(&name, "node input")?;
            match (last_pass, view) {
                (false, Some(view)) => {
                    self.wanted.entry(name).or_insert(view);
                }
                (true, view) => {
                    if let Some(wanted) = self.wanted.get_mut(name)
                        && Some(*wanted) != view
                    {
                        *wanted = View::RowsByLast;
                    }
                }
                (false, None) => {}
            }
        }
        Ok(())
    }

    /// The view of the tensor `name` of rank `rank`.
    pub fn view(&self, name: &str, rank: usize) -> View {
        match self.wanted.get(name) {
            Some(View::Transposed) if rank != 2 => View::RowsByLast,
            Some(&view) => view,
            None => View::RowsByLast,
        }
    }
}

/// What a node wants of one of its inputs.
struct Wish {
    input: usize,
    view: View,
}

impl Wish {
    fn of_node(source: &Source<'_, '_>, body: Range<usize>) -> Result<Option<Wish>, ModelError> {
        let node = NodeHead::parse(source, body.clone())?;
        let any = |names: &[&str]| names.iter().any(|name| node.is_onnx(name));
        Ok(if any(&["Conv", "ConvTranspose", "ConvInteger"]) {
            Some(Wish { input: 1, view: View::RowsByFirst })
        } else if any(&["QLinearConv"]) {
            Some(Wish { input: 3, view: View::RowsByFirst })
        } else if any(&["Gemm"]) && integer_attribute(source, body, "transB")? == Some(1) {
            Some(Wish { input: 1, view: View::Transposed })
        } else {
            None
        })
    }
}

/// The integer attribute `name` of the node that is `body`.
fn integer_attribute(source: &Source<'_, '_>, body: Range<usize>, name: &str) -> Result<Option<u64>, ModelError> {
    let mut found = None;
    for field in source.fields(body, "NodeProto") {
        let field = field?;
        let (5, Value::Bytes(attribute)) = (field.number, field.value) else {
            continue;
        };
        let (mut matches, mut value) = (false, None);
        for field in source.fields(attribute, "AttributeProto") {
            let field = field?;
            match (field.number, field.value) {
                (1, Value::Bytes(span)) => matches = &source.bytes[span] == name.as_bytes(),
                (3, Value::Varint(integer)) => value = Some(integer),
                _ => {}
            }
        }
        if matches {
            found = value;
        }
    }
    Ok(found)
}
