//! Where predictions get a model's blocks: the block cache, and behind it the tables.
//!
//! A session keeps, with each plan, where the blocks of its model are stored: the tensors' rows and the blocks' hashes, read
//! once. Hashes identify content, so what is found in the cache is right whatever has become of the rows; a place that is out
//! of date is noticed when the block is read from there, and the places are read anew.

use crate::cache::{self, BlockKey, ModelSlot};
use crate::catalog::{self, BlockRef, OpenWeights, TensorRow};
use crate::pg::temp_file::TempFile;
use crate::pg::{error, progress};
use inference::error::ModelError;
use inference::plan::Plan;
use inference::weights::{BlockSource, Frame, SpillFile, WINDOW};
use pgrx::pg_sys;
use pgrx::prelude::*;
use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tensor_blocks::Tiling;

/// Blocks that are read in place of the stored ones: by the tensor's ordinal and the block's number.
pub type Replaced = HashMap<(u32, u32), BlockRef>;

/// One tensor's blocks.
struct TensorBlocks {
    row: TensorRow,
    tiling: Tiling,
    blocks: Vec<BlockRef>,
}

#[derive(Default)]
struct Known {
    rows: Vec<TensorRow>,
    tensors: Vec<Option<Arc<TensorBlocks>>>,
    /// Of a model on trial.
    replaced: Option<Arc<Replaced>>,
}

/// The blocks of one model version. Called on the backend's main thread only.
pub struct ModelBlocks {
    content_hash: [u8; 32],
    /// `tessera.model_version.id`: of a version with this content that the active snapshot sees; 0 if not known yet.
    version: AtomicI64,
    known: Mutex<Known>,
}

impl ModelBlocks {
    /// Nothing is read yet.
    pub fn new(content_hash: [u8; 32]) -> ModelBlocks {
        ModelBlocks { content_hash, version: AtomicI64::new(0), known: Mutex::default() }
    }

    /// Those of a version whose tensors are `rows`.
    pub fn of_version(content_hash: [u8; 32], version: i64, rows: Vec<TensorRow>) -> ModelBlocks {
        let known = Known { rows, ..Known::default() };
        ModelBlocks { content_hash, version: AtomicI64::new(version), known: Mutex::new(known) }
    }

    /// Says which version the model has for the active snapshot. False if that one is cut into other blocks than the plan
    /// was made for: equal content can be stored anew with blocks of another size.
    pub fn serves(&self, version: i64, plan: &Plan) -> bool {
        if self.version.load(Ordering::Relaxed) == version {
            return true;
        }
        let rows = catalog::tensors(version);
        let same = plan
            .stored_tensors()
            .iter()
            .all(|tensor| rows.get(tensor.ordinal as usize).is_some_and(|row| row.tiling() == tensor.tiling));
        if same {
            // What is known of the blocks stays: equal content in equal blocks has equal hashes.
            self.version.store(version, Ordering::Relaxed);
            self.lock().rows = rows;
        }
        same
    }

    /// Puts the model on trial: runs read these blocks in place of those that are stored.
    pub fn replace(&self, replaced: Replaced) {
        self.lock().replaced = Some(Arc::new(replaced));
    }

    /// The model's content hash.
    pub fn content_hash(&self) -> &[u8; 32] {
        &self.content_hash
    }

    fn slot(&self) -> ModelSlot {
        // SAFETY: set once, when the session begins.
        cache::model_slot(unsafe { pg_sys::MyDatabaseId }, &self.content_hash)
    }

    /// Counts a run of the model.
    pub fn note_run(&self) {
        cache::note_run(self.slot());
    }

    /// Counts a prediction for the statistics.
    pub fn note_prediction(&self, prediction: cache::Prediction) {
        // SAFETY: set once, when the session begins.
        cache::note(unsafe { pg_sys::MyDatabaseId }, &self.content_hash, prediction);
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The blocks of a tensor, read from the tables if they are not known, or not to be trusted. The tensors' own rows never
    /// change, so those of this version are read once: what is read anew is in tables that [`OpenWeights`] has locked.
    fn tensor(&self, weights: &OpenWeights, ordinal: u32, anew: bool) -> Arc<TensorBlocks> {
        let place = ordinal as usize;
        let row = {
            let known = self.lock();
            match known.tensors.get(place) {
                Some(Some(tensor)) if !anew => return tensor.clone(),
                _ => known.rows.get(place).cloned(),
            }
        };
        let row = row.unwrap_or_else(|| {
            let rows = catalog::tensors(self.version.load(Ordering::Relaxed));
            let Some(row) = rows.get(place).cloned() else { missing(ordinal) };
            self.lock().rows = rows;
            row
        });
        let tiling = row.tiling();
        let blocks = catalog::block_refs(weights, &row, &tiling);
        let tensor = Arc::new(TensorBlocks { row, tiling, blocks });
        let mut known = self.lock();
        if known.tensors.len() <= place {
            known.tensors.resize_with(place + 1, || None);
        }
        known.tensors[place] = Some(tensor.clone());
        tensor
    }

    /// Loads the blocks of these tensors into the cache, as far as there is room. Returns how many are in frames now.
    pub fn warm(&self, ordinals: impl Iterator<Item = u32>) -> u64 {
        let mut warm = 0;
        for ordinal in ordinals {
            let count = self.tensor(&OpenWeights::open(), ordinal, false).blocks.len() as u32;
            let all: Vec<u32> = (0..count).collect();
            let mut done = 0;
            while done < all.len() {
                crate::pg::interrupt::check();
                let pins = self.pins(ordinal, &all[done..]);
                warm += pins.iter().filter(|pin| pin.is_cached()).count() as u64;
                done += pins.len();
            }
        }
        warm
    }

    /// Pins the leading blocks of `wanted`, and has the pages of those that come next read ahead.
    fn pins(&self, ordinal: u32, wanted: &[u32]) -> Vec<cache::Pin> {
        let (wanted, next) = wanted.split_at(wanted.len().min(WINDOW));
        let weights = OpenWeights::open();
        let tensor = self.tensor(&weights, ordinal, false);
        let replaced = self.lock().replaced.clone().unwrap_or_default();
        let replacement = |number: u32| replaced.get(&(ordinal, number));
        // Where the blocks are now, if they have moved since.
        let mut moved: Option<Arc<TensorBlocks>> = None;
        let key = |&number: &u32| {
            let tile = tensor.tile(number);
            let Some(stored) = tensor.blocks.get(number as usize) else { missing(ordinal) };
            let block = replacement(number).unwrap_or(stored);
            BlockKey { hash: block.hash, bytes: tensor.tiling.tile_bytes(tile) as u32 }
        };
        let keys: Vec<BlockKey> = wanted.iter().map(key).collect();
        for number in next.iter().take(WINDOW) {
            if !cache::is_cached(&key(number)) {
                let stored = &tensor.blocks[*number as usize];
                catalog::prefetch_block(&weights, replacement(*number).unwrap_or(stored));
            }
        }
        cache::pin(self.slot(), &keys, &mut |at, out| {
            let number = wanted[at];
            if let Some(block) = replacement(number) {
                // Its row is visible to the snapshot under which it was found, and cannot go before that.
                if catalog::read_block(&weights, &tensor.row, tensor.tile(number), block, out).is_err() {
                    missing(ordinal)
                }
                return;
            }
            if moved.as_ref().unwrap_or(&tensor).read(&weights, number, out) {
                return;
            }
            let now = moved.insert(self.tensor(&weights, ordinal, true));
            let same = now.blocks.get(number as usize).is_some_and(|block| block.hash == keys[at].hash);
            if !same || !now.read(&weights, number, out) {
                missing(ordinal)
            }
        })
    }
}

impl TensorBlocks {
    fn tile(&self, number: u32) -> tensor_blocks::Tile {
        let cols = self.tiling.block_cols().max(1);
        self.tiling.tile(number / cols, number % cols).unwrap_or_else(|| missing(number))
    }

    /// False if the block is not where it was.
    fn read(&self, weights: &OpenWeights, number: u32, out: &mut [u8]) -> bool {
        catalog::read_block(weights, &self.row, self.tile(number), &self.blocks[number as usize], out).is_ok()
    }
}

fn missing(tensor: u32) -> ! {
    error::raise(
        PgSqlErrorCode::ERRCODE_DATA_CORRUPTED,
        format!("a block of tensor {tensor} of the model is not stored"),
        "",
        "Restore the tables of pg_tessera from a backup, or drop the model and load it again.",
    )
}

impl BlockSource for ModelBlocks {
    fn pin(&self, tensor: u32, wanted: &[u32]) -> Result<Vec<Box<dyn Frame>>, ModelError> {
        let pins = self.pins(tensor, wanted);
        // A trial counts blocks of its own.
        if self.lock().replaced.is_none() {
            progress::add(progress::Field::Blocks, pins.len() as u64);
        }
        Ok(pins.into_iter().map(|pin| Box::new(pin) as Box<dyn Frame>).collect())
    }

    fn operator_memory(&self) -> u64 {
        super::settings::operator_memory_bytes()
    }

    fn spill_file(&self) -> Result<Option<Box<dyn SpillFile>>, ModelError> {
        Ok(Some(Box::new(TempFile::new())))
    }
}
