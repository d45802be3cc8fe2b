//! Plans: a graph and its tensors, compiled for execution.
//!
//! Responsible for: everything between a stored graph and the numbers that it computes. [`Plan::compile`] checks the
//! graph ([`refusals`]), gives it its tensors ([`prepare`]), and lets tract compile it ([`build`]); [`Plan::run`]
//! checks inputs, binds free dimensions and executes node by node ([`run`]). [`Plan::rows`] says whether many rows may be
//! given to one run ([`rows`]).
//!
//! Invariants:
//! - a model is data of a stranger: whatever it contains, compiling and running end with a result or a
//!   [`ModelError`], never with a panic, an abort for want of memory, an overflowing stack, or a file of the server
//!   being opened;
//! - numbers are right or absent: what tract is known to compute wrongly is refused at compile;
//! - a plan is immutable but for its cache of specialisations, and may be used by several threads.

mod analyse;
mod attention;
mod blocks;
mod branch;
mod build;
mod cast;
mod classical;
mod concrete;
mod conv;
mod legacy;
mod modulo;
mod names;
mod norm;
mod ops;
mod passes;
mod pool;
mod prepare;
mod quantize;
mod recurrent;
mod reduce;
pub mod refusals;
mod repair;
mod rewrite;
pub mod rows;
mod run;
mod runnable;
mod slices;
mod spill;
mod sum;
mod trees;
mod widen;

#[cfg(test)]
mod tests;

use crate::error::{ErrorKind, ModelError};
use crate::signature::Signature;
use crate::tensor::HostTensor;
use crate::weights::{self, BlockSource, StoredTensor};
use crate::worker;
use build::{Runnable, Template};
use names::Names;
use rows::{Rows, Work};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tensor_blocks::Tiling;

pub(crate) use prepare::decode;

/// Fetches the bytes of the stored tensor with this ordinal: little-endian, row-major, appended to the buffer.
pub type FetchTensor<'a> = dyn FnMut(u32, &mut Vec<u8>) -> Result<(), ModelError> + 'a;

/// Settings of a compilation.
#[derive(Clone, Debug)]
pub struct CompileOptions {
    /// Bytes that the values of one run may take at a time, and that a constant computed at compile may take.
    /// A run that would need more is refused with `TooLarge`. Default 2 GB.
    pub memory_limit: u64,
    /// Tensors of fewer bytes are part of the plan even where they could stay in blocks. Default 32 kB.
    pub inline_tensor_bytes: u64,
    /// Plans for concrete input shapes that are kept for a model that needs them. Default 4.
    pub specialisations: usize,
}

impl Default for CompileOptions {
    fn default() -> CompileOptions {
        CompileOptions { memory_limit: 2 << 30, inline_tensor_bytes: 32 << 10, specialisations: 4 }
    }
}

/// The shapes of a run's inputs, in the signature's order.
type Shapes = Vec<Vec<usize>>;

/// What a plan for concrete inputs is made for: the shapes of all inputs, and the values of those that the graph
/// needs to be constants.
#[derive(Clone, PartialEq)]
struct Key {
    shapes: Shapes,
    values: Vec<HostTensor>,
}

/// A compiled model.
pub struct Plan {
    signature: Signature,
    options: CompileOptions,
    /// Serves every input shape; none where tract cannot compile the graph with free dimensions.
    general: Option<Arc<Runnable>>,
    /// What plans for concrete shapes are made of; none where `general` does for all shapes.
    template: Option<Template>,
    specialised: Mutex<Vec<(Key, Arc<Runnable>)>>,
    /// What stays in blocks, by ordinal.
    stored: Vec<StoredTensor>,
    /// Bytes of the tensors.
    weights: u64,
    memory: AtomicU64,
    doubt: Option<ModelError>,
    rows: Rows,
    /// Verdicts on sizes, for a plan whose own does not hold for all.
    proven: Mutex<Vec<(Shapes, Rows)>>,
    work: Option<Work>,
}

impl Plan {
    /// Compiles a stored graph. The tensors are fetched on the calling thread, the work is done on the compute thread
    /// ([`worker`]), which has the stack for deep graphs.
    ///
    /// # Errors
    /// `NotOnnx` and `InvalidModel` for what is no valid graph; `UnsupportedOperator`, `UnsupportedOpset`,
    /// `UnsupportedType` for what cannot be run; `TooLarge` for constants beyond the memory limit; what `tensors`
    /// returns.
    pub fn compile(graph: &[u8], tensors: &mut FetchTensor<'_>, options: &CompileOptions) -> Result<Plan, ModelError> {
        Plan::compile_on_blocks(graph, tensors, &[], options, &mut || false)
    }

    /// As [`compile`](Plan::compile); tensors that have a tiling (by ordinal) may stay in blocks: they are not fetched,
    /// and a run has to have a source of blocks ([`Plan::run_on_blocks`]). `poll` is called at least every 20 ms while the compute thread works, and ends
    /// the call with `Cancelled` when it says true.
    ///
    /// # Errors
    /// As [`compile`](Plan::compile), and `Cancelled`.
    pub fn compile_on_blocks(
        graph: &[u8],
        tensors: &mut FetchTensor<'_>,
        tilings: &[Option<Tiling>],
        options: &CompileOptions,
        poll: &mut dyn FnMut() -> bool,
    ) -> Result<Plan, ModelError> {
        let mut inline = BTreeSet::new();
        loop {
            let blocks = prepare::Blocks { tilings, inline: &inline };
            let prepared = prepare::prepare(graph, tensors, blocks, options)?;
            let stored: Vec<u32> = prepared.stored.values().map(|tensor| tensor.ordinal).collect();
            match Plan::compile_prepared(prepared, options, poll) {
                // Each turn puts at least one more tensor inline.
                Err(error) if error.kind == ErrorKind::WantsInline && !error.tensors.is_empty() => {
                    inline.extend(error.tensors);
                }
                // What tract cannot compile without seeing its weights it may compile with them.
                Err(error)
                    if !stored.is_empty() && !matches!(error.kind, ErrorKind::Cancelled | ErrorKind::TooLarge) =>
                {
                    inline.extend(stored);
                }
                result => return result,
            }
        }
    }

    fn compile_prepared(
        prepared: prepare::Prepared,
        options: &CompileOptions,
        poll: &mut dyn FnMut() -> bool,
    ) -> Result<Plan, ModelError> {
        let options = options.clone();
        worker::run_interruptible(
            move |cancel, _| {
                contain("compiling the model", ErrorKind::InvalidModel, || {
                    Plan::from_prepared(prepared, options, cancel)
                })
            },
            poll,
        )
    }

    fn from_prepared(
        prepared: prepare::Prepared,
        options: CompileOptions,
        cancel: &AtomicBool,
    ) -> Result<Plan, ModelError> {
        let weights = prepared.weights;
        let signature = prepared.signature.clone();
        let mut stored: Vec<StoredTensor> = prepared.stored.values().cloned().collect();
        stored.sort_by_key(|tensor| tensor.ordinal);
        let build::Compiled { general, template, doubt, rows, work } = build::compile(prepared, &options, cancel)?;
        let plan = Plan {
            signature,
            options,
            stored,
            general: general.map(Arc::new),
            template,
            specialised: Mutex::new(Vec::new()),
            weights,
            memory: AtomicU64::new(0),
            doubt,
            rows,
            proven: Mutex::new(Vec::new()),
            work,
        };
        plan.count_memory(0);
        Ok(plan)
    }

    /// The tensors that the plan does not hold, by ordinal: a run needs a source of their blocks.
    pub fn stored_tensors(&self) -> &[StoredTensor] {
        &self.stored
    }

    /// As [`run`](Plan::run), for a plan whose tensors stay in blocks.
    ///
    /// # Errors
    /// As [`run`](Plan::run), and what the source gives.
    pub fn run_on_blocks(
        &self,
        inputs: Vec<(String, HostTensor)>,
        source: Arc<dyn BlockSource>,
        cancel: &Arc<AtomicBool>,
    ) -> Result<Vec<(String, HostTensor)>, ModelError> {
        weights::with_source(source, cancel.clone(), || self.run(inputs, cancel))
    }

    /// Runs the plan. `cancel` is looked at between operators. Outputs come in the graph's order.
    ///
    /// # Errors
    /// `UnknownInput`, `MissingInput` and `InvalidInput` for inputs that do not fit, `TooLarge` for a run beyond the
    /// memory limit, `Cancelled`, and `InvalidInput` for values that the model cannot compute with, such as an index
    /// out of range.
    pub fn run(
        &self,
        inputs: Vec<(String, HostTensor)>,
        cancel: &AtomicBool,
    ) -> Result<Vec<(String, HostTensor)>, ModelError> {
        let inputs = run::order_inputs(&self.signature, inputs)?;
        let key = self.key(&inputs.iter().collect::<Vec<_>>());
        contain("running the model", ErrorKind::InvalidInput, || {
            let runnable = self.runnable(&key, cancel)?;
            run::run(&runnable, &self.signature, inputs, &key.shapes, &self.options, self.weights(), cancel)
        })
    }

    /// True when a run with these inputs may keep the calling thread for longer than about 20 ms, or
    /// when it has to compile first. Such a run belongs on the compute thread; others are quicker in place.
    pub fn is_heavy(&self, inputs: &[(String, HostTensor)]) -> bool {
        let mut ordered = Vec::with_capacity(inputs.len());
        for port in &self.signature.inputs {
            // A run that will be refused is not heavy.
            let Some((_, tensor)) = inputs.iter().find(|(name, _)| *name == port.name) else { return false };
            ordered.push(tensor);
        }
        let key = self.key(&ordered);
        match self.ready(&key) {
            Some(runnable) => runnable.is_heavy(&key.shapes),
            None => true,
        }
    }

    /// What the model takes and gives, as the graph declares it.
    pub fn signature(&self) -> &Signature {
        &self.signature
    }

    /// Bytes that the plan occupies: an estimate from the sizes of its tensors, growing with its specialisations.
    pub fn memory_bytes(&self) -> u64 {
        self.memory.load(Ordering::Relaxed)
    }

    /// True when the first dimension of every input and output is the same free dimension, so that any number of
    /// rows can be given at a time. Says nothing about whether rows influence each other.
    pub fn batch_is_free(&self) -> bool {
        self.signature.batch_is_declared_free()
    }

    /// True when one compiled form serves all shapes; false when each new combination of input shapes is compiled.
    pub fn is_general(&self) -> bool {
        self.template.is_none()
    }

    /// Why the plan could not be proven to run at compile, if so: it compiles only for concrete input shapes or
    /// values, and those that were tried did not fit the model. A run with fitting inputs may well succeed.
    pub fn doubt(&self) -> Option<&ModelError> {
        self.doubt.as_ref()
    }

    /// Whether rows may be stacked for one run, along which axes, and if not, why. The number of rows in a run is any:
    /// a plan without one form for all shapes ([`is_general`](Plan::is_general)) compiles for each number anew.
    pub fn rows(&self) -> &Rows {
        &self.rows
    }

    /// The verdict for inputs of these shapes, in the signature's order: that of [`rows`](Plan::rows), proven anew where it does not hold
    /// for every size. The sizes along the axis of the rows do not matter. What was proven is kept; a proof takes about as long as
    /// half a compilation, and belongs on the compute thread.
    pub fn rows_at(&self, shapes: &[Vec<usize>], cancel: &AtomicBool) -> Rows {
        let (Rows::Independent { inputs, every_size: false, .. }, Some(Template::Parsed(parsed, ..))) =
            (&self.rows, &self.template)
        else {
            return self.rows.clone();
        };
        let mut shapes = shapes.to_vec();
        for (shape, &axis) in shapes.iter_mut().zip(inputs) {
            if let Some(size) = shape.get_mut(axis) {
                *size = 1;
            }
        }
        let mut proven = self.proven.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, rows)) = proven.iter().find(|(held, _)| *held == shapes) {
            return rows.clone();
        }
        let (rows, _) = rows::at_sizes(parsed, &self.signature, &Default::default(), &shapes, &self.options, cancel);
        if !cancel.load(Ordering::Relaxed) {
            if proven.len() >= PROVEN {
                proven.remove(0);
            }
            proven.push((shapes, rows.clone()));
        }
        rows
    }

    /// Floating-point operations of one row, two for a multiply-add: an estimate from the products, convolutions,
    /// recurrent layers, reductions and divisions. `other` is the size that free dimensions other than the rows' are taken
    /// to have. None where the graph is not known before the sizes of its inputs.
    pub fn flops_per_row(&self, other: u64) -> Option<f64> {
        self.work.as_ref().map(|work| work.flops(other))
    }

    /// Bytes that the values of a run with inputs of these shapes, in the signature's order, take at a time. None where the run
    /// would be refused, and where the plan has to be compiled for these shapes first.
    pub fn peak_bytes(&self, shapes: &[Vec<usize>]) -> Option<u64> {
        let general = self.general.as_ref()?;
        general.demand(&shapes.to_vec()).ok().map(|demand| demand.peak)
    }

    /// Bytes of all tensors, in the plan and in blocks.
    fn weights(&self) -> u64 {
        self.weights + self.stored.iter().map(|tensor| tensor.tiling.byte_len() as u64).sum::<u64>()
    }

    /// What a plan for these inputs is made for.
    fn key(&self, inputs: &[&HostTensor]) -> Key {
        let bound = self.template.as_ref().map_or(&[][..], Template::bound);
        Key {
            shapes: inputs.iter().map(|tensor| tensor.shape.clone()).collect(),
            values: bound.iter().map(|&input| inputs[input].clone()).collect(),
        }
    }

    /// As `key`, of a form that serves all batches; none where no dimension is known to be one.
    fn any_batch(&self, key: &Key) -> Option<Key> {
        self.template.as_ref()?.free().batch()?;
        let mut wide = key.clone();
        // No batch that is run has this size.
        wide.shapes.iter_mut().filter_map(|shape| shape.first_mut()).for_each(|rows| *rows = usize::MAX);
        Some(wide)
    }

    /// The compiled form for these inputs, if it is there.
    fn ready(&self, key: &Key) -> Option<Arc<Runnable>> {
        match (&self.template, &self.general) {
            (None, Some(general)) => Some(general.clone()),
            _ => {
                let any_batch = self.any_batch(key);
                let mut cache = self.specialised.lock().unwrap_or_else(PoisonError::into_inner);
                let place = cache
                    .iter()
                    .position(|(held, _)| held == key || any_batch.as_ref().is_some_and(|it| held == it))?;
                // Last used stands last.
                let entry = cache.remove(place);
                let runnable = entry.1.clone();
                cache.push(entry);
                Some(runnable)
            }
        }
    }

    /// The compiled form for these inputs, compiled now if need be.
    fn runnable(&self, key: &Key, cancel: &AtomicBool) -> Result<Arc<Runnable>, ModelError> {
        if let Some(runnable) = self.ready(key) {
            return Ok(runnable);
        }
        let template = self.template.as_ref().ok_or_else(|| ModelError::internal("a plan without a compiled form"))?;
        let specialise =
            |free: &Names| build::specialise(template, &self.signature, key, free, &self.options, cancel).map(Arc::new);
        // For all batches where that can be compiled.
        let (key, made) = match self.any_batch(key).map(|wide| (wide, specialise(&template.free()))) {
            Some((_, Err(error))) if error.kind == ErrorKind::Cancelled => return Err(error),
            Some((wide, Ok(made))) => (wide, made),
            _ => (key.clone(), specialise(&Names::default())?),
        };
        let mut cache = self.specialised.lock().unwrap_or_else(PoisonError::into_inner);
        while cache.len() >= self.options.specialisations.max(1) {
            cache.remove(0);
        }
        cache.push((key, made.clone()));
        self.count_memory(cache.len());
        Ok(made)
    }

    fn count_memory(&self, specialised: usize) {
        let copies = u64::from(self.general.is_some()) + u64::from(self.template.is_some()) + specialised as u64;
        self.memory.store(self.weights * copies + OVERHEAD, Ordering::Relaxed);
    }
}

impl std::fmt::Debug for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plan").field("signature", &self.signature).finish_non_exhaustive()
    }
}

/// Sizes for which a plan keeps a verdict.
const PROVEN: usize = 64;

/// Bytes of a plan beside its tensors, roughly.
const OVERHEAD: u64 = 256 << 10;

/// Runs `work` with panics contained. A panic inside tract is caused by the model or by an input, so its kind is
/// the given one, not `Internal`.
fn contain<T>(step: &str, kind: ErrorKind, work: impl FnOnce() -> Result<T, ModelError>) -> Result<T, ModelError> {
    worker::contain_panic(step, || Ok(work())).unwrap_or_else(|mut error| {
        error.kind = kind;
        error.message = format!("{step} failed");
        error.hint = match kind {
            ErrorKind::InvalidInput => Some(run::INPUT_HINT.into()),
            _ => None,
        };
        Err(error)
    })
}

/// Sizes by name of dimension, of which there are few.
type Bindings<'a> = Vec<(&'a str, usize)>;
