//! Prediction: arguments to tensors, the plan, outputs to values.
//!
//! Weights come from the block cache while a plan runs (`source`). Two caches per session. *Plans*, by content hash: never stale, the least recently used goes first. *Names*: what a model
//! name means to a snapshot and a role, so that a row costs no look-up; an entry counts only while the active snapshot
//! sees the same as when it was made.

use super::settings;
use super::source::ModelBlocks;
use crate::catalog::{self, ModelSpec};
use crate::pg::fmgr::{Call, sql_functions, varlena_datum};
use crate::pg::snapshot::SnapshotIdentity;
use crate::pg::{array, compute, error, interrupt};
use inference::array::{Element, from_rows, to_rows_f32};
use inference::error::ModelError;
use inference::json;
use inference::plan::{CompileOptions, FetchTensor, Plan};
use inference::remote;
use inference::signature::{Dim, Port};
use inference::tensor::HostTensor;
use lru::LruCache;
use pgrx::pg_sys;
use pgrx::prelude::*;
use std::cell::RefCell;
use std::ffi::CStr;
use std::num::NonZeroUsize;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, LazyLock};
use tensor_blocks::Tiling;

sql_functions!(predict_real, predict_double, predict_integer, predict_bigint, predict_text, predict_jsonb);

/// Names that a session remembers.
const NAMES: NonZeroUsize = NonZeroUsize::new(256).expect("not zero");

/// What a plan is kept under: the model's content hash, and the settings with which it was compiled.
type PlanKey = ([u8; 32], u64, u64);

/// A model that this session can run.
pub struct Model {
    pub plan: Arc<Plan>,
    pub blocks: Arc<ModelBlocks>,
}

fn plan_key(content_hash: [u8; 32]) -> PlanKey {
    (content_hash, settings::max_prediction_bytes(), settings::inline_tensor_bytes())
}

struct Name {
    seen_by: SnapshotIdentity,
    user: pg_sys::Oid,
    key: PlanKey,
    model: Arc<Model>,
}

thread_local! {
    static PLANS: RefCell<LruCache<PlanKey, Arc<Model>>> = RefCell::new(LruCache::unbounded());
    static NAMED: RefCell<LruCache<String, Name>> = RefCell::new(LruCache::new(NAMES));
}

/// The model that `spec` names, for the active snapshot and the current role.
pub fn model_of(spec: &str) -> Arc<Model> {
    let seen_by = SnapshotIdentity::active();
    let user = crate::pg::identity::current_user();
    let known = NAMED.with_borrow_mut(|names| {
        names
            .get(spec)
            .filter(|name| name.seen_by == seen_by && name.user == user && name.key == plan_key(name.key.0))
            .map(|name| name.model.clone())
    });
    if let Some(model) = known {
        return model;
    }
    let version = catalog::resolve(&ModelSpec::parse(spec));
    let key = plan_key(version.content_hash);
    let cached = PLANS.with_borrow_mut(|plans| plans.get(&key).cloned());
    let cached = cached.filter(|model| model.blocks.serves(version.id, &model.plan));
    let model = cached.unwrap_or_else(|| {
        let graph = catalog::graph(&version.graph_hash);
        let tensors = catalog::tensors(version.id);
        let tilings: Vec<_> = tensors.iter().map(|tensor| Some(tensor.tiling())).collect();
        let mut fetch = |ordinal: u32, out: &mut Vec<u8>| {
            let tensor = tensors
                .get(ordinal as usize)
                .ok_or_else(|| ModelError::internal(format!("tensor {ordinal} of the graph is not stored")))?;
            catalog::read_tensor(tensor, out);
            Ok(())
        };
        let plan = compile(&graph, &mut fetch, &tilings);
        keep(version.content_hash, plan, ModelBlocks::of_version(version.content_hash, version.id, tensors))
    });
    let name = Name { seen_by, user, key, model: model.clone() };
    NAMED.with_borrow_mut(|names| names.put(spec.to_owned(), name));
    model
}

/// Compiles a plan; the work is done on the compute thread, so that it can be cancelled. `tilings`: by ordinal, how tensors
/// are cut into blocks.
pub fn compile(graph: &[u8], fetch: &mut FetchTensor<'_>, tilings: &[Option<Tiling>]) -> Arc<Plan> {
    compute::start();
    let options = CompileOptions {
        memory_limit: settings::max_prediction_bytes(),
        inline_tensor_bytes: settings::inline_tensor_bytes(),
        ..CompileOptions::default()
    };
    let plan = Plan::compile_on_blocks(graph, fetch, tilings, &options, &mut interrupt::should_stop);
    Arc::new(plan.unwrap_or_else(|e| interrupt::raise_or_model(e)))
}

/// Keeps a plan for this session, and lets the least recently used ones go.
pub fn remember(content_hash: [u8; 32], plan: Arc<Plan>) -> Arc<Model> {
    keep(content_hash, plan, ModelBlocks::new(content_hash))
}

fn keep(content_hash: [u8; 32], plan: Arc<Plan>, blocks: ModelBlocks) -> Arc<Model> {
    let model = Arc::new(Model { plan, blocks: Arc::new(blocks) });
    PLANS.with_borrow_mut(|plans| plans.put(plan_key(content_hash), model.clone()));
    shrink();
    model
}

fn shrink() {
    let evicted = PLANS.with_borrow_mut(|plans| {
        let limit = settings::plan_cache_bytes();
        let mut total: u64 = plans.iter().map(|(_, model)| model.plan.memory_bytes()).sum();
        let mut evicted = Vec::new();
        while total > limit && plans.len() > 1 {
            let Some((key, model)) = plans.pop_lru() else { break };
            total -= model.plan.memory_bytes().min(total);
            evicted.push(key);
        }
        evicted
    });
    if !evicted.is_empty() {
        NAMED.with_borrow_mut(|names| {
            let gone: Vec<String> =
                names.iter().filter(|(_, name)| evicted.contains(&name.key)).map(|(spec, _)| spec.clone()).collect();
            for spec in gone {
                names.pop(&spec);
            }
        });
    }
}

/// Runs the plan: in place when that is quick, else on the compute thread while this one listens for interrupts and gets the
/// blocks.
fn run(model: &Arc<Model>, inputs: Vec<(String, HostTensor)>) -> Vec<(String, HostTensor)> {
    static GO_ON: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);
    interrupt::check();
    let Model { plan, blocks } = &**model;
    if !plan.stored_tensors().is_empty() {
        blocks.note_run();
    }
    let result = if plan.is_heavy(&inputs) {
        compute::start();
        let memory = plan.memory_bytes();
        let result = remote::run_on_blocks(plan.clone(), inputs, &**blocks, &mut interrupt::should_stop);
        if plan.memory_bytes() != memory {
            shrink();
        }
        result
    } else {
        plan.run_on_blocks(inputs, blocks.clone(), &GO_ON)
    };
    result.unwrap_or_else(|e| interrupt::raise_or_model(e))
}

/// The only input of a model, for the array forms.
fn only_input<'p>(plan: &'p Plan, spec: &str) -> &'p Port {
    let inputs = &plan.signature().inputs;
    match inputs.as_slice() {
        [port] => port,
        _ => error::raise(
            PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
            format!("model \"{spec}\" has {} inputs, and an array is one", inputs.len()),
            &format!("It takes {}.", plan.signature().inputs_text()),
            "Name the inputs: predict(model, '{\"input\": [...], ...}'::jsonb).",
        ),
    }
}

/// One row, or the rows of a two-dimensional array, through the model; the first output, flattened per row.
fn predict_rows<T: Element>(spec: &str, dims: &[usize], values: &[T]) -> pg_sys::Datum {
    let model = model_of(spec);
    let plan = &model.plan;
    let port = only_input(plan, spec);
    let (rows, width) = match *dims {
        [] => (1, 0),
        [width] => (1, width),
        [rows, width] => (rows, width),
        _ => error::raise(
            PgSqlErrorCode::ERRCODE_ARRAY_ELEMENT_ERROR,
            format!("input of predict has {} dimensions", dims.len()),
            "One dimension is a row, two are several rows.",
            "Flatten each row, or give the input as jsonb in the tensor's own shape.",
        ),
    };
    let predict = |rows: usize, values: &[T]| {
        let input = from_rows(port, rows, width, values).unwrap_or_else(|e| error::raise_model(e));
        let outputs = run(&model, vec![(port.name.clone(), input)]);
        let Some((_, first)) = outputs.first() else {
            error::not_supported("the model has no output", "Load a model with at least one output.")
        };
        to_rows_f32(first, rows).unwrap_or_else(|e| error::raise_model(e))
    };
    if dims.len() < 2 {
        let (_, out) = predict(1, values);
        return array::from_f32(&[out.len()], &out);
    }
    let whole_batch = matches!(port.shape.first(), Some(Dim::Fixed(n)) if *n == rows as u64);
    if plan.batch_is_free() || whole_batch {
        let (out_width, out) = predict(rows, values);
        return array::from_f32(&[rows, out_width], &out);
    }
    // Any other model takes one row at a time.
    let (mut out, mut out_width) = (Vec::new(), 0);
    for row in values.chunks_exact(width.max(1)) {
        let (w, mut values) = predict(1, row);
        if !out.is_empty() && w != out_width {
            error::raise(
                PgSqlErrorCode::ERRCODE_ARRAY_ELEMENT_ERROR,
                "the rows' outputs differ in length and make no array",
                &format!("One has {out_width} values, another {w}."),
                "Predict row by row.",
            );
        }
        out_width = w;
        out.append(&mut values);
    }
    array::from_f32(&[rows, out_width], &out)
}

fn predict_array<T: Element + array::Fixed>(call: &Call) -> pg_sys::Datum {
    let spec: &str = call.need(0, "model");
    let Some(datum) = call.datum(1) else { return call.null() };
    array::with_elements::<T, _>(datum, |dims, values| predict_rows(spec, dims, values))
}

fn predict_real(call: &Call) -> pg_sys::Datum {
    predict_array::<f32>(call)
}

fn predict_double(call: &Call) -> pg_sys::Datum {
    predict_array::<f64>(call)
}

fn predict_integer(call: &Call) -> pg_sys::Datum {
    predict_array::<i32>(call)
}

fn predict_bigint(call: &Call) -> pg_sys::Datum {
    predict_array::<i64>(call)
}

/// Takes what has no type: an array literal such as `'{1,2}'`.
fn predict_text(call: &Call) -> pg_sys::Datum {
    let spec: &str = call.need(0, "model");
    let text: &str = call.need(1, "input");
    let trimmed = text.trim_start();
    let inner = trimmed.strip_prefix('{').unwrap_or(trimmed).trim_start();
    if !trimmed.starts_with('{') || inner.starts_with('"') && inner.contains(':') {
        error::raise(
            PgSqlErrorCode::ERRCODE_INVALID_TEXT_REPRESENTATION,
            "input of predict is no array literal",
            "A value without a type is read as an array of numbers.",
            "Write '{1,2,3}' for one row, '{{1,2},{3,4}}' for several, or cast to jsonb for named inputs.",
        );
    }
    array::with_elements::<f64, _>(array::parse_f64(text), |dims, values| predict_rows(spec, dims, values))
}

/// A jsonb argument. Its numbers can be larger than any float, which is the caller's error and not one of the server.
fn json_argument(call: &Call, n: usize) -> serde_json::Value {
    // SAFETY: the SQL declaration says that the argument is a jsonb.
    let text: Option<&CStr> = unsafe { pgrx::direct_function_call(pg_sys::jsonb_out, &[call.datum(n)]) };
    serde_json::from_slice(text.unwrap_or_default().to_bytes()).unwrap_or_else(|e| {
        error::raise(
            PgSqlErrorCode::ERRCODE_NUMERIC_VALUE_OUT_OF_RANGE,
            "inputs of predict cannot be read",
            &format!("{e}."),
            "Give numbers that a double precision value can hold, nested at most 128 deep.",
        )
    })
}

fn predict_jsonb(call: &Call) -> pg_sys::Datum {
    let spec: &str = call.need(0, "model");
    let model = model_of(spec);
    let inputs = json_argument(call, 1);
    let inputs = json::inputs_from_json(model.plan.signature(), &inputs).unwrap_or_else(|e| error::raise_model(e));
    let outputs = run(&model, inputs);
    let value = json::outputs_to_json(&outputs).unwrap_or_else(|e| error::raise_model(e));
    pgrx::JsonB(value).into_datum().unwrap_or_else(|| varlena_datum(&[]))
}
