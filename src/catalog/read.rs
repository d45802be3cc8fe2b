//! Reading models: name to version, graph, tensors. All under the active snapshot.

use super::names::ModelSpec;
use crate::pg::error;
use crate::pg::scan::{Key, Row, by_index, relation_oid};
use pgrx::pg_sys;
use pgrx::prelude::*;
use std::ffi::CStr;
use std::ops::ControlFlow;
use tensor_blocks::{Block, DType, Tiling, View};

const SCHEMA: &CStr = c"tessera";

/// One version of a model.
#[derive(Clone, Debug)]
pub struct VersionRow {
    /// `tessera.model_version.id`
    pub id: i64,
    /// Identity of graph and tensors together.
    pub content_hash: [u8; 32],
    /// Identity of the graph.
    pub graph_hash: Vec<u8>,
    /// Whether rows were declared to be independent, or not to be.
    pub rows_declared: Option<bool>,
}

/// A row of `tessera.tensor`.
#[derive(Clone, Debug)]
pub struct TensorRow {
    /// `tessera.tensor.id`
    pub id: i64,
    /// Element type.
    pub dtype: DType,
    /// Dimensions.
    pub dims: Vec<u64>,
    /// How it is seen as a matrix.
    pub view: View,
    /// Bytes of a whole block.
    pub block_bytes: usize,
}

pub(super) fn relation(name: &CStr) -> pg_sys::Oid {
    relation_oid(SCHEMA, name).unwrap_or_else(|| {
        error::raise(
            PgSqlErrorCode::ERRCODE_UNDEFINED_TABLE,
            format!("relation tessera.{} does not exist", name.to_string_lossy()),
            "",
            "Run CREATE EXTENSION pg_tessera.",
        )
    })
}

pub(super) fn damaged(what: &str) -> ! {
    error::raise(
        PgSqlErrorCode::ERRCODE_DATA_CORRUPTED,
        format!("the tables of pg_tessera are damaged: {what}"),
        "",
        "Restore them from a backup, or drop the model and load it again.",
    )
}

pub(super) fn column<T: FromDatum>(row: &Row, n: usize, what: &str) -> T {
    row.get(n).unwrap_or_else(|| damaged(what))
}

/// The version that `spec` names, for a caller who may predict with it.
///
/// Errors: no such model or version (`undefined_object`), no USAGE privilege (`insufficient_privilege`).
pub fn resolve(spec: &ModelSpec<'_>) -> VersionRow {
    let model = by_index(relation(c"model"), relation(c"model_name_key"), &[Key::Text(spec.name)], |row| {
        let id: i64 = column(row, 1, "a model has no id");
        let domain: pg_sys::Oid = column(row, 5, "a model has no domain");
        ControlFlow::Break((id, row.get::<i32>(3), domain))
    });
    let Some((model, active, domain)) = model else { no_such_model(spec.name) };
    check_usage(domain, spec.name);
    let Some(version) = spec.version.or(active) else {
        error::raise(
            PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT,
            format!("model \"{}\" has no active version", spec.name),
            "",
            "Use activate_model(name, version).",
        )
    };
    let keys = [Key::Int8(model), Key::Int4(version)];
    let found = by_index(relation(c"model_version"), relation(c"model_version_key"), &keys, |row| {
        let hash: Vec<u8> = column(row, 4, "a version has no content hash");
        ControlFlow::Break(VersionRow {
            id: column(row, 1, "a version has no id"),
            content_hash: hash.try_into().unwrap_or_else(|_| damaged("a content hash has not 32 bytes")),
            graph_hash: column(row, 5, "a version has no graph"),
            rows_declared: row.get::<bool>(11),
        })
    });
    found.unwrap_or_else(|| {
        error::raise(
            PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT,
            format!("model \"{}\" has no version {version}", spec.name),
            "",
            "See tessera.models for the versions that there are.",
        )
    })
}

/// True if there is a model of that name, of which the caller may use a version of that number. Raises nothing for a name.
pub fn is_usable(spec: &str) -> bool {
    let (Some(table), Some(index)) = (relation_oid(SCHEMA, c"model"), relation_oid(SCHEMA, c"model_name_key")) else {
        return false;
    };
    let name = spec.split('@').next().unwrap_or(spec);
    let usable = by_index(table, index, &[Key::Text(name)], |row| {
        ControlFlow::Break(row.get::<pg_sys::Oid>(5).is_some_and(may_use))
    });
    usable == Some(true) && estimate(spec).is_some()
}

/// What is known of a version without running it.
pub struct Estimate {
    /// Number of the version.
    pub version: i32,
    /// Floating-point operations of a row.
    pub flops_per_row: Option<f64>,
}

/// What is known of the version that a name means, without a look at privileges (see [`is_usable`]); `None` if there is none,
/// or no extension.
pub fn estimate(spec: &str) -> Option<Estimate> {
    let (name, version) = match spec.split_once('@') {
        Some((name, version)) => (name, Some(version.parse().ok()?)),
        None => (spec, None),
    };
    let index = relation_oid(SCHEMA, c"model_name_key")?;
    let (model, active) = by_index(relation_oid(SCHEMA, c"model")?, index, &[Key::Text(name)], |row| {
        ControlFlow::Break((row.get::<i64>(1), row.get::<i32>(3)))
    })?;
    let version = version.or(active)?;
    let index = relation_oid(SCHEMA, c"model_version_key")?;
    let keys = [Key::Int8(model?), Key::Int4(version)];
    by_index(relation_oid(SCHEMA, c"model_version")?, index, &keys, |row| {
        let signature = row.get::<pgrx::JsonB>(6).map(|json| json.0);
        let flops = signature.and_then(|signature| signature.get("flops_per_row")?.as_f64());
        ControlFlow::Break(Estimate { version, flops_per_row: flops })
    })
}

/// The signature of a stored version with this content, whosever it is; `None` if there is none that the snapshot sees.
pub fn signature_of_content(content_hash: &[u8; 32]) -> Option<serde_json::Value> {
    let index = relation_oid(SCHEMA, c"model_version_content")?;
    by_index(relation(c"model_version"), index, &[Key::Bytea(content_hash)], |row| {
        ControlFlow::Break(column::<pgrx::JsonB>(row, 6, "a version has no signature").0)
    })
}

pub(super) fn no_such_model(name: &str) -> ! {
    let hint = if name.contains('/') {
        "See tessera.models for the models that there are, and tessera.model_sets for the sets whose members are named SET/MEMBER."
    } else {
        "See tessera.models for the models that there are, or load one with load_model."
    };
    error::raise(PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT, format!("model \"{name}\" does not exist"), "", hint)
}

pub(super) fn may_use(domain: pg_sys::Oid) -> bool {
    // SAFETY: syscache look-ups in a transaction.
    unsafe {
        let user = pg_sys::GetUserId();
        #[cfg(any(feature = "pg14", feature = "pg15"))]
        let result = pg_sys::pg_type_aclcheck(domain, user, pg_sys::ACL_USAGE as pg_sys::AclMode);
        #[cfg(not(any(feature = "pg14", feature = "pg15")))]
        let result =
            pg_sys::object_aclcheck(pg_sys::TypeRelationId, domain, user, pg_sys::ACL_USAGE as pg_sys::AclMode);
        result == pg_sys::AclResult::ACLCHECK_OK
    }
}

pub(super) fn check_usage(domain: pg_sys::Oid, name: &str) {
    if !may_use(domain) {
        error::raise(
            PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
            format!("permission denied for model \"{name}\""),
            "",
            &format!("Its owner can allow it: GRANT USAGE ON DOMAIN tessera_model.\"{name}\" TO ..."),
        );
    }
}

/// The graph with this hash.
pub fn graph(hash: &[u8]) -> Vec<u8> {
    by_index(relation(c"graph"), relation(c"graph_pkey"), &[Key::Bytea(hash)], |row| {
        match row.with_bytes(2, <[u8]>::to_vec) {
            Some(graph) => ControlFlow::Break(graph),
            None => ControlFlow::Continue(()),
        }
    })
    .unwrap_or_else(|| damaged("a graph is missing"))
}

/// The tensors of a version, in the order of the graph.
pub fn tensors(version: i64) -> Vec<TensorRow> {
    let mut rows = Vec::new();
    by_index::<()>(relation(c"tensor"), relation(c"tensor_key"), &[Key::Int8(version)], |row| {
        let dtype: String = column(row, 5, "a tensor has no dtype");
        let dims: Vec<i64> = column(row, 6, "a tensor has no dims");
        let view: String = column(row, 7, "a tensor has no view");
        rows.push(TensorRow {
            id: column(row, 1, "a tensor has no id"),
            dtype: DType::from_name(&dtype).unwrap_or_else(|| damaged("a dtype is not known")),
            dims: dims.into_iter().map(|d| d as u64).collect(),
            view: View::from_name(&view).unwrap_or_else(|| damaged("a view is not known")),
            block_bytes: column::<i32>(row, 8, "a tensor has no block size") as usize,
        });
        ControlFlow::Continue(())
    });
    rows
}

/// Dimensions as PostgreSQL stores them.
pub fn dims_of(dims: &[u64]) -> Vec<i64> {
    dims.iter().map(|&d| d as i64).collect()
}

impl TensorRow {
    /// How the tensor is cut into blocks.
    pub fn tiling(&self) -> Tiling {
        Tiling::new(&self.dims, self.view, self.dtype, self.block_bytes).unwrap_or_else(|e| damaged(&e.to_string()))
    }
}

/// Appends a tensor's elements to `out`, put together from its blocks.
pub fn read_tensor(tensor: &TensorRow, out: &mut Vec<u8>) {
    let tiling = tensor.tiling();
    let start = out.len();
    out.resize(start + tiling.byte_len(), 0);
    let mut blocks = 0u64;
    by_index::<()>(relation(c"weight"), relation(c"weight_pkey"), &[Key::Int8(tensor.id)], |row| {
        crate::pg::interrupt::check();
        let block_row: i32 = column(row, 2, "a block has no row");
        let block_col: i32 = column(row, 3, "a block has no column");
        let tile = tiling
            .tile(block_row as u32, block_col as u32)
            .unwrap_or_else(|| damaged("a block lies outside its tensor"));
        let placed = row.with_bytes(4, |bytes| {
            let block = Block::decode(bytes).map_err(|e| e.to_string())?;
            tiling.scatter(tile, block.data(), &mut out[start..]).map_err(|e| e.to_string())
        });
        match placed {
            Some(Ok(())) => blocks += 1,
            Some(Err(e)) => damaged(&e),
            None => damaged("a block has no data"),
        }
        ControlFlow::Continue(())
    });
    if blocks != tiling.tile_count() {
        damaged(&format!("a tensor has {blocks} blocks of {}", tiling.tile_count()));
    }
}
