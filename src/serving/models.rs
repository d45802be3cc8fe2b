//! Models in use by this session: from a name to a plan, and runs of it.
//!
//! Weights come from the block cache while a plan runs (`source`). Two caches per session. *Plans*, by content hash: never
//! stale, the least recently used goes first. *Names*: what a model name means to a snapshot and a role, so that a row costs
//! no look-up; an entry counts only while the active snapshot sees the same as when it was made.

use super::settings;
use super::source::{ModelBlocks, Replaced};
use crate::cache::Prediction;
use crate::catalog::{self, ModelSpec, TensorRow, VersionRow};
use crate::pg::progress::{self, Activity, Field, Work};
use crate::pg::snapshot::SnapshotIdentity;
use crate::pg::{compute, interrupt};
use inference::error::ModelError;
use inference::plan::{CompileOptions, FetchTensor, Plan};
use inference::remote;
use inference::tensor::HostTensor;
use lru::LruCache;
use pgrx::pg_sys;
use std::cell::RefCell;
use std::num::NonZeroUsize;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, LazyLock};
use std::time::Instant;
use tensor_blocks::Tiling;

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
    declared: Option<bool>,
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
    model_as_declared(spec).0
}

/// The same, and whether its rows were declared to be independent, or not to be.
pub fn model_as_declared(spec: &str) -> (Arc<Model>, Option<bool>) {
    if let Some((set, member)) = super::sets::member_of(spec) {
        return (set.model(member), None);
    }
    let seen_by = SnapshotIdentity::active();
    let user = crate::pg::identity::current_user();
    let known = NAMED.with_borrow_mut(|names| {
        names
            .get(spec)
            .filter(|name| name.seen_by == seen_by && name.user == user && name.key == plan_key(name.key.0))
            .map(|name| (name.model.clone(), name.declared))
    });
    if let Some(known) = known {
        return known;
    }
    let version = catalog::resolve(&ModelSpec::parse(spec));
    let key = plan_key(version.content_hash);
    let cached = PLANS.with_borrow_mut(|plans| plans.get(&key).cloned());
    let cached = cached.filter(|model| model.blocks.serves(version.id, &model.plan));
    let model = cached.unwrap_or_else(|| {
        let tensors = catalog::tensors(version.id);
        let plan = compile_version(&version, &tensors, settings::inline_tensor_bytes());
        keep(version.content_hash, plan, ModelBlocks::of_version(version.content_hash, version.id, tensors))
    });
    let declared = version.rows_declared;
    let name = Name { declared, seen_by, user, key, model: model.clone() };
    NAMED.with_borrow_mut(|names| names.put(spec.to_owned(), name));
    (model, declared)
}

/// A version for trial runs, whose blocks can be replaced ([`ModelBlocks::replace`]): tensors of `inline_tensor_bytes` or more
/// stay in blocks where operators allow it. It is kept nowhere.
pub fn on_trial(version: &VersionRow, inline_tensor_bytes: u64) -> Arc<Model> {
    let tensors = catalog::tensors(version.id);
    let plan = compile_version(version, &tensors, inline_tensor_bytes);
    let blocks = ModelBlocks::of_version(version.content_hash, version.id, tensors);
    blocks.replace(Replaced::new());
    Arc::new(Model { plan, blocks: Arc::new(blocks) })
}

fn compile_version(version: &VersionRow, tensors: &[TensorRow], inline_tensor_bytes: u64) -> Arc<Plan> {
    let graph = catalog::graph(&version.graph_hash);
    let tilings: Vec<_> = tensors.iter().map(|tensor| Some(tensor.tiling())).collect();
    let mut fetch = |ordinal: u32, out: &mut Vec<u8>| {
        let tensor = tensors
            .get(ordinal as usize)
            .ok_or_else(|| ModelError::internal(format!("tensor {ordinal} of the graph is not stored")))?;
        catalog::read_tensor(tensor, out);
        Ok(())
    };
    compile_inlining(&graph, &mut fetch, &tilings, inline_tensor_bytes)
}

/// Compiles a plan; the work is done on the compute thread, so that it can be cancelled. `tilings`: by ordinal, how tensors
/// are cut into blocks.
pub fn compile(graph: &[u8], fetch: &mut FetchTensor<'_>, tilings: &[Option<Tiling>]) -> Arc<Plan> {
    compile_inlining(graph, fetch, tilings, settings::inline_tensor_bytes())
}

fn compile_inlining(
    graph: &[u8],
    fetch: &mut FetchTensor<'_>,
    tilings: &[Option<Tiling>],
    inline_tensor_bytes: u64,
) -> Arc<Plan> {
    compute::start();
    let options = CompileOptions {
        memory_limit: settings::max_prediction_bytes(),
        inline_tensor_bytes,
        ..CompileOptions::default()
    };
    let plan = Plan::compile_on_blocks(graph, fetch, tilings, &options, &mut interrupt::should_stop);
    Arc::new(plan.unwrap_or_else(|e| interrupt::raise_or_model(e)))
}

/// The plan that is kept for this content, if there is one.
pub fn kept(content_hash: &[u8; 32]) -> Option<Arc<Model>> {
    PLANS.with_borrow_mut(|plans| plans.get(&plan_key(*content_hash)).cloned())
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
pub fn run(model: &Arc<Model>, inputs: Vec<(String, HostTensor)>, rows: u64) -> Vec<(String, HostTensor)> {
    try_run(model, inputs, 1, rows).unwrap_or_else(|e| interrupt::raise_or_model(e))
}

/// As [`run`], for so many calls; what the model cannot compute is returned.
///
/// # Errors
/// As [`Plan::run`]; errors of the server are raised.
pub fn try_run(
    model: &Arc<Model>,
    inputs: Vec<(String, HostTensor)>,
    calls: u64,
    rows: u64,
) -> Result<Vec<(String, HostTensor)>, ModelError> {
    let begin = Instant::now();
    let result = run_plan(model, inputs);
    progress::add(Field::Rows, rows);
    let nanoseconds = u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX);
    model.blocks.note_prediction(Prediction { calls, rows, nanoseconds, failed: result.is_err() });
    result
}

/// How many blocks a run reads at least.
fn block_count(plan: &Plan) -> i64 {
    let tilings = plan.stored_tensors().iter().map(|tensor| &tensor.tiling);
    tilings.map(|tiling| i64::from(tiling.block_rows()) * i64::from(tiling.block_cols())).sum()
}

fn run_plan(model: &Arc<Model>, inputs: Vec<(String, HostTensor)>) -> Result<Vec<(String, HostTensor)>, ModelError> {
    let Model { plan, blocks } = &**model;
    interrupt::check();
    if !plan.stored_tensors().is_empty() {
        blocks.note_run();
    }
    let heavy = plan.is_heavy(&inputs);
    let _activity = heavy.then(|| Activity::begin(Work::Predict, Some(blocks.content_hash())));
    if heavy {
        progress::set(Field::Blocks, 0);
        progress::set(Field::AllBlocks, block_count(plan));
    }
    let memory = plan.memory_bytes();
    let result = compute_here_or_there(model, inputs, heavy);
    if heavy && plan.memory_bytes() != memory {
        shrink();
    }
    result
}

/// Runs a model that is on trial: no statistics count it.
///
/// # Errors
/// As [`Plan::run`]; errors of the server are raised.
pub fn run_trial(
    model: &Arc<Model>,
    inputs: Vec<(String, HostTensor)>,
) -> Result<Vec<(String, HostTensor)>, ModelError> {
    interrupt::check();
    let heavy = model.plan.is_heavy(&inputs);
    compute_here_or_there(model, inputs, heavy)
}

fn compute_here_or_there(
    model: &Arc<Model>,
    inputs: Vec<(String, HostTensor)>,
    heavy: bool,
) -> Result<Vec<(String, HostTensor)>, ModelError> {
    static GO_ON: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);
    let Model { plan, blocks } = &**model;
    if !heavy {
        return plan.run_on_blocks(inputs, blocks.clone(), &GO_ON);
    }
    compute::start();
    remote::run_on_blocks(plan.clone(), inputs, &**blocks, &mut interrupt::should_stop)
}
