//! Reading sets: name to set, its architecture, its map, its blocks. All under the active snapshot.

use crate::catalog::read::{check_usage, column, damaged, may_use, relation};
use crate::pg::error;
use crate::pg::scan::{Key, Row, by_index, relation_oid};
use pgrx::pg_sys;
use pgrx::prelude::*;
use std::ops::ControlFlow;
use tensor_blocks::members::{Chunk, Place, SegmentHash, decode_index};

/// What a set keeps of its members.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// All of them.
    Baseline,
    /// What differs from another set.
    Update,
    /// How they are trained.
    Provenance,
}

impl Storage {
    /// Its name in tables and views.
    pub fn name(self) -> &'static str {
        match self {
            Storage::Baseline => "baseline",
            Storage::Update => "update",
            Storage::Provenance => "provenance",
        }
    }
}

/// A row of `tessera.model_set`.
#[derive(Clone, Debug)]
pub struct SetRow {
    /// `tessera.model_set.id`
    pub id: i64,
    /// Its name.
    pub name: String,
    /// `tessera.architecture.id`
    pub architecture: i64,
    /// The set that it was made from; it may be gone.
    pub based_on: Option<i64>,
    /// How its members are trained.
    pub training: Option<serde_json::Value>,
    domain: pg_sys::Oid,
}

/// What the members of a set have in common.
#[derive(Clone, Debug)]
pub struct Architecture {
    /// Identity of the graph.
    pub graph_hash: [u8; 32],
    /// Inputs, outputs, and what is known of rows, as of a model version.
    pub signature: serde_json::Value,
}

impl SetRow {
    /// The domain that carries owner and privileges.
    pub fn domain(&self) -> pg_sys::Oid {
        self.domain
    }
}

/// What a set is known by in the block cache and in statistics: as the content hash of a model.
pub fn set_content(id: i64, domain: pg_sys::Oid) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("pg_tessera model set v1");
    hasher.update(&id.to_le_bytes()).update(&domain.to_u32().to_le_bytes());
    *hasher.finalize().as_bytes()
}

fn set_of(row: &Row) -> SetRow {
    SetRow {
        id: column(row, 1, "a set has no id"),
        name: column(row, 2, "a set has no name"),
        domain: column(row, 3, "a set has no domain"),
        architecture: column(row, 4, "a set has no architecture"),
        based_on: row.get(6),
        training: row.get::<pgrx::JsonB>(9).map(|json| json.0),
    }
}

fn find_set(name: &str) -> Option<SetRow> {
    let (table, index) = (relation_oid(c"tessera", c"model_set")?, relation_oid(c"tessera", c"model_set_name_key")?);
    by_index(table, index, &[Key::Text(name)], |row| ControlFlow::Break(set_of(row)))
}

/// The set of that name, if there is one; true with it if the caller may use it. Raises nothing.
pub fn look_up_set(name: &str) -> Option<(SetRow, bool)> {
    find_set(name).map(|set| {
        let usable = may_use(set.domain);
        (set, usable)
    })
}

/// The signature that is stored of a graph, if an architecture has it.
pub fn signature_of_graph(graph_hash: &[u8; 32]) -> Option<serde_json::Value> {
    let key = [Key::Bytea(graph_hash)];
    by_index(relation(c"architecture"), relation(c"architecture_graph_key"), &key, |row| {
        ControlFlow::Break(column::<pgrx::JsonB>(row, 3, "an architecture has no signature").0)
    })
}

/// The set of that name, for a caller who may use it.
///
/// Errors: no such set (`undefined_object`), no USAGE privilege (`insufficient_privilege`).
pub fn resolve_set(name: &str) -> SetRow {
    let set = find_set(name).unwrap_or_else(|| {
        error::raise(
            PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT,
            format!("model set \"{name}\" does not exist"),
            "",
            "See tessera.model_sets for the sets that there are, or save one with save_model_set.",
        )
    });
    check_usage(set.domain, name);
    set
}

/// The set with this id, if there is one that the caller may use.
pub fn set_of_id(id: i64) -> Option<SetRow> {
    let key = [Key::Int8(id)];
    by_index(relation(c"model_set"), relation(c"model_set_pkey"), &key, |row| ControlFlow::Break(set_of(row)))
        .filter(|set| may_use(set.domain))
}

/// The sets that are trained from those that `wanted` tells: id, name, and the id of the one that it is trained from.
pub(super) fn sets_trained_from(wanted: &dyn Fn(i64) -> bool) -> Vec<(i64, String, i64)> {
    let mut found = Vec::new();
    by_index::<()>(relation(c"model_set"), relation(c"model_set_pkey"), &[], |row| {
        let set = set_of(row);
        if let (Some(parent), true) = (set.based_on, set.training.is_some())
            && wanted(parent)
        {
            found.push((set.id, set.name, parent));
        }
        ControlFlow::Continue(())
    });
    found
}

/// The set and the member that a model's name means, if it has the form of one: `set/member`.
pub fn split_member(spec: &str) -> Option<(&str, &str)> {
    spec.split_once('/').filter(|(set, _)| !set.is_empty() && !set.contains('@'))
}

/// Raises the ERROR for a member that a set does not have.
pub fn no_such_member(set: &str, member: &str) -> ! {
    error::raise(
        PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT,
        format!("model set \"{set}\" has no member \"{member}\""),
        "",
        "See tessera.model_set_members for those that it has.",
    )
}

/// Raises an ERROR if that cannot be the name of a member.
pub fn check_member(name: &str) {
    let wrong = if name.is_empty() {
        "It is empty."
    } else if name.len() > 255 {
        "It is longer than 255 bytes."
    } else if name.chars().any(char::is_control) {
        "It contains a control character."
    } else {
        return;
    };
    error::raise(
        PgSqlErrorCode::ERRCODE_INVALID_NAME,
        format!("invalid name \"{}\" of a member of a model set", name.escape_default()),
        wrong,
        "Use 1 to 255 bytes without control characters.",
    )
}

/// An architecture by its id.
pub fn architecture(id: i64) -> Architecture {
    let key = [Key::Int8(id)];
    by_index(relation(c"architecture"), relation(c"architecture_pkey"), &key, |row| {
        let hash: Vec<u8> = column(row, 2, "an architecture has no graph");
        ControlFlow::Break(Architecture {
            graph_hash: hash.try_into().unwrap_or_else(|_| damaged("a graph's hash has not 32 bytes")),
            signature: column::<pgrx::JsonB>(row, 3, "an architecture has no signature").0,
        })
    })
    .unwrap_or_else(|| damaged("an architecture is missing"))
}

/// The first name of each chunk of a set's map, in order.
pub fn chunk_starts(set: i64) -> Vec<String> {
    let mut starts: Vec<String> = Vec::new();
    by_index::<()>(relation(c"set_map"), relation(c"set_map_pkey"), &[Key::Int8(set)], |row| {
        if column::<i32>(row, 2, "a part of a set's map has no number") as usize != starts.len() {
            damaged("a part of a set's map is missing");
        }
        starts.push(column(row, 3, "a part of a set's map has no name"));
        ControlFlow::Continue(())
    });
    starts
}

/// A part of a set's map, whose members have so many segments.
pub fn chunk(set: i64, number: usize, segments: usize) -> Chunk {
    let keys = [Key::Int8(set), Key::Int4(number as i32)];
    let found = by_index(relation(c"set_map"), relation(c"set_map_pkey"), &keys, |row| {
        let part =
            |n: usize| row.with_bytes(n, <[u8]>::to_vec).unwrap_or_else(|| damaged("a part of a set's map is empty"));
        ControlFlow::Break(Chunk::decode(&part(4), &part(5), &part(6), segments))
    });
    match found {
        Some(Ok(chunk)) => chunk,
        Some(Err(e)) => damaged(&e.to_string()),
        None => damaged("a part of a set's map is missing"),
    }
}

/// Calls `f` with hash and place of each segment in those of an architecture's blocks that are `wanted`.
pub fn set_blocks(architecture: i64, wanted: &dyn Fn(u32) -> bool, f: &mut dyn FnMut(SegmentHash, Place)) {
    let key = [Key::Int8(architecture)];
    by_index::<()>(relation(c"set_block"), relation(c"set_block_architecture"), &key, |row| {
        crate::pg::interrupt::check();
        let number: i64 = column(row, 1, "a block of a set has no number");
        let block = u32::try_from(number).unwrap_or_else(|_| damaged("the number of a set's block is out of range"));
        if wanted(block) {
            let sound = row.with_bytes(3, |index| {
                decode_index(index)
                    .map(|segments| segments.for_each(|(at, hash)| f(hash, Place { block, at })))
                    .is_some()
            });
            if sound != Some(true) {
                damaged("the list of a block's segments cannot be read");
            }
        }
        ControlFlow::Continue(())
    });
}
