//! One call of `predict` at work: rows are gathered, the model runs on them, values are handed out.

use super::calls::Elements;
use crate::cache;
use crate::pg::array;
use crate::serving::{self, Model};
use inference::array::{RowBuffer, to_rows_f32};
use inference::error::{ErrorKind, ModelError};
use inference::plan::rows::Rows;
use inference::signature::Port;
use pgrx::pg_sys;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Rows of a run of a plan that is compiled for each number of rows: more come in several runs, fewer one by one.
const FIXED_ROWS: usize = 16;

/// What was done, for EXPLAIN.
#[derive(Clone, Copy, Debug, Default)]
pub struct Done {
    /// Runs of models.
    pub batches: u64,
    /// Rows in them.
    pub rows: u64,
    /// Time in them.
    pub time: Duration,
    /// Blocks that were in the block cache, and those that were not.
    pub hits: u64,
    pub misses: u64,
    /// Most rows gathered at a time.
    pub largest: u64,
}

impl Done {
    pub const COUNTS: usize = 6;

    pub fn to_counts(self) -> [u64; Done::COUNTS] {
        let nanoseconds = u64::try_from(self.time.as_nanos()).unwrap_or(u64::MAX);
        [self.batches, self.rows, nanoseconds, self.hits, self.misses, self.largest]
    }

    pub fn of_counts([batches, rows, nanoseconds, hits, misses, largest]: [u64; Done::COUNTS]) -> Done {
        Done { batches, rows, time: Duration::from_nanos(nanoseconds), hits, misses, largest }
    }

    pub fn add(&mut self, other: Done) {
        self.batches += other.batches;
        self.rows += other.rows;
        self.time += other.time;
        self.hits += other.hits;
        self.misses += other.misses;
        self.largest = self.largest.max(other.largest);
    }
}

/// The model that a call uses, for as long as the snapshot and the name are the same.
pub struct InUse {
    model: Arc<Model>,
    declared: Option<bool>,
    port: Port,
    /// Whether rows may be stacked.
    pub batched: bool,
}

impl InUse {
    /// The model of this name. ERROR if there is none that the role may use.
    pub fn of(spec: &str) -> InUse {
        let (model, declared) = serving::model_as_declared(spec);
        let plan = &model.plan;
        let (port, batched) = match (&*plan.signature().inputs, plan.rows()) {
            ([port], Rows::Independent { inputs, outputs, every_size, .. }) => {
                (port.clone(), *every_size && inputs[..] == [0] && outputs.first() == Some(&0))
            }
            ([port, ..], _) => (port.clone(), false),
            ([], _) => (Port::new("", tensor_blocks::DType::Float32.into(), vec![]), false),
        };
        let batched = declared.unwrap_or(batched) && plan.signature().inputs.len() == 1 && plan.batch_is_free();
        InUse { model, declared, port, batched }
    }

    /// True if this still is the model of that name.
    pub fn is(&self, spec: &str) -> bool {
        let (model, declared) = serving::model_as_declared(spec);
        Arc::ptr_eq(&self.model, &model) && self.declared == declared
    }

    /// The model's content hash.
    pub fn content_hash(&self) -> &[u8; 32] {
        self.model.blocks.content_hash()
    }

    /// Adds a row, an array of these elements without nulls. False if it does not fit.
    pub fn push(&self, rows: &mut RowBuffer, elements: Elements, bytes: &[u8]) -> bool {
        elements.push(rows, &self.port, bytes)
    }

    /// Bytes that the model's values take at a time for a row such as those gathered; the most there is if that is not known.
    pub fn run_bytes(&self, rows: &RowBuffer) -> usize {
        let probe = 64;
        let Ok(shape) = rows.tensor(&self.port, 0, 1).map(|one| one.shape) else { return usize::MAX };
        let shape: Vec<usize> = std::iter::once(probe).chain(shape.into_iter().skip(1)).collect();
        let peak = self.model.plan.peak_bytes(&[shape]).map(|peak| peak.div_ceil(probe as u64));
        peak.and_then(|peak| usize::try_from(peak).ok()).unwrap_or(usize::MAX)
    }

    /// Predicts these rows; the arrays, in the current memory context, are given in order to `give`. Returns the bytes of one.
    ///
    /// # Errors
    /// What the model cannot compute: some of the rows may have been given.
    pub fn predict(
        &self,
        rows: &RowBuffer,
        range: Range<usize>,
        done: &mut Done,
        mut give: impl FnMut(pg_sys::Datum),
    ) -> Result<usize, ModelError> {
        let (mut from, mut bytes) = (range.start, 0);
        while from < range.end {
            let left = range.end - from;
            let count = match self.model.plan.is_general() {
                true => left,
                false if left >= FIXED_ROWS => FIXED_ROWS,
                false => 1,
            };
            let input = rows.tensor(&self.port, from, from + count)?;
            let (begin, [hits, misses]) = (Instant::now(), cache::session_counts());
            let outputs =
                serving::try_run(&self.model, vec![(self.port.name.clone(), input)], count as u64, count as u64)?;
            done.time += begin.elapsed();
            let now = cache::session_counts();
            (done.hits, done.misses) = (done.hits + now[0] - hits, done.misses + now[1] - misses);
            done.batches += 1;
            done.rows += count as u64;
            let (_, first) = outputs.first().ok_or_else(|| ModelError::invalid_model("the model has no output"))?;
            let (width, values) = to_rows_f32(first, count)?;
            array::rows_from_f32(&values, count, width, &mut give);
            from += count;
            bytes = array::f32_row_bytes(width);
        }
        Ok(bytes)
    }
}

/// Raises an interrupt if that is what ended a run.
pub fn raise_if_cancelled(error: &ModelError) {
    if error.kind == ErrorKind::Cancelled {
        crate::pg::interrupt::raise_or_model(error.clone());
    }
}
