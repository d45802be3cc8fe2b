//! The index: which blocks have bands in common with one.
//!
//! Responsible for: buckets of each band, in memory.
//!
//! ```text
//!  band 0:  slots  [ . 7 . . 3 ]     the latest entry whose band falls into the slot, plus 1
//!           bands  [ h0 h1 h2 .. ]   by entry
//!           next   [ 0  0  1  .. ]   by entry: the one before it in its slot, plus 1
//! ```
//!
//! A slot's chain has entries of all bands that fall into it, so the band is compared on the way. There are at least as
//! many slots as entries. Bands double their slots one after the other, so that no insertion waits for all of them.

use super::signature::{Hasher, NO_BUCKET};
use super::{NearError, NearOptions, Signature};
use std::cmp::Reverse;

/// Entries of one band that a question looks at, the latest first: a bucket that very many blocks share, like that
/// of zeros, must not make each question as long as the index.
const CHAIN_LIMIT: usize = 4096;
/// Slots of an empty index.
const FEWEST_SLOTS: usize = 64;

/// A block that has bands in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// What it was inserted as.
    pub id: u64,
    /// How many bands are in common, at least 1.
    pub bands: u32,
}

#[derive(Clone, Debug, Default)]
struct Band {
    slots: Vec<u32>,
    bands: Vec<u32>,
    next: Vec<u32>,
}

impl Band {
    fn push(&mut self, band: u32) {
        self.bands.push(band);
        self.next.push(0);
        self.link(self.bands.len() - 1);
    }

    fn link(&mut self, entry: usize) {
        if self.bands[entry] == NO_BUCKET {
            return;
        }
        let slot = self.bands[entry] as usize & (self.slots.len() - 1);
        self.next[entry] = self.slots[slot];
        self.slots[slot] = entry as u32 + 1;
    }

    fn resize(&mut self, slots: usize) {
        // Here, and not for all bands at one entry.
        self.bands.reserve_exact(slots - self.bands.len());
        self.next.reserve_exact(slots - self.next.len());
        self.slots = vec![0; slots];
        (0..self.bands.len()).for_each(|entry| self.link(entry));
    }
}

/// An index of blocks of one element type and shape. It keeps signatures and ids, not the blocks.
#[derive(Clone, Debug)]
pub struct NearIndex {
    hasher: Hasher,
    ids: Vec<u64>,
    bands: Vec<Band>,
}

impl NearIndex {
    /// An empty index of blocks of `elements` elements.
    pub fn new(elements: usize, options: &NearOptions) -> Result<NearIndex, NearError> {
        let hasher = Hasher::new(elements, options)?;
        let mut bands = vec![Band::default(); options.bands as usize];
        bands.iter_mut().for_each(|band| band.resize(FEWEST_SLOTS));
        Ok(NearIndex { hasher, ids: Vec::new(), bands })
    }

    /// The signature of a block, which needs no other block and can be kept; the same for indexes with the same
    /// elements and options. Bands with a NaN, an infinity or an overflow are like nothing, and so is a block with
    /// another number of values.
    pub fn signature(&self, values: &[f32]) -> Signature {
        self.hasher.signature(values)
    }

    /// Adds a block. An id that comes twice is two blocks. Constant time on average; the longest pause, when a band
    /// doubles, is a few milliseconds at 100,000 blocks and tens at a million.
    ///
    /// More blocks than 32 bits can count are not taken.
    pub fn insert(&mut self, id: u64, signature: &Signature) {
        if self.ids.len() >= u32::MAX as usize {
            return;
        }
        self.ids.push(id);
        let count = self.bands.len();
        for (at, band) in self.bands.iter_mut().enumerate() {
            // The first band has room for half as many entries as slots, the last one for all.
            let slots = band.slots.len();
            if self.ids.len() > slots / 2 + slots / 2 * (at + 1) / count {
                band.resize(2 * slots);
            }
            // A signature of another index may be shorter.
            band.push(signature.0.get(at).copied().unwrap_or(NO_BUCKET));
        }
    }

    /// The `most` blocks with most bands in common, descending; ties by id, ascending. Of a bucket with thousands of
    /// blocks only the latest are looked at.
    pub fn candidates(&self, signature: &Signature, most: usize) -> Vec<Candidate> {
        let mut entries = Vec::new();
        for (band, &value) in self.bands.iter().zip(&signature.0) {
            if value == NO_BUCKET {
                continue;
            }
            let mut at = band.slots[value as usize & (band.slots.len() - 1)];
            for _ in 0..CHAIN_LIMIT {
                let Some(entry) = (at as usize).checked_sub(1) else { break };
                if band.bands[entry] == value {
                    entries.push(entry as u32);
                }
                at = band.next[entry];
            }
        }
        entries.sort_unstable();
        let mut found: Vec<Candidate> = entries
            .chunk_by(|left, right| left == right)
            .map(|same| Candidate { id: self.ids[same[0] as usize], bands: same.len() as u32 })
            .collect();
        let key = |candidate: &Candidate| (Reverse(candidate.bands), candidate.id);
        if most < found.len() {
            found.select_nth_unstable_by_key(most, key);
            found.truncate(most);
        }
        found.sort_unstable_by_key(key);
        found
    }

    /// Bytes on the heap.
    pub fn memory_bytes(&self) -> usize {
        let words = |band: &Band| band.slots.capacity() + band.bands.capacity() + band.next.capacity();
        self.hasher.memory_bytes()
            + self.ids.capacity() * size_of::<u64>()
            + self.bands.capacity() * size_of::<Band>()
            + self.bands.iter().map(words).sum::<usize>() * size_of::<u32>()
    }

    /// Blocks in it.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }
}
