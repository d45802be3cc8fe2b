//! Near duplicates: a new version of a model that shares blocks with others wherever its metric allows it.
//!
//! netsDB's accuracy-aware deduplication (arXiv 2201.10442): near duplicates of the model's blocks are found, and merged from the
//! least important on as long as a metric on validation rows stays within a bound. Part of the rows guides the search, the
//! others tell what it has cost.
//!
//! Invariants:
//! - the version that was deduplicated stays as it is; nothing is stored unless both parts of the rows are within the bound;
//! - the validation query and the metric's function run with the caller's rights;
//! - models that the caller may not use are neither read nor shared with on purpose.

mod candidates;
mod metric;
mod rows;
mod trial;

use crate::catalog::{self, Merge, ModelSpec, VersionRow};
use crate::pg::fmgr::{Call, sql_functions_of_users_code};
use crate::pg::progress::{self, Activity, Field, Work};
use crate::pg::{error, memory, query};
use candidates::Found;
use metric::Metric;
use pgrx::pg_sys;
use pgrx::prelude::*;
use rows::Rows;
use std::convert::Infallible;
use std::str::FromStr;
use std::time::Instant;
use tensor_blocks::near::{Importance, NearOptions, Walk, largest_prefix};
use trial::{NOTHING, Trial};

sql_functions_of_users_code!(deduplicate_model);

/// What was asked for beside model, rows and metric.
struct Options {
    max_drop: f64,
    near: NearOptions,
    importance: Importance,
    walk: Walk,
    holdout: f64,
    seed: u64,
    dry_run: bool,
}

/// Raises `invalid_parameter_value`.
fn invalid(message: String, hint: &str) -> ! {
    error::raise(PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE, message, "", hint)
}

fn parse<T: FromStr>(call: &Call, n: usize, name: &str, choice: &str) -> Option<T> {
    call.get::<&str>(n)
        .map(|text| text.parse().unwrap_or_else(|_| invalid(format!("invalid {name} \"{text}\""), choice)))
}

fn natural(call: &Call, n: usize, name: &str) -> Option<u32> {
    call.get::<i32>(n).map(|number| match u32::try_from(number) {
        Ok(number) if number > 0 => number,
        _ => invalid(format!("{name} must be above 0, not {number}"), "Leave it out for its default."),
    })
}

fn options(call: &Call) -> Options {
    let standard = NearOptions::default();
    let seed = call.need::<i64>(13, "seed") as u64;
    let near = NearOptions {
        tolerance: call.get::<f64>(4).map_or(standard.tolerance, |tolerance| tolerance as f32),
        share: call.get(5).unwrap_or(standard.share),
        radius: call.get(6).unwrap_or(standard.radius),
        span: parse(call, 7, "span", "It is 'run' or 'block'.").unwrap_or(standard.span),
        bands: natural(call, 8, "bands").unwrap_or(standard.bands),
        hashes_per_band: natural(call, 9, "hashes_per_band").unwrap_or(standard.hashes_per_band),
        seed,
    };
    if let Err(e) = near.validate() {
        invalid(e.to_string(), "Leave the option out for its default.");
    }
    let max_drop: f64 = call.need(3, "max_drop");
    if max_drop.is_nan() || max_drop < 0.0 {
        invalid(format!("max_drop must not be negative, and is {max_drop}"), "It is in units of the metric.");
    }
    let holdout: f64 = call.need(12, "holdout");
    if !(holdout > 0.0 && holdout < 1.0) {
        invalid(
            format!("holdout must be between 0 and 1, and is {holdout}"),
            "It is the share of the rows that guide nothing.",
        );
    }
    let choice = "It is 'mean_abs', 'mean_square', or 'percentile' and a number up to 100, such as 'percentile75'.";
    Options {
        max_drop,
        near,
        importance: parse(call, 10, "importance", choice).unwrap_or_default(),
        walk: natural(call, 11, "step").map_or(Walk::Bisect, |step| Walk::Steps(step as usize)),
        holdout,
        seed,
        dry_run: call.need(14, "dry_run"),
    }
}

/// Seconds by phase, as JSON.
#[derive(Default)]
struct Clock {
    phases: serde_json::Map<String, serde_json::Value>,
    begin: Option<(&'static str, Instant)>,
}

impl Clock {
    /// The next phase: the number that `tessera.progress` shows, and its name there.
    fn phase(&mut self, number: i64, name: &'static str) {
        self.end();
        self.begin = Some((name, Instant::now()));
        progress::set(Field::Phase, number);
        progress::set(Field::Blocks, 0);
        progress::set(Field::AllBlocks, 0);
    }

    fn end(&mut self) {
        if let Some((name, begin)) = self.begin.take() {
            let milliseconds = (begin.elapsed().as_secs_f64() * 1e3).round();
            self.phases.insert(name.into(), (milliseconds / 1e3).into());
        }
    }
}

/// What a search ended with.
struct Outcome {
    /// Merges that are kept: the first so many of those found.
    merged: usize,
    tried: usize,
    evaluations: i64,
    /// The metric on the rows that guide, before and after.
    guide: [f64; 2],
    /// On those that were held out.
    held: [f64; 2],
    note: Option<String>,
}

/// `deduplicate_model(name, validation, ...)`: see `sql/deduplicate.sql`.
fn deduplicate_model(call: &Call) -> pg_sys::Datum {
    let spec = ModelSpec::parse(call.need(0, "name"));
    let (validation, metric): (&str, &str) = (call.need(1, "validation"), call.need(2, "metric"));
    let options = options(call);
    if !options.dry_run {
        query::need_writable(c"deduplicate_model()");
    }
    catalog::check_owner(spec.name);
    let base = catalog::resolve(&spec);
    let _activity = Activity::begin(Work::Deduplicate, Some(&base.content_hash));
    let mut clock = Clock::default();

    clock.phase(0, "reading rows");
    let home = memory::of_call(c"pg_tessera validation rows");
    let (rows, metric) = Rows::read(validation, home, |label| Metric::of(metric, label, home));
    clock.phase(1, "compiling");
    let mut trial = Trial::new(&spec, &base, &rows, &metric);
    let mut halves = Halves::new(&rows, &metric, &options);
    halves.before(&mut trial);
    clock.phase(2, "reading blocks");
    let found = candidates::find(&base, &trial.model().plan, &options.near, options.importance);
    clock.phase(4, "trying merges");
    let outcome = halves.search(&mut trial, &found.merges, &options);
    let merges = &found.merges[..outcome.merged];
    let mut version = None;
    if outcome.merged > 0 && !options.dry_run {
        clock.phase(5, "storing blocks");
        progress::set(Field::AllBlocks, found.blocks as i64);
        version = Some(store(&spec, &base, merges));
    }
    clock.end();
    report(call, version, &found, &outcome, clock)
}

fn store(spec: &ModelSpec<'_>, base: &VersionRow, merges: &[Merge]) -> i32 {
    let content_hash = catalog::merged_content(base, merges);
    catalog::store_merged(spec, base, content_hash, merges)
}

fn report(call: &Call, version: Option<i32>, found: &Found, outcome: &Outcome, clock: Clock) -> pg_sys::Datum {
    let count = |n: u64| (n as i64).into_datum();
    let saved: u64 = found.bytes[..outcome.merged].iter().sum();
    call.record(&[
        version.into_datum(),
        count(found.blocks),
        count(found.skipped),
        count(found.shared),
        count(found.merges.len() as u64),
        count(outcome.tried as u64),
        count(outcome.merged as u64),
        outcome.evaluations.into_datum(),
        outcome.held[0].into_datum(),
        outcome.held[1].into_datum(),
        outcome.guide[0].into_datum(),
        outcome.guide[1].into_datum(),
        count(saved),
        outcome.note.clone().into_datum(),
        pgrx::JsonB(serde_json::Value::Object(clock.phases)).into_datum(),
    ])
}

/// The two parts of the rows.
struct Halves<'r> {
    metric: &'r Metric,
    guide: Vec<usize>,
    held: Vec<usize>,
    guide_before: f64,
    held_before: f64,
}

impl<'r> Halves<'r> {
    fn new(rows: &Rows, metric: &'r Metric, options: &Options) -> Halves<'r> {
        let (mut guide, mut held) = trial::split(rows.len(), options.holdout, options.seed);
        // Rows of equal width are predicted together.
        guide.sort_by_key(|&row| rows.width(row));
        held.sort_by_key(|&row| rows.width(row));
        Halves { metric, guide, held, guide_before: 0.0, held_before: 0.0 }
    }

    /// Measures the model as it is.
    fn before(&mut self, trial: &mut Trial<'_>) {
        self.guide_before = trial.measure(&self.guide);
        self.held_before = trial.measure(&self.held);
        if !self.guide_before.is_finite() || !self.held_before.is_finite() {
            error::raise(
                PgSqlErrorCode::ERRCODE_DATA_EXCEPTION,
                "the metric of the model is no number",
                &format!("It is {} and {} on the two parts of the rows.", self.guide_before, self.held_before),
                "Look for rows whose prediction or label is NaN or infinite.",
            );
        }
    }

    /// True if a metric is within the bound. One that is no number is not.
    fn allows(&self, before: f64, after: f64, options: &Options) -> bool {
        self.metric.drop(before, after) <= options.max_drop + NOTHING
    }

    /// Merges as much as the guiding rows allow, and looks at what that does to the others.
    fn search(&self, trial: &mut Trial<'_>, merges: &[Merge], options: &Options) -> Outcome {
        progress::set(Field::AllBlocks, merges.len() as i64);
        let (mut tried, mut evaluations, mut guide_after) = (0, 0, self.guide_before);
        let Ok(merged) = largest_prefix::<Infallible>(merges.len(), options.walk, &mut |count| {
            progress::set(Field::Blocks, count as i64);
            trial.merge(&merges[..count]);
            let metric = trial.measure(&self.guide);
            tried = tried.max(count);
            evaluations += 1;
            let allowed = self.allows(self.guide_before, metric, options);
            if allowed {
                // The last that is allowed is the one that is kept: both walks go on from what was allowed.
                guide_after = metric;
            }
            Ok(allowed)
        });
        let mut outcome = Outcome {
            merged,
            tried,
            evaluations,
            guide: [self.guide_before, guide_after],
            held: [self.held_before; 2],
            note: None,
        };
        if merges.is_empty() {
            outcome.note = Some("no block has a near duplicate".into());
        } else if merged == 0 {
            outcome.note = Some("no merge is within max_drop".into());
        } else {
            trial.merge(&merges[..merged]);
            outcome.held[1] = trial.measure(&self.held);
            if !self.allows(self.held_before, outcome.held[1], options) {
                outcome.note = Some("the metric on the rows that were held out drops by more than max_drop".into());
                outcome.merged = 0;
            }
        }
        outcome
    }
}
