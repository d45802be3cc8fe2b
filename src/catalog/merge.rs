//! A version of a model some of whose blocks are those of others: what deduplication stores.
//!
//! Invariants: the rows of the new version refer to blocks that are in the store already, so nothing is stored but rows;
//! what it does not replace is the old version's, row by row; all of it is undone with the caller's transaction.

use super::blocks::{BlockRef, OpenWeights, read_block};
use super::content::ContentHash;
use super::names::ModelSpec;
use super::read::{VersionRow, damaged, read_tensor, tensors};
use super::write::{COPY_TENSOR_ROWS, as_owner, block_type_of, find_owned, lock_name, lock_object};
use crate::pg::{error, fmgr, interrupt, progress};
use pgrx::datum::DatumWithOid;
use pgrx::pg_sys;
use pgrx::prelude::*;
use pgrx::spi::{SpiClient, SpiError};
use tensor_blocks::Tile;

/// A block of a model that another one takes the place of.
#[derive(Clone, Debug)]
pub struct Merge {
    /// Ordinal of its tensor.
    pub ordinal: u32,
    /// Its tile of the tensor.
    pub tile: Tile,
    /// Its number there: `block_row * block_cols + block_col`.
    pub number: u32,
    /// The block that takes its place: of the same dtype and shape.
    pub to: BlockRef,
}

/// The content hash of a version like `base` but for `merges`.
pub fn merged_content(base: &VersionRow, merges: &[Merge]) -> [u8; 32] {
    let weights = OpenWeights::open();
    let mut hash = ContentHash::new(&base.graph_hash);
    let (mut whole, mut block) = (Vec::new(), Vec::new());
    for (ordinal, tensor) in (0..).zip(tensors(base.id)) {
        let tiling = tensor.tiling();
        whole.clear();
        read_tensor(&tensor, &mut whole);
        for merge in merges.iter().filter(|merge| merge.ordinal == ordinal) {
            interrupt::check();
            block.clear();
            block.resize(tiling.tile_bytes(merge.tile), 0);
            if read_block(&weights, &tensor, merge.tile, &merge.to, &mut block).is_err() {
                damaged("a block is not in the block store");
            }
            tiling.scatter(merge.tile, &block, &mut whole).unwrap_or_else(|e| damaged(&e.to_string()));
        }
        hash.add(&whole);
    }
    hash.finish()
}

/// Stores a version like `base` but for `merges`, under this content hash, and makes it the active one. Returns its number.
/// The active snapshot must see the rows that the merges' blocks were read from: while it does, no vacuum removes these blocks.
///
/// Errors: `object_not_in_prerequisite_state` if the model has changed since; those of [`check_owner`](super::check_owner).
pub fn store_merged(spec: &ModelSpec<'_>, base: &VersionRow, content_hash: [u8; 32], merges: &[Merge]) -> i32 {
    lock_name(spec.name);
    let weights = OpenWeights::open();
    as_owner(|client, caller| {
        let model = find_owned(client, spec.name, caller)?;
        // It stays until this transaction ends, however its model may be dropped.
        let kept = client.update(
            "SELECT version FROM tessera.model_version WHERE id = $1 AND model = $2 FOR KEY SHARE",
            Some(1),
            &[base.id.into(), model.id.into()],
        )?;
        let kept: Option<i32> = if kept.is_empty() { None } else { kept.first().get_one()? };
        if kept.is_none() || (spec.version.is_none() && model.active != kept) {
            error::raise(
                PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                format!("model \"{}\" was changed while it was deduplicated", spec.name),
                "The version that was deduplicated is no longer the active one, or was dropped.",
                "Run deduplicate_model again.",
            );
        }
        let version = model.next_version(spec.name);
        lock_object(c"graph", &base.graph_hash, pg_sys::ShareLock, true);
        let id: i64 = client
            .update(
                "INSERT INTO tessera.model_version (model, version, content_hash, graph_hash, signature, parameters, loaded_bytes, block_bytes, rows_declared)
                 SELECT model, $2, $3, graph_hash, signature, parameters, loaded_bytes, block_bytes, rows_declared
                 FROM tessera.model_version WHERE id = $1 RETURNING id",
                None,
                &[base.id.into(), version.into(), content_hash.to_vec().into()],
            )?
            .first()
            .get_one()?
            .unwrap_or_default();
        client.update(COPY_TENSOR_ROWS, None, &[base.id.into(), id.into()])?;
        let copied = copy_others(client, base.id, id, merges)?;
        progress::add(progress::Field::Blocks, copied as u64);
        let tensors = tensor_ids(client, id)?;
        place(client, &weights, &tensors, merges)?;
        let all: i64 = client
            .update(
                "SELECT count(*) FROM tessera.weight w JOIN tessera.tensor t ON t.id = w.tensor WHERE t.model_version = $1",
                Some(1),
                &[base.id.into()],
            )?
            .first()
            .get_one()?
            .unwrap_or_default();
        if copied + merges.len() != all as usize {
            damaged("a version lacks blocks");
        }
        client.update(
            "UPDATE tessera.model SET last_version = $2, active_version = $2 WHERE id = $1",
            None,
            &[model.id.into(), version.into()],
        )?;
        Ok(version)
    })
}

/// Gives version `to` the blocks of version `from` that are not replaced. Returns their number.
fn copy_others(client: &mut SpiClient<'_>, from: i64, to: i64, merges: &[Merge]) -> Result<usize, SpiError> {
    let column = |of: fn(&Merge) -> u32| merges.iter().map(|merge| of(merge) as i32).collect::<Vec<i32>>();
    let rows = client.update(
        "INSERT INTO tessera.weight (tensor, block_row, block_col, data)
         SELECT n.id, w.block_row, w.block_col, w.data
         FROM tessera.tensor o
         JOIN tessera.tensor n ON n.model_version = $2 AND n.ordinal = o.ordinal
         JOIN tessera.weight w ON w.tensor = o.id
         WHERE o.model_version = $1
           AND NOT EXISTS (SELECT FROM unnest($3, $4, $5) AS m(ordinal, block_row, block_col)
                           WHERE m.ordinal = o.ordinal AND m.block_row = w.block_row AND m.block_col = w.block_col)
         ORDER BY n.id, w.block_row, w.block_col",
        None,
        &[
            from.into(),
            to.into(),
            column(|merge| merge.ordinal).into(),
            column(|merge| merge.tile.block_row).into(),
            column(|merge| merge.tile.block_col).into(),
        ],
    )?;
    Ok(rows.len())
}

/// `tessera.tensor.id` of a version's tensors, by ordinal.
fn tensor_ids(client: &mut SpiClient<'_>, version: i64) -> Result<Vec<i64>, SpiError> {
    let rows = client.update(
        "SELECT id FROM tessera.tensor WHERE model_version = $1 ORDER BY ordinal",
        None,
        &[version.into()],
    )?;
    rows.map(|row| row.get::<i64>(1).map(Option::unwrap_or_default)).collect()
}

/// Inserts the rows of the replaced blocks, which refer to the blocks that take their place.
fn place(client: &mut SpiClient<'_>, weights: &OpenWeights, tensors: &[i64], merges: &[Merge]) -> Result<(), SpiError> {
    let block_type = block_type_of(c"weight", 4);
    let types = [pg_sys::INT8OID, pg_sys::INT4OID, pg_sys::INT4OID, block_type].map(PgOid::from);
    let insert = client.prepare_mut(
        "INSERT INTO tessera.weight (tensor, block_row, block_col, data) VALUES ($1, $2, $3, $4)",
        &types,
    )?;
    for merge in merges {
        interrupt::check();
        let (Some(&tensor), Some(pointer)) = (tensors.get(merge.ordinal as usize), merge.to.toast_pointer(weights))
        else {
            damaged("a tensor is missing")
        };
        let datum = fmgr::raw_datum(&pointer);
        // SAFETY: a palloc'd TOAST pointer to a tensor_block, freed below; SPI copies what it keeps.
        unsafe {
            let data = DatumWithOid::new(datum, block_type);
            client.update(
                &insert,
                None,
                &[tensor.into(), (merge.tile.block_row as i32).into(), (merge.tile.block_col as i32).into(), data],
            )?;
            pg_sys::pfree(datum.cast_mut_ptr());
        }
        progress::add(progress::Field::Blocks, 1);
    }
    Ok(())
}
