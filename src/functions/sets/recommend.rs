//! What a set costs, saved whole, by its differences, and by its training.
//!
//! Estimates from a sample of the set's members: they are read, cut and hashed as saving and recovering do it; writing is counted with
//! what the sample's bytes take to be copied and hashed once more, since nothing is stored here.

use super::recover::{parent_of, recovered};
use crate::pg::fmgr::{Call, Rows, sql_functions_of_users_code};
use crate::serving::sets::{Reader, set_of};
use pgrx::pg_sys;
use pgrx::prelude::*;
use std::collections::HashSet;
use std::time::Instant;
use tensor_blocks::members::Place;

sql_functions_of_users_code!(recommend_storage);

/// Members of the sample.
const SAMPLE: usize = 32;
/// Bytes of a stored segment beside its content: its entry in the block's list, and its place in the map.
const BESIDE: f64 = 40.0;
/// Bytes of a name in the map.
const NAME: f64 = 12.0;
/// Bytes of a recipe in the map.
const RECIPE: f64 = 66.0;
/// Bytes that are written a millisecond, by the benchmark of loads.
const WRITTEN: f64 = 150_000.0;

struct Cost {
    storage: &'static str,
    bytes: Option<f64>,
    save_ms: Option<f64>,
    recover_ms: Option<f64>,
}

fn recommend_storage(call: &Call) -> pg_sys::Datum {
    let set = set_of(call.need(0, "set_name"));
    let parent = parent_of(&set);
    let members: Vec<_> = set.members().collect();
    let count = members.len() as f64;
    let segments = set.shared.segments.count() as f64;
    let whole = count * (set.shared.segments.bytes() as f64 + BESIDE * segments + NAME);

    // Recovering: of a sample spread over the set; trained members apart.
    let mut reader = Reader::default();
    let (mut stored_ms, mut stored) = (0.0, 0.0);
    let (mut trained_ms, mut trained) = (0.0, 0.0);
    let step = (members.len() / SAMPLE).max(1);
    for (member, name) in members.iter().step_by(step).take(SAMPLE) {
        let is_trained = set.recipe(*member).is_some();
        if is_trained && trained >= 3.0 {
            continue;
        }
        let begin = Instant::now();
        recovered(&set, *member, name, &mut reader);
        let elapsed = begin.elapsed().as_secs_f64() * 1e3;
        let (ms, n) = if is_trained { (&mut trained_ms, &mut trained) } else { (&mut stored_ms, &mut stored) };
        (*ms, *n) = (*ms + elapsed, *n + 1.0);
    }
    let of_member = (stored > 0.0).then(|| stored_ms / stored);
    let recipes = members.iter().filter(|(member, _)| set.recipe(*member).is_some()).count() as f64;

    let mut costs = vec![Cost {
        storage: "baseline",
        bytes: Some(whole),
        save_ms: of_member.map(|ms| count * ms + whole / WRITTEN),
        recover_ms: of_member.map(|ms| count * ms),
    }];
    // What differs from the set that it is based on; what is trained is taken to differ as a whole.
    let changed = parent.as_ref().map(|parent| {
        let known: HashSet<Place> = parent.members().flat_map(|(member, _)| parent.places(member)).collect();
        let sizes: Vec<f64> =
            (0..set.shared.segments.count()).map(|n| set.shared.segments.size(n) as f64 + BESIDE).collect();
        let mut bytes = count * 6.0 * segments;
        for (member, _) in &members {
            let is_trained = set.recipe(*member).is_some();
            let places = set.places(*member);
            let new = places.iter().zip(&sizes).filter(|(place, _)| is_trained || !known.contains(place));
            bytes += new.map(|(_, size)| size).sum::<f64>();
        }
        bytes
    });
    costs.push(Cost {
        storage: "update",
        bytes: changed,
        save_ms: changed.zip(of_member).map(|(bytes, ms)| count * ms + bytes / WRITTEN),
        recover_ms: changed.and(of_member).map(|ms| count * ms),
    });
    let of_training = (trained > 0.0).then(|| trained_ms / trained);
    costs.push(Cost {
        storage: "provenance",
        bytes: of_training.map(|_| recipes * RECIPE),
        save_ms: of_training.map(|ms| 2.0 * recipes * ms),
        recover_ms: of_training.map(|ms| recipes * ms + (count - recipes) * of_member.unwrap_or(0.0)),
    });
    // The smallest of those that are recovered about as fast as the whole set.
    let bound = costs[0].recover_ms.map_or(f64::INFINITY, |ms| 2.0 * ms.max(50.0));
    let best = costs
        .iter()
        .enumerate()
        .filter(|(_, cost)| cost.recover_ms.is_some_and(|ms| ms <= bound))
        .filter_map(|(at, cost)| cost.bytes.map(|bytes| (at, bytes)))
        .min_by(|a, b| a.1.total_cmp(&b.1))
        .map_or(0, |(at, _)| at);
    let mut rows = Rows::start(call);
    for (at, cost) in costs.iter().enumerate() {
        rows.push(&[
            cost.storage.into_datum(),
            cost.bytes.map(|bytes| bytes as i64).into_datum(),
            cost.save_ms.into_datum(),
            cost.recover_ms.into_datum(),
            (at == best).into_datum(),
        ]);
    }
    call.null()
}
