//! Members of sets at work in this session: a set's map, the blocks of its members, and predictions with many of them.
//!
//! An architecture is compiled once ([`Shared`]), whatever number of its members predict: where its graph is a feed-forward net, rows run
//! straight on the parameters in the block cache. Members of other architectures have a plan each, as models have.
//!
//! A set never changes, so what is known of it stays right as long as its name means it to the snapshot.

use super::models::{Model, compile, kept, remember};
use crate::cache::{self, BlockKey, ModelSlot, Pin};
use crate::catalog::sets::{self, SetRow};
use crate::catalog::{self, BlockRef, OpenWeights};
use crate::pg::snapshot::SnapshotIdentity;
use crate::pg::{error, interrupt};
use inference::net::{FeedForward, Scratch};
use inference::onnx::{self, Merger, StoredRef};
use inference::signature::{Port, Signature};
use lru::LruCache;
use pgrx::pg_sys;
use pgrx::prelude::*;
use std::cell::RefCell;
use std::collections::HashMap;
use std::io::Write;
use std::num::NonZeroUsize;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;
use tensor_blocks::members::{Chunk, Place, Recipe, Segments};

/// Sets that a session remembers.
const SETS: NonZeroUsize = NonZeroUsize::new(16).expect("not zero");
/// Blocks that are pinned at a time.
const WINDOW: usize = 64;

/// What all members of a set have in common, made once.
pub struct Shared {
    /// Identity of the graph.
    pub graph_hash: [u8; 32],
    /// ONNX graph without its tensors.
    pub graph: Vec<u8>,
    /// As of a model version.
    pub signature: Signature,
    /// Its tensors, by ordinal.
    pub tensors: Vec<StoredRef>,
    /// How they are cut.
    pub segments: Segments,
    /// Whether rows may go together, as was proven of the first member that was saved.
    pub independent: bool,
    net: Option<FeedForward>,
    merger: Merger,
}

impl Shared {
    fn of(architecture: &sets::Architecture) -> Shared {
        let graph = catalog::graph(&architecture.graph_hash);
        if blake3::hash(&graph) != architecture.graph_hash {
            damaged("a graph has another hash than it is stored under");
        }
        Shared::of_graph(graph, architecture.graph_hash, &architecture.signature)
    }

    /// For a graph, as `onnx::strip` gives it, and the signature that is stored with it.
    pub fn of_graph(graph: Vec<u8>, graph_hash: [u8; 32], signature: &serde_json::Value) -> Shared {
        let independent =
            signature.pointer("/rows/verdict").and_then(|verdict| verdict.as_str()) == Some("independent");
        let signature = serde_json::from_value(signature.clone()).unwrap_or_else(|e| damaged(&e.to_string()));
        let tensors = onnx::stored_tensors(&graph).unwrap_or_else(|e| error::raise_model(e));
        let sizes = tensors.iter().map(|tensor| (tensor.bytes as usize, tensor.dims.len()));
        let segments = Segments::new(sizes).unwrap_or_else(|e| {
            error::raise(
                PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
                "the models are too large for a set",
                &format!("{e}."),
                "Load each as a model of its own.",
            )
        });
        let net = FeedForward::of_graph(&graph).filter(|net| net.tensors() == tensors.len());
        let merger = Merger::new(&graph).unwrap_or_else(|e| error::raise_model(e));
        Shared { graph_hash, graph, signature, tensors, segments, independent, net, merger }
    }

    /// The input of a feed-forward net.
    pub fn net_port(&self) -> Option<&Port> {
        self.net.as_ref().and(self.signature.inputs.first())
    }
}

/// A set in use.
pub struct OpenSet {
    /// Its row.
    pub row: SetRow,
    /// What its members have in common.
    pub shared: Rc<Shared>,
    starts: Vec<String>,
    chunks: RefCell<Vec<Option<Rc<NamedChunk>>>>,
    blocks: RefCell<HashMap<u32, BlockRef>>,
    content_hash: [u8; 32],
}

struct NamedChunk {
    chunk: Chunk,
    numbers: HashMap<String, u16>,
}

/// A member of a set: its chunk, and its number there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member {
    chunk: u32,
    number: u16,
}

type SetKey = (i64, pg_sys::Oid);

struct Named {
    seen_by: SnapshotIdentity,
    user: pg_sys::Oid,
    set: Rc<OpenSet>,
}

thread_local! {
    static OPEN: RefCell<LruCache<SetKey, Rc<OpenSet>>> = RefCell::new(LruCache::new(SETS));
    static SHARED: RefCell<LruCache<[u8; 32], Rc<Shared>>> = RefCell::new(LruCache::new(SETS));
    static NAMED: RefCell<LruCache<String, Named>> = RefCell::new(LruCache::new(SETS));
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::default());
}

fn damaged(what: &str) -> ! {
    error::raise(
        PgSqlErrorCode::ERRCODE_DATA_CORRUPTED,
        format!("the tables of pg_tessera are damaged: {what}"),
        "",
        "Restore them from a backup, or drop the set and save it again.",
    )
}

/// The set and the member that a name means, `None` for a name of another form or if there is no such set. ERROR if the role may not
/// use the set, it has no such member, or the member has to be trained first.
pub fn member_of(spec: &str) -> Option<(Rc<OpenSet>, Member)> {
    let (set, member) = sets::split_member(spec)?;
    let set = known_set(set).or_else(|| sets::look_up_set(set).map(|_| set_of(set)))?;
    let found = set.need(member);
    set.need_stored(found, member);
    Some((set, found))
}

/// The set of this name, if there is one that the role may use. Raises nothing for a name.
pub fn usable_set(name: &str) -> Option<Rc<OpenSet>> {
    known_set(name).or_else(|| sets::look_up_set(name).filter(|(_, usable)| *usable).map(|_| set_of(name)))
}

/// Whether a name means a member of a set with which the role can predict; `None` for a name of another form, or if there is no such
/// set. Raises nothing for a name.
pub fn is_usable_member(spec: &str) -> Option<bool> {
    let (set, member) = sets::split_member(spec)?;
    if known_set(set).is_none() && !sets::look_up_set(set)?.1 {
        return Some(false);
    }
    let set = set_of(set);
    Some(set.find(member).is_some_and(|member| set.recipe(member).is_none()))
}

fn known_set(name: &str) -> Option<Rc<OpenSet>> {
    let (seen_by, user) = (SnapshotIdentity::active(), crate::pg::identity::current_user());
    NAMED.with_borrow_mut(|named| {
        named.get(name).filter(|named| named.seen_by == seen_by && named.user == user).map(|named| named.set.clone())
    })
}

/// The set of this name, for the active snapshot and the current role. ERROR if there is none that the role may use.
pub fn set_of(name: &str) -> Rc<OpenSet> {
    if let Some(known) = known_set(name) {
        return known;
    }
    let (seen_by, user) = (SnapshotIdentity::active(), crate::pg::identity::current_user());
    let set = open(sets::resolve_set(name));
    NAMED.with_borrow_mut(|named| named.put(name.to_owned(), Named { seen_by, user, set: set.clone() }));
    set
}

/// A set in use, by its row.
pub fn open(row: SetRow) -> Rc<OpenSet> {
    let key = (row.id, row.domain());
    if let Some(known) = OPEN.with_borrow_mut(|open| open.get(&key).cloned()) {
        return known;
    }
    let architecture = sets::architecture(row.architecture);
    let shared = SHARED.with_borrow_mut(|shared| shared.get(&architecture.graph_hash).cloned()).unwrap_or_else(|| {
        let made = Rc::new(Shared::of(&architecture));
        SHARED.with_borrow_mut(|shared| shared.put(architecture.graph_hash, made.clone()));
        made
    });
    let starts = sets::chunk_starts(row.id);
    let set = Rc::new(OpenSet {
        shared,
        chunks: RefCell::new(vec![None; starts.len()]),
        starts,
        blocks: RefCell::default(),
        content_hash: sets::set_content(row.id, row.domain()),
        row,
    });
    OPEN.with_borrow_mut(|open| open.put(key, set.clone()));
    set
}

impl OpenSet {
    fn chunk(&self, number: usize) -> Rc<NamedChunk> {
        if let Some(Some(chunk)) = self.chunks.borrow().get(number) {
            return chunk.clone();
        }
        let chunk = sets::chunk(self.row.id, number, self.shared.segments.count());
        let numbers = chunk.names.iter().enumerate().map(|(at, name)| (name.clone(), at as u16)).collect();
        let chunk = Rc::new(NamedChunk { chunk, numbers });
        self.chunks.borrow_mut()[number] = Some(chunk.clone());
        chunk
    }

    /// The member of this name.
    pub fn find(&self, name: &str) -> Option<Member> {
        let chunk = self.starts.partition_point(|start| start.as_str() <= name).checked_sub(1)?;
        let number = *self.chunk(chunk).numbers.get(name)?;
        Some(Member { chunk: chunk as u32, number })
    }

    /// The member of this name. ERROR if the set does not have it.
    pub fn need(&self, name: &str) -> Member {
        self.find(name).unwrap_or_else(|| sets::no_such_member(&self.row.name, name))
    }

    /// All members with their names, ascending.
    pub fn members(&self) -> impl Iterator<Item = (Member, String)> + '_ {
        (0..self.starts.len()).flat_map(move |chunk| {
            let names = self.chunk(chunk).chunk.names.clone();
            let member = move |number: usize| Member { chunk: chunk as u32, number: number as u16 };
            names.into_iter().enumerate().map(move |(number, name)| (member(number), name))
        })
    }

    /// Where a member's segments lie. Those of one that is trained are of the member that it is trained from.
    pub fn places(&self, member: Member) -> Vec<Place> {
        let chunk = self.chunk(member.chunk as usize);
        chunk.chunk.places_of(usize::from(member.number), self.shared.segments.count()).to_vec()
    }

    /// How a member is trained; none if it is stored.
    pub fn recipe(&self, member: Member) -> Option<Recipe> {
        self.chunk(member.chunk as usize).chunk.recipe_of(usize::from(member.number)).copied()
    }

    /// What the set is known by in the block cache and in statistics.
    pub fn content_hash(&self) -> &[u8; 32] {
        &self.content_hash
    }

    fn slot(&self) -> ModelSlot {
        // SAFETY: set once, when the session begins.
        cache::model_slot(unsafe { pg_sys::MyDatabaseId }, &self.content_hash)
    }

    fn block(&self, weights: &OpenWeights, number: u32, anew: bool) -> BlockRef {
        if let Some(known) = self.blocks.borrow().get(&number).filter(|_| !anew) {
            return known.clone();
        }
        let block = catalog::set_block(weights, number).unwrap_or_else(|| damaged("a block of a set is missing"));
        self.blocks.borrow_mut().insert(number, block.clone());
        block
    }

    /// Reads a block into `out`, past the cache.
    pub fn read_block(&self, weights: &OpenWeights, number: u32, out: &mut Vec<u8>) {
        for anew in [false, true] {
            let block = self.block(weights, number, anew);
            out.clear();
            out.resize(block.bytes(), 0);
            if catalog::read_set_block(weights, number, &block, out).is_ok() {
                return;
            }
        }
        damaged("a block of a set cannot be read")
    }

    /// Pins all these blocks.
    fn pin(&self, numbers: &[u32]) -> Vec<Pin> {
        let weights = OpenWeights::of_sets();
        let blocks: Vec<BlockRef> = numbers.iter().map(|&number| self.block(&weights, number, false)).collect();
        let keys: Vec<BlockKey> =
            blocks.iter().map(|block| BlockKey { hash: block.hash, bytes: block.bytes() as u32 }).collect();
        for (key, block) in keys.iter().zip(&blocks) {
            if !cache::is_cached(key) {
                catalog::prefetch_block(&weights, block);
            }
        }
        let (slot, mut pins) = (self.slot(), Vec::with_capacity(numbers.len()));
        while pins.len() < numbers.len() {
            let done = pins.len();
            pins.extend(cache::pin(slot, &keys[done..], &mut |at, out| {
                let (number, block) = (numbers[done + at], &blocks[done + at]);
                if catalog::read_set_block(&weights, number, block, out).is_ok() {
                    return;
                }
                let now = self.block(&weights, number, true);
                if now.hash != block.hash || catalog::read_set_block(&weights, number, &now, out).is_err() {
                    damaged("a block of a set cannot be read")
                }
            }));
        }
        pins
    }

    /// Raises an ERROR if a member is not stored but has to be trained.
    pub fn need_stored(&self, member: Member, name: &str) {
        if self.recipe(member).is_some() {
            error::raise(
                PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                format!("member \"{name}\" of model set \"{}\" is not stored", self.row.name),
                "The set keeps how it is trained, not its parameters.",
                &format!(
                    "Save the set's members: save_model_set('...', 'SELECT * FROM recover_model_set(''{}'')'), and predict with that.",
                    self.row.name
                ),
            );
        }
    }

    /// Predicts row `n` of `x` with `members[n]`, by a feed-forward net; appends the outputs to `out` in the same order. Returns the
    /// length of one. None of the members has to be trained.
    pub fn predict(&self, members: &[Member], x: &[f32], out: &mut Vec<f32>) -> usize {
        let Some(net) = &self.shared.net else { damaged("an architecture is no feed-forward net") };
        let begin = Instant::now();
        let (k, n) = net.widths();
        assert_eq!(x.len(), members.len() * k, "values of the rows");
        let mut order: Vec<(Member, u32)> =
            members.iter().enumerate().map(|(at, member)| (*member, at as u32)).collect();
        order.sort_unstable();
        let start = out.len();
        out.resize(start + members.len() * n, 0.0);
        cache::note_run(self.slot());
        let (mut from, mut rows, mut results) = (0, Vec::new(), Vec::new());
        while from < order.len() {
            interrupt::check();
            // Members as long as their blocks fit the window, at least one.
            let (mut numbers, mut to) = (Vec::with_capacity(WINDOW + self.shared.segments.count()), from);
            while to < order.len() {
                let member = order[to].0;
                if to == from || member != order[to - 1].0 {
                    let before = numbers.len();
                    for place in self.places(member) {
                        if !numbers.contains(&place.block) {
                            numbers.push(place.block);
                        }
                    }
                    if to > from && numbers.len() > WINDOW {
                        numbers.truncate(before);
                        break;
                    }
                }
                to += 1;
            }
            numbers.sort_unstable();
            let pins = self.pin(&numbers);
            let mut at = from;
            while at < to {
                let member = order[at].0;
                let count = order[at..to].iter().take_while(|(other, _)| *other == member).count();
                rows.clear();
                for &(_, row) in &order[at..at + count] {
                    rows.extend_from_slice(&x[row as usize * k..][..k]);
                }
                results.resize(count * n, 0.0);
                self.run(net, member, &numbers, &pins, &rows, count, &mut results);
                for (&(_, row), result) in order[at..at + count].iter().zip(results.chunks_exact(n.max(1))) {
                    out[start + row as usize * n..][..n].copy_from_slice(result);
                }
                at += count;
            }
            from = to;
        }
        let nanoseconds = u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let rows = members.len() as u64;
        // SAFETY: set once, when the session begins.
        let database = unsafe { pg_sys::MyDatabaseId };
        cache::note(database, &self.content_hash, cache::Prediction { calls: rows, rows, nanoseconds, failed: false });
        n
    }

    #[allow(clippy::too_many_arguments)] // What a run consists of.
    fn run(
        &self,
        net: &FeedForward,
        member: Member,
        numbers: &[u32],
        pins: &[Pin],
        x: &[f32],
        m: usize,
        out: &mut [f32],
    ) {
        let (places, segments) = (self.places(member), &self.shared.segments);
        let segment = |number: usize| -> &[u8] {
            let place = places[number];
            let pin = numbers.binary_search(&place.block).ok().and_then(|at| pins.get(at));
            pin.and_then(|pin| pin.bytes().get(place.offset()..place.offset() + segments.size(number)))
                .unwrap_or_else(|| damaged("a segment lies outside its block"))
        };
        // What is cut is put together first.
        let mut whole: Vec<Vec<f32>> = Vec::new();
        for tensor in 0..segments.tensors() {
            if segments.pieces(tensor).len() > 1 {
                let mut bytes = Vec::new();
                segments.scatter(tensor, segment, &mut bytes);
                whole.push(bytes.as_chunks::<4>().0.iter().map(|value| f32::from_le_bytes(*value)).collect());
            }
        }
        let mut whole = whole.iter();
        let params: Vec<&[f32]> = (0..segments.tensors())
            .map(|tensor| match segments.pieces(tensor) {
                [] => &[][..],
                [piece] => floats(&segment(piece.segment)[piece.at..piece.at + piece.bytes]),
                _ => whole.next().map_or(&[][..], Vec::as_slice),
            })
            .collect();
        SCRATCH.with_borrow_mut(|scratch| net.run(&params, x, m, out, scratch));
    }

    /// Calls `f` with a function that hands on the bytes of a stored member's tensor piece by piece, read past the cache.
    fn with_tensors<T>(
        &self,
        member: Member,
        reader: &mut Reader,
        f: impl FnOnce(&dyn Fn(usize, &mut dyn FnMut(&[u8]))) -> T,
    ) -> T {
        let (places, segments) = (self.places(member), &self.shared.segments);
        let blocks: Vec<_> = places.iter().map(|place| reader.block(self, place.block)).collect();
        let segment = |number: usize| {
            let place = places[number];
            let bytes = blocks[number].get(place.offset()..place.offset() + segments.size(number));
            bytes.unwrap_or_else(|| damaged("a segment lies outside its block"))
        };
        f(&|tensor, give| {
            for piece in segments.pieces(tensor) {
                give(&segment(piece.segment)[piece.at..piece.at + piece.bytes]);
            }
        })
    }

    /// Bytes of a member's ONNX file.
    pub fn model_bytes(&self) -> usize {
        usize::try_from(self.shared.merger.model_bytes()).unwrap_or(usize::MAX)
    }

    /// Writes a stored member's ONNX file, read past the cache, to `out`, which has room for [`OpenSet::model_bytes`].
    pub fn write(&self, member: Member, reader: &mut Reader, mut out: &mut [u8]) {
        self.with_tensors(member, reader, |tensor| {
            let mut give = |ordinal: u32, out: &mut dyn Write| {
                let (mut count, mut written) = (0, 0);
                tensor(ordinal as usize, &mut |bytes| {
                    count += bytes.len() as u64;
                    written += u64::from(out.write_all(bytes).is_ok()) * bytes.len() as u64;
                });
                // What did not fit makes the tensor too short.
                Ok(count.min(written))
            };
            self.shared.merger.write(&mut give, &mut out).unwrap_or_else(|e| error::raise_model(e));
        });
    }

    /// A plan for a member, kept as plans of models are.
    pub fn model(&self, member: Member) -> Arc<Model> {
        let mut hasher = blake3::Hasher::new_derive_key("pg_tessera member of a set v1");
        hasher.update(&self.shared.graph_hash).update(&self.row.domain().to_u32().to_le_bytes());
        for place in self.places(member) {
            hasher.update(&place.block.to_le_bytes()).update(&place.at.to_le_bytes());
        }
        let content = *hasher.finalize().as_bytes();
        kept(&content).unwrap_or_else(|| {
            self.with_tensors(member, &mut Reader::default(), |tensor| {
                let mut fetch = |ordinal: u32, out: &mut Vec<u8>| {
                    tensor(ordinal as usize, &mut |bytes| out.extend_from_slice(bytes));
                    Ok(())
                };
                remember(content, compile(&self.shared.graph, &mut fetch, &[]))
            })
        })
    }

    /// One row of a feed-forward net's, or several.
    pub fn predict_one(&self, member: Member, x: &[f32]) -> Vec<f32> {
        let Some(net) = &self.shared.net else { damaged("an architecture is no feed-forward net") };
        let rows = x.len().checked_div(net.widths().0).unwrap_or(0);
        let mut out = Vec::new();
        self.predict(&vec![member; rows], x, &mut out);
        out
    }
}

/// The float32 values of bytes that are aligned, as segments and tensors in them are.
fn floats(bytes: &[u8]) -> &[f32] {
    bytemuck::try_cast_slice(bytes).unwrap_or_else(|_| damaged("a tensor does not begin at a multiple of its elements"))
}

/// Blocks that were read lately.
pub struct Reader {
    recent: LruCache<u32, Rc<Vec<u8>>>,
}

impl Default for Reader {
    fn default() -> Reader {
        Reader { recent: LruCache::new(NonZeroUsize::new(WINDOW).expect("not zero")) }
    }
}

impl Reader {
    fn block(&mut self, set: &OpenSet, number: u32) -> Rc<Vec<u8>> {
        if let Some(known) = self.recent.get(&number) {
            return known.clone();
        }
        interrupt::check();
        // The memory of a block that nobody reads any more is used again.
        let mut bytes = match self.recent.len() == self.recent.cap().get() {
            true => self.recent.pop_lru().and_then(|(_, bytes)| Rc::try_unwrap(bytes).ok()).unwrap_or_default(),
            false => Vec::new(),
        };
        set.read_block(&OpenWeights::of_sets(), number, &mut bytes);
        let bytes = Rc::new(bytes);
        self.recent.put(number, bytes.clone());
        bytes
    }
}
