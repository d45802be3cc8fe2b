//! One tensor block as a value: its binary and its text form.
//!
//! ```text
//!  binary:  | version 1 | dtype | rank | 0 | rank dims, u32 little-endian | elements, row-major, little-endian |
//!  text:    float32[128,128]:<base64 of the elements>
//! ```
//! Invariant: a [`Block`] is consistent: the elements are as many bytes as dtype and shape say. Equal blocks have
//! equal binary forms.

use crate::{BlockHash, DType, block_hash};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use std::fmt;

/// First byte of the binary form.
const VERSION: u8 = 1;
/// Bytes before the dims.
const HEAD: usize = 4;
/// Most dimensions of a block, as of an ONNX tensor in practice.
const MAX_RANK: usize = 64;

/// Element type, dims (little-endian) and what follows the head.
type Parts<'a> = (DType, &'a [[u8; 4]], &'a [u8]);

fn parts(bytes: &[u8]) -> Result<Parts<'_>, BlockError> {
    let &[version, dtype, rank, _] = bytes.first_chunk::<HEAD>().ok_or(BlockError::Truncated)?;
    if version != VERSION {
        return Err(BlockError::Version(version));
    }
    let dtype = DType::from_onnx(i32::from(dtype)).ok_or_else(|| BlockError::DType(dtype.to_string()))?;
    let (shape, rest) = bytes[HEAD..].split_at_checked(4 * usize::from(rank)).ok_or(BlockError::Truncated)?;
    Ok((dtype, shape.as_chunks().0, rest))
}

/// Element type, what follows the head, and the bytes that elements of that type in the head's shape take.
pub(crate) fn split_head(bytes: &[u8]) -> Result<(DType, &[u8], u64), BlockError> {
    let (dtype, shape, rest) = parts(bytes)?;
    let shape = || shape.iter().map(|dim| u32::from_le_bytes(*dim));
    if shape().len() > MAX_RANK {
        return Err(BlockError::Rank(shape().len()));
    }
    Ok((dtype, rest, byte_len(dtype, shape()).ok_or_else(|| BlockError::Shape(shape().collect()))?))
}

/// Bytes of elements in this shape; none if that is beyond 64 bits.
fn byte_len(dtype: DType, mut shape: impl Iterator<Item = u32>) -> Option<u64> {
    dtype.byte_len(shape.try_fold(1u64, |n, dim| n.checked_mul(u64::from(dim)))?)
}

/// A block, borrowed from its binary form or made of parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block<'a> {
    dtype: DType,
    shape: Vec<u32>,
    data: std::borrow::Cow<'a, [u8]>,
}

/// Why bytes or a text are no block.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    /// The binary form ends too soon.
    #[error("the value ends in the middle of a tensor block")]
    Truncated,
    /// Another version of the binary form.
    #[error("version {0} of the binary form is not known")]
    Version(u8),
    /// Not an element type with a fixed width.
    #[error("element type {0} is not known")]
    DType(String),
    /// More dimensions than a block may have.
    #[error("{0} dimensions are too many")]
    Rank(usize),
    /// The shape's product is beyond what can be represented.
    #[error("the shape {0:?} is too large")]
    Shape(Vec<u32>),
    /// Data and shape disagree.
    #[error("{dtype}{shape:?} takes {expected} bytes, not {found}")]
    Length {
        /// Element type.
        dtype: &'static str,
        /// Dimensions.
        shape: Vec<u32>,
        /// Bytes that they take.
        expected: u64,
        /// Bytes that were there.
        found: usize,
    },
    /// The text form is malformed.
    #[error("{0}")]
    Syntax(String),
}

impl<'a> Block<'a> {
    /// Bytes of the binary form before the elements, for a block of two dimensions.
    pub const HEAD_OF_MATRIX: usize = HEAD + 2 * 4;

    /// A block of `data`: row-major little-endian elements of `dtype` in `shape`.
    pub fn new(
        dtype: DType,
        shape: Vec<u32>,
        data: impl Into<std::borrow::Cow<'a, [u8]>>,
    ) -> Result<Block<'a>, BlockError> {
        let data = data.into();
        if shape.len() > MAX_RANK {
            return Err(BlockError::Rank(shape.len()));
        }
        let expected = byte_len(dtype, shape.iter().copied()).ok_or_else(|| BlockError::Shape(shape.clone()))?;
        if expected != data.len() as u64 {
            return Err(BlockError::Length { dtype: dtype.name(), shape, expected, found: data.len() });
        }
        Ok(Block { dtype, shape, data })
    }

    /// Reads the binary form; the elements are borrowed.
    pub fn decode(bytes: &'a [u8]) -> Result<Block<'a>, BlockError> {
        let (dtype, shape, data) = parts(bytes)?;
        Block::new(dtype, shape.iter().map(|dim| u32::from_le_bytes(*dim)).collect(), data)
    }

    /// The part of the binary form before the elements.
    pub fn head(&self) -> Vec<u8> {
        Block::head_of(self.dtype, &self.shape)
    }

    /// The head of a block of elements of `dtype` in `shape`.
    pub fn head_of(dtype: DType, shape: &[u32]) -> Vec<u8> {
        let mut head = vec![VERSION, dtype.onnx_code() as u8, shape.len() as u8, 0];
        for dim in shape {
            head.extend_from_slice(&dim.to_le_bytes());
        }
        head
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Dimensions.
    pub fn shape(&self) -> &[u32] {
        &self.shape
    }

    /// The elements: row-major, little-endian.
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// The block's identity.
    pub fn hash(&self) -> BlockHash {
        block_hash(self.dtype, &self.shape, &self.data)
    }

    /// Reads the text form.
    pub fn parse(text: &str) -> Result<Block<'static>, BlockError> {
        let syntax = |what: &str| BlockError::Syntax(what.to_owned());
        let text = text.trim();
        let (head, data) = text.split_once(':').ok_or_else(|| syntax("a colon is missing"))?;
        let (name, dims) = head
            .strip_suffix(']')
            .and_then(|head| head.split_once('['))
            .ok_or_else(|| syntax("the shape is missing"))?;
        let dtype = DType::from_name(name.trim()).ok_or_else(|| BlockError::DType(name.trim().to_owned()))?;
        let shape = if dims.trim().is_empty() {
            Vec::new()
        } else {
            dims.split(',')
                .map(|dim| dim.trim().parse::<u32>().map_err(|_| syntax("a dimension is no whole number")))
                .collect::<Result<_, _>>()?
        };
        let data = STANDARD.decode(data.trim()).map_err(|e| syntax(&format!("not base64: {e}")))?;
        Block::new(dtype, shape, data)
    }

    /// The elements as `f64`; `None` for types without numbers of that kind (complex, 4 and 8 bit floats and integers
    /// narrower than a byte).
    pub fn to_f64(&self) -> Option<Vec<f64>> {
        macro_rules! read {
            ($t:ty) => {
                self.data
                    .chunks_exact(std::mem::size_of::<$t>())
                    .map(|c| <$t>::from_le_bytes(c.try_into().expect("whole element")) as f64)
                    .collect()
            };
        }
        Some(match self.dtype {
            DType::Float32 => read!(f32),
            DType::Float64 => read!(f64),
            DType::Int8 => read!(i8),
            DType::UInt8 | DType::Bool => read!(u8),
            DType::Int16 => read!(i16),
            DType::UInt16 => read!(u16),
            DType::Int32 => read!(i32),
            DType::UInt32 => read!(u32),
            DType::Int64 => read!(i64),
            DType::UInt64 => read!(u64),
            DType::Float16 => self.pairs(|bits| half::f16::from_bits(bits).to_f64()),
            DType::BFloat16 => self.pairs(|bits| half::bf16::from_bits(bits).to_f64()),
            _ => return None,
        })
    }

    fn pairs(&self, value: impl Fn(u16) -> f64) -> Vec<f64> {
        self.data.chunks_exact(2).map(|c| value(u16::from_le_bytes([c[0], c[1]]))).collect()
    }
}

impl fmt::Display for Block<'_> {
    /// The text form.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[", self.dtype.name())?;
        for (i, dim) in self.shape.iter().enumerate() {
            write!(f, "{}{dim}", if i > 0 { "," } else { "" })?;
        }
        write!(f, "]:{}", STANDARD.encode(&self.data))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_reads_back_from_both_forms() {
        for &dtype in DType::ALL {
            let data: Vec<u8> = (0..dtype.byte_len(6).unwrap()).map(|i| i as u8).collect();
            let block = Block::new(dtype, vec![2, 3], data).unwrap();
            let binary = [block.head(), block.data().to_vec()].concat();
            assert_eq!(Block::decode(&binary).unwrap(), block);
            assert_eq!(Block::parse(&block.to_string()).unwrap(), block);
        }
    }

    #[test]
    fn a_scalar_and_an_empty_block_are_blocks() {
        assert_eq!(Block::parse("int8[]:BQ==").unwrap().data(), [5]);
        assert_eq!(Block::parse(" float32[0,7]: ").unwrap().shape(), [0, 7]);
    }

    #[test]
    fn what_is_no_block_is_refused() {
        assert_eq!(Block::decode(&[]), Err(BlockError::Truncated));
        assert_eq!(Block::decode(&[9, 1, 0, 0]), Err(BlockError::Version(9)));
        assert_eq!(Block::decode(&[1, 99, 0, 0]), Err(BlockError::DType("99".into())));
        assert_eq!(Block::decode(&[1, 1, 2, 0, 1, 0, 0, 0]), Err(BlockError::Truncated));
        let huge = [&[1u8, 1, 3, 0][..], &[255; 12]].concat();
        assert!(matches!(Block::decode(&huge), Err(BlockError::Shape(_))));
        assert!(matches!(Block::parse("float32[2]:AAAA"), Err(BlockError::Length { expected: 8, found: 3, .. })));
        for text in ["", "float32", "float32[1]", "float32[x]:AAAAAA==", "float32[1]:?", "text[1]:AA=="] {
            assert!(Block::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn numbers_come_out_as_they_are() {
        let block = Block::new(DType::Float16, vec![2], [0x00, 0x3c, 0x00, 0xc0].to_vec()).unwrap();
        assert_eq!(block.to_f64().unwrap(), [1.0, -2.0]);
    }
}
