//! Models of one architecture by the thousand: how their parameters are cut, packed into blocks, and found again.
//!
//! Responsible for: cutting a model's tensors into [`Segments`]; the map from members to where their segments lie
//! ([`Chunk`]); packing segments into blocks, each content once ([`Packer`]).
//!
//! ```text
//!   member "0042":  | w0 b0 | w1 b1 | w2 b2 | w3 b3 |       segments follow the layers, at most 64 kB each
//!                       |       |       |       |
//!   chunk (512 members): block, offset of each segment     6 bytes a segment
//!                       v       v       v       v
//!   block 7: | 0041 | 0042 whole ............... |         a member that is new lies in one piece, if it fits
//!   block 9: | 0007's layer 3 | 0042's layer 3 |           what was changed later lies elsewhere
//! ```
//!
//! This is the storage of sets after *Efficient Multi-Model Management* (Strassenburg et al., EDBT 2023): its baseline and its
//! update approach, in which a derived set stores only the layers whose hashes differ. Here a set's map is complete, so that
//! reading a member costs the same in each generation.
//!
//! Invariants:
//! - a segment has one place; equal hashes mean equal segments, nothing is compared element by element;
//! - offsets are multiples of [`UNIT`], and tensors begin at multiples of it within a segment;
//! - decoding trusts nothing: bytes that were damaged are an error.

mod chunk;
mod packer;
mod segments;

pub use chunk::{CHUNK_MEMBERS, Chunk, ChunkError, Recipe};
pub use packer::{BLOCK_MAX, PackedBlock, Packer, block_capacity, decode_index};
pub use segments::{Piece, SEGMENT_MAX, Segments, SegmentsError};

/// Bytes that offsets count.
pub const UNIT: usize = 4;

/// Identity of a segment's bytes.
pub type SegmentHash = [u8; 32];

/// Where a segment lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// Number of the block.
    pub block: u32,
    /// Offset in the block's elements, in units of [`UNIT`] bytes.
    pub at: u16,
}

impl Place {
    /// Bytes of the stored form.
    pub const BYTES: usize = 6;

    /// Offset in bytes.
    pub fn offset(self) -> usize {
        usize::from(self.at) * UNIT
    }

    /// The blocks of a chunk's stored places; none if they are damaged.
    pub fn blocks_of(stored: &[u8]) -> Option<impl Iterator<Item = u32>> {
        let (places, rest) = chunk::Part::Places.open(stored).ok()?.as_chunks::<{ Place::BYTES }>();
        rest.is_empty().then(|| places.iter().map(|place| Place::read(place).block))
    }

    fn write(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.block.to_le_bytes());
        out.extend_from_slice(&self.at.to_le_bytes());
    }

    fn read(bytes: &[u8; Place::BYTES]) -> Place {
        let [a, b, c, d, e, f] = *bytes;
        Place { block: u32::from_le_bytes([a, b, c, d]), at: u16::from_le_bytes([e, f]) }
    }
}

/// BLAKE3 of a segment's bytes, in a domain of its own.
pub fn segment_hash(bytes: &[u8]) -> SegmentHash {
    const CONTEXT: &str = "pg_tessera segment of a model set v1";
    *blake3::Hasher::new_derive_key(CONTEXT).update(bytes).finalize().as_bytes()
}
