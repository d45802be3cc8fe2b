//! What is not run, and why.
//!
//! Responsible for: finding, before anything is computed, operators, operator sets and attributes that tract lacks,
//! ignores or computes wrongly, and saying which one it was. A number that is wrong is worse than an error.

use super::legacy::BROADCASTING;
use super::rewrite::{attribute, float, integer, text};
use crate::error::ModelError;
use std::collections::{HashMap, HashSet};
use std::sync::LazyLock;
use tract_onnx::pb::{GraphProto, ModelProto, NodeProto};

/// The oldest operator set of the default domain. Before 7, broadcasting followed attributes that tract ignores:
/// nodes with such attributes are refused one by one.
pub const OLDEST_OPSET: i64 = 1;

/// The newest operator set of the default domain: the newest whose node tests have been run. A newer one may give
/// an operator a new meaning.
pub const NEWEST_OPSET: i64 = 28;

/// The newest version of `ai.onnx.ml` that is known.
pub const NEWEST_ML_OPSET: i64 = 5;

/// Operators of `ai.onnx.ml` that can be run.
const ML_OPERATORS: &[&str] = &[
    "ArrayFeatureExtractor",
    "CategoryMapper",
    "LinearClassifier",
    "LinearRegressor",
    "Normalizer",
    "Scaler",
    "TreeEnsembleClassifier",
    "TreeEnsembleRegressor",
];

/// Operators of `com.microsoft` that can be run. Not those on blocks of 4 bits: tract keeps their scales in float16.
const MICROSOFT_OPERATORS: &[&str] = &[
    "BiasGelu",
    "FastGelu",
    "Gelu",
    "QuickGelu",
    "RotaryEmbedding",
    "SimplifiedLayerNormalization",
    "SkipSimplifiedLayerNormalization",
    "SkipLayerNormalization",
];

/// Operators that tract registers but that are in no operator set of the default domain.
const NOT_IN_DEFAULT_DOMAIN: &[&str] = &[
    "BiasGelu",
    "FastGelu",
    "QuickGelu",
    "MatMulNBits",
    "GatherBlockQuantized",
    "SkipSimplifiedLayerNormalization",
    "SkipLayerNormalization",
];

static REGISTERED: LazyLock<HashSet<String>> =
    LazyLock::new(|| super::build::framework().op_register.0.keys().cloned().collect());

/// Checks every node of a model, in subgraphs too.
///
/// # Errors
/// `UnsupportedOpset` or `UnsupportedOperator`, naming operator, domain and operator set version.
pub fn check(model: &ModelProto) -> Result<(), ModelError> {
    let opsets = opsets(model)?;
    if !model.functions.is_empty() {
        let names: Vec<&str> = model.functions.iter().filter_map(|function| function.name.as_deref()).collect();
        return Err(ModelError::unsupported_operator("the model defines functions of its own")
            .detail(format!("Functions: {}.", names.join(", ")))
            .hint("Inline them before loading, with onnx.inliner.inline_local_functions."));
    }
    model.graph.as_ref().map_or(Ok(()), |graph| check_graph(graph, &opsets))
}

/// The version of the default domain that the model imports; 0 if none.
pub(super) fn default_opset(model: &ModelProto) -> i64 {
    opsets_by_domain(model).get("").copied().unwrap_or(0)
}

/// Version by domain, the default domain being "".
type Opsets<'a> = HashMap<&'a str, i64>;

fn opsets_by_domain(model: &ModelProto) -> Opsets<'_> {
    let domain = |domain| if domain == "ai.onnx" { "" } else { domain };
    model.opset_import.iter().map(|set| (domain(set.domain.as_str()), set.version)).collect()
}

fn opsets(model: &ModelProto) -> Result<Opsets<'_>, ModelError> {
    let opsets = opsets_by_domain(model);
    for (domain, name, oldest, newest) in
        [("", "ai.onnx", OLDEST_OPSET, NEWEST_OPSET), ("ai.onnx.ml", "ai.onnx.ml", 1, NEWEST_ML_OPSET)]
    {
        if let Some(&version) = opsets.get(domain)
            && !(oldest..=newest).contains(&version)
        {
            return Err(ModelError::unsupported_opset(format!(
                "operator set {name} version {version} is not supported"
            ))
            .detail(format!("Versions {oldest} to {newest} are."))
            .hint("Export the model again with another opset, or convert it with onnx.version_converter."));
        }
    }
    if opsets.is_empty() {
        return Err(ModelError::unsupported_opset("the model does not say which operator set it uses")
            .hint("Export the model again with opset 13 or later."));
    }
    Ok(opsets)
}

fn check_graph(graph: &GraphProto, opsets: &Opsets<'_>) -> Result<(), ModelError> {
    if !graph.sparse_initializer.is_empty() {
        return Err(ModelError::unsupported_type("sparse initializers cannot be computed with")
            .hint("Export the model with dense tensors."));
    }
    for node in &graph.node {
        check_node(node, opsets)?;
        for attribute in &node.attribute {
            for body in attribute.g.iter().chain(&attribute.graphs) {
                check_graph(body, opsets)?;
            }
        }
    }
    Ok(())
}

fn check_node(node: &NodeProto, opsets: &Opsets<'_>) -> Result<(), ModelError> {
    let domain = if node.domain == "ai.onnx" { "" } else { node.domain.as_str() };
    let operator = node.op_type.as_str();
    let known = match domain {
        "" => {
            REGISTERED.contains(operator)
                && !NOT_IN_DEFAULT_DOMAIN.contains(&operator)
                && !ML_OPERATORS.contains(&operator)
        }
        "ai.onnx.ml" => ML_OPERATORS.contains(&operator),
        "com.microsoft" => MICROSOFT_OPERATORS.contains(&operator),
        _ => false,
    };
    let version = opsets.get(domain).copied();
    if !known {
        return Err(unsupported(node, version, None));
    }
    let Some(version) = version else {
        return Err(ModelError::unsupported_opset(format!(
            "the model uses operator {operator} of domain {} but imports no operator set of that domain",
            domain_name(domain)
        )));
    };
    check_attributes(node)?;
    match refusal(domain, node, version) {
        Some(reason) => Err(unsupported(node, Some(version), Some(reason))),
        None => Ok(()),
    }
}

/// No count or window in an attribute exceeds this.
const LARGEST_ATTRIBUTE: i64 = 1 << 20;

/// No tensor has more dimensions: tract adds them one by one.
const LARGEST_RANK: i64 = 64;

/// No window has more places than this: tract lists them all.
const LARGEST_WINDOW: i64 = 1 << 22;

/// Refuses attributes by which tract would allocate while it reads the graph.
fn check_attributes(node: &NodeProto) -> Result<(), ModelError> {
    let absurd = |name: &str, values: &dyn std::fmt::Debug| {
        ModelError::too_large(format!("attribute {name} of operator {} is out of range", node.op_type))
            .detail(format!("It is {values:?}."))
    };
    for attribute in &node.attribute {
        let name = attribute.name.as_str();
        match name {
            "group" | "num_groups" | "num_heads" | "num_outputs" | "blocksize" | "hidden_size" | "p" | "n_targets"
            | "targets"
                if !(0..=LARGEST_ATTRIBUTE).contains(&attribute.i) =>
            {
                return Err(absurd(name, &attribute.i));
            }
            "axis" | "batch_dims" if !(-LARGEST_RANK..=LARGEST_RANK).contains(&attribute.i) => {
                return Err(absurd(name, &attribute.i));
            }
            "axes" | "scan_input_axes" | "scan_output_axes"
                if attribute.ints.iter().any(|axis| !(-LARGEST_RANK..=LARGEST_RANK).contains(axis)) =>
            {
                return Err(absurd(name, &attribute.ints));
            }
            "num_scan_inputs" if !(0..=node.input.len() as i64).contains(&attribute.i) => {
                return Err(absurd(name, &attribute.i));
            }
            // tract looks for the way to a permutation, whether there is one or not.
            "perm" => {
                let mut sorted = attribute.ints.clone();
                sorted.sort_unstable();
                if sorted.iter().zip(0..).any(|(axis, place)| *axis != place) {
                    return Err(ModelError::invalid_model(format!(
                        "attribute perm of operator {} is no permutation",
                        node.op_type
                    ))
                    .detail(format!("It is {:?}.", attribute.ints)));
                }
            }
            "kernel_shape" | "strides" | "dilations" | "output_padding" | "output_shape" => {
                let fits = |value: &i64| value.unsigned_abs() <= LARGEST_ATTRIBUTE as u64;
                let window = attribute.ints.iter().try_fold(1i64, |product, value| product.checked_mul(*value));
                if !attribute.ints.iter().all(fits)
                    || (name == "kernel_shape" && window.is_none_or(|window| !(0..=LARGEST_WINDOW).contains(&window)))
                {
                    return Err(absurd(name, &attribute.ints));
                }
            }
            "pads" if attribute.ints.iter().any(|value| value.unsigned_abs() > i32::MAX as u64) => {
                return Err(absurd(name, &attribute.ints));
            }
            _ => {}
        }
    }
    Ok(())
}

/// The error for an operator that is supported, but not in the way that this model uses it; `text` says more.
pub(super) fn unsupported_use(model: &ModelProto, operator: &str, text: &str) -> ModelError {
    fn find<'a>(graph: &'a GraphProto, operator: &str) -> Option<&'a NodeProto> {
        graph.node.iter().find_map(|node| {
            let inner = || node.attribute.iter().flat_map(|it| it.g.iter().chain(&it.graphs));
            if node.op_type == operator { Some(node) } else { inner().find_map(|body| find(body, operator)) }
        })
    }
    let domain = model.graph.as_ref().and_then(|graph| find(graph, operator)).map_or("", |node| node.domain.as_str());
    let opsets = opsets_by_domain(model);
    let version = opsets.get(if domain == "ai.onnx" { "" } else { domain });
    let version = version.map_or(String::new(), |version| format!(", opset {version}"));
    ModelError::unsupported_operator(format!(
        "operator {operator} is not supported as the model uses it (domain {}{version})",
        domain_name(domain)
    ))
    .detail(text)
    .hint("Export the model with other operators or another opset.")
}

fn domain_name(domain: &str) -> &str {
    if domain.is_empty() { "ai.onnx" } else { domain }
}

/// The error for a node that is not run.
fn unsupported(node: &NodeProto, version: Option<i64>, reason: Option<&str>) -> ModelError {
    let domain = domain_name(&node.domain);
    let version = version.map_or(String::new(), |version| format!(", opset {version}"));
    let name = if node.name.is_empty() { node.output.first().map_or("", String::as_str) } else { &node.name };
    let mut error = ModelError::unsupported_operator(match reason {
        None => format!("operator {} is not supported (domain {domain}{version})", node.op_type),
        Some(reason) => format!("operator {} {reason} is not supported (domain {domain}{version})", node.op_type),
    })
    .detail(format!("Node \"{name}\" uses it."));
    if node.op_type == "ZipMap" {
        error = error.hint("Export the classifier with the converter option zipmap set to false.");
    } else {
        error = error.hint("Export the model with other operators or another opset.");
    }
    error
}

/// Why this node of a registered operator is not run: which attribute, input or version is at fault.
fn refusal(domain: &str, node: &NodeProto, version: i64) -> Option<&'static str> {
    if !domain.is_empty() {
        return ml_refusal(node);
    }
    let set = |name: &str| integer(node, name).is_some_and(|value| value != 0);
    let has = |name: &str| attribute(node, name).is_some();
    let given = |input: usize| node.input.get(input).is_some_and(|name| !name.is_empty());
    match node.op_type.as_str() {
        // What could be mended by the ranks has been.
        operator if version < 7 && BROADCASTING.contains(&operator) && has("axis") => Some("with attribute axis"),
        // tract computes inference, whatever the mode.
        "BatchNormalization" if set("training_mode") || (version < 7 && !set("is_test")) => Some("in training mode"),
        "Celu" | "Swish" if given(1) => Some("with two inputs"),
        // tract has sigmoid and tanh in their usual places, no clipping, no coupled gates.
        "LSTM" | "GRU" | "RNN" if !usual_activations(node) => Some("with other activations than the usual ones"),
        "LSTM" | "GRU" | "RNN" if float(node, "clip").is_some_and(|clip| clip != 0.0) => Some("with clip"),
        "LSTM" if set("input_forget") => Some("with input_forget"),
        // The rewrite needs a Slice with steps.
        "LSTM" | "GRU" | "RNN" if text(node, "direction") == Some("reverse") && version < 10 => {
            Some("in reverse direction before opset 10")
        }
        // tract takes the output type from the zero point, and float32 for dequantized values.
        "QuantizeLinear" if !given(2) && !matches!(integer(node, "output_dtype"), None | Some(0 | 2)) => {
            Some("with output_dtype and no zero point")
        }
        "DequantizeLinear" if !matches!(integer(node, "output_dtype"), None | Some(0 | 1)) => {
            Some("with another output type than float32")
        }
        // tract knows one order of the channels only.
        "SpaceToDepth" if !matches!(text(node, "mode"), None | Some("DCR")) => Some("with mode CRD"),
        // Until opset 9 the first input was the sequences' lengths.
        "Scan" if version < 9 => Some("of opset 8"),
        "Scan" if has("directions") => Some("with directions"),
        "Constant" if has("sparse_value") => Some("with a sparse value"),
        _ => None,
    }
}

/// The same for the other domains.
fn ml_refusal(node: &NodeProto) -> Option<&'static str> {
    let as_tensor = |attribute: &tract_onnx::pb::AttributeProto| attribute.name.ends_with("_as_tensor");
    match node.op_type.as_str() {
        // tract reads the lists of floats only.
        "TreeEnsembleClassifier" | "TreeEnsembleRegressor" if node.attribute.iter().any(as_tensor) => {
            Some("with values as tensors")
        }
        // tract divides by the largest absolute value; the largest value is meant.
        "Normalizer" if text(node, "norm") == Some("MAX") || text(node, "norm").is_none() => Some("with norm MAX"),
        // ONNX Runtime leaves a single score as it is, the text of ONNX does not.
        "LinearRegressor"
            if integer(node, "targets").unwrap_or(1) == 1
                && !matches!(text(node, "post_transform"), None | Some("NONE" | "")) =>
        {
            Some("with a post_transform of one target")
        }
        _ => None,
    }
}

fn usual_activations(node: &NodeProto) -> bool {
    let Some(given) = attribute(node, "activations").filter(|given| !given.strings.is_empty()) else { return true };
    let usual: &[&str] = match node.op_type.as_str() {
        "LSTM" => &["sigmoid", "tanh", "tanh"],
        "GRU" => &["sigmoid", "tanh"],
        _ => &["tanh"],
    };
    given.strings.iter().zip(usual.iter().cycle()).all(|(given, usual)| given.eq_ignore_ascii_case(usual.as_bytes()))
}
