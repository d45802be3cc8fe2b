//! Broadcasting before operator set 7.
//!
//! Responsible for: giving the second operand of the arithmetic of opsets 1 to 6 the shape that NumPy's rules need.
//! There the attribute `axis` says with which axis of the first operand the second one begins, and PRelu's slopes
//! belong to the channels; tract knows NumPy's rules only. Where the ranks are not declared the node is left as it
//! is, and [`refusals`](super::refusals) refuses it.

use super::rewrite::{attribute, integer};
use std::collections::HashMap;
use tract_onnx::pb::attribute_proto::AttributeType;
use tract_onnx::pb::{AttributeProto, GraphProto, NodeProto, ValueInfoProto, type_proto};

/// Operators whose second operand these opsets broadcast.
pub(super) const BROADCASTING: &[&str] =
    &["Add", "Sub", "Mul", "Div", "Pow", "And", "Or", "Xor", "Equal", "Greater", "Less", "PRelu"];

/// Mends the nodes of a graph of an operator set before 7.
pub(super) fn broadcast(graph: &mut GraphProto) {
    let mut ranks: HashMap<String, i64> = HashMap::new();
    let declared = |info: &ValueInfoProto| match &info.r#type.as_ref()?.value {
        Some(type_proto::Value::TensorType(tensor)) => {
            Some((info.name.clone(), tensor.shape.as_ref()?.dim.len() as i64))
        }
        _ => None,
    };
    ranks.extend(graph.input.iter().chain(&graph.value_info).chain(&graph.output).filter_map(declared));
    ranks.extend(graph.initializer.iter().map(|tensor| (tensor.name.clone(), tensor.dims.len() as i64)));
    let mut nodes = Vec::with_capacity(graph.node.len());
    for mut node in std::mem::take(&mut graph.node) {
        let channels = node.op_type == "PRelu";
        if BROADCASTING.contains(&node.op_type.as_str())
            && node.input.len() == 2
            && (channels || attribute(&node, "axis").is_some())
            && let (Some(&left), Some(&right)) = (ranks.get(&node.input[0]), ranks.get(&node.input[1]))
        {
            let axis = if channels { 1 } else { integer(&node, "axis").unwrap_or(0) };
            let axis = if axis < 0 { axis + left } else { axis };
            let behind = left - axis - right;
            // A single slope, or a picture of one dimension, needs nothing.
            if behind > 0 && !(channels && right == 0) {
                nodes.push(unsqueeze(&mut node, right, behind));
            }
            if behind >= 0 {
                node.attribute.retain(|attribute| attribute.name != "axis");
            }
        }
        nodes.push(node);
    }
    graph.node = nodes;
}

/// Gives the node's second operand `behind` further axes of size 1.
fn unsqueeze(node: &mut NodeProto, rank: i64, behind: i64) -> NodeProto {
    let output = format!("{}/broadcast/{}", node.input[1], node.output.first().map_or("", String::as_str));
    let axes = AttributeProto {
        name: "axes".into(),
        r#type: AttributeType::Ints as i32,
        ints: (rank..rank + behind).collect(),
        ..AttributeProto::default()
    };
    let made = NodeProto {
        op_type: "Unsqueeze".into(),
        name: output.clone(),
        input: vec![node.input[1].clone()],
        output: vec![output.clone()],
        attribute: vec![axes],
        ..NodeProto::default()
    };
    node.input[1] = output;
    made
}
