//! Computed shapes that go through int32.
//!
//! Responsible for: letting what is computed of a Shape stay int64 where a graph casts it to int32 and back. tract keeps
//! sizes as symbols in int64 only; after a cast to int32 a free dimension is a number that is known when it runs, and a
//! Reshape to it cannot be compiled but for concrete shapes.
//!
//! Invariant: every value of the graph is still made, in its own type; what is added are int64 forms of some, and casts back to
//! int64 take these. The two differ only where a number does not fit int32, which is no size then.

use super::rewrite::{Names, integer, node};
use std::collections::{HashMap, HashSet};
use tract_onnx::pb::attribute_proto::AttributeType;
use tract_onnx::pb::{AttributeProto, GraphProto, NodeProto};

const INT32: i64 = 6;
const INT64: i64 = 7;

/// Adds the int64 forms.
pub(super) fn widen(graph: &mut GraphProto, names: &mut Names) {
    // What is computed of shapes in int64, and the int64 forms of what is computed of them in int32.
    let mut sizes: HashSet<String> = HashSet::new();
    let mut wide: HashMap<String, String> = HashMap::new();
    let mut nodes = Vec::with_capacity(graph.node.len());
    for mut made in std::mem::take(&mut graph.node) {
        let (Some(output), true) = (made.output.first().cloned(), matches!(made.domain.as_str(), "" | "ai.onnx"))
        else {
            nodes.push(made);
            continue;
        };
        let operands = match made.op_type.as_str() {
            "Concat" | "Add" | "Sub" | "Mul" | "Div" => made.input.len(),
            "Slice" | "Gather" | "Squeeze" | "Unsqueeze" | "Identity" | "Cast" => 1,
            _ => 0,
        };
        let operands = &made.input[..operands.min(made.input.len())];
        let (of_sizes, of_wide) =
            (operands.iter().any(|it| sizes.contains(it)), operands.iter().any(|it| wide.contains_key(it)));
        match (made.op_type.as_str(), integer(&made, "to")) {
            ("Shape", _) => {
                sizes.insert(output);
            }
            ("Cast", Some(to)) if of_sizes || of_wide => {
                let form = wide.get(&made.input[0]).unwrap_or(&made.input[0]).clone();
                match to {
                    INT64 => {
                        made.input[0] = form;
                        sizes.insert(output);
                    }
                    INT32 => {
                        wide.insert(output, form);
                    }
                    _ => {}
                }
            }
            ("Cast", _) => {}
            _ if of_wide => {
                let mut form = NodeProto { name: names.fresh("wide"), ..made.clone() };
                form.output = vec![form.name.clone()];
                let count = operands.len();
                for input in &mut form.input[..count] {
                    *input = match wide.get(input) {
                        Some(known) => known.clone(),
                        None => {
                            let cast = to_int64(input, names);
                            let name = cast.output[0].clone();
                            nodes.push(cast);
                            name
                        }
                    };
                }
                wide.insert(output, form.name.clone());
                nodes.push(form);
            }
            _ if of_sizes => {
                sizes.insert(output);
            }
            _ => {}
        }
        nodes.push(made);
    }
    graph.node = nodes;
}

fn to_int64(input: &str, names: &mut Names) -> NodeProto {
    let mut cast = node("Cast", &[input], names.fresh("int64"));
    cast.attribute.push(AttributeProto {
        name: "to".into(),
        r#type: AttributeType::Int as i32,
        i: INT64,
        ..AttributeProto::default()
    });
    cast
}
