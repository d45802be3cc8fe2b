//! Saving and dropping sets. Everything runs inside the caller's transaction and is undone with it.

use super::read::{Storage, sets_trained_from};
use crate::catalog::read::damaged;
use crate::catalog::write::{as_owner, create_domain, delete_unused_graphs, lock_object, owns_domain};
use crate::pg::beside::Beside;
use crate::pg::insert::insert_rows;
use crate::pg::scan::relation_oid;
use crate::pg::varlena::VARHDRSZ;
use crate::pg::{error, fmgr, snapshot};
use crate::store::Hash;
use crate::table_am::toaster::with_hashes;
use pgrx::pg_sys;
use pgrx::prelude::*;
use pgrx::spi::{SpiClient, SpiError};
use std::collections::{HashMap, HashSet};
use tensor_blocks::members::{CHUNK_MEMBERS, Chunk, PackedBlock, Place};
use tensor_blocks::{Block, DType, block_hash};

/// Blocks that are hashed, and stored, at a time.
const HELD: usize = 64;

/// A set that is to be stored.
pub struct NewSet<'a> {
    /// Its name, which is locked and free.
    pub name: &'a str,
    /// How it is stored.
    pub storage: Storage,
    /// The set that it is made from.
    pub based_on: Option<i64>,
    /// ONNX graph without its tensors.
    pub graph: &'a [u8],
    /// BLAKE3 of the graph.
    pub graph_hash: [u8; 32],
    /// As of a model version, with the number of parameters and their bytes.
    pub signature: serde_json::Value,
    /// How its members are trained.
    pub training: Option<serde_json::Value>,
}

/// Stores a set, block by block, then its map.
pub struct SetWriter {
    set: i64,
    name: String,
    architecture: i64,
    /// Blocks that wait until there are [`HELD`], without their hashes yet.
    held: Vec<(PackedBlock, Hash)>,
    hashing: Beside<Vec<(PackedBlock, Hash)>>,
    /// Numbers of blocks that are not used yet, descending.
    numbers: Vec<Option<i64>>,
    bytes: u64,
}

/// Takes the lock on a set's name, which is that of a model's, until the transaction ends.
pub fn lock_set_name(name: &str) {
    lock_object(c"model", name.as_bytes(), pg_sys::ExclusiveLock, true);
}

impl SetWriter {
    /// Bytes that a block has before its elements, for the head of the value as which it is stored.
    pub const ROOM: usize = VARHDRSZ + Block::HEAD_OF_MATRIX;

    /// Stores the set's row, without members, owned by the caller. Its architecture is shared with others' until the transaction ends.
    pub fn begin(new: &NewSet<'_>) -> SetWriter {
        lock_architecture(&new.graph_hash, false);
        as_owner(|client, caller| {
            check_free(client, new.name)?;
            if let Some(parent) = new.based_on {
                // From here on it stays: who drops it waits for the architecture. Locked, so that an old snapshot is noticed.
                let query = "SELECT FROM tessera.model_set WHERE id = $1 FOR KEY SHARE";
                if client.update(query, Some(1), &[parent.into()])?.is_empty() {
                    error::raise(
                        PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT,
                        "the set that this one is based on was dropped meanwhile",
                        "",
                        "Save the set again, based on another one or on none.",
                    );
                }
            }
            // Until this transaction ends nobody else sees that the graph is used: see `delete_unused_graphs`.
            lock_object(c"graph", &new.graph_hash, pg_sys::ShareLock, true);
            client.update(
                "INSERT INTO tessera.graph (hash, graph) VALUES ($1, $2) ON CONFLICT (hash) DO NOTHING",
                None,
                &[new.graph_hash.to_vec().into(), new.graph.to_vec().into()],
            )?;
            client.update(
                "INSERT INTO tessera.architecture (graph_hash, signature) VALUES ($1, $2) ON CONFLICT (graph_hash) DO NOTHING",
                None,
                &[new.graph_hash.to_vec().into(), pgrx::JsonB(new.signature.clone()).into()],
            )?;
            let architecture: i64 = client
                .update(
                    "SELECT id FROM tessera.architecture WHERE graph_hash = $1",
                    Some(1),
                    &[new.graph_hash.to_vec().into()],
                )?
                .first()
                .get_one()?
                .unwrap_or_else(|| damaged("an architecture is missing"));
            let domain = create_domain(
                client,
                new.name,
                caller,
                "a set of models of pg_tessera: its owner owns the set, USAGE allows to predict",
            )?;
            let set: i64 = client
                .update(
                    "INSERT INTO tessera.model_set (name, domain, architecture, storage, based_on, members, bytes_added, training)
                     VALUES ($1, $2::regtype, $3, $4, $5, 0, 0, $6) RETURNING id",
                    None,
                    &[
                        new.name.into(),
                        domain.as_str().into(),
                        architecture.into(),
                        new.storage.name().into(),
                        new.based_on.into(),
                        new.training.clone().map(pgrx::JsonB).into(),
                    ],
                )?
                .first()
                .get_one()?
                .unwrap_or_default();
            Ok(SetWriter {
                set,
                name: new.name.to_owned(),
                architecture,
                held: Vec::new(),
                hashing: Beside::new("tessera hashing", |blocks: &mut Vec<_>| blocks.iter_mut().for_each(finish_block)),
                numbers: Vec::new(),
                bytes: 0,
            })
        })
    }

    /// The number of a new block.
    pub fn next_number(&mut self) -> u32 {
        if self.numbers.is_empty() {
            self.numbers = as_owner(|client, _| {
                let query =
                    "SELECT pg_catalog.nextval('tessera.set_block_number_seq') FROM pg_catalog.generate_series(1, $1)";
                client
                    .update(query, None, &[(HELD as i32).into()])?
                    .map(|row| row.get::<i64>(1))
                    .collect::<Result<Vec<_>, _>>()
            });
            self.numbers.reverse();
        }
        let number = self.numbers.pop().flatten();
        let number = number.and_then(|number| u32::try_from(number).ok());
        number.unwrap_or_else(|| damaged("the number of a set's block is out of range"))
    }

    /// Stores a block, with others that are held until then, when they are hashed.
    pub fn block(&mut self, block: PackedBlock) {
        self.bytes += (block.elements().len() + block.index.len()) as u64;
        self.held.push((block, Hash::default()));
        if self.held.len() >= HELD {
            let held = std::mem::take(&mut self.held);
            let before = self.hashing.exchange(held);
            self.store(before.unwrap_or_default());
        }
    }

    fn flush(&mut self) {
        let before = self.hashing.collect();
        self.store(before.unwrap_or_default());
        let rest = std::mem::take(&mut self.held);
        self.store(self.hashing.here(rest));
    }

    fn store(&self, mut blocks: Vec<(PackedBlock, Hash)>) {
        crate::pg::interrupt::check();
        if blocks.is_empty() {
            return;
        }
        let row = |(block, _): &mut (PackedBlock, Hash)| {
            [
                pg_sys::Datum::from(i64::from(block.number)),
                pg_sys::Datum::from(self.architecture),
                fmgr::varlena_datum(&[&block.index]),
                fmgr::varlena_in_place(&mut block.bytes),
            ]
        };
        let rows: Vec<[pg_sys::Datum; 4]> = blocks.iter_mut().map(row).collect();
        let hashes = rows.iter().zip(&blocks).map(|(row, (_, hash))| (row[3], *hash)).collect();
        let table = relation_oid(c"tessera", c"set_block").unwrap_or_else(|| damaged("a table is missing"));
        // SAFETY: of the types of tessera.set_block's columns: bigint twice, bytea, tensor_block, whose bytes are held until here.
        unsafe {
            with_hashes(hashes, || insert_rows(table, &rows));
            rows.iter().for_each(|row| pg_sys::pfree(row[2].cast_mut_ptr()));
        }
    }

    /// Stores the map: members ascending by name, with the places of their segments, and the recipes of those that have one.
    /// Returns how many there are.
    pub fn finish(mut self, members: Vec<(String, Vec<Place>, Option<tensor_blocks::members::Recipe>)>) -> i64 {
        self.flush();
        let count = members.len() as i64;
        let (set, name, mut bytes) = (self.set, std::mem::take(&mut self.name), self.bytes);
        as_owner(|client, _| {
            let mut members = members.into_iter();
            for number in 0.. {
                crate::pg::interrupt::check();
                let mut chunk = Chunk::default();
                for (name, places, recipe) in members.by_ref().take(CHUNK_MEMBERS) {
                    if let Some(recipe) = recipe {
                        chunk.recipes.push((chunk.names.len() as u16, recipe));
                    }
                    chunk.names.push(name);
                    chunk.places.extend(places);
                }
                let Some(first) = chunk.names.first().cloned() else { break };
                let parts = [chunk.encode_names(), chunk.encode_places(), chunk.encode_recipes()];
                bytes += parts.iter().map(|part| part.len() as u64).sum::<u64>();
                let [names, places, recipes] = parts;
                client.update(
                    "INSERT INTO tessera.set_map (model_set, chunk, first_name, names, places, recipes) VALUES ($1, $2, $3, $4, $5, $6)",
                    None,
                    &[set.into(), number.into(), first.into(), names.into(), places.into(), recipes.into()],
                )?;
            }
            let stored = client.update(
                "UPDATE tessera.model_set SET members = $2, bytes_added = $3 WHERE id = $1 RETURNING id",
                None,
                &[set.into(), count.into(), (bytes as i64).into()],
            )?;
            if stored.is_empty() {
                error::raise(
                    PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT,
                    format!("model set \"{name}\" was dropped while it was saved"),
                    "",
                    "Call nothing in the query that drops the set.",
                );
            }
            Ok(count)
        })
    }
}

/// Writes the head of a block's value before its elements, and hashes it.
fn finish_block((block, hash): &mut (PackedBlock, Hash)) {
    let shape = [1, (block.elements().len() / 4) as u32];
    *hash = block_hash(DType::Float32, &shape, block.elements()).0;
    let head = Block::head_of(DType::Float32, &shape);
    block.bytes[block.room - head.len()..block.room].copy_from_slice(&head);
}

/// Raises an ERROR if a set or a model has the name, or a model one that a member of the set could have.
fn check_free(client: &mut SpiClient<'_>, name: &str) -> Result<(), SpiError> {
    let taken =
        |what: String, hint: &str| -> ! { error::raise(PgSqlErrorCode::ERRCODE_DUPLICATE_OBJECT, what, "", hint) };
    if !client.update("SELECT FROM tessera.model_set WHERE name = $1", Some(1), &[name.into()])?.is_empty() {
        taken(
            format!("model set \"{name}\" already exists"),
            "Save under another name, based on this set if it is a new generation of it, or drop it first.",
        );
    }
    let query =
        "SELECT m.name FROM tessera.model m WHERE m.name = $1 OR pg_catalog.starts_with(m.name, $1 || '/') LIMIT 1";
    let models = client.update(query, Some(1), &[name.into()])?;
    if !models.is_empty() {
        let model = models.first().get_one::<String>()?.unwrap_or_default();
        taken(
            format!("model \"{model}\" already exists, which could not be told from a set \"{name}\""),
            "Choose another name.",
        );
    }
    Ok(())
}

/// Shares the architecture, or has it alone, until the transaction ends.
fn lock_architecture(graph_hash: &[u8], alone: bool) {
    let mode = if alone { pg_sys::ExclusiveLock } else { pg_sys::ShareLock };
    lock_object(c"architecture", graph_hash, mode, true);
}

/// Drops a set of the caller's.
pub fn drop_set(name: &str) {
    lock_set_name(name);
    as_owner(|client, caller| {
        let rows = client.update(
            "SELECT domain::oid, domain::text FROM tessera.model_set WHERE name = $1",
            Some(1),
            &[name.into()],
        )?;
        if rows.is_empty() {
            error::raise(
                PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT,
                format!("model set \"{name}\" does not exist"),
                "",
                "See tessera.model_sets for the sets that there are.",
            );
        }
        let row = rows.first();
        let domain = row.get::<pg_sys::Oid>(1)?.unwrap_or(pg_sys::InvalidOid);
        let domain_name = row.get::<String>(2)?.unwrap_or_default();
        if !owns_domain(domain, caller) {
            error::raise(
                PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
                format!("must be owner of model set \"{name}\""),
                "",
                "Ask its owner, whom tessera.model_sets shows, or a superuser.",
            );
        }
        // The rows go when the event trigger sees that the domain is gone: so it is also with DROP DOMAIN and DROP OWNED.
        client.update(&format!("DROP DOMAIN {domain_name}"), None, &[])?;
        Ok(())
    });
}

/// Removes the rows of sets whose domains no longer exist. Called after a DROP.
pub fn drop_orphan_sets() {
    const GONE: &str = "NOT EXISTS (SELECT FROM pg_type t WHERE t.oid = s.domain)";
    as_owner(|client, _| {
        let table = client.update(
            &format!(
                "SELECT s.id, s.name, s.architecture, a.graph_hash FROM tessera.model_set s
                 JOIN tessera.architecture a ON a.id = s.architecture WHERE {GONE} ORDER BY a.graph_hash"
            ),
            None,
            &[],
        )?;
        let mut gone = Vec::new();
        for row in table {
            let id: i64 = row.get(1)?.unwrap_or_default();
            let name: String = row.get(2)?.unwrap_or_default();
            let architecture: i64 = row.get(3)?.unwrap_or_default();
            let graph_hash: Vec<u8> = row.get(4)?.unwrap_or_default();
            gone.push((id, name, architecture, graph_hash));
        }
        if gone.is_empty() {
            return Ok(());
        }
        gone.iter().for_each(|(.., graph_hash)| lock_architecture(graph_hash, true));
        check_not_needed(&gone.iter().map(|(id, name, ..)| (*id, name.as_str())).collect());
        let ids: Vec<i64> = gone.iter().map(|(id, ..)| *id).collect();
        for query in [
            "DELETE FROM tessera.set_map WHERE model_set = ANY ($1)",
            "DELETE FROM tessera.model_set WHERE id = ANY ($1)",
        ] {
            client.update(query, None, &[ids.clone().into()])?;
        }
        let mut architectures: Vec<i64> = gone.iter().map(|(_, _, architecture, _)| *architecture).collect();
        architectures.sort_unstable();
        architectures.dedup();
        for architecture in architectures {
            delete_unused_blocks(client, architecture)?;
        }
        // SAFETY: this transaction's own setting; as in `delete_unused_blocks`.
        if unsafe { pg_sys::XactIsoLevel } >= pg_sys::XACT_REPEATABLE_READ as i32 {
            return Ok(());
        }
        client.update(
            "DELETE FROM tessera.architecture a WHERE NOT EXISTS (SELECT FROM tessera.model_set s WHERE s.architecture = a.id)
             AND NOT EXISTS (SELECT FROM tessera.set_block b WHERE b.architecture = a.id) AND a.graph_hash = ANY ($1)",
            None,
            &[gone.into_iter().map(|(.., graph_hash)| graph_hash).collect::<Vec<_>>().into()],
        )?;
        delete_unused_graphs(client)
    });
}

/// Raises an ERROR if a set that stays is trained from one of these, which are given with their names.
fn check_not_needed(sets: &HashMap<i64, &str>) {
    // The architecture is locked, so that no other comes; those that came since the transaction's snapshot count too.
    let needed = snapshot::with_latest(|| sets_trained_from(&|set| sets.contains_key(&set)));
    let Some((_, child, parent)) = needed.into_iter().find(|(child, ..)| !sets.contains_key(child)) else { return };
    let parent = sets.get(&parent).copied().unwrap_or_default();
    error::raise(
        PgSqlErrorCode::ERRCODE_DEPENDENT_OBJECTS_STILL_EXIST,
        format!("cannot drop model set \"{parent}\" because set \"{child}\" is trained from it"),
        "Members that are not stored but trained need the members that they are trained from.",
        &format!(
            "Drop \"{child}\" first, or save its members: save_model_set('...', 'SELECT * FROM recover_model_set(''{child}'')')."
        ),
    )
}

/// Removes the blocks of an architecture in which no set has a place. The architecture is locked.
fn delete_unused_blocks(client: &mut SpiClient<'_>, architecture: i64) -> Result<(), SpiError> {
    // SAFETY: this transaction's own setting. Under one snapshot for all statements, sets committed since are not seen: what is
    // left here goes with a later drop.
    if unsafe { pg_sys::XactIsoLevel } >= pg_sys::XACT_REPEATABLE_READ as i32 {
        return Ok(());
    }
    // A set that this transaction is saving, in a query that comes to this drop, has blocks but no map yet. They go with a later
    // drop as well.
    let making = "SELECT FROM tessera.model_set WHERE architecture = $1 AND members = 0";
    if !client.update(making, Some(1), &[architecture.into()])?.is_empty() {
        return Ok(());
    }
    let maps = client.update(
        "SELECT m.places FROM tessera.set_map m JOIN tessera.model_set s ON s.id = m.model_set WHERE s.architecture = $1",
        None,
        &[architecture.into()],
    )?;
    let mut used: HashSet<u32> = HashSet::new();
    for row in maps {
        crate::pg::interrupt::check();
        let places: Vec<u8> = row.get(1)?.unwrap_or_default();
        used.extend(Place::blocks_of(&places).unwrap_or_else(|| damaged("a part of a set's map cannot be read")));
    }
    let used: Vec<i64> = used.into_iter().map(i64::from).collect();
    client.update(
        "DELETE FROM tessera.set_block WHERE architecture = $1 AND number <> ALL ($2)",
        None,
        &[architecture.into(), used.into()],
    )?;
    Ok(())
}
