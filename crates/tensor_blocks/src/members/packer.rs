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
    /// Room for the packer's owner, and the segments, one behind the other.
    pub bytes: Vec<u8>,
    /// Bytes of that room.
    pub room: usize,
    /// Offset (in units, u16) and hash of each segment: what [`decode_index`] reads.
    pub index: Vec<u8>,
}

impl PackedBlock {
    /// The segments, one behind the other.
    pub fn elements(&self) -> &[u8] {
        &self.bytes[self.room..]
    }
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
#[derive(Debug)]
pub struct Packer {
    capacity: usize,
    room: usize,
    known: HashMap<SegmentHash, Place>,
    open: Option<PackedBlock>,
}

/// Bytes of a block for members of `member` bytes, at most [`BLOCK_MAX`]: as many whole members as fill a tensor page of `page` bytes
/// best, since a block of `beside` bytes more than its elements does not lie across two of them.
pub fn block_capacity(member: usize, page: usize, beside: usize) -> usize {
    // Of what is as good as the best, the largest.
    const AS_GOOD: usize = 200;
    let fill = |bytes: usize| page / (bytes + beside) * bytes;
    let sizes = (1..=BLOCK_MAX.checked_div(member).unwrap_or(0)).map(|count| count * member);
    let best = sizes.clone().map(fill).max().unwrap_or(0);
    sizes.rev().find(|&bytes| fill(bytes) + page / AS_GOOD >= best).unwrap_or(BLOCK_MAX)
}

impl Packer {
    /// For blocks of at most `capacity` bytes, which are no more than [`BLOCK_MAX`]. A larger segment has a block of its own. Before
    /// the bytes of each block are `room` zeros, for what its owner stores with them.
    pub fn new(capacity: usize, room: usize) -> Packer {
        Packer { capacity: capacity.min(BLOCK_MAX), room, known: HashMap::new(), open: None }
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
        let left = self.open.as_ref().map_or(0, |open| self.capacity.saturating_sub(open.elements().len()));
        if new > left && new <= self.capacity {
            self.finish(full)?;
        }
        let mut places = Vec::with_capacity(segments.len());
        for (hash, bytes) in segments {
            debug_assert!(bytes.len() <= BLOCK_MAX && bytes.len().is_multiple_of(UNIT));
            if let Some(place) = self.known.get(hash) {
                places.push(*place);
                continue;
            }
            if self.open.as_ref().is_some_and(|open| open.elements().len() + bytes.len() > self.capacity) {
                self.finish(full)?;
            }
            if self.open.is_none() {
                let number = number()?;
                let mut room = Vec::with_capacity(self.room + self.capacity);
                room.resize(self.room, 0);
                self.open = Some(PackedBlock { number, bytes: room, room: self.room, index: Vec::new() });
            }
            let Some(open) = &mut self.open else { continue };
            let place = Place { block: open.number, at: (open.elements().len() / UNIT) as u16 };
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
        let (places, blocks) = pack(&members, &mut Packer::new(BLOCK_MAX, 16));
        for (member, places) in members.iter().zip(&places) {
            for (bytes, place) in member.iter().zip(places) {
                let block = &blocks[&place.block];
                assert_eq!(&block.elements()[place.offset()..][..bytes.len()], bytes);
                let hash = decode_index(&block.index).unwrap().find(|(at, _)| *at == place.at).unwrap().1;
                assert_eq!(hash, segment_hash(bytes));
            }
        }
        let stored: usize = blocks.values().map(|block| block.elements().len()).sum();
        // The third layer is one for all; 0 times 3 is 0, so the first member's segments are different lengths of zeros.
        assert_eq!(stored, 40 * (1152 + 9408 + 196) + 9408);
        assert!(blocks.values().all(|block| block.elements().len() <= BLOCK_MAX && block.bytes[..16] == [0; 16]));
        assert!(decode_index(&[0; 35]).is_none());
    }

    #[test]
    fn blocks_fill_tensor_pages() {
        let page = 65 * 8168;
        // Two of three would fit into a block; eight blocks of three leave a tenth of a page.
        assert_eq!(block_capacity(19_972, page, 12), 2 * 19_972);
        for member in (4..BLOCK_MAX).step_by(52) {
            let bytes = block_capacity(member, page, 12);
            assert!(bytes.is_multiple_of(member) && bytes <= BLOCK_MAX);
        }
        assert_eq!([block_capacity(0, page, 12), block_capacity(70_000, page, 12)], [BLOCK_MAX; 2]);
    }

    #[test]
    fn a_member_lies_in_one_block_and_what_is_known_is_not_stored() {
        let members: Vec<Vec<Vec<u8>>> = (0..7).map(|n| vec![vec![n; 10_000], vec![n + 100; 12_000]]).collect();
        let (places, _) = pack(&members, &mut Packer::new(BLOCK_MAX, 16));
        assert!(places.iter().all(|places| places[0].block == places[1].block));
        let mut packer = Packer::new(BLOCK_MAX, 16);
        for (member, places) in members.iter().zip(&places) {
            packer.know(segment_hash(&member[0]), places[0]);
        }
        let changed: Vec<Vec<Vec<u8>>> = members.iter().map(|m| vec![m[0].clone(), vec![7; 12_000]]).collect();
        let (new, blocks) = pack(&changed, &mut packer);
        assert!(new.iter().zip(&places).all(|(new, old)| new[0] == old[0]));
        assert_eq!(blocks.values().map(|block| block.elements().len()).sum::<usize>(), 12_000);
    }
}
