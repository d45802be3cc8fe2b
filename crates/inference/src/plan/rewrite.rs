//! Nodes that tract computes wrongly, written with nodes that it computes right.
//!
//! Responsible for: rewriting the decoded graph before tract reads it. Each rewrite says what is wrong with the
//! original; where no rewrite is worth it, [`refusals`](super::refusals) refuses the node.
//!
//! Invariant: a rewritten node keeps its outputs' names, and new names cannot collide with the graph's: they begin
//! with a prefix that is extended until no name has it.

use tract_onnx::pb::attribute_proto::AttributeType;
use tract_onnx::pb::{AttributeProto, GraphProto, NodeProto, TensorProto};

/// Rewrites the nodes of a graph and of its subgraphs.
pub(super) fn rewrite(graph: &mut GraphProto) {
    let mut prefix = "tessera".to_owned();
    while uses(graph, &prefix) {
        prefix.push('_');
    }
    let mut names = Names { prefix, next: 0 };
    rewrite_graph(graph, &mut names);
    super::widen::widen(graph, &mut names);
}

fn uses(graph: &GraphProto, prefix: &str) -> bool {
    let named = |name: &String| name.starts_with(prefix);
    graph.node.iter().any(|node| {
        node.output.iter().any(named)
            || node.attribute.iter().flat_map(|it| it.g.iter().chain(&it.graphs)).any(|body| uses(body, prefix))
    }) || graph.input.iter().any(|input| named(&input.name))
        || graph.initializer.iter().any(|tensor| named(&tensor.name))
}

/// Names that the graph does not have.
pub(super) struct Names {
    prefix: String,
    next: usize,
}

impl Names {
    pub fn fresh(&mut self, what: &str) -> String {
        self.next += 1;
        format!("{}/{}/{what}", self.prefix, self.next)
    }
}

fn rewrite_graph(graph: &mut GraphProto, names: &mut Names) {
    let mut nodes = Vec::with_capacity(graph.node.len());
    for mut node in std::mem::take(&mut graph.node) {
        for body in node.attribute.iter_mut().flat_map(|it| it.g.iter_mut().chain(&mut it.graphs)) {
            rewrite_graph(body, names);
        }
        // tract counts inputs and outputs that are left out at the end.
        trim(&mut node.input);
        trim(&mut node.output);
        let default_domain = matches!(node.domain.as_str(), "" | "ai.onnx");
        match node.op_type.as_str() {
            "LSTM" | "GRU" | "RNN" if default_domain && text(&node, "direction") == Some("reverse") => {
                reverse(node, names, &mut nodes);
            }
            "Celu" if default_domain && float(&node, "alpha").is_some_and(|alpha| alpha != 1.0) => {
                celu(node, names, &mut nodes);
            }
            "Swish" if default_domain && float(&node, "alpha").is_some_and(|alpha| alpha != 1.0) => {
                swish(node, names, &mut nodes);
            }
            "Einsum" if default_domain => sum_lonely_letters(node, names, &mut nodes),
            "ConstantOfShape" if default_domain && attribute(&node, "value").is_none() => {
                // tract's default is a zero of float64.
                node.attribute.push(value(1, &[1], 0f32.to_le_bytes().to_vec()));
                nodes.push(node);
            }
            _ => nodes.push(node),
        }
    }
    graph.node = nodes;
}

fn trim(names: &mut Vec<String>) {
    while names.len() > 1 && names.last().is_some_and(String::is_empty) {
        names.pop();
    }
}

pub(super) fn attribute<'a>(node: &'a NodeProto, name: &str) -> Option<&'a AttributeProto> {
    node.attribute.iter().find(|attribute| attribute.name == name)
}

/// The value of a text attribute.
pub(super) fn text<'a>(node: &'a NodeProto, name: &str) -> Option<&'a str> {
    attribute(node, name).and_then(|attribute| std::str::from_utf8(&attribute.s).ok())
}

/// The value of an integer attribute.
pub(super) fn integer(node: &NodeProto, name: &str) -> Option<i64> {
    attribute(node, name).map(|attribute| attribute.i)
}

/// The value of a float attribute.
pub(super) fn float(node: &NodeProto, name: &str) -> Option<f32> {
    attribute(node, name).map(|attribute| attribute.f)
}

pub(super) fn node(op_type: &str, inputs: &[&str], output: String) -> NodeProto {
    NodeProto {
        op_type: op_type.to_owned(),
        name: output.clone(),
        input: inputs.iter().map(|&input| input.to_owned()).collect(),
        output: vec![output],
        ..NodeProto::default()
    }
}

fn constant(names: &mut Names, data_type: i32, dims: &[i64], raw_data: Vec<u8>) -> NodeProto {
    let mut constant = node("Constant", &[], names.fresh("constant"));
    constant.attribute.push(value(data_type, dims, raw_data));
    constant
}

/// An attribute "value" with this tensor.
fn value(data_type: i32, dims: &[i64], raw_data: Vec<u8>) -> AttributeProto {
    let value = TensorProto { dims: dims.to_vec(), data_type, raw_data, ..TensorProto::default() };
    AttributeProto {
        name: "value".into(),
        r#type: AttributeType::Tensor as i32,
        t: Some(value),
        ..AttributeProto::default()
    }
}

/// tract runs a reverse recurrence forward. Here its input and its sequence output are turned around instead.
fn reverse(mut recurrence: NodeProto, names: &mut Names, nodes: &mut Vec<NodeProto>) {
    let time = integer(&recurrence, "layout").unwrap_or(0);
    if let Some(direction) = recurrence.attribute.iter_mut().find(|attribute| attribute.name == "direction") {
        direction.s = b"forward".to_vec();
    }
    let mut parameter = |value: i64| {
        let constant = constant(names, 7, &[1], value.to_le_bytes().to_vec());
        let name = constant.output[0].clone();
        nodes.push(constant);
        name
    };
    let (start, end, axis, step) = (parameter(-1), parameter(i64::MIN), parameter(time), parameter(-1));
    let turned = names.fresh("reversed");
    nodes.push(node("Slice", &[&recurrence.input[0], &start, &end, &axis, &step], turned.clone()));
    recurrence.input[0] = turned;
    let sequence = recurrence.output.first().filter(|name| !name.is_empty()).cloned();
    match sequence {
        Some(sequence) => {
            let forward = names.fresh("sequence");
            recurrence.output[0] = forward.clone();
            nodes.push(recurrence);
            nodes.push(node("Slice", &[&forward, &start, &end, &axis, &step], sequence));
        }
        None => nodes.push(recurrence),
    }
}

/// A float32 constant in the element type of `like`.
fn scalar_like(value: f32, like: &str, names: &mut Names, nodes: &mut Vec<NodeProto>) -> String {
    let constant = constant(names, 1, &[], value.to_le_bytes().to_vec());
    let cast = names.fresh("cast");
    nodes.push(node("CastLike", &[&constant.output[0], like], cast.clone()));
    nodes.insert(nodes.len() - 1, constant);
    cast
}

/// tract leaves out the factor alpha before the exponential part: alpha * Elu(x / alpha).
fn celu(celu: NodeProto, names: &mut Names, nodes: &mut Vec<NodeProto>) {
    let (input, alpha) = (celu.input[0].clone(), float(&celu, "alpha").unwrap_or(1.0));
    let alpha = scalar_like(alpha, &input, names, nodes);
    let (scaled, activated) = (names.fresh("scaled"), names.fresh("activated"));
    nodes.push(node("Div", &[&input, &alpha], scaled.clone()));
    nodes.push(node("Elu", &[&scaled], activated.clone()));
    nodes.push(node("Mul", &[&activated, &alpha], celu.output[0].clone()));
}

/// tract does not end compiling an Einsum of several operands in which a letter stands in one of them only and not in the
/// output: it is summed before, by an Einsum of that operand alone.
fn sum_lonely_letters(mut einsum: NodeProto, names: &mut Names, nodes: &mut Vec<NodeProto>) {
    let equation = text(&einsum, "equation").unwrap_or("").replace(' ', "");
    let operands = equation.split("->").next().unwrap_or("");
    let mut terms: Vec<String> = operands.split(',').map(str::to_owned).collect();
    // Without an arrow the output has the letters that stand once, so none is left out that stands in one operand.
    if let (Some((_, output)), 2..) = (equation.split_once("->"), terms.len())
        && terms.len() == einsum.input.len()
    {
        for (place, input) in einsum.input.iter_mut().enumerate() {
            let others: String =
                terms.iter().enumerate().filter(|(at, _)| *at != place).map(|(_, term)| &**term).collect();
            let term = &terms[place];
            // A letter that is repeated within the operand is a diagonal, which is taken on the way.
            let lonely =
                |letter: char| letter.is_ascii_alphabetic() && !others.contains(letter) && !output.contains(letter);
            if !term.contains(lonely) {
                continue;
            }
            let mut kept = String::new();
            for letter in term.chars().filter(|letter| !lonely(*letter)) {
                if letter == '.' || !kept.contains(letter) {
                    kept.push(letter);
                }
            }
            let mut sum = node("Einsum", &[input], names.fresh("summed"));
            sum.attribute.push(AttributeProto {
                name: "equation".into(),
                r#type: AttributeType::String as i32,
                s: format!("{term}->{kept}").into_bytes(),
                ..AttributeProto::default()
            });
            input.clone_from(&sum.output[0]);
            nodes.push(sum);
            terms[place] = kept;
        }
        let equation = format!("{}->{output}", terms.join(","));
        if let Some(attribute) = einsum.attribute.iter_mut().find(|attribute| attribute.name == "equation") {
            attribute.s = equation.into_bytes();
        }
    }
    nodes.push(einsum);
}

/// tract ignores alpha: x * Sigmoid(alpha * x).
fn swish(swish: NodeProto, names: &mut Names, nodes: &mut Vec<NodeProto>) {
    let (input, alpha) = (swish.input[0].clone(), float(&swish, "alpha").unwrap_or(1.0));
    let alpha = scalar_like(alpha, &input, names, nodes);
    let (scaled, gate) = (names.fresh("scaled"), names.fresh("gate"));
    nodes.push(node("Mul", &[&input, &alpha], scaled.clone()));
    nodes.push(node("Sigmoid", &[&scaled], gate.clone()));
    nodes.push(node("Mul", &[&input, &gate], swish.output[0].clone()));
}
