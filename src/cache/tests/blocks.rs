//! Artificial blocks: number `n` of a test has a hash of its own, and words that tell a wrong block from the right one.

use crate::cache::{BlockKey, ModelSlot, Pin, model_slot, pin};
use pgrx::pg_sys;

/// Bytes of most artificial blocks.
pub const BYTES: u32 = 65536;

/// A block of a test; `seed` keeps the blocks of tests apart, which share one server.
pub fn key(seed: u64, n: u64) -> BlockKey {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..].copy_from_slice(&n.to_le_bytes());
    BlockKey { hash: *blake3::hash(&bytes).as_bytes(), bytes: BYTES }
}

fn word(key: &BlockKey, at: usize) -> u64 {
    let first = u64::from_le_bytes(key.hash[..8].try_into().expect("eight bytes"));
    (first ^ at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// The elements of a block.
pub fn fill(key: &BlockKey, out: &mut [u8]) {
    for (at, bytes) in out.chunks_exact_mut(8).enumerate() {
        bytes.copy_from_slice(&word(key, at).to_le_bytes());
    }
}

/// Whether these are the elements of the block.
pub fn is_right(key: &BlockKey, bytes: &[u8]) -> bool {
    bytes.len() == key.bytes as usize
        && bytes.as_ptr().addr().is_multiple_of(64)
        && bytes.chunks_exact(8).enumerate().all(|(at, found)| found == word(key, at).to_le_bytes())
}

/// An artificial model of this database.
pub fn model(seed: u64, n: u64) -> ModelSlot {
    // SAFETY: backend state.
    model_slot(unsafe { pg_sys::MyDatabaseId }, &key(seed, u64::MAX - n).hash)
}

/// Pins a prefix of `keys`, checks what is pinned, and tells how many blocks were loaded for it.
pub fn get(slot: ModelSlot, keys: &[BlockKey]) -> (Vec<Pin>, usize) {
    let mut loads = 0;
    let pins = pin(slot, keys, &mut |n, out| {
        loads += 1;
        fill(&keys[n], out);
    });
    assert!(!pins.is_empty() && pins.len() <= keys.len());
    for (pin, key) in pins.iter().zip(keys) {
        assert!(is_right(key, pin.bytes()), "a block has another's elements");
    }
    (pins, loads)
}

/// Walks over all `keys`, as a run of a model does; tells how many blocks were loaded.
pub fn walk(slot: ModelSlot, keys: &[BlockKey]) -> usize {
    let (mut at, mut loads) = (0, 0);
    while at < keys.len() {
        let window = &keys[at..keys.len().min(at + inference::weights::WINDOW)];
        let (pins, loaded) = get(slot, window);
        at += pins.len();
        loads += loaded;
    }
    loads
}
