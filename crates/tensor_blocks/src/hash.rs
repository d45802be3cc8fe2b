//! The identity of a block.
//!
//! Responsible for: the content hash by which equal blocks are found and shared.
//!
//! Invariants:
//! - the encoding is fixed: the hash is stored on disk and compared between databases;
//! - it is injective: the block's bytes come first (so that BLAKE3 hashes them in its widest strides), and a trailer
//!   that can be read from its end follows: the dims as u32 little-endian, the dtype's code, the rank.

use crate::DType;
use std::fmt;

/// BLAKE3's key derivation context: blocks share no hash with other things that are hashed with BLAKE3.
const CONTEXT: &str = "pg_tessera tensor block v1";

/// BLAKE3 of a block's dtype, shape and bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash(pub [u8; 32]);

impl fmt::Display for BlockHash {
    /// 64 lower-case hexadecimal digits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockHash({self})")
    }
}

/// The hash of a block of `dtype` and `shape` whose row-major little-endian elements are `bytes`.
///
/// At most 255 dimensions: the rank is one byte here and in the stored form of a block.
///
/// # Panics
/// With more than 255 dimensions.
pub fn block_hash(dtype: DType, shape: &[u32], bytes: &[u8]) -> BlockHash {
    let rank = u8::try_from(shape.len()).expect("a block has at most 255 dimensions");
    let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
    hasher.update(bytes);
    for dim in shape {
        hasher.update(&dim.to_le_bytes());
    }
    hasher.update(&[dtype.onnx_code() as u8, rank]);
    BlockHash(*hasher.finalize().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_dtype_shape_and_bytes_apart() {
        let bytes = [0u8; 16];
        let hashes = [
            block_hash(DType::Float32, &[2, 2], &bytes),
            block_hash(DType::Int32, &[2, 2], &bytes),
            block_hash(DType::Float32, &[4, 1], &bytes),
            block_hash(DType::Float32, &[4], &bytes),
            block_hash(DType::Float32, &[2, 2], &[1; 16]),
            block_hash(DType::Float32, &[], &bytes),
            // The same stream but for the border between bytes and dims.
            block_hash(DType::Float32, &[2], &[&bytes[..], &2u32.to_le_bytes()].concat()),
        ];
        for (i, left) in hashes.iter().enumerate() {
            for right in &hashes[i + 1..] {
                assert_ne!(left, right);
            }
        }
        assert_eq!(hashes[0], block_hash(DType::Float32, &[2, 2], &bytes));
    }

    /// The encoding is on disk: this value may never change. The oracle is BLAKE3 over the documented stream.
    #[test]
    fn encoding_is_fixed() {
        let stream = [1, 2, 3, 4, 1, 0, 0, 0, 4, 0, 0, 0, 2, 2];
        let expected = blake3::derive_key("pg_tessera tensor block v1", &stream);
        let hash = block_hash(DType::UInt8, &[1, 4], &[1, 2, 3, 4]);
        assert_eq!(hash.0, expected);
        assert_eq!(hash.to_string(), "aadc88bdd5be5658365d18455fdc8514c161a15126838639cd4f8cb8ca2e9935");
    }
}
