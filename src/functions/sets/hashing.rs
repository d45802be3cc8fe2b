//! Hashing members of a set on a thread beside, while members before them are stored.

use crate::pg::{compute, error};
use pgrx::prelude::*;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
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

/// The thread's two ends. It ends when this is dropped, also by an ERROR.
struct Thread {
    to: SyncSender<Batch>,
    from: Receiver<Batch>,
}

/// Members between their arrival and their places.
pub struct Hashing {
    starts: Vec<usize>,
    /// What is being filled.
    open: Batch,
    /// None before the first full batch, and if there is no thread to be had.
    thread: Option<Thread>,
    /// Whether the thread has a batch.
    busy: bool,
    /// A batch whose memory is used again.
    spare: Batch,
}

impl Hashing {
    /// For members whose segments begin at `starts`, the last of which is where a member ends.
    pub fn new(starts: Vec<usize>) -> Hashing {
        Hashing { starts, open: Batch::default(), thread: None, busy: false, spare: Batch::default() }
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
            return Some(self.here(full));
        }
        let full = std::mem::replace(&mut self.open, std::mem::take(&mut self.spare));
        let before = self.collect();
        if self.thread.is_none() {
            self.thread = start(self.starts.clone());
        }
        let Some(thread) = &self.thread else { return Some(self.here(full)) };
        thread.to.send(full).unwrap_or_else(|_| lost());
        self.busy = true;
        before
    }

    fn here(&self, mut batch: Batch) -> Batch {
        batch.hash(&self.starts);
        batch
    }

    /// What the thread has, when it is hashed.
    fn collect(&mut self) -> Option<Batch> {
        if !std::mem::take(&mut self.busy) {
            return None;
        }
        // A batch takes it half a millisecond, so that nobody waits for long.
        let thread = self.thread.as_ref()?;
        Some(thread.from.recv().unwrap_or_else(|_| lost()))
    }

    /// Takes back a batch that was placed.
    pub fn reuse(&mut self, batch: Batch) {
        let unused = self.open.names.is_empty() && self.open.bytes.capacity() == 0;
        let place = if unused { &mut self.open } else { &mut self.spare };
        *place = batch;
    }

    /// The last members, in one batch or two. Others can be added afterwards.
    pub fn rest(&mut self) -> impl Iterator<Item = Batch> + use<> {
        let before = self.collect();
        let open = std::mem::take(&mut self.open);
        before.into_iter().chain([self.here(open)])
    }
}

fn start(starts: Vec<usize>) -> Option<Thread> {
    let (to, batches) = sync_channel::<Batch>(1);
    let (hashed, from) = sync_channel::<Batch>(1);
    let work = move || {
        while let Ok(mut batch) = batches.recv() {
            batch.hash(&starts);
            if hashed.send(batch).is_err() {
                return;
            }
        }
    };
    compute::spawn("tessera hashing", work).then_some(Thread { to, from })
}

fn lost() -> ! {
    error::raise(PgSqlErrorCode::ERRCODE_INTERNAL_ERROR, "the thread that hashes members of a set has ended", "", "")
}
