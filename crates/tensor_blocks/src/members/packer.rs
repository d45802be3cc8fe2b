//! Packing segments into blocks.

use super::{Place, SegmentHash, UNIT};
use std::collections::HashMap;

/// Most bytes of a block: a frame of the block cache.
pub const BLOCK_MAX: usize = super::SEGMENT_MAX;
/// Contents that are remembered: equal segments beyond so many are stored again.
const REMEMBERED: usize = 1 << 20;
/// Bytes of an entry of a block's index.
const ENTRY: usize = 2 + 32;

/// A block that is full, or the last one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedBlock {
    /// Its number.
    pub number: u32,
    /// The segments, one behind the other.
    pub bytes: Vec<u8>,
    /// Offset (in units, u16) and hash of each segment: what [`decode_index`] reads.
    pub index: Vec<u8>,
}

/// Offsets and hashes of a block's segments; none if the bytes are no index.
pub fn decode_index(index: &[u8]) -> Option<impl Iterator<Item = (u16, SegmentHash)>> {
    let (entries, rest) = index.as_chunks::<ENTRY>();
    let entry = |entry: &[u8; ENTRY]| {
        let mut hash = [0; 32];
        hash.copy_from_slice(&entry[2..]);
        (u16::from_le_bytes([entry[0], entry[1]]), hash)
    };
    rest.is_empty().then(|| entries.iter().map(entry))
}

/// Packs segments in the order in which they come.
#[derive(Debug, Default)]
pub struct Packer {
    known: HashMap<SegmentHash, Place>,
    open: Option<PackedBlock>,
}

impl Packer {
    /// Knows no content yet.
    pub fn new() -> Packer {
        Packer::default()
    }

    /// Tells that a content is stored already.
    pub fn know(&mut self, hash: SegmentHash, place: Place) {
        if self.known.len() < REMEMBERED {
            self.known.insert(hash, place);
        }
    }

    /// Places a member's segments, given as hash and bytes (a multiple of [`UNIT`], at most [`BLOCK_MAX`]). What is not known
    /// goes into one block if it fits there. `number` gives the number of a new block, `full` takes one that is full.
    ///
    /// # Errors
    /// Those of `number` and `full`.
    pub fn place<E>(
        &mut self,
        segments: &[(SegmentHash, &[u8])],
        number: &mut dyn FnMut() -> Result<u32, E>,
        full: &mut dyn FnMut(PackedBlock) -> Result<(), E>,
    ) -> Result<Vec<Place>, E> {
        let new: usize =
            segments.iter().filter(|(hash, _)| !self.known.contains_key(hash)).map(|(_, bytes)| bytes.len()).sum();
        let left = self.open.as_ref().map_or(0, |open| BLOCK_MAX - open.bytes.len());
        if new > left && new <= BLOCK_MAX {
            self.finish(full)?;
        }
        let mut places = Vec::with_capacity(segments.len());
        for (hash, bytes) in segments {
            debug_assert!(bytes.len() <= BLOCK_MAX && bytes.len().is_multiple_of(UNIT));
            if let Some(place) = self.known.get(hash) {
                places.push(*place);
                continue;
            }
            if self.open.as_ref().is_some_and(|open| open.bytes.len() + bytes.len() > BLOCK_MAX) {
                self.finish(full)?;
            }
            if self.open.is_none() {
                self.open =
                    Some(PackedBlock { number: number()?, bytes: Vec::with_capacity(BLOCK_MAX), index: Vec::new() });
            }
            let Some(open) = &mut self.open else { continue };
            let place = Place { block: open.number, at: (open.bytes.len() / UNIT) as u16 };
            open.bytes.extend_from_slice(bytes);
            open.index.extend_from_slice(&place.at.to_le_bytes());
            open.index.extend_from_slice(hash);
            places.push(place);
            self.know(*hash, place);
        }
        Ok(places)
    }

    /// Ends the block that is open.
    ///
    /// # Errors
    /// Those of `full`.
    pub fn finish<E>(&mut self, full: &mut dyn FnMut(PackedBlock) -> Result<(), E>) -> Result<(), E> {
        self.open.take().map_or(Ok(()), full)
    }
}

#[cfg(test)]
mod tests {
    use super::super::segment_hash;
    use super::*;
    use std::convert::Infallible;

    fn pack(members: &[Vec<Vec<u8>>], packer: &mut Packer) -> (Vec<Vec<Place>>, HashMap<u32, PackedBlock>) {
        let (mut next, mut blocks) = (0, HashMap::new());
        let mut number = || {
            next += 1;
            Ok::<u32, Infallible>(next)
        };
        let mut full = |block: PackedBlock| {
            blocks.insert(block.number, block);
            Ok(())
        };
        let mut places = Vec::new();
        for member in members {
            let segments: Vec<_> = member.iter().map(|bytes| (segment_hash(bytes), bytes.as_slice())).collect();
            let Ok(placed) = packer.place(&segments, &mut number, &mut full);
            places.push(placed);
        }
        let Ok(()) = packer.finish(&mut full);
        (places, blocks)
    }

    #[test]
    fn segments_are_found_where_they_were_placed_and_stored_once() {
        let member = |n: u8| vec![vec![n; 1152], vec![n.wrapping_mul(3); 9408], vec![200; 9408], vec![n; 196]];
        let members: Vec<_> = (0..40).map(member).collect();
        let (places, blocks) = pack(&members, &mut Packer::new());
        for (member, places) in members.iter().zip(&places) {
            for (bytes, place) in member.iter().zip(places) {
                let block = &blocks[&place.block];
                assert_eq!(&block.bytes[place.offset()..][..bytes.len()], bytes);
                let hash = decode_index(&block.index).unwrap().find(|(at, _)| *at == place.at).unwrap().1;
                assert_eq!(hash, segment_hash(bytes));
            }
        }
        let stored: usize = blocks.values().map(|block| block.bytes.len()).sum();
        // The third layer is one for all; 0 times 3 is 0, so the first member's segments are different lengths of zeros.
        assert_eq!(stored, 40 * (1152 + 9408 + 196) + 9408);
        assert!(blocks.values().all(|block| block.bytes.len() <= BLOCK_MAX));
        assert!(decode_index(&[0; 35]).is_none());
    }

    #[test]
    fn a_member_lies_in_one_block_and_what_is_known_is_not_stored() {
        let members: Vec<Vec<Vec<u8>>> = (0..7).map(|n| vec![vec![n; 10_000], vec![n + 100; 12_000]]).collect();
        let (places, _) = pack(&members, &mut Packer::new());
        assert!(places.iter().all(|places| places[0].block == places[1].block));
        let mut packer = Packer::new();
        for (member, places) in members.iter().zip(&places) {
            packer.know(segment_hash(&member[0]), places[0]);
        }
        let changed: Vec<Vec<Vec<u8>>> = members.iter().map(|m| vec![m[0].clone(), vec![7; 12_000]]).collect();
        let (new, blocks) = pack(&changed, &mut packer);
        assert!(new.iter().zip(&places).all(|(new, old)| new[0] == old[0]));
        assert_eq!(blocks.values().map(|block| block.bytes.len()).sum::<usize>(), 12_000);
    }
}
