//! Loading: ONNX bytes to a stored version.

use crate::catalog::{self, ContentHash, NewVersion};
use crate::pg::fmgr::{Call, missing, sql_functions};
use crate::pg::large_object::LargeObject;
use crate::pg::progress::{self, Activity, Field, Work};
use crate::pg::{error, interrupt};
use crate::serving;
use inference::error::ModelError;
use inference::onnx::{self, ExternalData, FolderExternalData, NoExternalData, StoredTensor};
use inference::plan::Plan;
use pgrx::pg_sys;
use pgrx::prelude::*;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tensor_blocks::{Tiling, View};

sql_functions!(load_model, load_model_from_file, load_model_from_large_object);

/// Sizes of a block that can be asked for: below, locators outweigh blocks; above, a tensor page holds less than two.
const BLOCK_BYTES: std::ops::RangeInclusive<i32> = 1024..=262_144;

/// Size of free dimensions other than the rows', such as words of a sentence, for an estimate.
const USUAL_SIZE: u64 = 128;

/// Bytes read from a file between two looks at interrupts.
const PIECE: usize = 8 << 20;

fn load_model(call: &Call) -> pg_sys::Datum {
    let name: &str = call.need(0, "name");
    let Some(model) = call.bytes(1) else { missing("onnx") };
    load(name, model, &mut NoExternalData, call.need(2, "block_bytes"))
}

fn load_model_from_file(call: &Call) -> pg_sys::Datum {
    let name: &str = call.need(0, "name");
    let path: &str = call.need(1, "path");
    catalog::check_name(name);
    check_may_read_files();
    let (path, model) = read_file(path);
    let folder = path.parent().unwrap_or(Path::new("/"));
    let mut external = FolderExternalData::new(folder).unwrap_or_else(|e| error::raise_model(e));
    load(name, &model, &mut external, call.need(2, "block_bytes"))
}

fn load_model_from_large_object(call: &Call) -> pg_sys::Datum {
    let name: &str = call.need(0, "name");
    catalog::check_name(name);
    let model = LargeObject::open(call.need(1, "large_object")).read_all();
    load(name, &model, &mut NoExternalData, call.need(2, "block_bytes"))
}

/// Parses, checks, tiles and stores a model, and makes the new version the active one.
fn load(name: &str, model: &[u8], external: &mut dyn ExternalData, block_bytes: i32) -> pg_sys::Datum {
    catalog::check_name(name);
    if !BLOCK_BYTES.contains(&block_bytes) {
        error::raise(
            PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
            "block_bytes is out of range",
            &format!("It is {block_bytes}."),
            &format!("Choose {} to {}; 65536 suits most models.", BLOCK_BYTES.start(), BLOCK_BYTES.end()),
        );
    }
    let mut check = || {
        interrupt::check();
        Ok(())
    };
    let _activity = Activity::begin(Work::Load, None);
    let mut stripped = onnx::strip(model, external, &mut check).unwrap_or_else(|e| error::raise_model(e));
    let graph_hash = *blake3::hash(&stripped.graph).as_bytes();
    let content_hash = content_hash(&graph_hash, &stripped.tensors);

    progress::set(Field::Content, progress::content_field(&content_hash));
    progress::set(Field::Phase, 1);
    let loaded_bytes = model.len() as u64 + external_bytes(model, &stripped.tensors);
    // Compiling is the check that the model can be run; the plan serves this session's first prediction. What was loaded
    // before has passed it.
    let (signature, plan) = match catalog::signature_of_content(&content_hash) {
        Some(signature) => (signature, None),
        None => {
            let plan = if serving::settings::share_transposed() {
                compile_with_twins(&mut stripped, block_bytes as usize)
            } else {
                compile(&stripped, block_bytes as usize)
            };
            (describe(&plan), Some(plan))
        }
    };
    progress::set(Field::Phase, 2);
    progress::set(Field::AllBlocks, block_count(&stripped.tensors, block_bytes as usize));
    let version = catalog::store(
        name,
        &NewVersion {
            graph: &stripped.graph,
            graph_hash,
            content_hash,
            signature,
            tensors: &stripped.tensors,
            loaded_bytes,
            block_bytes: block_bytes as usize,
        },
    );
    if let Some(plan) = plan {
        serving::remember(content_hash, plan);
    }
    pg_sys::Datum::from(version)
}

/// The signature, and what was found out about rows of the model.
pub(super) fn describe(plan: &Plan) -> serde_json::Value {
    let mut described = serde_json::to_value(plan.signature()).unwrap_or_default();
    if let Some(fields) = described.as_object_mut() {
        fields.insert("rows".into(), serde_json::to_value(plan.rows()).unwrap_or_default());
        fields.insert("flops_per_row".into(), plan.flops_per_row(USUAL_SIZE).into());
    }
    described
}

/// As [`compile`]. Tensors whose blocks are stored the other way round get that view, if the plan can use it: an operator that
/// takes only one would have the tensor in its own memory.
fn compile_with_twins(stripped: &mut onnx::Stripped<'_>, block_bytes: usize) -> Arc<Plan> {
    let mut twins = catalog::twins(&stripped.tensors, block_bytes);
    loop {
        exchange_views(stripped, &mut twins);
        let plan = compile(stripped, block_bytes);
        let is_used = |&(place, _): &(usize, View)| {
            let tensor = &stripped.tensors[place];
            let mut stored = plan.stored_tensors().iter();
            stored.any(|it| it.ordinal == tensor.ordinal && it.tiling.view() == tensor.view)
        };
        if twins.iter().all(is_used) {
            return plan;
        }
        let used: Vec<bool> = twins.iter().map(is_used).collect();
        exchange_views(stripped, &mut twins);
        let mut used = used.into_iter();
        twins.retain(|_| used.next() == Some(true));
    }
}

/// Exchanges the views of tensors, by their places, with those beside them.
fn exchange_views(stripped: &mut onnx::Stripped<'_>, views: &mut [(usize, View)]) {
    for (place, view) in views {
        std::mem::swap(&mut stripped.tensors[*place].view, view);
    }
}

fn compile(stripped: &onnx::Stripped<'_>, block_bytes: usize) -> Arc<Plan> {
    let tiling = |tensor: &StoredTensor<'_>| Tiling::new(&tensor.dims, tensor.view, tensor.dtype, block_bytes).ok();
    let tilings: Vec<_> = stripped.tensors.iter().map(tiling).collect();
    let mut fetch = |ordinal: u32, out: &mut Vec<u8>| {
        interrupt::check();
        let tensor = stripped
            .tensors
            .get(ordinal as usize)
            .ok_or_else(|| ModelError::internal(format!("tensor {ordinal} of the graph was not stripped")))?;
        out.extend_from_slice(&tensor.data);
        Ok(())
    };
    serving::compile(&stripped.graph, &mut fetch, &tilings)
}

/// How many blocks the tensors have.
fn block_count(tensors: &[StoredTensor<'_>], block_bytes: usize) -> i64 {
    let tiling = |tensor: &StoredTensor<'_>| Tiling::new(&tensor.dims, tensor.view, tensor.dtype, block_bytes).ok();
    tensors
        .iter()
        .filter_map(tiling)
        .map(|tiling| i64::from(tiling.block_rows()) * i64::from(tiling.block_cols()))
        .sum()
}

/// Identity of graph and tensors together: what a compiled plan is kept under.
pub(super) fn content_hash(graph_hash: &[u8; 32], tensors: &[StoredTensor<'_>]) -> [u8; 32] {
    let mut whole = ContentHash::new(graph_hash);
    tensors.iter().for_each(|tensor| whole.add(&tensor.data));
    whole.finish()
}

/// Bytes of tensors that do not lie in the model itself.
fn external_bytes(model: &[u8], tensors: &[StoredTensor<'_>]) -> u64 {
    let total: u64 = tensors.iter().map(|t| t.data.len() as u64).sum();
    total.saturating_sub(model.len() as u64)
}

fn check_may_read_files() {
    // SAFETY: syscache look-ups in a transaction.
    let allowed = unsafe {
        pg_sys::superuser()
            || pg_sys::has_privs_of_role(pg_sys::GetUserId(), pg_sys::Oid::from_u32(pg_sys::ROLE_PG_READ_SERVER_FILES))
    };
    if !allowed {
        error::raise(
            PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
            "permission denied to load a model from a file of the server",
            "Only roles with the privileges of pg_read_server_files may read files.",
            "Use load_model with the file's content, or load_model_from_large_object.",
        );
    }
}

fn read_file(path: &str) -> (PathBuf, Vec<u8>) {
    let fail = |e: std::io::Error| -> ! {
        let code = match e.kind() {
            std::io::ErrorKind::NotFound => PgSqlErrorCode::ERRCODE_UNDEFINED_FILE,
            std::io::ErrorKind::PermissionDenied => PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
            _ => PgSqlErrorCode::ERRCODE_IO_ERROR,
        };
        error::raise(
            code,
            format!("could not read model file \"{path}\""),
            &format!("{e}."),
            "Give the path of a file on the server that the server's user may read.",
        )
    };
    let real = std::fs::canonicalize(path).unwrap_or_else(|e| fail(e));
    if !real.is_file() {
        error::raise(
            PgSqlErrorCode::ERRCODE_WRONG_OBJECT_TYPE,
            format!("\"{path}\" is not a regular file"),
            "",
            "Give the path of an ONNX file.",
        );
    }
    let mut file = std::fs::File::open(&real).unwrap_or_else(|e| fail(e));
    let mut model = Vec::new();
    loop {
        interrupt::check();
        match file.by_ref().take(PIECE as u64).read_to_end(&mut model) {
            Ok(0) => return (real, model),
            Ok(_) => {}
            Err(e) => fail(e),
        }
    }
}
