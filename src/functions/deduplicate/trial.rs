//! A model on trial: how well it predicts the validation rows while some of its blocks are others.

use super::metric::Metric;
use super::rows::Rows;
use crate::catalog::{Merge, ModelSpec, VersionRow};
use crate::pg::progress::{self, Field};
use crate::pg::{error, interrupt};
use crate::serving::{self, Model, settings};
use inference::array::{RowBuffer, to_rows_f32};
use inference::plan::rows::Rows as Verdict;
use inference::signature::{Port, PortType};
use pgrx::prelude::*;
use std::sync::Arc;

/// Tensors of fewer bytes are not worth a trial: they stay as they are.
const SMALLEST_TENSOR: u64 = 4096;

/// Rows of a run of a plan that is compiled for each number of rows: more come in several runs, fewer one by one.
const FIXED_ROWS: usize = 16;

/// A metric that is worse by less than this is not worse: sums of floats come out so.
pub const NOTHING: f64 = 1e-9;

/// A model on trial.
pub struct Trial<'r> {
    model: Arc<Model>,
    port: Port,
    output: PortType,
    rows: &'r Rows,
    metric: &'r Metric,
    /// Most rows of a run.
    at_a_time: usize,
    batch: RowBuffer,
}

impl<'r> Trial<'r> {
    /// Of this version. ERROR if it has several inputs, or no output.
    pub fn new(spec: &ModelSpec<'_>, version: &VersionRow, rows: &'r Rows, metric: &'r Metric) -> Trial<'r> {
        let model = serving::on_trial(version, SMALLEST_TENSOR);
        let signature = model.plan.signature();
        let (port, output) = match (&*signature.inputs, &*signature.outputs) {
            ([port], [output, ..]) => (port.clone(), output.dtype),
            (inputs, _) => error::raise(
                PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
                format!("model \"{}\" has {} inputs", spec.name, inputs.len()),
                "The validation query gives one array a row, which is one input.",
                "Deduplicate models with one input.",
            ),
        };
        let mut trial = Trial { model, port, output, rows, metric, at_a_time: 1, batch: RowBuffer::default() };
        if trial.rows_are_independent(version) {
            trial.at_a_time = trial.rows_at_a_time();
        }
        trial
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    fn rows_are_independent(&self, version: &VersionRow) -> bool {
        let plan = &self.model.plan;
        let proven = match plan.rows() {
            Verdict::Independent { inputs, outputs, every_size, .. } => {
                *every_size && inputs[..] == [0] && outputs.first() == Some(&0)
            }
            _ => false,
        };
        version.rows_declared.unwrap_or(proven) && plan.batch_is_free()
    }

    /// As many rows as tessera.batch_size and tessera.batch_memory allow, judged by the first one.
    fn rows_at_a_time(&mut self) -> usize {
        let plan = &self.model.plan;
        if !plan.is_general() {
            return FIXED_ROWS;
        }
        self.batch.clear();
        self.rows.gather(0, &self.port, &mut self.batch);
        let shape = self.batch.tensor(&self.port, 0, 1).unwrap_or_else(|e| error::raise_model(e)).shape;
        let probe = 64;
        let shape: Vec<usize> = std::iter::once(probe).chain(shape.into_iter().skip(1)).collect();
        let row = plan.peak_bytes(&[shape]).unwrap_or(u64::MAX).div_ceil(probe as u64).max(1);
        let fit = settings::batch_bytes() as u64 / row;
        usize::try_from(fit).unwrap_or(usize::MAX).clamp(1, settings::batch_size())
    }

    /// Puts these merges on trial, in place of those before.
    pub fn merge(&self, merges: &[Merge]) {
        let replaced = merges.iter().map(|merge| ((merge.ordinal, merge.number), merge.to.clone())).collect();
        self.model.blocks.replace(replaced);
    }

    /// The metric over these rows. NaN if a prediction, and so the metric, is no number.
    pub fn measure(&mut self, rows: &[usize]) -> f64 {
        let (mut sum, mut from) = (0.0, 0);
        while from < rows.len() {
            let width = self.rows.width(rows[from]);
            let fit = rows[from..].iter().take(self.at_a_time).take_while(|&&row| self.rows.width(row) == width);
            let count = match fit.count() {
                count if self.model.plan.is_general() || count == FIXED_ROWS => count,
                _ => 1,
            };
            sum += self.run(&rows[from..from + count]);
            from += count;
        }
        sum / rows.len() as f64
    }

    /// The sum of the metric over rows that are predicted together.
    fn run(&mut self, rows: &[usize]) -> f64 {
        self.batch.clear();
        rows.iter().for_each(|&row| self.rows.gather(row, &self.port, &mut self.batch));
        let input = self.batch.tensor(&self.port, 0, rows.len()).unwrap_or_else(|e| error::raise_model(e));
        let outputs = serving::run_trial(&self.model, vec![(self.port.name.clone(), input)])
            .unwrap_or_else(|e| interrupt::raise_or_model(e));
        let (_, first) = outputs.first().unwrap_or_else(|| error::not_supported("the model has no output", ""));
        let (width, values) = to_rows_f32(first, rows.len()).unwrap_or_else(|e| error::raise_model(e));
        progress::add(Field::Rows, rows.len() as u64);
        let mut sum = 0.0;
        for (at, &row) in rows.iter().enumerate() {
            let prediction = &values[at * width..(at + 1) * width];
            sum += self.metric.score(row, prediction, self.output, self.rows.label(row));
        }
        sum
    }
}

/// The rows that guide the search, and those that measure its result: `holdout` is the share of the latter. The same for the
/// same number, share and seed.
pub fn split(count: usize, holdout: f64, seed: u64) -> (Vec<usize>, Vec<usize>) {
    let mut rows: Vec<usize> = (0..count).collect();
    // Fisher and Yates, with SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators").
    let mut state = seed;
    let mut random = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    };
    for at in (1..count).rev() {
        rows.swap(at, ((u128::from(random()) * (at as u128 + 1)) >> 64) as usize);
    }
    let held = ((count as f64 * holdout).round() as usize).clamp(1, count - 1);
    let mut guide = rows.split_off(held);
    // In the order of the query: rows of equal width that come together go together.
    guide.sort_unstable();
    rows.sort_unstable();
    (guide, rows)
}
