//! From a prepared model to something that runs.
//!
//! Responsible for: parsing by tract, choosing between one compiled form for all shapes and one per combination of
//! input shapes, and optimising. First the free dimensions are symbols; where tract cannot follow them, or is much
//! slower with them, the plan keeps a [`Template`] that is compiled for concrete shapes on demand.

use super::analyse::analyse;
use super::blocks::{self, StoredConst};
use super::concrete::{scales_free_pictures, wants_concrete_shapes};
use super::names::Names;
use super::passes;
use super::prepare::Prepared;
use super::rows::{self, Rows, Work};
use super::{CompileOptions, Key, Shapes};
use crate::error::{ErrorKind, ModelError};
use crate::signature::{Dim, Port, PortType, Signature};
use crate::tensor::{HostTensor, engine_of_dtype};
use crate::weights::{self, StoredTensor};
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
pub(super) const CONSTANT_LIMIT: u64 = 512 << 20;

/// What plans for concrete shapes are made of. Its tensors are shared by all clones.
#[allow(clippy::large_enum_variant)]
pub(super) enum Template {
    /// The graph with symbols: the quick way, where tract can follow them.
    Symbolic(TypedModel, Names),
    /// The graph as parsed, and the inputs whose values it needs as constants, such as the shape of a Reshape.
    Parsed(InferenceModel, Vec<usize>, Names),
}

impl Template {
    /// The inputs whose values are part of a compiled form.
    pub fn bound(&self) -> &[usize] {
        match self {
            Template::Symbolic(..) => &[],
            Template::Parsed(_, bound, _) => bound,
        }
    }

    /// The symbols that may be left free: the batch, unless a value that is bound may go with it.
    pub fn free(&self) -> Names {
        match self {
            Template::Symbolic(_, names) => names.of_batch_only(),
            Template::Parsed(_, bound, names) if bound.is_empty() => names.of_batch_only(),
            Template::Parsed(..) => Names::default(),
        }
    }
}

/// The result of a compilation.
pub(super) struct Compiled {
    pub general: Option<Runnable>,
    pub template: Option<Template>,
    pub doubt: Option<ModelError>,
    pub rows: Rows,
    pub work: Option<Work>,
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
        super::ops::register(&mut framework);
        framework.with_ignore_value_info(true).with_ignore_output_shapes(true)
    });
    &FRAMEWORK
}

/// The error for a step in which tract failed.
pub(super) fn failure(step: &str, error: &TractError) -> ModelError {
    ModelError::invalid_model(format!("{step} failed")).detail(format!("{error:#}"))
}

/// The error for a graph that tract cannot read: nearly always an attribute that it lacks.
fn unreadable(model: &ModelProto, error: &TractError) -> ModelError {
    let made = failure("reading the graph", error);
    let text = format!("{error:#}");
    let lower = text.to_ascii_lowercase();
    let lacks = ["unsupported", "not supported", "unimplemented", "unknown", "unexpected", "expected attribute"];
    if !lacks.iter().any(|word| lower.contains(word)) {
        return made;
    }
    // "Building node NAME (OPERATOR)", the innermost last.
    let operator = text.rsplit("Building node ").next().and_then(|rest| rest.split_once(')')?.0.rsplit_once('('));
    match operator {
        Some((_, operator)) => super::refusals::unsupported_use(model, operator, &text),
        None => made,
    }
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
) -> Result<Compiled, ModelError> {
    let Prepared { signature, model, constants, stored, .. } = prepared;
    let operators = rows::operators(model.graph.as_ref());
    let parsed = parse(&model, constants, stored, &signature)?;
    drop(model);
    // What has been proven of sizes with free dimensions is not proven again.
    let _proofs = parsed.symbols.proof_cache_session();
    proceed(cancel)?;
    let names = Names::new(&signature, &parsed.symbols);
    let free = names.inputs.iter().flatten().any(Option::is_some);
    let ranked = signature.inputs.iter().all(|port| port.ranked);
    let (mut failed, mut proven) = (None, None);
    if ranked {
        let dims = (0..signature.inputs.len()).map(|input| names.dims(&signature, input)).collect();
        let symbolic = super::contain("compiling the model with free dimensions", ErrorKind::InvalidModel, || {
            let inferred = inferred(parsed.clone(), &signature, dims, &[], options, cancel)?;
            let (rows, work) = rows::analyse(&inferred, &signature, &names, &operators);
            let placed = placed(inferred)?;
            if free && scales_free_pictures(&placed, &names) {
                return Ok(Compiled { general: None, template: None, doubt: None, rows, work });
            }
            let typed = simplified(placed, options, cancel)?;
            if free && wants_concrete_shapes(&typed) {
                let template = Some(Template::Symbolic(typed, names.clone()));
                return Ok(Compiled { general: None, template, doubt: None, rows, work });
            }
            let general = Some(optimise(typed, names.clone(), vec![], rows.can_be_cut(), options, cancel)?);
            Ok(Compiled { general, template: None, doubt: None, rows, work })
        });
        match symbolic {
            // For concrete pictures.
            Ok(Compiled { general: None, template: None, rows, work, .. }) => proven = Some((rows, work)),
            Ok(mut compiled) => {
                if let Some(template) = &compiled.template {
                    compiled.doubt = probe(template, &signature, options, cancel)?.err();
                }
                return Ok(compiled);
            }
            Err(error) if matches!(error.kind, ErrorKind::Cancelled | ErrorKind::WantsInline) => return Err(error),
            // With free dimensions a slice to some great end has that size for tract.
            Err(error) if error.kind == ErrorKind::TooLarge && !free => return Err(error),
            Err(error) if !free && !wants_constants(&error) => return Err(error),
            Err(error) => failed = Some(error),
        }
    }
    // Concrete shapes, and if that does not do, concrete values of small inputs.
    let template = Template::Parsed(parsed, vec![], names);
    let rows = Rows::dependent("the graph is not known before the sizes of its inputs");
    if !ranked {
        return Ok(Compiled { general: None, template: Some(template), doubt: None, rows, work: None });
    }
    let probed = if free { Some(probe(&template, &signature, options, cancel)?) } else { None };
    let (shapes, doubt) = match probed {
        None => (None, failed),
        Some(Ok(shapes)) => (Some(shapes), None),
        Some(Err(error)) => (None, Some(error)),
    };
    let Template::Parsed(parsed, _, names) = template else {
        return Err(ModelError::internal("the template has changed"));
    };
    let bound = if doubt.as_ref().is_some_and(wants_constants) { bindable(&signature) } else { vec![] };
    match doubt {
        Some(error) if bound.is_empty() && !free => Err(error),
        doubt => {
            let (rows, work) = match (proven, shapes) {
                (Some(proven), _) => proven,
                (None, Some(shapes)) => rows::at_sizes(&parsed, &signature, &operators, &shapes, options, cancel),
                (None, None) => (rows, None),
            };
            let template = Some(Template::Parsed(parsed, bound, names));
            Ok(Compiled { general: None, template, doubt, rows, work })
        }
    }
}

/// True for tract's complaints that something is not known at compile that it needs there.
fn wants_constants(error: &ModelError) -> bool {
    let text = error.detail.as_deref().unwrap_or("").to_ascii_lowercase();
    ["const", "variable", "known scalar", "to be determined", "neither sizes nor scales", "can not be typed"]
        .iter()
        .any(|word| text.contains(word))
}

/// The inputs that a graph may want as constants: shapes, axes, scales. Never what carries the rows.
fn bindable(signature: &Signature) -> Vec<usize> {
    let small = |port: &Port| {
        let count = port.shape.iter().try_fold(1u64, |count, dim| match dim {
            Dim::Fixed(size) => count.checked_mul(*size),
            _ => Some(count),
        });
        port.shape.len() <= 1 && count.is_some_and(|count| count <= 4096)
    };
    signature.inputs.iter().enumerate().filter(|(_, port)| small(port)).map(|(input, _)| input).collect()
}

/// Compiles for some likely shapes, so that a graph that compiles for none is noticed when it is loaded and not when
/// it is first used. Returns the shapes that did, or the first error if none did.
fn probe(
    template: &Template,
    signature: &Signature,
    options: &CompileOptions,
    cancel: &AtomicBool,
) -> Result<Result<Shapes, ModelError>, ModelError> {
    let mut errors: Vec<ModelError> = Vec::new();
    // Rows come first and are called a batch; a sequence comes last; pictures have the sizes of pictures.
    for (rows, other) in [(1, 1), (2, 8), (1, 32), (1, 64), (1, 224), (1, 512), (1, 576), (1, 16000)] {
        for only_last in [false, true] {
            let shape = |port: &Port| {
                let last = port.shape.len().saturating_sub(1);
                let size = |(axis, dim): (usize, &Dim)| match dim {
                    Dim::Fixed(size) => usize::try_from(*size).unwrap_or(usize::MAX),
                    Dim::Symbol(name) if name.to_ascii_lowercase().contains("batch") => rows,
                    _ if axis == 0 || (only_last && axis != last) => rows,
                    _ => other,
                };
                port.shape.iter().enumerate().map(size).collect()
            };
            let key = Key { shapes: signature.inputs.iter().map(shape).collect(), values: vec![] };
            let made = super::contain("compiling the model", ErrorKind::InvalidModel, || {
                specialise(template, signature, &key, &template.free(), options, cancel)
                    .or_else(|_| specialise(template, signature, &key, &Names::default(), options, cancel))
            });
            match made {
                Ok(_) => return Ok(Ok(key.shapes)),
                Err(error) if matches!(error.kind, ErrorKind::Cancelled | ErrorKind::WantsInline) => return Err(error),
                // Shapes that do not fit fail in many ways; a wish for constants is the one to hear.
                Err(error) if wants_constants(&error) => return Ok(Err(error)),
                Err(error) => errors.push(error),
            }
        }
    }
    // The same complaint whatever the shapes is about the graph, and so is any complaint where only the number of rows is
    // free: no other size is left that could do.
    let only_rows_free =
        signature.inputs.iter().all(|port| port.shape.iter().skip(1).all(|dim| matches!(dim, Dim::Fixed(_))));
    let first = errors.swap_remove(0);
    if only_rows_free || errors.iter().all(|error| *error == first) { Err(first) } else { Ok(Err(first)) }
}

/// Parses the graph and gives it its tensors.
fn parse(
    model: &ModelProto,
    mut constants: HashMap<String, Arc<Tensor>>,
    mut stored: HashMap<String, StoredTensor>,
    signature: &Signature,
) -> Result<InferenceModel, ModelError> {
    let parsed = framework().parse(model, None).map_err(|error| unreadable(model, &error))?;
    if let Some(name) = parsed.unresolved_inputs.first() {
        return Err(ModelError::invalid_model(format!("the graph uses \"{name}\", which nothing defines")));
    }
    let mut model = parsed.model;
    let sources = std::mem::take(&mut model.inputs);
    for outlet in sources {
        let name = model.nodes[outlet.node].name.as_str();
        if let Some(tensor) = constants.remove(name) {
            place(&mut model, outlet, tensor)?;
        } else if let Some(tensor) = stored.remove(name) {
            let node = &mut model.nodes[outlet.node];
            node.op = expand(StoredConst { tensor });
            node.outputs[0].fact = InferenceFact::default();
        } else {
            model.inputs.push(outlet);
        }
    }
    let names: Vec<&str> = model.inputs.iter().map(|outlet| model.nodes[outlet.node].name.as_str()).collect();
    if names.len() != signature.inputs.len()
        || names.iter().zip(&signature.inputs).any(|(name, port)| *name != port.name)
    {
        return Err(ModelError::internal("the inputs of the parsed graph are not those of its signature"));
    }
    Ok(model)
}

/// Makes a source a constant.
fn place(model: &mut InferenceModel, source: OutletId, tensor: Arc<Tensor>) -> Result<(), ModelError> {
    let wrong = |error| failure("placing a tensor", &error);
    let node = &mut model.nodes[source.node];
    node.outputs[0].fact = TypedFact::try_from(tensor.clone()).map_err(wrong)?.into();
    node.op = Const::new(tensor).map_err(wrong)?.into();
    Ok(())
}

fn engine_type(port: &Port) -> Result<DatumType, ModelError> {
    match port.dtype {
        PortType::String => Ok(DatumType::String),
        PortType::Fixed(dtype) => engine_of_dtype(dtype).ok_or_else(|| crate::tensor::unsupported_dtype(dtype)),
    }
}

/// The graph in tract's core operators for these input dimensions, the given inputs being constants.
fn inferred(
    model: InferenceModel,
    signature: &Signature,
    dims: Vec<Vec<TDim>>,
    constants: &[(usize, &HostTensor)],
    options: &CompileOptions,
    cancel: &AtomicBool,
) -> Result<TypedModel, ModelError> {
    into_typed(with_facts(model, signature, dims, constants, options, cancel)?, options, cancel)
}

/// The graph with types and shapes.
pub(super) fn with_facts(
    mut model: InferenceModel,
    signature: &Signature,
    dims: Vec<Vec<TDim>>,
    constants: &[(usize, &HostTensor)],
    options: &CompileOptions,
    cancel: &AtomicBool,
) -> Result<InferenceModel, ModelError> {
    for (input, (port, dims)) in signature.inputs.iter().zip(dims).enumerate() {
        let fact = InferenceFact::dt_shape(engine_type(port)?, dims);
        model.set_input_fact(input, fact).map_err(|error| failure("declaring the inputs", &error))?;
    }
    for &(input, value) in constants {
        let source = model.inputs[input];
        place(&mut model, source, Arc::new(value.to_engine()?))?;
    }
    let mut input = 0;
    model.inputs.retain(|_| {
        input += 1;
        !constants.iter().any(|(bound, _)| *bound == input - 1)
    });
    analyse(&mut model, constant_limit(options), cancel)?;
    Ok(model)
}

/// A graph with types and shapes in tract's core operators.
pub(super) fn into_typed(
    model: InferenceModel,
    options: &CompileOptions,
    cancel: &AtomicBool,
) -> Result<TypedModel, ModelError> {
    let typed = passes::into_typed(model).map_err(|error| failure("inferring types and shapes", &error))?;
    proceed(cancel)?;
    check_sizes(&typed, options)?;
    Ok(typed)
}

/// The same graph with convolutions of our own.
fn placed(mut typed: TypedModel) -> Result<TypedModel, ModelError> {
    super::repair::repair(&mut typed);
    // Before tract rewrites its own.
    super::conv::place(&mut typed).map_err(|error| failure("placing the convolutions", &error))?;
    Ok(typed)
}

/// The graph without what it can do without, and with operators on blocks.
fn simplified(mut typed: TypedModel, options: &CompileOptions, cancel: &AtomicBool) -> Result<TypedModel, ModelError> {
    passes::declutter(&mut typed).map_err(|error| failure("simplifying the graph", &error))?;
    proceed(cancel)?;
    super::conv::fuse(&mut typed).map_err(|error| failure("fusing the convolutions", &error))?;
    super::sum::place(&mut typed);
    place_on_blocks(&mut typed, options.memory_limit)?;
    super::norm::fuse(&mut typed).map_err(|error| failure("fusing the normalisations", &error))?;
    super::attention::fuse(&mut typed).map_err(|error| failure("fusing the attention", &error))?;
    proceed(cancel)?;
    Ok(typed)
}

/// Exchanges operators for those that compute on blocks. What has no such operator has to be inline: when a plan is made
/// that is told to the caller, in a run the tensor is put together from its blocks.
fn place_on_blocks(model: &mut TypedModel, limit: u64) -> Result<(), ModelError> {
    loop {
        let inline = blocks::replace(model).map_err(|error| failure("placing the operators on blocks", &error))?;
        if inline.is_empty() {
            return Ok(());
        }
        if weights::source().is_none() {
            return Err(ModelError::wants_inline(inline));
        }
        blocks::put_inline(model, &inline, limit)?;
    }
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
    bound: Vec<usize>,
    rows_are_independent: bool,
    options: &CompileOptions,
    cancel: &AtomicBool,
) -> Result<Runnable, ModelError> {
    let rows_are_independent = rows_are_independent || super::slices::batch_of(&typed, &names).is_some();
    passes::optimize(&mut typed).map_err(|error| failure("optimising the graph", &error))?;
    proceed(cancel)?;
    let made = Runnable::new(typed, names, bound, options).map_err(|error| failure("ordering the graph", &error))?;
    Ok(made.with_independent_rows(rows_are_independent))
}

/// Compiles for these inputs. Dimensions with a symbol in `free` stay free.
pub(super) fn specialise(
    template: &Template,
    signature: &Signature,
    key: &Key,
    free: &Names,
    options: &CompileOptions,
    cancel: &AtomicBool,
) -> Result<Runnable, ModelError> {
    let shapes = &key.shapes;
    let typed = match template {
        Template::Symbolic(typed, names) => {
            let mut sizes = HashMap::new();
            for (symbols, shape) in names.inputs.iter().zip(shapes) {
                for (symbol, size) in symbols.iter().zip(shape) {
                    if let Some(symbol) = symbol.as_ref().filter(|symbol| free.batch() != Some(symbol)) {
                        sizes.insert(symbol.clone(), TDim::Val(*size as i64));
                    }
                }
            }
            let mut concrete =
                typed.set_symbols(&sizes).map_err(|error| failure("fixing the free dimensions", &error))?;
            check_sizes(&concrete, options)?;
            passes::declutter(&mut concrete).map_err(|error| failure("simplifying the graph", &error))?;
            super::conv::fuse(&mut concrete).map_err(|error| failure("fusing the convolutions", &error))?;
            concrete
        }
        Template::Parsed(model, bound, _) => {
            let constants: Vec<_> = bound.iter().copied().zip(&key.values).collect();
            let dim = |input: usize, axis: usize, size: usize| {
                let symbol = free.inputs.get(input).and_then(|axes| axes.get(axis)?.as_ref());
                symbol.map_or(TDim::Val(size as i64), |symbol| symbol.to_dim())
            };
            let dims = |(input, shape): (usize, &Vec<usize>)| {
                shape.iter().enumerate().map(|(axis, &size)| dim(input, axis, size)).collect()
            };
            let dims = shapes.iter().enumerate().map(dims).collect();
            let inferred = inferred(model.clone(), signature, dims, &constants, options, cancel)?;
            simplified(placed(inferred)?, options, cancel)?
        }
    };
    proceed(cancel)?;
    let names = if free.batch().is_some() { free.clone() } else { Names::default() };
    optimise(typed, names, template.bound().to_vec(), false, options, cancel)
}
