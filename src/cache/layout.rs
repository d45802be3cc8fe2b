//! What stands where in the cache's area.
//!
//! ```text
//! header | model slots | backends | frames' states | free bits | victims | condition variables
//!        | chain heads | entries | (to a multiple of 4096) frames
//! ```
//!
//! All but the frames' bytes are atomics, so that references can be shared between processes without `unsafe`. Which lock
//! protects what is told at the fields; a field with no lock is a counter, or read and set in one step.

use super::settings;
use crate::pg::shmem::{self, Region};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Bytes of a frame: a block of 128 x 128 float32.
pub const FRAME_BYTES: usize = 65536;
/// Partitions of the lookup, each with a lock, a condition variable, and entries and chains of its own.
pub const PARTITIONS: usize = 64;
/// Number of the lock on the choice of victims.
pub const REPLACEMENT_LOCK: usize = PARTITIONS;
/// Number of the lock on the model slots.
pub const SLOTS_LOCK: usize = PARTITIONS + 1;
/// All locks.
pub const LOCKS: usize = PARTITIONS + 2;
/// Model slots. The first one stands for all models that have none of their own.
pub const SLOTS: usize = 64;
/// Most pins of one process. Two windows of an operator are a half of it.
pub const PINS: usize = 128;
/// Lookup entries per frame; those without a frame remember what is worth keeping.
const ENTRIES_PER_FRAME: usize = 8;
/// No frame, no entry.
pub const NONE: u32 = u32::MAX;

const MAGIC: u64 = u64::from_le_bytes(*b"tessblkc");
const VERSION: u32 = 2;

/// Counts since the server started, or since they were reset.
#[repr(C)]
#[derive(Default)]
pub struct Counters {
    /// Blocks that were found in a frame.
    pub hits: AtomicU64,
    /// Blocks that were not.
    pub misses: AtomicU64,
    /// Blocks that were loaded into a frame.
    pub loads: AtomicU64,
    /// Bytes of these.
    pub bytes_loaded: AtomicU64,
    /// Frames that were given to another block.
    pub evictions: AtomicU64,
    /// Waits for another process that was loading a wanted block.
    pub waits: AtomicU64,
    /// Blocks that were loaded into private memory.
    pub fallbacks: AtomicU64,
    _free: AtomicU64,
}

impl Counters {
    /// In the order of the fields.
    pub fn all(&self) -> [&AtomicU64; 7] {
        [&self.hits, &self.misses, &self.loads, &self.bytes_loaded, &self.evictions, &self.waits, &self.fallbacks]
    }
}

/// Adds to a counter.
pub fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

/// The begin of the area.
#[repr(C)]
pub struct Header {
    magic: AtomicU64,
    version: AtomicU32,
    frames: AtomicU32,
    entries: AtomicU32,
    backends: AtomicU32,
    bytes: AtomicU64,
    /// Counts uses of blocks; the time of LRU.
    pub tick: AtomicU64,
    /// Counts runs of models; the time in which access rates decay.
    pub runs: AtomicU64,
    /// No word of the free bits before this one has one set, nearly always.
    pub free_hint: AtomicU32,
    /// Where CLOCK goes on. Replacement lock.
    pub hand: AtomicU32,
    /// The victims that were chosen: `victims[next..len]`. Replacement lock.
    pub victims_next: AtomicU32,
    /// See `victims_next`.
    pub victims_len: AtomicU32,
    /// By which policy they were. Replacement lock.
    pub victims_policy: AtomicU32,
    _unused: AtomicU32,
    /// Where the ghosts' clock of each partition goes on. The partition's lock.
    pub ghost_hands: [AtomicU32; PARTITIONS],
    /// Slots whose models are to be kept, a bit for each. Slots lock.
    pub kept: AtomicU64,
    /// When the counters were reset, in PostgreSQL's microseconds; 0 for never.
    pub reset_at: AtomicU64,
    /// Of the whole cache.
    pub counters: Counters,
    /// Of predictions. Rows are taken under the slots lock.
    pub stats: [Stat; STATS],
}

/// Models of which predictions are counted.
pub const STATS: usize = 256;

/// Predictions with a model.
#[repr(C)]
pub struct Stat {
    /// OID of its database, 0 in a row that is not used.
    pub database: AtomicU32,
    _unused: AtomicU32,
    /// Its content hash.
    pub hash: [AtomicU64; 4],
    /// Calls, rows, runs, nanoseconds, errors.
    pub counts: [AtomicU64; 5],
}

/// A model that is being used.
#[repr(C)]
pub struct Slot {
    /// OID of its database, 0 in a slot that is not used. Slots lock.
    pub database: AtomicU32,
    /// Grows when the slot gets another model. Slots lock.
    pub generation: AtomicU32,
    /// Its content hash. Slots lock.
    pub hash: [AtomicU64; 4],
    /// Decayed number of runs (f64), as of run number `rated_at`.
    pub rate: AtomicU64,
    /// See `rate`.
    pub rated_at: AtomicU64,
    /// Runs since it got the slot.
    pub runs: AtomicU64,
    _unused: AtomicU64,
    /// Of this model.
    pub counters: Counters,
}

/// A process that pins blocks.
#[repr(C)]
pub struct Backend {
    /// Its process id, 0 in a row that is not used.
    pub process: AtomicU32,
    _unused: AtomicU32,
    /// Number + 1 of each frame that it pins, as often as it pins it.
    pub pins: [AtomicU32; PINS],
}

/// A block's place in memory.
#[repr(C)]
pub struct Frame {
    /// One of [`State`].
    pub state: AtomicU32,
    /// How many pins there are. Grows under the lock of the block's partition only, or by [`Frame::take`].
    pub pins: AtomicU32,
    /// Entry of its block. Lock of the entry's partition.
    pub entry: AtomicU32,
    /// CLOCK's bit: used since the hand passed.
    pub used: AtomicU32,
    /// Tick of its last use.
    pub last_used: AtomicU64,
}

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum State {
    /// Has no block, and its free bit is set.
    Free = 0,
    /// Has no block, and belongs to the process that pins it.
    Taken = 1,
    /// The process that pins it fills it.
    Loading = 2,
    /// Has its block.
    Valid = 3,
    /// Was being filled by a process that gave up. Who wants the block goes on in its place.
    Abandoned = 4,
}

impl State {
    /// As views show it.
    pub fn name(self) -> &'static str {
        match self {
            State::Free => "free",
            State::Taken => "taken",
            State::Loading => "loading",
            State::Valid => "valid",
            State::Abandoned => "abandoned",
        }
    }
}

impl Frame {
    /// Its state.
    pub fn state(&self) -> State {
        match self.state.load(Ordering::Acquire) {
            1 => State::Taken,
            2 => State::Loading,
            3 => State::Valid,
            4 => State::Abandoned,
            _ => State::Free,
        }
    }

    /// Goes from one state to another, if it is in the one.
    pub fn change(&self, from: State, to: State) -> bool {
        self.state.compare_exchange(from as u32, to as u32, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// The first pin, if there is none.
    pub fn take(&self) -> bool {
        self.pins.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
}

/// What is known of a block: by its partition's lock, but for the counts.
#[repr(C)]
pub struct Entry {
    /// The block's hash.
    pub hash: [AtomicU64; 4],
    /// Its bytes; 0 in an entry that is not used.
    pub bytes: AtomicU32,
    /// The next entry of the chain.
    pub next: AtomicU32,
    /// Where the block is; `NONE` makes this entry a ghost.
    pub frame: AtomicU32,
    /// Used since the ghosts' clock passed.
    pub touched: AtomicU32,
    /// Slots of the models that use it.
    pub owners: AtomicU64,
    /// How often it was used.
    pub accesses: AtomicU32,
    /// The sum of its owners' runs that were before it was known (wrapping).
    pub runs_before: AtomicU32,
}

impl Entry {
    /// The hash.
    pub fn key(&self) -> [u64; 4] {
        self.hash.each_ref().map(|word| word.load(Ordering::Relaxed))
    }
}

/// A frame that is to go.
#[repr(C)]
pub struct Victim {
    /// Its number.
    pub frame: AtomicU32,
    /// Its block.
    pub entry: AtomicU32,
    /// When it was last used as it was chosen.
    pub last_used: AtomicU64,
}

/// Sizes and places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Frames.
    pub frames: usize,
    /// Entries of a partition.
    pub entries: usize,
    /// Chains of a partition.
    pub chains: usize,
    /// Rows for processes.
    pub backends: usize,
    /// Most victims that are chosen at a time.
    pub victims: usize,
    slots_at: usize,
    backends_at: usize,
    frames_at: usize,
    free_at: usize,
    victims_at: usize,
    conditions_at: usize,
    chains_at: usize,
    entries_at: usize,
    bytes_at: usize,
    /// All of it, with room to align the frames.
    pub total: usize,
}

/// The frames' bytes begin at a multiple of a page of memory.
const FRAMES_ALIGN: usize = 4096;

impl Plan {
    /// For so many frames and processes.
    pub fn new(frames: usize, backends: usize) -> Plan {
        // A partition has room for its share of the entries, and more where few frames can happen to meet in one.
        let entries = (frames * ENTRIES_PER_FRAME).div_ceil(PARTITIONS) + frames.min(16);
        let chains = entries.next_power_of_two();
        let victims = (frames / 16).clamp(8, 16384);
        let mut end = 0usize;
        let mut place = |bytes: usize| {
            let at = end.next_multiple_of(64);
            end = at + bytes;
            at
        };
        place(size_of::<Header>());
        let slots_at = place(SLOTS * size_of::<Slot>());
        let backends_at = place(backends * size_of::<Backend>());
        let frames_at = place(frames * size_of::<Frame>());
        let free_at = place(frames.div_ceil(64) * 8);
        let victims_at = place(victims * size_of::<Victim>());
        let conditions_at = place(PARTITIONS * Region::CONDITION_BYTES);
        let chains_at = place(PARTITIONS * chains * 4);
        let entries_at = place(PARTITIONS * entries * size_of::<Entry>());
        let bytes_at = place(0);
        let total = bytes_at + FRAMES_ALIGN + frames * FRAME_BYTES;
        Plan {
            frames,
            entries,
            chains,
            backends,
            victims,
            slots_at,
            backends_at,
            frames_at,
            free_at,
            victims_at,
            conditions_at,
            chains_at,
            entries_at,
            bytes_at,
            total,
        }
    }

    /// By the settings, for shared memory. The same from the moment on at which that was asked for.
    pub fn of_server() -> Plan {
        static PLAN: OnceLock<Plan> = OnceLock::new();
        *PLAN.get_or_init(|| Plan::new(settings::frames(), shmem::most_processes()))
    }

    /// By the settings, for this process alone.
    pub fn of_process() -> Plan {
        Plan::new(settings::frames(), 1)
    }
}

/// The area, as a process sees it.
pub struct Area {
    /// Sizes.
    pub plan: Plan,
    /// Memory and locks.
    pub region: Region,
    /// Its begin.
    pub header: &'static Header,
    /// Models.
    pub slots: &'static [Slot],
    /// Processes.
    pub backends: &'static [Backend],
    /// Frames' states.
    pub frames: &'static [Frame],
    /// A bit for each free frame.
    pub free: &'static [AtomicU64],
    /// Frames that are to go.
    pub victims: &'static [Victim],
    /// First entry of each chain; a partition's chains lie together.
    pub chains: &'static [AtomicU32],
    /// A partition's entries lie together.
    pub entries: &'static [Entry],
    bytes: *mut u8,
}

// SAFETY: atomics, and bytes that are handed out under the rules of `frame_bytes`.
unsafe impl Send for Area {}
// SAFETY: as above.
unsafe impl Sync for Area {}

impl Area {
    /// Sees a region as an area.
    pub fn new(region: Region, plan: Plan) -> Area {
        let first = region.aligned_offset(plan.bytes_at, FRAMES_ALIGN);
        let bytes = region.bytes_at(first, plan.frames * FRAME_BYTES);
        // SAFETY: the plan gives each a place of its own, and all consist of atomics, for which zeros are a value.
        unsafe {
            Area {
                header: &region.slice(0, 1)[0],
                slots: region.slice(plan.slots_at, SLOTS),
                backends: region.slice(plan.backends_at, plan.backends),
                frames: region.slice(plan.frames_at, plan.frames),
                free: region.slice(plan.free_at, plan.frames.div_ceil(64)),
                victims: region.slice(plan.victims_at, plan.victims),
                chains: region.slice(plan.chains_at, PARTITIONS * plan.chains),
                entries: region.slice(plan.entries_at, PARTITIONS * plan.entries),
                plan,
                region,
                bytes,
            }
        }
    }

    /// Makes a new area out of zeros. The magic comes last.
    pub fn set_up(&self) {
        for chain in self.chains {
            chain.store(NONE, Ordering::Relaxed);
        }
        for frame in self.frames {
            frame.entry.store(NONE, Ordering::Relaxed);
        }
        for n in 0..self.frames.len() {
            self.free[n / 64].fetch_or(1 << (n % 64), Ordering::Relaxed);
        }
        if self.region.is_shared() {
            for partition in 0..PARTITIONS {
                self.region.init_condition(self.condition(partition));
            }
        }
        let header = self.header;
        header.version.store(VERSION, Ordering::Relaxed);
        header.frames.store(self.plan.frames as u32, Ordering::Relaxed);
        header.entries.store(self.plan.entries as u32, Ordering::Relaxed);
        header.backends.store(self.plan.backends as u32, Ordering::Relaxed);
        header.bytes.store(self.plan.total as u64, Ordering::Relaxed);
        header.magic.store(MAGIC, Ordering::Release);
    }

    /// Whether the area was made by a library with the same layout and the same sizes.
    pub fn is_ours(&self) -> bool {
        let header = self.header;
        header.magic.load(Ordering::Acquire) == MAGIC
            && header.version.load(Ordering::Relaxed) == VERSION
            && header.frames.load(Ordering::Relaxed) as usize == self.plan.frames
            && header.entries.load(Ordering::Relaxed) as usize == self.plan.entries
            && header.backends.load(Ordering::Relaxed) as usize == self.plan.backends
            && header.bytes.load(Ordering::Relaxed) as usize == self.plan.total
    }

    /// Where the condition variable of a partition lies.
    pub fn condition(&self, partition: usize) -> usize {
        self.plan.conditions_at + partition * Region::CONDITION_BYTES
    }

    /// Address of a frame's bytes. They are written by the process that has it in state `Loading`, and read by who
    /// pinned it in state `Valid`.
    pub fn frame_bytes(&self, frame: u32) -> *mut u8 {
        let n = frame as usize;
        assert!(n < self.frames.len(), "a frame of the cache");
        // SAFETY: inside the frames' bytes.
        unsafe { self.bytes.add(n * FRAME_BYTES) }
    }
}

const _: () = assert!(size_of::<Entry>() == 64 && size_of::<Frame>() == 24 && size_of::<Victim>() == 16);
const _: () = assert!(size_of::<Counters>() == 64 && size_of::<Slot>() == 136 && size_of::<Backend>() == 520);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_beside_the_frames_is_little() {
        for (frames, percent) in [(2, 90), (64, 10), (4096, 3), (1 << 18, 2)] {
            let plan = Plan::new(frames, 150);
            let beside = plan.total - frames * FRAME_BYTES;
            assert!(beside * 100 <= plan.total * percent, "{beside} bytes beside {frames} frames");
            assert!(plan.entries * PARTITIONS >= frames * ENTRIES_PER_FRAME && plan.chains >= plan.entries);
            assert!(plan.bytes_at >= plan.entries_at + PARTITIONS * plan.entries * size_of::<Entry>());
        }
    }
}
