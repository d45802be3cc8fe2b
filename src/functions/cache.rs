//! The block cache, for users: what is in it, what shall stay, whether it is sound.

use crate::cache::{self, FrameView};
use crate::catalog::{self, ModelSpec};
use crate::pg::error;
use crate::pg::fmgr::{Call, Rows, sql_functions};
use crate::pg::progress::{self, View, Work};
use pgrx::pg_sys;
use pgrx::prelude::*;
use std::collections::HashMap;

sql_functions!(
    cache_frames,
    cache_totals,
    cache_models,
    activities,
    prediction_counts,
    reset_model_stats,
    check_cache,
    reset_cache_stats,
    keep_model,
    release_model,
    warm_model
);

fn database() -> pg_sys::Oid {
    // SAFETY: set once, when the session begins.
    unsafe { pg_sys::MyDatabaseId }
}

/// Names of this database's models among the owners that the role may see. `None` hides the frame: a superuser sees those
/// of dropped models too, without a name.
fn names_of(
    owners: impl Iterator<Item = (pg_sys::Oid, [u8; 32])>,
    visible: &HashMap<[u8; 32], Vec<String>>,
) -> Option<Vec<String>> {
    let here: Vec<[u8; 32]> = owners.filter(|(db, _)| *db == database()).map(|(_, hash)| hash).collect();
    let mut names: Vec<String> = here.iter().filter_map(|hash| visible.get(hash)).flatten().cloned().collect();
    names.sort();
    // SAFETY: asks about the current role.
    let all = unsafe { pg_sys::superuser() };
    (!names.is_empty() || (all && !here.is_empty())).then_some(names)
}

fn cache_frames(call: &Call) -> pg_sys::Datum {
    let visible = catalog::visible_contents();
    let mut rows = Rows::start(call);
    for FrameView { frame, bytes, pins, state, owners } in cache::frames() {
        let Some(names) = names_of(owners.into_iter(), &visible) else { continue };
        rows.push(&[
            (frame as i32).into_datum(),
            (bytes as i32).into_datum(),
            (pins as i32).into_datum(),
            state.into_datum(),
            names.into_datum(),
        ]);
    }
    call.null()
}

fn cache_totals(call: &Call) -> pg_sys::Datum {
    let totals = cache::totals();
    let [hits, misses, loads, bytes_loaded, evictions, waits, fallbacks] = totals.counts;
    let counts = [totals.frames, totals.frames_used, totals.frames_pinned, totals.bytes, totals.bytes_used];
    let more = [hits, misses, loads, bytes_loaded, evictions, waits, fallbacks];
    let mut row = vec![totals.shared.into_datum()];
    row.extend(counts.iter().chain(&more).map(|&n| (n as i64).into_datum()));
    row.push(totals.reset_at.map(pg_sys::Datum::from));
    call.record(&row)
}

fn cache_models(call: &Call) -> pg_sys::Datum {
    let visible = catalog::visible_contents();
    let mut rows = Rows::start(call);
    for model in cache::models() {
        let Some(names) = names_of([(model.database, model.content_hash)].into_iter(), &visible) else { continue };
        let [hits, misses, loads, bytes_loaded, _, waits, fallbacks] = model.counts;
        let mut row = vec![names.into_datum(), model.kept.into_datum()];
        let counts = [model.runs, model.frames, model.bytes, hits, misses, loads, bytes_loaded, waits, fallbacks];
        row.extend(counts.iter().map(|&n| (n as i64).into_datum()));
        rows.push(&row);
    }
    call.null()
}

fn activities(call: &Call) -> pg_sys::Datum {
    let visible = catalog::visible_contents();
    let names: HashMap<i64, &Vec<String>> =
        visible.iter().map(|(hash, names)| (progress::content_field(hash), names)).collect();
    let mut rows = Rows::start(call);
    for View { pid, fields } in progress::activities() {
        let Some([work, phase, content, predicted, blocks, all_blocks]) = fields else {
            rows.push(&[pid.into_datum(), None, None, None, None, None, None]);
            continue;
        };
        let loads = work == Work::Load as i64;
        let deduplicates = work == Work::Deduplicate as i64;
        let phase = match phase {
            0 if deduplicates => "reading rows",
            2 if deduplicates => "reading blocks",
            3 if deduplicates => "comparing blocks",
            4 if deduplicates => "trying merges",
            _ if !loads && !deduplicates => "predicting",
            0 => "reading model",
            1 => "compiling",
            _ => "storing blocks",
        };
        let command = match () {
            () if loads => "load",
            () if deduplicates => "deduplicate",
            () => "predict",
        };
        rows.push(&[
            pid.into_datum(),
            command.into_datum(),
            phase.into_datum(),
            names.get(&content).copied().cloned().into_datum(),
            (!loads).then_some(predicted).into_datum(),
            blocks.into_datum(),
            (all_blocks > 0).then_some(all_blocks).into_datum(),
        ]);
    }
    call.null()
}

fn prediction_counts(call: &Call) -> pg_sys::Datum {
    let visible = catalog::visible_contents();
    let mut rows = Rows::start(call);
    for model in cache::statistics() {
        let Some(names) = names_of([(model.database, model.content_hash)].into_iter(), &visible) else { continue };
        let [calls, of_rows, runs, nanoseconds, errors] = model.counts;
        let count = |n: u64| (n as i64).into_datum();
        let milliseconds = (nanoseconds as f64 / 1e6).into_datum();
        rows.push(&[names.into_datum(), count(calls), count(of_rows), count(runs), milliseconds, count(errors)]);
    }
    call.null()
}

fn reset_model_stats(_: &Call) -> pg_sys::Datum {
    cache::reset_statistics();
    pg_sys::Datum::from(0)
}

fn check_cache(call: &Call) -> pg_sys::Datum {
    let mut rows = Rows::start(call);
    for (problem, frame, detail) in cache::check() {
        rows.push(&[problem.into_datum(), frame.map(|n| (n as i32).into()), detail.into_datum()]);
    }
    call.null()
}

fn reset_cache_stats(_: &Call) -> pg_sys::Datum {
    // SAFETY: reads the clock.
    cache::reset(unsafe { pg_sys::GetCurrentTimestamp() });
    pg_sys::Datum::from(0)
}

/// Content hash of the version that the argument names, whose owner the caller must be.
fn owned_content(call: &Call) -> [u8; 32] {
    let spec = ModelSpec::parse(call.need(0, "name"));
    catalog::check_owner(spec.name);
    catalog::resolve(&spec).content_hash
}

fn keep_model(call: &Call) -> pg_sys::Datum {
    let content = owned_content(call);
    if !cache::keep(database(), &content) {
        error::raise(
            PgSqlErrorCode::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED,
            "too many models are to be kept in the block cache",
            "Up to 32 can be, and only models that are among the 63 most recently used.",
            "See tessera.block_cache_models, and use release_model.",
        );
    }
    pg_sys::Datum::from(0)
}

fn release_model(call: &Call) -> pg_sys::Datum {
    pg_sys::Datum::from(cache::release(database(), &owned_content(call)))
}

/// `warm_model(name)`: loads the model's blocks into the cache, as far as there is room; how many of them were put there or
/// found there.
fn warm_model(call: &Call) -> pg_sys::Datum {
    let model = crate::serving::model_of(call.need(0, "name"));
    let ordinals = model.plan.stored_tensors().iter().map(|tensor| tensor.ordinal);
    pg_sys::Datum::from(model.blocks.warm(ordinals) as i64)
}
