//! The identity of a model's content: its graph and the bytes of its tensors, however they are cut into blocks.

use crate::pg::interrupt;

/// Bytes that are hashed between two looks at interrupts.
const PIECE: usize = 64 << 20;

/// Computes a content hash, tensor by tensor.
pub struct ContentHash(blake3::Hasher);

impl ContentHash {
    /// Of a model with this graph. Dtypes and dimensions of the tensors stand there.
    pub fn new(graph_hash: &[u8]) -> ContentHash {
        let mut whole = blake3::Hasher::new_derive_key("pg_tessera model content v1");
        whole.update(graph_hash);
        ContentHash(whole)
    }

    /// Adds the tensor that comes next in the order of the graph: its elements, row-major.
    pub fn add(&mut self, elements: &[u8]) {
        let mut one = blake3::Hasher::new();
        for piece in elements.chunks(PIECE) {
            interrupt::check();
            one.update(piece);
        }
        self.0.update(one.finalize().as_bytes());
    }

    /// The hash, after the last tensor.
    pub fn finish(self) -> [u8; 32] {
        *self.0.finalize().as_bytes()
    }
}
