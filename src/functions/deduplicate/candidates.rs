//! Which blocks of a model might be others: near duplicates among the blocks of all models that the caller may use.
//!
//! Duplicate detection of netsDB (arXiv 2201.10442): locality-sensitive hashes give candidates, their content says how much alike they
//! are, and those that matter least to the model come first.
//!
//! Invariants:
//! - of a block there are kept a signature and where it is stored, and never its content, which is read again to compare;
//! - a block that takes another one's place keeps its own, and is not merged itself;
//! - content of models that the caller may not use is not read. That they have a block too is known by its hash.

use crate::catalog::{self, BlockRef, Merge, OpenWeights, TensorRow, VersionRow};
use crate::pg::progress::{self, Field};
use crate::pg::{error, interrupt, memory};
use inference::plan::Plan;
use pgrx::prelude::*;
use std::collections::{HashMap, HashSet};
use tensor_blocks::near::{Importance, NearIndex, NearOptions, Signature, elements_f32, importance, share_within};
use tensor_blocks::{DType, Tile, Tiling};

/// Most candidates that a block is compared with.
const COMPARED: usize = 16;

/// Blocks that are indexed between two looks at their memory.
const LOOK: usize = 256;

/// Dtype and shape of a block: only equal ones are compared.
type Kind = (DType, [u32; 2]);

/// What there is to merge.
#[derive(Default)]
pub struct Found {
    /// The least important first, each with a block that may take its place.
    pub merges: Vec<Merge>,
    /// Bytes in the block store of the blocks that these replace, in the same order.
    pub bytes: Vec<u64>,
    /// Blocks of the model.
    pub blocks: u64,
    /// Of these, blocks that are shared with others already.
    pub shared: u64,
    /// Of these, blocks of tensors that cannot be on trial: smaller ones, and those whose operators do not compute on blocks.
    pub skipped: u64,
}

/// A tensor of any model.
struct Tensor {
    row: TensorRow,
    tiling: Tiling,
}

impl Tensor {
    fn tile(&self, number: u32) -> Option<Tile> {
        let cols = self.tiling.block_cols().max(1);
        self.tiling.tile(number / cols, number % cols)
    }
}

/// A block with content that a caller may see.
struct Target {
    /// Its place in the list of tensors.
    tensor: usize,
    number: u32,
    block: BlockRef,
}

/// A block of the model that nobody else has.
struct Own {
    /// Its place in the list of targets.
    target: usize,
    ordinal: u32,
    importance: f64,
    signature: Signature,
}

/// How often the blocks of the model's tensors occur in all models, and at which ordinal.
type Uses = HashMap<[u8; 32], (u32, u64)>;

/// Looks for near duplicates of the blocks that `plan` keeps out of itself.
///
/// Errors: `program_limit_exceeded` if the index does not fit in maintenance_work_mem; those of damaged tables.
pub fn find(base: &VersionRow, plan: &Plan, options: &NearOptions, how: Importance) -> Found {
    let weights = OpenWeights::open();
    let on_trial: HashSet<u32> = plan.stored_tensors().iter().map(|tensor| tensor.ordinal).collect();
    let mut found = Found::default();
    let (mut uses, mut kinds) = (Uses::new(), HashSet::new());
    for (ordinal, row) in (0..).zip(catalog::tensors(base.id)) {
        let tiling = row.tiling();
        found.blocks += tiling.tile_count();
        if !on_trial.contains(&ordinal) || !elements_f32(row.dtype, &[], &mut Vec::new()) {
            found.skipped += tiling.tile_count();
            continue;
        }
        kinds.extend(tiling.tiles().map(|tile| (row.dtype, tile.shape())));
        for block in catalog::block_refs(&weights, &row, &tiling) {
            uses.insert(block.hash, (ordinal, 0));
        }
    }
    let (tensors, targets) = targets(base, &weights, &kinds, &mut uses);
    let (indexes, mut own) = index(&weights, &tensors, &targets, &uses, options, how);
    let movable: usize = own.len();
    found.shared = found.blocks - found.skipped - movable as u64;
    own.sort_by(|a, b| a.importance.total_cmp(&b.importance).then(a.target.cmp(&b.target)));
    compare(&weights, &tensors, &targets, &indexes, &own, options, &mut found);
    found
}

/// The blocks of these kinds, each once, of all models that the caller may use. Counts in `uses` how often blocks occur, in
/// other models too.
fn targets(
    base: &VersionRow,
    weights: &OpenWeights,
    kinds: &HashSet<Kind>,
    uses: &mut Uses,
) -> (Vec<Tensor>, Vec<Target>) {
    let (mut tensors, mut targets) = (Vec::new(), Vec::new());
    let mut seen = HashSet::new();
    for (version, usable) in catalog::versions() {
        for row in catalog::tensors(version) {
            interrupt::check();
            let tiling = row.tiling();
            if !tiling.tiles().any(|tile| kinds.contains(&(row.dtype, tile.shape()))) {
                continue;
            }
            let blocks = catalog::block_refs(weights, &row, &tiling);
            tensors.push(Tensor { row, tiling });
            let tensor = tensors.len() - 1;
            for (number, block) in (0..).zip(blocks) {
                if let Some((_, count)) = uses.get_mut(&block.hash) {
                    *count += 1;
                }
                let tile = tensors[tensor].tile(number);
                let kind = tile.map(|tile| (tensors[tensor].row.dtype, tile.shape()));
                let readable = usable || version == base.id;
                let wanted =
                    readable && block.stored_bytes().is_some() && kind.is_some_and(|kind| kinds.contains(&kind));
                if wanted && seen.insert(block.hash) {
                    targets.push(Target { tensor, number, block });
                }
            }
        }
    }
    (tensors, targets)
}

/// Reads every target once: an index of each kind, and those that are the model's alone.
fn index(
    weights: &OpenWeights,
    tensors: &[Tensor],
    targets: &[Target],
    uses: &Uses,
    options: &NearOptions,
    how: Importance,
) -> (HashMap<Kind, NearIndex>, Vec<Own>) {
    progress::set(Field::AllBlocks, targets.len() as i64);
    let limit = memory::of_maintenance();
    let (mut indexes, mut own) = (HashMap::new(), Vec::new());
    let mut reader = Reader::default();
    for (at, target) in targets.iter().enumerate() {
        interrupt::check();
        let tensor = &tensors[target.tensor];
        let Some(tile) = tensor.tile(target.number) else { continue };
        let Some(values) = reader.read(weights, tensor, tile, &target.block) else { continue };
        let kind = (tensor.row.dtype, tile.shape());
        let index = indexes.entry(kind).or_insert_with(|| {
            NearIndex::new(values.len(), options).unwrap_or_else(|e| {
                error::raise(
                    PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
                    e.to_string(),
                    "",
                    "Leave span, or radius and tolerance, out for their defaults.",
                )
            })
        });
        let signature = index.signature(values);
        index.insert(at as u64, &signature);
        if let Some(&(ordinal, 1)) = uses.get(&target.block.hash) {
            own.push(Own { target: at, ordinal, importance: importance(values, how), signature });
        }
        progress::add(Field::Blocks, 1);
        if at % LOOK == 0 {
            let signatures = own.len() * (size_of::<Own>() + 4 * options.bands as usize);
            let held = size_of_val(targets) + signatures;
            let held = held + indexes.values().map(NearIndex::memory_bytes).sum::<usize>();
            if held > limit {
                error::raise(
                    PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
                    "the index of blocks does not fit in maintenance_work_mem",
                    &format!("{at} of {} blocks take {held} of {limit} bytes.", targets.len()),
                    "Raise maintenance_work_mem, or ask for fewer bands.",
                );
            }
        }
    }
    (indexes, own)
}

/// Chooses for each of the model's own blocks the one that is most like it.
fn compare(
    weights: &OpenWeights,
    tensors: &[Tensor],
    targets: &[Target],
    indexes: &HashMap<Kind, NearIndex>,
    own: &[Own],
    options: &NearOptions,
    found: &mut Found,
) {
    progress::set(Field::Phase, 3);
    progress::set(Field::Blocks, 0);
    progress::set(Field::AllBlocks, own.len() as i64);
    // Targets that are merged, and targets that others are merged with.
    let (mut gone, mut kept) = (HashSet::new(), HashSet::new());
    let (mut reader, mut other) = (Reader::default(), Reader::default());
    for block in own {
        interrupt::check();
        progress::add(Field::Blocks, 1);
        if kept.contains(&block.target) {
            continue;
        }
        let target = &targets[block.target];
        let tensor = &tensors[target.tensor];
        let Some(tile) = tensor.tile(target.number) else { continue };
        let Some(index) = indexes.get(&(tensor.row.dtype, tile.shape())) else { continue };
        let candidates: Vec<usize> = index
            .candidates(&block.signature, COMPARED + 1)
            .into_iter()
            .map(|candidate| candidate.id as usize)
            .filter(|id| *id != block.target && !gone.contains(id))
            .collect();
        if candidates.is_empty() {
            continue;
        }
        let Some(values) = reader.read(weights, tensor, tile, &target.block) else { continue };
        let mut best: Option<(usize, f64)> = None;
        for id in candidates {
            interrupt::check();
            let (candidate, of) = (&targets[id], &tensors[targets[id].tensor]);
            let Some(tile) = of.tile(candidate.number) else { continue };
            let Some(others) = other.read(weights, of, tile, &candidate.block) else { continue };
            let share = share_within(values, others, options.tolerance);
            if share >= options.share && best.is_none_or(|(_, most)| share > most) {
                best = Some((id, share));
            }
        }
        if let Some((id, _)) = best {
            gone.insert(block.target);
            kept.insert(id);
            found.merges.push(Merge {
                ordinal: block.ordinal,
                tile,
                number: target.number,
                to: targets[id].block.clone(),
            });
            found.bytes.push(target.block.stored_bytes().unwrap_or_default());
        }
    }
}

/// Buffers for the content of a block.
#[derive(Default)]
struct Reader {
    bytes: Vec<u8>,
    values: Vec<f32>,
}

impl Reader {
    /// The values of a block; none if it is no longer where it was.
    fn read(&mut self, weights: &OpenWeights, tensor: &Tensor, tile: Tile, block: &BlockRef) -> Option<&[f32]> {
        self.bytes.clear();
        self.bytes.resize(tensor.tiling.tile_bytes(tile), 0);
        catalog::read_block(weights, &tensor.row, tile, block, &mut self.bytes).ok()?;
        self.values.clear();
        elements_f32(tensor.row.dtype, &self.bytes, &mut self.values).then_some(&self.values)
    }
}
