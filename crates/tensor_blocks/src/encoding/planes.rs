//! Byte planes, each in as few bytes as its bytes' frequencies allow.
//!
//! ```text
//!  | bytes of plane 0 | ... | bytes of plane W - 1 | plane 0 | ... | plane W - 1 |      W bytes an element
//!    u32 little-endian
//! ```
//! Plane p has byte p of each element, of n. It has n bytes if it is stored as it is, one if all its bytes are the same, else it is in
//! Huffman's code ([`super::huffman`]). Floating-point elements are rotated left by one bit before, which takes the sign to the low
//! end: the highest plane of float32 has whole exponents then, and these are what trained weights have in common (about 2.7
//! bits in 8), while their mantissas are noise. For the same reason there is nothing in them for a dictionary to find.

use super::{EncodingError, huffman, width_of};
use crate::DType;

/// The planes of elements of `dtype`; none unless they are smaller by a tenth.
pub(super) fn compress(dtype: DType, elements: &[u8]) -> Option<Vec<u8>> {
    let width = width_of(dtype);
    let len = elements.len() / width;
    if len < huffman::SMALLEST || u32::try_from(len).is_err() {
        return None;
    }
    let most = elements.len() - elements.len() / 10;
    let mut out = Vec::with_capacity(most);
    out.resize(4 * width, 0);
    let mut plane = vec![0; len];
    for p in 0..width {
        take_plane(dtype, elements, p, &mut plane);
        let start = out.len();
        if plane[1..] == plane[..len - 1] {
            out.push(plane[0]);
        } else if !huffman::encode(&plane, &mut out) {
            out.extend_from_slice(&plane);
        }
        let bytes = (out.len() - start) as u32;
        out[4 * p..4 * p + 4].copy_from_slice(&bytes.to_le_bytes());
        if out.len() > most {
            return None;
        }
    }
    Some(out)
}

/// Fills `out`, a whole number of elements of `dtype`, from their planes.
pub(super) fn decompress(dtype: DType, body: &[u8], out: &mut [u8]) -> Result<(), EncodingError> {
    let width = width_of(dtype);
    let len = out.len() / width;
    let short = EncodingError::Body { expected: 4 * width, found: body.len() };
    let (lengths, mut rest) = body.split_at_checked(4 * width).ok_or(short)?;
    let mut scratch = vec![0; out.len()];
    let mut room = scratch.as_mut_slice();
    let mut planes: [&[u8]; 16] = [&[]; 16];
    for (p, bytes) in lengths.as_chunks().0.iter().enumerate() {
        let (stored, after) =
            rest.split_at_checked(u32::from_le_bytes(*bytes) as usize).ok_or(EncodingError::Plane(p))?;
        rest = after;
        if stored.len() == len {
            planes[p] = stored;
            continue;
        }
        let (plane, next) = room.split_at_mut(len);
        room = next;
        match *stored {
            [byte] => plane.fill(byte),
            _ => huffman::decode(stored, plane).ok_or(EncodingError::Plane(p))?,
        }
        planes[p] = plane;
    }
    if !rest.is_empty() {
        return Err(EncodingError::Body { expected: body.len() - rest.len(), found: body.len() });
    }
    put_planes(dtype, &planes[..width], out);
    Ok(())
}

/// True for types whose sign is moved to the low end.
fn is_rotated(dtype: DType) -> bool {
    matches!(dtype, DType::Float32 | DType::Float64 | DType::Float16 | DType::BFloat16)
}

fn take_plane(dtype: DType, elements: &[u8], p: usize, plane: &mut [u8]) {
    macro_rules! rotated {
        ($t:ty) => {
            for (byte, e) in plane.iter_mut().zip(elements.as_chunks().0) {
                *byte = (<$t>::from_le_bytes(*e).rotate_left(1) >> (8 * p)) as u8;
            }
        };
    }
    match (is_rotated(dtype), width_of(dtype)) {
        (true, 2) => rotated!(u16),
        (true, 4) => rotated!(u32),
        (true, _) => rotated!(u64),
        (false, width) => {
            for (byte, e) in plane.iter_mut().zip(elements.chunks_exact(width)) {
                *byte = e[p];
            }
        }
    }
}

/// The inverse of [`take_plane`], of all planes.
fn put_planes(dtype: DType, planes: &[&[u8]], out: &mut [u8]) {
    match (is_rotated(dtype), planes) {
        (true, [a, b]) => {
            for (out, (a, b)) in out.as_chunks_mut().0.iter_mut().zip(a.iter().zip(*b)) {
                *out = u16::from_le_bytes([*a, *b]).rotate_right(1).to_le_bytes();
            }
        }
        (true, [a, b, c, d]) => {
            let planes = a.iter().zip(*b).zip(c.iter().zip(*d));
            for (out, ((a, b), (c, d))) in out.as_chunks_mut().0.iter_mut().zip(planes) {
                *out = u32::from_le_bytes([*a, *b, *c, *d]).rotate_right(1).to_le_bytes();
            }
        }
        (rotated, planes) => {
            let width = planes.len();
            for (p, plane) in planes.iter().enumerate() {
                for (out, byte) in out[p..].iter_mut().step_by(width).zip(*plane) {
                    *out = *byte;
                }
            }
            if rotated {
                for e in out.as_chunks_mut().0 {
                    *e = u64::from_le_bytes(*e).rotate_right(1).to_le_bytes();
                }
            }
        }
    }
}
