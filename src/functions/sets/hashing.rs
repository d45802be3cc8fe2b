//! Hashing members of a set on a thread beside, while members before them are stored.

use crate::pg::beside::Beside;
use tensor_blocks::members::{SegmentHash, segment_hash};

/// Bytes of members that are handed over at a time. Larger ones are hashed where they are: their segments are large, and they
/// are not held twice.
const BATCH_BYTES: usize = 1 << 20;

/// Members that wait to be placed: their segments, one behind the other.
#[derive(Default)]
pub struct Batch {
    names: Vec<String>,
    bytes: Vec<u8>,
    /// Of every segment of every member.
    hashes: Vec<SegmentHash>,
}

impl Batch {
    /// `starts`: where the segments of a member begin, and the last ends.
    fn hash(&mut self, starts: &[usize]) {
        let member = starts.last().copied().unwrap_or(0);
        for number in 0..self.names.len() {
            let run = &self.bytes[number * member..(number + 1) * member];
            self.hashes.extend(starts.windows(2).map(|ends| segment_hash(&run[ends[0]..ends[1]])));
        }
    }

    /// Calls `place` with each member's name and segments, in the order in which they came, and empties the batch.
    pub fn drain(&mut self, starts: &[usize], mut place: impl FnMut(String, &[(SegmentHash, &[u8])])) {
        let (member, count) = (starts.last().copied().unwrap_or(0), starts.len() - 1);
        for (number, name) in self.names.drain(..).enumerate() {
            let run = &self.bytes[number * member..(number + 1) * member];
            let hashes = &self.hashes[number * count..(number + 1) * count];
            let parts = starts.windows(2).zip(hashes).map(|(ends, hash)| (*hash, &run[ends[0]..ends[1]]));
            place(name, &parts.collect::<Vec<_>>());
        }
        self.bytes.clear();
        self.hashes.clear();
    }
}

/// Members between their arrival and their places.
pub struct Hashing {
    starts: Vec<usize>,
    /// What is being filled.
    open: Batch,
    thread: Beside<Batch>,
    /// A batch whose memory is used again.
    spare: Batch,
}

impl Hashing {
    /// For members whose segments begin at `starts`, the last of which is where a member ends.
    pub fn new(starts: Vec<usize>) -> Hashing {
        let ends = starts.clone();
        let thread = Beside::new("tessera hashing", move |batch: &mut Batch| batch.hash(&ends));
        Hashing { starts, open: Batch::default(), thread, spare: Batch::default() }
    }

    /// Where the segments of a member begin.
    pub fn starts(&self) -> &[usize] {
        &self.starts
    }

    fn member_bytes(&self) -> usize {
        self.starts.last().copied().unwrap_or(0)
    }

    /// Takes a member, whose bytes `gather` appends. Gives a batch that is to be placed, members before this one or all of them.
    pub fn add(&mut self, name: &str, gather: impl FnOnce(&mut Vec<u8>)) -> Option<Batch> {
        gather(&mut self.open.bytes);
        self.open.names.push(name.to_owned());
        if self.open.bytes.len() < BATCH_BYTES {
            return None;
        }
        if self.member_bytes() > BATCH_BYTES / 4 {
            let full = std::mem::take(&mut self.open);
            return Some(self.thread.here(full));
        }
        let full = std::mem::replace(&mut self.open, std::mem::take(&mut self.spare));
        self.thread.exchange(full)
    }

    /// Takes back a batch that was placed.
    pub fn reuse(&mut self, batch: Batch) {
        let unused = self.open.names.is_empty() && self.open.bytes.capacity() == 0;
        let place = if unused { &mut self.open } else { &mut self.spare };
        *place = batch;
    }

    /// The last members, in one batch or two. Others can be added afterwards.
    pub fn rest(&mut self) -> impl Iterator<Item = Batch> + use<> {
        let before = self.thread.collect();
        let open = std::mem::take(&mut self.open);
        before.into_iter().chain([self.thread.here(open)])
    }
}
