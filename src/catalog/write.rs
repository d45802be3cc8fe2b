//! Changing models. Everything here runs inside the caller's transaction and is undone with it.
//!
//! Whoever changes a model first takes a lock on its name until the transaction ends, so that concurrent loads of one name
//! take turns. The lock is a heavyweight one: the deadlock detector sees it, and waiting for it can be cancelled.

use super::names::{ModelSpec, check_name};
use super::read::{dims_of, no_such_model};
use crate::pg::scan::relation_oid;
use crate::pg::{error, fmgr, identity, progress};
use inference::onnx::StoredTensor;
use pgrx::datum::DatumWithOid;
use pgrx::pg_sys;
use pgrx::prelude::*;
use pgrx::spi::{SpiClient, SpiError};
use std::ffi::CStr;
use tensor_blocks::{Block, Tiling};

/// A model that was parsed and checked, ready to be stored.
pub struct NewVersion<'a> {
    /// ONNX graph without its tensors.
    pub graph: &'a [u8],
    /// BLAKE3 of the graph.
    pub graph_hash: [u8; 32],
    /// BLAKE3 over graph and tensors.
    pub content_hash: [u8; 32],
    /// Inputs, outputs and opsets as JSON.
    pub signature: serde_json::Value,
    /// Its tensors.
    pub tensors: &'a [StoredTensor<'a>],
    /// Bytes of the ONNX file and its external data.
    pub loaded_bytes: u64,
    /// Bytes of a whole block.
    pub block_bytes: usize,
}

/// Runs `f` in SPI with the extension owner's rights; an error of SPI itself becomes an ERROR.
pub(super) fn as_owner<T>(f: impl FnOnce(&mut SpiClient<'_>, pg_sys::Oid) -> Result<T, SpiError>) -> T {
    identity::as_extension_owner(|caller| match Spi::connect_mut(|client| f(client, caller)) {
        Ok(value) => value,
        Err(e) => error::raise(
            PgSqlErrorCode::ERRCODE_EXTERNAL_ROUTINE_EXCEPTION,
            "could not change the tables of pg_tessera",
            &format!("{e}."),
            "",
        ),
    })
}

/// Takes the lock on a model's name.
pub(super) fn lock_name(name: &str) {
    lock_object(c"model", name.as_bytes(), pg_sys::ExclusiveLock, true);
}

/// A heavyweight lock on (database, table of `tessera`, number of `what`), released at the end of the transaction. False if
/// it is not to be had without waiting.
pub(super) fn lock_object(table: &CStr, what: &[u8], mode: u32, wait: bool) -> bool {
    let class = relation_oid(c"tessera", table).unwrap_or(pg_sys::InvalidOid);
    let hash = blake3::hash(what);
    let object = u32::from_le_bytes(hash.as_bytes()[..4].try_into().expect("four bytes"));
    // SET_LOCKTAG_OBJECT (lock.h), as LockDatabaseObject uses it.
    let tag = pg_sys::LOCKTAG {
        // SAFETY: set once, when the backend starts.
        locktag_field1: unsafe { pg_sys::MyDatabaseId }.to_u32(),
        locktag_field2: class.to_u32(),
        locktag_field3: object,
        locktag_field4: 0,
        locktag_type: pg_sys::LockTagType::LOCKTAG_OBJECT as u8,
        locktag_lockmethodid: pg_sys::DEFAULT_LOCKMETHOD as u8,
    };
    // SAFETY: in a transaction; the tag is read during the call.
    let result = unsafe { pg_sys::LockAcquire(&tag, mode as pg_sys::LOCKMODE, false, !wait) };
    result != pg_sys::LockAcquireResult::LOCKACQUIRE_NOT_AVAIL
}

pub(super) struct ModelRow {
    pub(super) id: i64,
    /// Qualified and quoted; its owner may have renamed it.
    domain_name: String,
    domain: pg_sys::Oid,
    pub(super) active: Option<i32>,
    last_version: i32,
}

impl ModelRow {
    /// The number of the version that comes next.
    pub(super) fn next_version(&self, name: &str) -> i32 {
        self.last_version.checked_add(1).unwrap_or_else(|| {
            error::raise(
                PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
                format!("model \"{name}\" has used up its version numbers"),
                "",
                "Load it under another name.",
            )
        })
    }
}

/// The model, if it exists. By a statement that may write, whose snapshot is taken now: the function's own may be older
/// than the wait for the name's lock.
fn find(client: &mut SpiClient<'_>, name: &str) -> Result<Option<ModelRow>, SpiError> {
    let rows = client.update(
        "SELECT id, domain::oid, active_version, last_version, domain::text FROM tessera.model WHERE name = $1",
        Some(1),
        &[name.into()],
    )?;
    if rows.is_empty() {
        return Ok(None);
    }
    let row = rows.first();
    Ok(Some(ModelRow {
        id: row.get(1)?.unwrap_or_default(),
        domain: row.get(2)?.unwrap_or(pg_sys::InvalidOid),
        active: row.get(3)?,
        last_version: row.get(4)?.unwrap_or_default(),
        domain_name: row.get(5)?.unwrap_or_default(),
    }))
}

/// The model, which must exist and belong to `caller`.
pub(super) fn find_owned(client: &mut SpiClient<'_>, name: &str, caller: pg_sys::Oid) -> Result<ModelRow, SpiError> {
    let Some(model) = find(client, name)? else { no_such_model(name) };
    if !owns_domain(model.domain, caller) {
        error::raise(
            PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
            format!("must be owner of model \"{name}\""),
            "",
            "Ask its owner, whom tessera.models shows, or a superuser.",
        );
    }
    Ok(model)
}

/// Whether the domain of a model or of a set belongs to `caller`.
pub(super) fn owns_domain(domain: pg_sys::Oid, caller: pg_sys::Oid) -> bool {
    // SAFETY: syscache look-ups in a transaction.
    unsafe {
        #[cfg(any(feature = "pg14", feature = "pg15"))]
        let owns = pg_sys::pg_type_ownercheck(domain, caller);
        #[cfg(not(any(feature = "pg14", feature = "pg15")))]
        let owns = pg_sys::object_ownercheck(pg_sys::TypeRelationId, domain, caller);
        owns
    }
}

/// Raises an ERROR unless the model exists and belongs to the current role.
pub fn check_owner(name: &str) {
    as_owner(|client, caller| find_owned(client, name, caller).map(|_| ()));
}

fn domain_name(name: &str) -> String {
    pgrx::spi::quote_qualified_identifier("tessera_model", name)
}

/// Makes the domain of a model or a set, owned by `caller`; its qualified name.
pub(super) fn create_domain(
    client: &mut SpiClient<'_>,
    name: &str,
    caller: pg_sys::Oid,
    comment: &str,
) -> Result<String, SpiError> {
    let domain = domain_name(name);
    // SAFETY: syscache look-up; the name is palloc'd.
    let owner =
        unsafe { std::ffi::CStr::from_ptr(pg_sys::GetUserNameFromId(caller, false)).to_string_lossy().into_owned() };
    // Somebody may have renamed a domain of theirs to this name.
    let taken = client.update(
        "SELECT FROM pg_catalog.pg_type WHERE typname = $1::name AND typnamespace = 'tessera_model'::regnamespace",
        Some(1),
        &[name.into()],
    )?;
    if !taken.is_empty() {
        error::raise(
            PgSqlErrorCode::ERRCODE_DUPLICATE_OBJECT,
            format!("the domain of model \"{name}\" cannot be made: type {domain} exists"),
            "It belongs to no model of that name.",
            "Choose another name, or rename or drop that type.",
        );
    }
    client.update(&format!("CREATE DOMAIN {domain} AS bytea"), None, &[])?;
    client.update(&format!("COMMENT ON DOMAIN {domain} IS {}", pgrx::spi::quote_literal(comment)), None, &[])?;
    let owner = pgrx::spi::quote_identifier(owner);
    client.update(&format!("ALTER DOMAIN {domain} OWNER TO {owner}"), None, &[])?;
    Ok(domain)
}

/// Makes a model without versions, owned by `caller`.
fn create(client: &mut SpiClient<'_>, name: &str, caller: pg_sys::Oid) -> Result<ModelRow, SpiError> {
    check_no_set(client, name)?;
    let comment = "a model of pg_tessera: its owner owns the model, USAGE allows to predict";
    let domain = create_domain(client, name, caller, comment)?;
    client.update(
        "INSERT INTO tessera.model (name, domain) VALUES ($1, $2::regtype)",
        None,
        &[name.into(), domain.as_str().into()],
    )?;
    Ok(find(client, name)?.unwrap_or_else(|| no_such_model(name)))
}

/// Takes the lock on the set that a model's name would be a member of, so that no such set is saved meanwhile.
fn lock_set_of(name: &str) {
    if let Some((set, _)) = name.split_once('/') {
        lock_object(c"model", set.as_bytes(), pg_sys::ShareLock, true);
    }
}

/// Raises an ERROR if a set has the name, or if the name is that of a set's member.
fn check_no_set(client: &mut SpiClient<'_>, name: &str) -> Result<(), SpiError> {
    let set = name.split_once('/').map_or(name, |(set, _)| set);
    if client.update("SELECT FROM tessera.model_set WHERE name = $1", Some(1), &[set.into()])?.is_empty() {
        return Ok(());
    }
    error::raise(
        PgSqlErrorCode::ERRCODE_DUPLICATE_OBJECT,
        format!("model set \"{set}\" already exists"),
        &format!("\"{name}\" as the name of a model could not be told from it or its members."),
        "Choose another name.",
    )
}

/// Stores a version and makes it the active one. Returns its number.
pub fn store(name: &str, new: &NewVersion<'_>) -> i32 {
    lock_set_of(name);
    lock_name(name);
    as_owner(|client, caller| {
        let model = match find(client, name)? {
            Some(_) => find_owned(client, name, caller)?,
            None => create(client, name, caller)?,
        };
        let version = model.next_version(name);
        // Until this transaction ends nobody else sees that the graph is used: see `delete_unused_graphs`.
        lock_object(c"graph", &new.graph_hash, pg_sys::ShareLock, true);
        client.update(
            "INSERT INTO tessera.graph (hash, graph) VALUES ($1, $2) ON CONFLICT (hash) DO NOTHING",
            None,
            &[new.graph_hash.to_vec().into(), new.graph.to_vec().into()],
        )?;
        let parameters: u64 = new.tensors.iter().map(|t| t.dims.iter().product::<u64>()).sum();
        let id: i64 = client
            .update(
                "INSERT INTO tessera.model_version (model, version, content_hash, graph_hash, signature, parameters, loaded_bytes, block_bytes)
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8) RETURNING id",
                None,
                &[
                    model.id.into(),
                    version.into(),
                    new.content_hash.to_vec().into(),
                    new.graph_hash.to_vec().into(),
                    pgrx::JsonB(new.signature.clone()).into(),
                    (parameters as i64).into(),
                    (new.loaded_bytes as i64).into(),
                    (new.block_bytes as i32).into(),
                ],
            )?
            .first()
            .get_one()?
            .unwrap_or_default();
        match stored_before(client, id, new)? {
            Some(twin) => copy_tensors(client, twin, id)?,
            None => {
                for tensor in new.tensors {
                    store_tensor(client, id, tensor, new.block_bytes)?;
                }
            }
        }
        client.update(
            "UPDATE tessera.model SET last_version = $2, active_version = $2 WHERE id = $1",
            None,
            &[model.id.into(), version.into()],
        )?;
        Ok(version)
    })
}

/// Another version with the same content and tiling. Equal content hashes are equal graphs and tensors. It is locked, so
/// that it is still there when its rows are copied, by later statements; one that is being dropped is passed over.
fn stored_before(client: &mut SpiClient<'_>, id: i64, new: &NewVersion<'_>) -> Result<Option<i64>, SpiError> {
    let rows = client.update(
        "SELECT id FROM tessera.model_version WHERE content_hash = $1 AND block_bytes = $2 AND id <> $3
         LIMIT 1 FOR KEY SHARE SKIP LOCKED",
        Some(1),
        &[new.content_hash.to_vec().into(), (new.block_bytes as i32).into(), id.into()],
    )?;
    if rows.is_empty() { Ok(None) } else { rows.first().get_one() }
}

/// Gives version `$2` the tensors of version `$1`, without their blocks.
pub(super) const COPY_TENSOR_ROWS: &str =
    "INSERT INTO tessera.tensor (model_version, ordinal, name, dtype, dims, view, block_bytes)
     SELECT $2, ordinal, name, dtype, dims, view, block_bytes FROM tessera.tensor WHERE model_version = $1 ORDER BY ordinal";

/// Gives version `to` the tensors of version `from`: the rows reference the same blocks, whose content is not touched.
fn copy_tensors(client: &mut SpiClient<'_>, from: i64, to: i64) -> Result<(), SpiError> {
    for query in [
        COPY_TENSOR_ROWS,
        "INSERT INTO tessera.weight (tensor, block_row, block_col, data)
         SELECT n.id, w.block_row, w.block_col, w.data
         FROM tessera.tensor o
         JOIN tessera.tensor n ON n.model_version = $2 AND n.ordinal = o.ordinal
         JOIN tessera.weight w ON w.tensor = o.id
         WHERE o.model_version = $1
         ORDER BY n.id, w.block_row, w.block_col",
    ] {
        client.update(query, None, &[from.into(), to.into()])?;
    }
    Ok(())
}

fn store_tensor(
    client: &mut SpiClient<'_>,
    version_id: i64,
    tensor: &StoredTensor<'_>,
    block_bytes: usize,
) -> Result<(), SpiError> {
    let tiling = Tiling::new(&tensor.dims, tensor.view, tensor.dtype, block_bytes).unwrap_or_else(|e| {
        error::raise(
            PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
            format!("tensor \"{}\" cannot be stored", tensor.name),
            &format!("{e}."),
            "",
        )
    });
    let id: i64 = client
        .update(
            "INSERT INTO tessera.tensor (model_version, ordinal, name, dtype, dims, view, block_bytes)
             VALUES ($1, $2, $3, $4, $5, $6, $7) RETURNING id",
            None,
            &[
                version_id.into(),
                (tensor.ordinal as i32).into(),
                tensor.name.as_str().into(),
                tensor.dtype.name().into(),
                dims_of(&tensor.dims).into(),
                tensor.view.name().into(),
                (block_bytes as i32).into(),
            ],
        )?
        .first()
        .get_one()?
        .unwrap_or_default();
    let block_type = block_type_of(c"weight", 4);
    let types = [pg_sys::INT8OID, pg_sys::INT4OID, pg_sys::INT4OID, block_type].map(PgOid::from);
    let insert = client.prepare_mut(
        "INSERT INTO tessera.weight (tensor, block_row, block_col, data) VALUES ($1, $2, $3, $4)",
        &types,
    )?;
    let mut elements = Vec::new();
    for tile in tiling.tiles() {
        crate::pg::interrupt::check();
        elements.clear();
        let block = tiling
            .gather(tile, &tensor.data, &mut elements)
            .map_err(|e| e.to_string())
            .and_then(|()| {
                Block::new(tensor.dtype, vec![tile.rows, tile.cols], elements.as_slice()).map_err(|e| e.to_string())
            })
            .unwrap_or_else(|e| {
                error::raise(
                    PgSqlErrorCode::ERRCODE_INVALID_BINARY_REPRESENTATION,
                    format!("tensor \"{}\" cannot be tiled", tensor.name),
                    &e,
                    "",
                )
            });
        progress::add(progress::Field::Blocks, 1);
        let datum = fmgr::varlena_datum(&[&block.head(), block.data()]);
        // SAFETY: a palloc'd tensor_block, freed below; SPI copies what it keeps.
        unsafe {
            let data = DatumWithOid::new(datum, block_type);
            client.update(
                &insert,
                None,
                &[id.into(), (tile.block_row as i32).into(), (tile.block_col as i32).into(), data],
            )?;
            pg_sys::pfree(datum.cast_mut_ptr());
        }
    }
    Ok(())
}

/// Type of a column, by number, of a table of `tessera`: that of blocks, whatever schema it is in.
pub(super) fn block_type_of(table: &CStr, column: i16) -> pg_sys::Oid {
    let table = relation_oid(c"tessera", table).unwrap_or(pg_sys::InvalidOid);
    // SAFETY: syscache look-up in a transaction.
    unsafe { pg_sys::get_atttype(table, column) }
}

/// Makes `version` the active one.
pub fn activate(name: &str, version: i32) {
    lock_name(name);
    as_owner(|client, caller| {
        let model = find_owned(client, name, caller)?;
        need_version(client, name, &model, version)?;
        client.update(
            "UPDATE tessera.model SET active_version = $2 WHERE id = $1",
            None,
            &[model.id.into(), version.into()],
        )?;
        Ok(())
    })
}

/// Says whether rows of a version (of the active one if none is named) are independent; `None`: as proven.
pub fn declare_rows(spec: &ModelSpec<'_>, independent: Option<bool>) {
    lock_name(spec.name);
    as_owner(|client, caller| {
        let model = find_owned(client, spec.name, caller)?;
        let Some(version) = spec.version.or(model.active) else {
            error::raise(
                PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT,
                format!("model \"{}\" has no active version", spec.name),
                "",
                "Name the version: name@version.",
            )
        };
        let id = need_version(client, spec.name, &model, version)?;
        client.update(
            "UPDATE tessera.model_version SET rows_declared = $2 WHERE id = $1",
            None,
            &[id.into(), independent.into()],
        )?;
        Ok(())
    })
}

fn need_version(client: &mut SpiClient<'_>, name: &str, model: &ModelRow, version: i32) -> Result<i64, SpiError> {
    let rows = client.update(
        "SELECT id FROM tessera.model_version WHERE model = $1 AND version = $2",
        Some(1),
        &[model.id.into(), version.into()],
    )?;
    if rows.is_empty() {
        error::raise(
            PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT,
            format!("model \"{name}\" has no version {version}"),
            "",
            "See tessera.models for the versions that there are.",
        );
    }
    Ok(rows.first().get_one()?.unwrap_or_default())
}

/// Gives the model another name.
pub fn rename(name: &str, new_name: &str) {
    check_name(new_name);
    let (first, second) = if name < new_name { (name, new_name) } else { (new_name, name) };
    lock_set_of(new_name);
    lock_name(first);
    lock_name(second);
    as_owner(|client, caller| {
        let model = find_owned(client, name, caller)?;
        check_no_set(client, new_name)?;
        if find(client, new_name)?.is_some() {
            error::raise(
                PgSqlErrorCode::ERRCODE_DUPLICATE_OBJECT,
                format!("model \"{new_name}\" already exists"),
                "",
                "Choose another name, or drop that model first.",
            );
        }
        let rename = format!("ALTER DOMAIN {} RENAME TO {}", model.domain_name, pgrx::spi::quote_identifier(new_name));
        client.update(&rename, None, &[])?;
        client.update("UPDATE tessera.model SET name = $2 WHERE id = $1", None, &[model.id.into(), new_name.into()])?;
        Ok(())
    })
}

/// Drops a model, or one version of it. The last version takes the model along.
pub fn drop_model(spec: &ModelSpec<'_>) {
    let name = spec.name;
    lock_name(name);
    as_owner(|client, caller| {
        let model = find_owned(client, name, caller)?;
        let versions: i64 = client
            .update("SELECT count(*) FROM tessera.model_version WHERE model = $1", None, &[model.id.into()])?
            .first()
            .get_one()?
            .unwrap_or_default();
        if let Some(version) = spec.version {
            let id = need_version(client, name, &model, version)?;
            if versions > 1 {
                if model.active == Some(version) {
                    error::raise(
                        PgSqlErrorCode::ERRCODE_OBJECT_IN_USE,
                        format!("cannot drop version {version} of model \"{name}\" because it is the active one"),
                        "",
                        "Activate another version first, or drop the whole model.",
                    );
                }
                return delete_versions(client, &[id]);
            }
        }
        // The rows go when the event trigger sees that the domain is gone: so it is also with DROP DOMAIN and DROP OWNED.
        client.update(&format!("DROP DOMAIN {}", model.domain_name), None, &[])?;
        Ok(())
    })
}

/// Removes the rows of models whose domains no longer exist. Called after a DROP.
pub fn drop_orphans() {
    as_owner(|client, _| {
        let ids = column(
            client,
            "SELECT id FROM tessera.model m WHERE NOT EXISTS (SELECT FROM pg_type t WHERE t.oid = m.domain)",
            &[],
        )?;
        if ids.is_empty() {
            return Ok(());
        }
        let versions =
            column(client, "SELECT id FROM tessera.model_version WHERE model = ANY ($1)", &[ids.clone().into()])?;
        delete_versions(client, &versions)?;
        client.update("DELETE FROM tessera.model WHERE id = ANY ($1)", None, &[ids.into()])?;
        Ok(())
    })
}

fn column(client: &mut SpiClient<'_>, query: &str, args: &[DatumWithOid<'_>]) -> Result<Vec<i64>, SpiError> {
    client.update(query, None, args)?.map(|row| row.get::<i64>(1).map(Option::unwrap_or_default)).collect()
}

fn delete_versions(client: &mut SpiClient<'_>, versions: &[i64]) -> Result<(), SpiError> {
    let versions = versions.to_vec();
    for query in [
        "DELETE FROM tessera.weight WHERE tensor = ANY (ARRAY(SELECT id FROM tessera.tensor WHERE model_version = ANY ($1)))",
        "DELETE FROM tessera.tensor WHERE model_version = ANY ($1)",
        "DELETE FROM tessera.model_version WHERE id = ANY ($1)",
    ] {
        client.update(query, None, &[versions.clone().into()])?;
    }
    delete_unused_graphs(client)
}

/// Removes the graphs that no version uses, except those that a running load uses or waits for: the version that it will
/// commit cannot be seen yet. What is left here goes with a later drop.
pub(super) fn delete_unused_graphs(client: &mut SpiClient<'_>) -> Result<(), SpiError> {
    const UNUSED: &str = "NOT EXISTS (SELECT FROM tessera.model_version v WHERE v.graph_hash = g.hash)
                          AND NOT EXISTS (SELECT FROM tessera.architecture a WHERE a.graph_hash = g.hash)";
    // SAFETY: this transaction's own setting. Under one snapshot for all statements, versions committed since are not seen.
    if unsafe { pg_sys::XactIsoLevel } >= pg_sys::XACT_REPEATABLE_READ as i32 {
        return Ok(());
    }
    let unused: Vec<Vec<u8>> = client
        .update(&format!("SELECT hash FROM tessera.graph g WHERE {UNUSED}"), None, &[])?
        .map(|row| row.get::<Vec<u8>>(1).map(Option::unwrap_or_default))
        .collect::<Result<_, _>>()?;
    let free: Vec<Vec<u8>> =
        unused.into_iter().filter(|hash| lock_object(c"graph", hash, pg_sys::ExclusiveLock, false)).collect();
    if !free.is_empty() {
        // With a snapshot of its own: a load may have ended between the first look and the lock.
        client.update(
            &format!("DELETE FROM tessera.graph g WHERE hash = ANY ($1) AND {UNUSED}"),
            None,
            &[free.into()],
        )?;
    }
    Ok(())
}
