//! What a model takes and gives.
//!
//! Responsible for: the names, element types and shapes of a graph's inputs and outputs as the graph declares them,
//! its operator sets and its producer.
//!
//! Invariant: inputs are the ones that a caller has to give. An initializer that older exports repeat among the
//! inputs is not one of them.

use crate::error::ModelError;
use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize, Serializer};
use std::collections::HashSet;
use std::fmt;
use tensor_blocks::DType;
use tract_onnx::pb::tensor_shape_proto::dimension::Value as DimValue;
use tract_onnx::pb::type_proto::Value as TypeValue;
use tract_onnx::pb::{ModelProto, ValueInfoProto};

/// The element type of a port: a fixed-width one, or strings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PortType {
    /// A fixed-width element type.
    Fixed(DType),
    /// UTF-8 strings.
    String,
}

impl PortType {
    /// The name of the element type: NumPy's, or "string".
    pub fn name(self) -> &'static str {
        match self {
            PortType::Fixed(dtype) => dtype.name(),
            PortType::String => "string",
        }
    }

    /// The type with this [`name`](PortType::name).
    pub fn from_name(name: &str) -> Option<PortType> {
        if name == "string" { Some(PortType::String) } else { DType::from_name(name).map(PortType::Fixed) }
    }

    /// The type with this code of ONNX's `TensorProto.DataType`.
    pub fn from_onnx(code: i32) -> Option<PortType> {
        if code == 8 { Some(PortType::String) } else { DType::from_onnx(code).map(PortType::Fixed) }
    }

    /// True for the floating-point types.
    pub fn is_float(self) -> bool {
        use DType::*;
        matches!(self, PortType::Fixed(Float16 | BFloat16 | Float32 | Float64))
    }
}

impl From<DType> for PortType {
    fn from(dtype: DType) -> PortType {
        PortType::Fixed(dtype)
    }
}

impl fmt::Display for PortType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Serialize for PortType {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for PortType {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<PortType, D::Error> {
        let name = std::borrow::Cow::<str>::deserialize(deserializer)?;
        PortType::from_name(&name).ok_or_else(|| D::Error::custom(format!("unknown element type \"{name}\"")))
    }
}

/// One dimension of a port's shape.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dim {
    /// Always this size.
    Fixed(u64),
    /// A free size with a name: equal names mean equal sizes within one run.
    Symbol(String),
    /// A free size.
    Unknown,
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Dim::Fixed(size) => write!(f, "{size}"),
            Dim::Symbol(name) => f.write_str(name),
            Dim::Unknown => f.write_str("?"),
        }
    }
}

/// An input or output of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// Its name in the graph.
    pub name: String,
    /// Its element type.
    pub dtype: PortType,
    /// Its dimensions, outermost first. Empty for a scalar, and when not even the rank is declared.
    pub shape: Vec<Dim>,
    /// False when the graph declares no shape at all, so that any rank may come.
    #[serde(default = "yes")]
    pub ranked: bool,
}

fn yes() -> bool {
    true
}

impl Port {
    /// A port of known rank.
    pub fn new(name: impl Into<String>, dtype: PortType, shape: Vec<Dim>) -> Port {
        Port { name: name.into(), dtype, shape, ranked: true }
    }

    /// The shape in words: "\[batch, 3, ?\]", or "any shape".
    pub fn shape_text(&self) -> String {
        if !self.ranked {
            return "any shape".into();
        }
        let dims: Vec<String> = self.shape.iter().map(Dim::to_string).collect();
        format!("[{}]", dims.join(", "))
    }

    /// Type and shape in words: "float32\[batch, 28\]".
    pub fn type_text(&self) -> String {
        format!("{}{}{}", self.dtype, if self.ranked { "" } else { " of " }, self.shape_text())
    }
}

/// An operator set that a model imports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opset {
    /// Its domain, "ai.onnx" for the default one.
    pub domain: String,
    /// Its version.
    pub version: i64,
}

/// What a model takes and gives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signature {
    /// What a caller gives, in the graph's order.
    pub inputs: Vec<Port>,
    /// What a run returns, in the graph's order.
    pub outputs: Vec<Port>,
    /// Operator sets, the default domain named "ai.onnx".
    pub opsets: Vec<Opset>,
    /// Version of the ONNX format.
    pub ir_version: i64,
    /// Name and version of the program that wrote the model; empty if it says nothing.
    pub producer: String,
}

impl Signature {
    /// Reads the signature of an ONNX graph.
    ///
    /// # Errors
    /// `NotOnnx` for bytes that are no model, `InvalidModel` for one without a graph or outputs, `UnsupportedType` for
    /// ports that are no tensors (sequences, maps, optionals) or have an unknown element type.
    pub fn of_graph(graph: &[u8]) -> Result<Signature, ModelError> {
        Signature::of_model(&crate::plan::decode(graph)?)
    }

    /// The same for a model that is already decoded.
    pub(crate) fn of_model(model: &ModelProto) -> Result<Signature, ModelError> {
        let graph = model.graph.as_ref().ok_or_else(|| ModelError::invalid_model("the model contains no graph"))?;
        let initialized: HashSet<&str> = graph.initializer.iter().map(|tensor| tensor.name.as_str()).collect();
        let mut inputs = Vec::new();
        for info in graph.input.iter().filter(|info| !initialized.contains(info.name.as_str())) {
            inputs.push(port(info, "input")?);
        }
        let outputs = graph.output.iter().map(|info| port(info, "output")).collect::<Result<Vec<_>, _>>()?;
        if outputs.is_empty() {
            return Err(ModelError::invalid_model("the model has no output"));
        }
        for (what, ports) in [("input", &inputs), ("output", &outputs)] {
            let mut names = HashSet::new();
            if let Some(twice) = ports.iter().find(|port| !names.insert(port.name.as_str())) {
                return Err(ModelError::invalid_model(format!("{what} \"{}\" is declared twice", twice.name)));
            }
        }
        let opsets = model
            .opset_import
            .iter()
            .map(|set| Opset {
                domain: if set.domain.is_empty() { "ai.onnx".into() } else { set.domain.clone() },
                version: set.version,
            })
            .collect();
        let producer = [model.producer_name.as_str(), model.producer_version.as_str()].join(" ").trim().to_owned();
        Ok(Signature { inputs, outputs, opsets, ir_version: model.ir_version, producer })
    }

    /// The input of this name.
    pub fn input(&self, name: &str) -> Option<&Port> {
        self.inputs.iter().find(|port| port.name == name)
    }

    /// The inputs in words, for hints: "a float32\[n, 3\], b int64\[\]".
    pub fn inputs_text(&self) -> String {
        let ports: Vec<String> =
            self.inputs.iter().map(|port| format!("\"{}\" {}", port.name, port.type_text())).collect();
        ports.join(", ")
    }

    /// True when the first dimension of every input and output is one and the same symbol, or an unnamed free
    /// dimension throughout.
    pub fn batch_is_declared_free(&self) -> bool {
        let Some(first) = self.inputs.first().and_then(|port| port.shape.first()) else { return false };
        !matches!(first, Dim::Fixed(_))
            && self.inputs.iter().chain(&self.outputs).all(|port| port.shape.first() == Some(first))
    }
}

/// Longest dimension name that is kept: exporters write whole expressions.
const SYMBOL_LENGTH: usize = 200;

fn port(info: &ValueInfoProto, what: &str) -> Result<Port, ModelError> {
    let refuse = |type_name: &str| {
        ModelError::unsupported_type(format!("{what} \"{}\" has type {type_name}", info.name)).hint(
            "Inputs and outputs must be tensors; for scikit-learn exports set the converter option zipmap to false.",
        )
    };
    let declared = info
        .r#type
        .as_ref()
        .ok_or_else(|| ModelError::invalid_model(format!("{what} \"{}\" has no type", info.name)))?;
    let Some(TypeValue::TensorType(tensor)) = declared.value.as_ref() else {
        return Err(refuse("sequence, map, optional or sparse tensor"));
    };
    let dtype = PortType::from_onnx(tensor.elem_type).ok_or_else(|| {
        if tensor.elem_type == 0 {
            ModelError::invalid_model(format!("{what} \"{}\" has no element type", info.name))
        } else {
            refuse(&format!("unknown element type {}", tensor.elem_type))
        }
    })?;
    let mut port = Port { name: info.name.clone(), dtype, shape: Vec::new(), ranked: tensor.shape.is_some() };
    for dim in tensor.shape.iter().flat_map(|shape| &shape.dim) {
        port.shape.push(match &dim.value {
            Some(DimValue::DimValue(size)) if *size >= 0 => Dim::Fixed(*size as u64),
            Some(DimValue::DimParam(name)) if !name.is_empty() && name != "?" && name.len() <= SYMBOL_LENGTH => {
                Dim::Symbol(name.clone())
            }
            _ => Dim::Unknown,
        });
    }
    Ok(port)
}
