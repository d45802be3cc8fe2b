//! A set that is being made: members are cut, hashed, packed and noted, one by one.

use super::hashing::{Batch, Hashing};
use crate::catalog::sets::{NewSet, SetWriter, Storage, check_member, set_blocks};
use crate::pg::progress::{self, Field};
use crate::pg::{error, interrupt};
use crate::serving::sets::{OpenSet, Shared};
use pgrx::prelude::*;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashSet};
use std::convert::Infallible;
use std::rc::Rc;
use tensor_blocks::Block;
use tensor_blocks::members::{Packer, Place, Recipe, block_capacity};
use tensor_blocks::packing::TENSOR_PAGE_BYTES;

/// A set that is being made.
pub struct Making {
    pub shared: Rc<Shared>,
    storage: Storage,
    parent: Option<Rc<OpenSet>>,
    packer: Packer,
    writer: RefCell<SetWriter>,
    /// Those that were added, also if they have no place yet.
    members: BTreeMap<String, (Vec<Place>, Option<Recipe>)>,
    hashing: Hashing,
}

/// What a set is made of.
pub struct Plan<'a> {
    pub name: &'a str,
    pub storage: Storage,
    pub parent: Option<Rc<OpenSet>>,
    pub shared: Rc<Shared>,
    /// As of a model version, with the number of parameters and their bytes.
    pub signature: serde_json::Value,
    pub training: Option<serde_json::Value>,
}

impl Making {
    /// Stores the set's row; its name is locked.
    pub fn begin(plan: Plan<'_>) -> Making {
        let Plan { name, storage, parent, shared, signature, training } = plan;
        let based_on = parent.as_ref().map(|parent| parent.row.id);
        let writer = SetWriter::begin(&NewSet {
            name,
            storage,
            based_on,
            graph: &shared.graph,
            graph_hash: shared.graph_hash,
            signature,
            training,
        });
        let member = shared.segments.bytes();
        let capacity = block_capacity(member, TENSOR_PAGE_BYTES as usize, Block::HEAD_OF_MATRIX);
        let mut packer = Packer::new(capacity, SetWriter::ROOM);
        if let Some(parent) = &parent {
            // What the parent uses: contents are told by their hashes.
            let blocks: HashSet<u32> =
                parent.members().flat_map(|(member, _)| parent.places(member)).map(|place| place.block).collect();
            set_blocks(parent.row.architecture, &|block| blocks.contains(&block), &mut |hash, place| {
                packer.know(hash, place)
            });
        }
        let hashing = Hashing::new(shared.segments.starts());
        Making { shared, storage, parent, packer, writer: RefCell::new(writer), members: BTreeMap::new(), hashing }
    }

    /// Whether a member of this name was added.
    pub fn has(&self, name: &str) -> bool {
        self.members.contains_key(name)
    }

    fn check_new(&self, name: &str) {
        check_member(name);
        if self.has(name) {
            error::raise(
                PgSqlErrorCode::ERRCODE_DUPLICATE_OBJECT,
                format!("member \"{name}\" is given twice"),
                "",
                "Give each member of a set once.",
            );
        }
    }

    /// Adds a member; `tensor` gives the bytes of one by ordinal, as many as the architecture says.
    pub fn add<'t>(&mut self, name: &str, tensor: impl Fn(usize) -> &'t [u8]) {
        self.check_new(name);
        self.members.insert(name.to_owned(), (Vec::new(), None));
        let segments = &self.shared.segments;
        if let Some(batch) = self.hashing.add(name, |run| segments.gather(tensor, run)) {
            self.place(batch);
        }
    }

    /// Gives the members of a batch their places, and stores the blocks that are full.
    fn place(&mut self, mut batch: Batch) {
        let writer = &self.writer;
        let mut number = || Ok::<u32, Infallible>(writer.borrow_mut().next_number());
        let mut full = |block| {
            writer.borrow_mut().block(block);
            progress::add(Field::Blocks, 1);
            Ok(())
        };
        let (packer, members) = (&mut self.packer, &mut self.members);
        batch.drain(self.hashing.starts(), |name, parts| {
            let Ok(places) = packer.place(parts, &mut number, &mut full);
            members.insert(name, (places, None));
        });
        self.hashing.reuse(batch);
    }

    /// Adds a member of the parent by how it is trained.
    pub fn add_recipe(&mut self, name: &str, places: Vec<Place>, recipe: Recipe) {
        self.check_new(name);
        self.members.insert(name.to_owned(), (places, Some(recipe)));
    }

    /// Takes over the parent's members that were not added, and stores the map. Returns the number of members.
    pub fn finish(mut self) -> i64 {
        for batch in self.hashing.rest() {
            self.place(batch);
        }
        let writer = &self.writer;
        let Ok(()) = self.packer.finish::<Infallible>(&mut |block| {
            writer.borrow_mut().block(block);
            Ok(())
        });
        if let Some(parent) = self.parent.take() {
            for (member, name) in parent.members() {
                interrupt::check();
                if self.members.contains_key(&name) {
                    continue;
                }
                let recipe = parent.recipe(member).map(Recipe::inherited);
                if recipe.is_some() && self.storage != Storage::Provenance {
                    cannot_take_over(&parent.row.name, &name);
                }
                self.members.insert(name, (parent.places(member), recipe));
            }
        }
        if self.members.is_empty() {
            error::raise(
                PgSqlErrorCode::ERRCODE_NO_DATA_FOUND,
                "the query gives no member",
                "A set has at least one.",
                "Give a query with a row for each member.",
            );
        }
        let members = self.members.into_iter().map(|(name, (places, recipe))| (name, places, recipe)).collect();
        self.writer.into_inner().finish(members)
    }
}

/// Raises the ERROR for a member that is kept as a recipe of another set.
fn cannot_take_over(set: &str, member: &str) -> ! {
    error::raise(
        PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
        format!("member \"{member}\" cannot be taken over from model set \"{set}\""),
        "That set keeps how it is trained, not its parameters.",
        &format!("Give all members: 'SELECT * FROM recover_model_set(''{set}'')' has them."),
    )
}
