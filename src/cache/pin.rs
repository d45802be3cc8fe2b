//! Pinning: the way from wanted blocks to frames that hold them.
//!
//! 1. Pin what is there.
//! 2. In order, claim what is not. The first block that another process is loading, or for which there is no frame, ends
//!    the prefix.
//! 3. Load what was claimed, and publish each block at once.
//!
//! Only with nothing pinned and nothing claimed does a process wait for another.

use super::area::area;
use super::backend::{self, Hold};
use super::layout::{Area, FRAME_BYTES, NONE, State, add};
use super::models::ModelSlot;
use super::partition::{self, Partition};
use super::{BlockKey, replace};
use crate::pg::interrupt;
use inference::weights::{AlignedBytes, Frame};
use std::cell::Cell;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// How long a waiter sleeps before it looks again: a loader that gave up wakes nobody.
const NAP_MS: i64 = 10;
/// How long a process waits for another's load before it loads the block for itself.
const PATIENCE: Duration = Duration::from_secs(1);

/// A block in memory, for as long as this lives.
pub struct Pin {
    held: Held,
}

enum Held {
    Frame { hold: Hold, bytes: usize, area: &'static Area },
    Private(AlignedBytes),
}

impl Pin {
    /// The block's elements; they begin at a multiple of 64.
    pub fn bytes(&self) -> &[u8] {
        match &self.held {
            Held::Frame { hold, bytes, area } => {
                // SAFETY: the frame was published, and nobody writes to it while it is pinned.
                unsafe { std::slice::from_raw_parts(area.frame_bytes(hold.frame()), *bytes) }
            }
            Held::Private(block) => block.bytes(),
        }
    }

    /// Whether it is a frame of the cache, and no private memory.
    pub fn is_cached(&self) -> bool {
        matches!(self.held, Held::Frame { .. })
    }
}

impl Frame for Pin {
    fn bytes(&self) -> &[u8] {
        Pin::bytes(self)
    }
}

/// Pins the leading blocks of `keys`: at least one, at most a quarter of the cache, as many as can be had without waiting.
/// Those that are loaded for it are a sixteenth of the cache at most.
///
/// `load(i, out)` fills the elements of block `i`, and has verified them against its hash when it returns. It may raise an
/// ERROR; it must take no heavyweight lock (relations are opened before), and not call this function.
///
/// On the main thread only. Never an error for want of frames: then the block is in private memory, which is counted.
pub fn pin(slot: ModelSlot, keys: &[BlockKey], load: &mut dyn FnMut(usize, &mut [u8])) -> Vec<Pin> {
    assert!(!keys.is_empty(), "blocks are wanted");
    let area = area();
    let mut waiting_since: Option<Instant> = None;
    loop {
        interrupt::check();
        // One place more is needed while a claim is exchanged for a block that came up meanwhile.
        let room = if backend::join(area) { backend::room().saturating_sub(1) } else { 0 };
        let most = keys.len().min((area.frames.len() / 4).max(1)).min(room);
        let fitting = keys[..most].iter().take_while(|key| key.bytes as usize <= FRAME_BYTES).count();
        if fitting == 0 {
            return vec![private(area, slot, keys[0], load)];
        }
        match Batch::gather(area, &keys[..fitting]) {
            Ok(batch) => return batch.load(slot, load),
            Err(Stop::NoFrame) => return vec![private(area, slot, keys[0], load)],
            Err(Stop::Busy) => {}
        }
        let since = *waiting_since.get_or_insert_with(|| {
            count(area, slot, |counters| &counters.waits, 1);
            Instant::now()
        });
        if since.elapsed() > PATIENCE {
            return vec![private(area, slot, keys[0], load)];
        }
        wait(area, &keys[0]);
    }
}

/// True if the block is in a frame, or is being loaded into one. Nothing is pinned: it may go the next moment.
pub fn is_cached(key: &BlockKey) -> bool {
    let area = area();
    let partition = Partition::lock(area, partition::number_of(key.words()), false);
    partition.find(key.words(), key.bytes).is_some_and(|entry| area.entries[entry as usize].frame.load(Relaxed) != NONE)
}

/// Waits until nobody loads the block any more, or a moment. Serves interrupts.
fn wait(area: &Area, key: &BlockKey) {
    let number = partition::number_of(key.words());
    area.region.prepare_to_wait(area.condition(number));
    let busy = {
        let partition = Partition::lock(area, number, false);
        partition.find(key.words(), key.bytes).is_some_and(|entry| {
            let frame = area.entries[entry as usize].frame.load(Relaxed);
            frame != NONE && area.frames[frame as usize].state() == State::Loading
        })
    };
    if busy {
        area.region.wait(area.condition(number), NAP_MS);
    }
    area.region.end_wait();
}

fn private(area: &Area, slot: ModelSlot, key: BlockKey, load: &mut dyn FnMut(usize, &mut [u8])) -> Pin {
    let mut block = AlignedBytes::zeroed(key.bytes as usize);
    load(0, block.bytes_mut());
    note_session(0, 1);
    count(area, slot, |counters| &counters.misses, 1);
    count(area, slot, |counters| &counters.fallbacks, 1);
    Pin { held: Held::Private(block) }
}

thread_local! {
    /// Hits and misses of this session.
    static SESSION: Cell<[u64; 2]> = const { Cell::new([0; 2]) };
}

/// Hits and misses of this session since it began.
pub fn session_counts() -> [u64; 2] {
    SESSION.get()
}

fn note_session(hits: u64, misses: u64) {
    let [all_hits, all_misses] = SESSION.get();
    SESSION.set([all_hits + hits, all_misses + misses]);
}

fn count(area: &Area, slot: ModelSlot, which: fn(&super::layout::Counters) -> &std::sync::atomic::AtomicU64, n: u64) {
    add(which(&area.header.counters), n);
    if let Some((_, slot)) = slot.of(area) {
        add(which(&slot.counters), n);
    }
}

/// Why there is no pin.
#[derive(Clone, Copy)]
enum Stop {
    /// Somebody is loading the block.
    Busy,
    /// All frames are pinned.
    NoFrame,
}

/// A block that is pinned, or claimed.
struct Got {
    hold: Hold,
    missing: bool,
}

/// The prefix that can be had now.
struct Batch<'k> {
    area: &'static Area,
    keys: &'k [BlockKey],
    got: Vec<Got>,
}

impl<'k> Batch<'k> {
    fn gather(area: &'static Area, keys: &'k [BlockKey]) -> Result<Batch<'k>, Stop> {
        let mut there: Vec<Option<Hold>> = keys.iter().map(|key| look(area, key)).collect();
        let mut got = Vec::with_capacity(keys.len());
        let mut stop = Stop::Busy;
        // In a small cache, blocks that pass through must not push out at a time more than a few that are worth keeping.
        let mut claims = (area.frames.len() / 16).max(1);
        for (key, there) in keys.iter().zip(&mut there) {
            if there.is_none() {
                if claims == 0 {
                    break;
                }
                claims -= 1;
            }
            let next = match there.take() {
                Some(hold) => Ok(Got { hold, missing: false }),
                None => claim(area, key),
            };
            match next {
                Ok(next) => got.push(next),
                Err(reason) => {
                    stop = reason;
                    break;
                }
            }
        }
        if got.is_empty() { Err(stop) } else { Ok(Batch { area, keys, got }) }
    }

    /// Loads what was claimed. An ERROR of `load` drops the batch, which gives up the claims that are left.
    fn load(mut self, slot: ModelSlot, load: &mut dyn FnMut(usize, &mut [u8])) -> Vec<Pin> {
        let area = self.area;
        let mut missing = 0;
        for (n, (got, key)) in self.got.iter_mut().zip(self.keys).enumerate() {
            if !got.missing {
                continue;
            }
            interrupt::check();
            // SAFETY: the frame is claimed, so only this process touches its bytes, which are as many as a frame has.
            let out = unsafe { std::slice::from_raw_parts_mut(area.frame_bytes(got.hold.frame()), key.bytes as usize) };
            load(n, out);
            got.hold.publish();
            area.region.wake(area.condition(partition::number_of(key.words())));
            missing += 1;
            count(area, slot, |counters| &counters.loads, 1);
            count(area, slot, |counters| &counters.bytes_loaded, key.bytes.into());
        }
        let all = self.got.len() as u64;
        note_session(all - missing, missing);
        count(area, slot, |counters| &counters.hits, all - missing);
        count(area, slot, |counters| &counters.misses, missing);
        let tick = area.header.tick.fetch_add(all, Relaxed);
        for (got, tick) in self.got.iter().zip(tick + 1..) {
            used(area, got.hold.frame(), slot, tick);
        }
        let keys = self.keys;
        let pin = |(got, key): (Got, &BlockKey)| Pin {
            held: Held::Frame { hold: got.hold, bytes: key.bytes as usize, area },
        };
        self.got.into_iter().zip(keys).map(pin).collect()
    }
}

/// Notes a use of a pinned block.
fn used(area: &Area, frame: u32, slot: ModelSlot, tick: u64) {
    let frame = &area.frames[frame as usize];
    frame.last_used.store(tick, Relaxed);
    frame.used.store(1, Relaxed);
    let entry = &area.entries[frame.entry.load(Relaxed) as usize];
    entry.touched.store(1, Relaxed);
    entry.accesses.fetch_add(1, Relaxed);
    let Some((n, model)) = slot.of(area) else { return };
    if entry.owners.load(Relaxed) & (1 << n) == 0 && entry.owners.fetch_or(1 << n, Relaxed) & (1 << n) == 0 {
        // The run that is going on is the first one of this model that counts.
        let before = (model.runs.load(Relaxed) as u32).saturating_sub(1);
        entry.runs_before.fetch_add(before, Relaxed);
    }
}

/// Pins a block if it is there.
fn look(area: &'static Area, key: &BlockKey) -> Option<Hold> {
    let partition = Partition::lock(area, partition::number_of(key.words()), false);
    let entry = partition.find(key.words(), key.bytes)?;
    let frame = area.entries[entry as usize].frame.load(Relaxed);
    if frame == NONE || area.frames[frame as usize].state() != State::Valid {
        return None;
    }
    Some(pinned(area, frame))
}

/// Counts and notes a pin. Under a lock of the block's partition.
fn pinned(area: &'static Area, frame: u32) -> Hold {
    area.frames[frame as usize].pins.fetch_add(1, std::sync::atomic::Ordering::AcqRel);
    Hold::note(area, frame, false)
}

/// Claims a block that is not there, or pins it if it has come meanwhile.
fn claim(area: &'static Area, key: &BlockKey) -> Result<Got, Stop> {
    let number = partition::number_of(key.words());
    if let Some(result) = present(area, &Partition::lock(area, number, true), key) {
        return result;
    }
    // Making room locks other partitions, so none is held.
    let frame = replace::take_frame(area).ok_or(Stop::NoFrame)?;
    let hold = Hold::note(area, frame, true);
    let partition = Partition::lock(area, number, true);
    if let Some(result) = present(area, &partition, key) {
        return result; // and the frame becomes free again
    }
    let entry = partition
        .find(key.words(), key.bytes)
        .or_else(|| partition.insert(key.words(), key.bytes))
        .ok_or(Stop::NoFrame)?;
    partition.attach(entry, frame);
    Ok(Got { hold, missing: true })
}

/// What is to be done with a block that has a frame; `None` if it has none.
fn present(area: &'static Area, partition: &Partition<'_>, key: &BlockKey) -> Option<Result<Got, Stop>> {
    let entry = partition.find(key.words(), key.bytes)?;
    let number = area.entries[entry as usize].frame.load(Relaxed);
    let frame = area.frames.get(number as usize)?;
    Some(match frame.state() {
        State::Valid => Ok(Got { hold: pinned(area, number), missing: false }),
        // Who was loading it gave up: this process goes on.
        State::Abandoned if frame.change(State::Abandoned, State::Loading) => {
            frame.pins.fetch_add(1, std::sync::atomic::Ordering::AcqRel);
            Ok(Got { hold: Hold::note(area, number, true), missing: true })
        }
        _ => Err(Stop::Busy),
    })
}
