//! From a prepared model to something that runs.
//!
//! Responsible for: parsing by tract, choosing between one compiled form for all shapes and one per combination of
//! input shapes, and optimising. First the free dimensions are symbols; where tract cannot follow them, or is much
//! slower with them, the plan keeps a [`Template`] that is compiled for concrete shapes on demand.

use super::analyse::analyse;
use super::names::Names;
use super::prepare::Prepared;
use super::{CompileOptions, Shapes};
use crate::error::{ErrorKind, ModelError};
use crate::signature::{Port, PortType, Signature};
use crate::tensor::engine_of_dtype;
use crate::worker::cancelled;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use tract_onnx::Onnx;
use tract_onnx::data_resolver::ModelDataResolver;
use tract_onnx::pb::ModelProto;
use tract_onnx::tract_hir::internal::*;
use tract_onnx::tract_hir::ops::konst::Const;

pub(super) use super::runnable::Runnable;

/// A constant that is computed while compiling may take this many bytes.
const CONSTANT_LIMIT: u64 = 512 << 20;

/// What plans for concrete shapes are made of. Its tensors are shared by all clones.
#[allow(clippy::large_enum_variant)]
pub(super) enum Template {
    /// The graph with symbols: the quick way, where tract can follow them.
    Symbolic(TypedModel, Names),
    /// The graph as parsed.
    Parsed(InferenceModel),
}

/// Refuses to open files.
struct NoFiles;

impl ModelDataResolver for NoFiles {
    fn read_bytes_from_path(
        &self,
        _: &mut Vec<u8>,
        path: &std::path::Path,
        _: usize,
        _: Option<usize>,
    ) -> TractResult<()> {
        bail!("a model in the database refers to the file {path:?}")
    }
}

/// tract's ONNX reader, without access to files.
pub(super) fn framework() -> &'static Onnx {
    static FRAMEWORK: LazyLock<Onnx> = LazyLock::new(|| {
        let mut framework = tract_onnx::onnx();
        framework.provider = Arc::new(NoFiles);
        framework.with_ignore_value_info(true).with_ignore_output_shapes(true)
    });
    &FRAMEWORK
}

/// The error for a step in which tract failed.
pub(super) fn failure(step: &str, error: &TractError) -> ModelError {
    ModelError::invalid_model(format!("{step} failed")).detail(format!("{error:#}"))
}

fn constant_limit(options: &CompileOptions) -> u64 {
    options.memory_limit.min(CONSTANT_LIMIT)
}

fn proceed(cancel: &AtomicBool) -> Result<(), ModelError> {
    if cancel.load(Ordering::Acquire) { Err(cancelled()) } else { Ok(()) }
}

/// Compiles a model: a form for all shapes, or what forms for concrete shapes are made of.
pub(super) fn compile(
    prepared: Prepared,
    options: &CompileOptions,
    cancel: &AtomicBool,
) -> Result<(Option<Runnable>, Option<Template>), ModelError> {
    let Prepared { signature, model, constants, .. } = prepared;
    let parsed = parse(&model, constants, &signature)?;
    drop(model);
    proceed(cancel)?;
    let names = Names::new(&signature, &parsed.symbols);
    let free = names.inputs.iter().flatten().any(Option::is_some);
    let ranked = signature.inputs.iter().all(|port| port.ranked);
    if ranked {
        let dims = (0..signature.inputs.len()).map(|input| names.dims(&signature, input)).collect();
        let symbolic = super::contain("compiling the model with free dimensions", ErrorKind::InvalidModel, || {
            let typed = typed(parsed.clone(), &signature, dims, options, cancel)?;
            if free && wants_concrete_shapes(&typed) {
                return Ok((None, Some(Template::Symbolic(typed, names.clone()))));
            }
            let runnable = optimise(typed, names.clone(), options, cancel)?;
            Ok((Some(runnable), None))
        });
        match symbolic {
            Ok((None, Some(template))) => {
                probe(&template, &signature, options, cancel)?;
                return Ok((None, Some(template)));
            }
            Ok(done) => return Ok(done),
            Err(error) if !free || matches!(error.kind, ErrorKind::Cancelled | ErrorKind::TooLarge) => {
                return Err(error);
            }
            Err(_) => {}
        }
    }
    let template = Template::Parsed(parsed);
    if ranked {
        probe(&template, &signature, options, cancel)?;
    }
    Ok((None, Some(template)))
}

/// Compiles for some likely shapes, so that a graph that compiles for none is refused when it is loaded and not when
/// it is first used.
fn probe(
    template: &Template,
    signature: &Signature,
    options: &CompileOptions,
    cancel: &AtomicBool,
) -> Result<(), ModelError> {
    let mut first = None;
    // A batch of one; more rows and columns; the usual sizes of pictures and of sound.
    for (batch, other) in [(1, 1), (2, 8), (1, 32), (1, 64), (1, 224), (1, 512), (1, 16000)] {
        let shapes = signature
            .inputs
            .iter()
            .map(|port| {
                let size = |(axis, dim): (usize, &crate::signature::Dim)| match dim {
                    crate::signature::Dim::Fixed(size) => *size as usize,
                    _ if axis == 0 => batch,
                    _ => other,
                };
                port.shape.iter().enumerate().map(size).collect()
            })
            .collect();
        let made = super::contain("compiling the model", ErrorKind::InvalidModel, || {
            specialise(template, signature, &shapes, options, cancel)
        });
        match made {
            Ok(_) => return Ok(()),
            Err(error) if matches!(error.kind, ErrorKind::Cancelled) => return Err(error),
            Err(error) => first = first.or(Some(error)),
        }
    }
    first.map_or(Ok(()), Err)
}

/// Parses the graph and gives it its tensors.
fn parse(
    model: &ModelProto,
    mut constants: HashMap<String, Arc<Tensor>>,
    signature: &Signature,
) -> Result<InferenceModel, ModelError> {
    let parsed = framework().parse(model, None).map_err(|error| failure("reading the graph", &error))?;
    if let Some(name) = parsed.unresolved_inputs.first() {
        return Err(ModelError::invalid_model(format!("the graph uses \"{name}\", which nothing defines")));
    }
    let mut model = parsed.model;
    let sources = std::mem::take(&mut model.inputs);
    for outlet in sources {
        let node = &mut model.nodes[outlet.node];
        match constants.remove(node.name.as_str()) {
            Some(tensor) => {
                let fact = TypedFact::try_from(tensor.clone()).map_err(|error| failure("placing a tensor", &error))?;
                node.outputs[0].fact = fact.into();
                node.op = Const::new(tensor).map_err(|error| failure("placing a tensor", &error))?.into();
            }
            None => model.inputs.push(outlet),
        }
    }
    let names: Vec<&str> = model.inputs.iter().map(|outlet| model.nodes[outlet.node].name.as_str()).collect();
    if names.len() != signature.inputs.len() || names.iter().zip(&signature.inputs).any(|(name, port)| *name != port.name) {
        return Err(ModelError::internal("the inputs of the parsed graph are not those of its signature"));
    }
    Ok(model)
}

fn engine_type(port: &Port) -> Result<DatumType, ModelError> {
    match port.dtype {
        PortType::String => Ok(DatumType::String),
        PortType::Fixed(dtype) => engine_of_dtype(dtype).ok_or_else(|| crate::tensor::unsupported_dtype(dtype)),
    }
}

/// The graph in tract's core operators for these input dimensions.
fn typed(
    mut model: InferenceModel,
    signature: &Signature,
    dims: Vec<Vec<TDim>>,
    options: &CompileOptions,
    cancel: &AtomicBool,
) -> Result<TypedModel, ModelError> {
    for (input, (port, dims)) in signature.inputs.iter().zip(dims).enumerate() {
        let fact = InferenceFact::dt_shape(engine_type(port)?, dims);
        model.set_input_fact(input, fact).map_err(|error| failure("declaring the inputs", &error))?;
    }
    analyse(&mut model, constant_limit(options), cancel)?;
    let mut typed = model.into_typed().map_err(|error| failure("inferring types and shapes", &error))?;
    proceed(cancel)?;
    check_sizes(&typed, options)?;
    typed.declutter().map_err(|error| failure("simplifying the graph", &error))?;
    proceed(cancel)?;
    Ok(typed)
}

/// Refuses a graph in which a value of known size exceeds the limit.
fn check_sizes(model: &TypedModel, options: &CompileOptions) -> Result<(), ModelError> {
    for node in &model.nodes {
        for outlet in &node.outputs {
            let mut bytes = Some(outlet.fact.datum_type.size_of() as u64);
            for dim in outlet.fact.shape.iter() {
                match dim.to_i64() {
                    Ok(size) => bytes = bytes.and_then(|bytes| bytes.checked_mul(u64::try_from(size).ok()?)),
                    Err(_) => {
                        bytes = Some(0);
                        break;
                    }
                }
            }
            if bytes.is_none_or(|bytes| bytes > options.memory_limit) {
                return Err(super::runnable::beyond_limit(&node.name, bytes, options.memory_limit));
            }
        }
    }
    Ok(())
}

fn optimise(
    mut typed: TypedModel,
    names: Names,
    options: &CompileOptions,
    cancel: &AtomicBool,
) -> Result<Runnable, ModelError> {
    typed.optimize().map_err(|error| failure("optimising the graph", &error))?;
    proceed(cancel)?;
    Runnable::new(typed, names, options).map_err(|error| failure("ordering the graph", &error))
}

/// Compiles for these input shapes.
pub(super) fn specialise(
    template: &Template,
    signature: &Signature,
    shapes: &Shapes,
    options: &CompileOptions,
    cancel: &AtomicBool,
) -> Result<Runnable, ModelError> {
    let typed = match template {
        Template::Symbolic(typed, names) => {
            let mut sizes = HashMap::new();
            for (symbols, shape) in names.inputs.iter().zip(shapes) {
                for (symbol, size) in symbols.iter().zip(shape) {
                    if let Some(symbol) = symbol {
                        sizes.insert(symbol.clone(), TDim::Val(*size as i64));
                    }
                }
            }
            let mut concrete =
                typed.set_symbols(&sizes).map_err(|error| failure("fixing the free dimensions", &error))?;
            check_sizes(&concrete, options)?;
            concrete.declutter().map_err(|error| failure("simplifying the graph", &error))?;
            concrete
        }
        Template::Parsed(model) => {
            let dims = shapes.iter().map(|shape| shape.iter().map(|&size| TDim::Val(size as i64)).collect()).collect();
            typed(model.clone(), signature, dims, options, cancel)?
        }
    };
    proceed(cancel)?;
    optimise(typed, Names::default(), options, cancel)
}

/// True where tract is several times slower with a free dimension than without: convolutions and pooling.
fn wants_concrete_shapes(model: &TypedModel) -> bool {
    model.nodes.iter().any(|node| matches!(&*node.op.name(), "Conv" | "Deconv" | "MaxPool" | "SumPool"))
}
