//! Huffman codes of bytes: what is left to gain in a plane whose bytes are independent of each other but not equally frequent.
//!
//! ```text
//!  | first | last | a nibble a byte value of first ..= last | length of stream 0, 1, 2 | stream 0 .. 3 | 8 zeros |
//!    u8      u8     bits of its code, 0: does not occur        u32 little-endian, bytes
//! ```
//! The bytes are coded in four quarters, each a stream of its own, so that a processor decodes four codes at a time. Codes are
//! canonical: those of one length ascend with the byte values. Each stands in its stream with its first bit lowest, from the
//! lowest bit of the first byte on. The zeros are there so that eight bytes can be read anywhere in a stream.

/// Bits of the longest code. The table of 2^11 entries of two bytes lies in the first-level cache.
const LONGEST: u32 = 11;
const TABLE: usize = 1 << LONGEST;
/// Codes that one reading of 64 bits holds for sure, wherever it begins in its first byte.
const CODES: usize = 57 / LONGEST as usize;
/// Zeros behind the streams.
const PAD: usize = 8;
/// Fewest bytes that are coded: four quarters with something in each.
pub(super) const SMALLEST: usize = 64;

/// Appends the coded form of `bytes`; false, and nothing is appended, if it would not be smaller by a 32nd at least, or if there
/// are less than [`SMALLEST`].
pub(super) fn encode(bytes: &[u8], out: &mut Vec<u8>) -> bool {
    let counts = count(bytes);
    let symbols = counts.iter().filter(|count| **count > 0).count();
    if bytes.len() < SMALLEST || symbols < 2 || u32::try_from(bytes.len()).is_err() {
        return false;
    }
    let lengths = code_lengths(&counts);
    let first = lengths.iter().position(|len| *len > 0).unwrap_or(0);
    let last = lengths.iter().rposition(|len| *len > 0).unwrap_or(255);
    let bits: u64 = counts.iter().zip(&lengths).map(|(&count, &len)| u64::from(count) * u64::from(len)).sum();
    let head = 2 + (last - first + 2) / 2 + 12 + PAD + 4;
    if bits / 8 + head as u64 > (bytes.len() - bytes.len() / 32) as u64 {
        return false;
    }
    let codes = codes(&lengths);
    out.extend([first as u8, last as u8]);
    out.extend(lengths[first..=last].chunks(2).map(|pair| pair[0] | pair.get(1).unwrap_or(&0) << 4));
    let sizes = out.len();
    out.resize(sizes + 12, 0);
    for (stream, quarter) in bytes.chunks(bytes.len().div_ceil(4)).enumerate() {
        let start = out.len();
        let (mut held, mut bits) = (0u64, 0u32);
        for &byte in quarter {
            let (code, len) = codes[usize::from(byte)];
            held |= u64::from(code) << bits;
            bits += len;
            if bits >= 32 {
                out.extend_from_slice(&(held as u32).to_le_bytes());
                held >>= 32;
                bits -= 32;
            }
        }
        out.extend_from_slice(&held.to_le_bytes()[..bits.div_ceil(8) as usize]);
        if stream < 3 {
            let len = (out.len() - start) as u32;
            out[sizes + 4 * stream..][..4].copy_from_slice(&len.to_le_bytes());
        }
    }
    out.extend_from_slice(&[0; PAD]);
    true
}

/// Fills `out` with the bytes of which `coded` is the form. None if it is not, or is of another number of bytes; `out` has
/// anything then.
pub(super) fn decode(coded: &[u8], out: &mut [u8]) -> Option<()> {
    let (&[first, last], rest) = coded.split_first_chunk::<2>()?;
    let (nibbles, rest) = rest.split_at_checked((usize::from(last.checked_sub(first)?) + 2) / 2)?;
    let (sizes, streams) = rest.split_first_chunk::<12>()?;
    let mut lengths = [0u8; 256];
    for (at, len) in lengths[usize::from(first)..=usize::from(last)].iter_mut().enumerate() {
        *len = nibbles[at / 2] >> (4 * (at % 2)) & 0xf;
    }
    let table = table(&lengths)?;
    if out.len() < SMALLEST {
        return None;
    }

    // Each stream's first bit and the bit behind its last byte.
    let mut at = [0usize; 4];
    let mut ends = [0usize; 4];
    let mut start = 0usize;
    let last_size = |start: usize| streams.len().checked_sub(start)?.checked_sub(PAD);
    for stream in 0..4 {
        let size = match sizes.as_chunks().0.get(stream) {
            Some(size) => u32::from_le_bytes(*size) as usize,
            None => last_size(start)?,
        };
        at[stream] = start * 8;
        start = start.checked_add(size)?;
        ends[stream] = start.checked_mul(8)?;
    }
    last_size(start).filter(|left| *left == 0)?;

    let quarter = out.len().div_ceil(4);
    let mut quarters = out.chunks_mut(quarter);
    let mut outs: [&mut [u8]; 4] = [quarters.next()?, quarters.next()?, quarters.next()?, quarters.next()?];
    let groups = outs[3].len() / CODES;
    {
        let [a, b, c, d] = &mut outs;
        let all = a.as_chunks_mut::<CODES>().0.iter_mut().zip(b.as_chunks_mut::<CODES>().0);
        let all = all.zip(c.as_chunks_mut::<CODES>().0.iter_mut().zip(d.as_chunks_mut::<CODES>().0));
        for ((a, b), (c, d)) in all {
            let mut words =
                [word(streams, at[0])?, word(streams, at[1])?, word(streams, at[2])?, word(streams, at[3])?];
            for i in 0..CODES {
                for (stream, out) in [&mut *a, &mut *b, &mut *c, &mut *d].into_iter().enumerate() {
                    let entry = table[words[stream] as usize % TABLE];
                    words[stream] >>= entry >> 8;
                    at[stream] += usize::from(entry >> 8);
                    out[i] = entry as u8;
                }
            }
        }
    }
    for (stream, out) in outs.into_iter().enumerate() {
        let at = &mut at[stream];
        for byte in &mut out[groups * CODES..] {
            let entry = table[word(streams, *at)? as usize % TABLE];
            *at += usize::from(entry >> 8);
            *byte = entry as u8;
        }
        // The last code ends in the stream's last byte.
        if at.next_multiple_of(8) != ends[stream] {
            return None;
        }
    }
    Some(())
}

/// At least 57 bits from bit `at` on.
fn word(streams: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*streams.get(at / 8..)?.first_chunk()?) >> (at % 8))
}

/// How often each byte value occurs.
fn count(bytes: &[u8]) -> [u32; 256] {
    // Two counts, so that equal neighbours do not wait for each other.
    let mut counts = [[0u32; 256]; 2];
    for pair in bytes.chunks(2) {
        for (counts, &byte) in counts.iter_mut().zip(pair) {
            counts[usize::from(byte)] += 1;
        }
    }
    std::array::from_fn(|byte| counts[0][byte] + counts[1][byte])
}

/// Bits of each value's code, at most [`LONGEST`]; 0 for values that do not occur. Two values occur at least.
fn code_lengths(counts: &[u32; 256]) -> [u8; 256] {
    let mut leaves: Vec<(u64, u8)> = (0..=255u8)
        .filter(|&byte| counts[usize::from(byte)] > 0)
        .map(|byte| (counts[usize::from(byte)].into(), byte))
        .collect();
    leaves.sort_unstable();
    loop {
        let depths = depths(&leaves);
        if depths.iter().all(|depth| *depth <= LONGEST) {
            let mut lengths = [0; 256];
            for (&(_, byte), depth) in leaves.iter().zip(depths) {
                lengths[usize::from(byte)] = depth as u8;
            }
            return lengths;
        }
        // Flatter, and still in order.
        leaves.iter_mut().for_each(|(count, _)| *count = count.div_ceil(2));
    }
}

/// Depth of each leaf in Huffman's tree; the leaves are sorted by weight. Nodes are made in the order of their weights, so
/// the two lightest are always the first of the leaves or of the nodes that have no parent yet.
fn depths(leaves: &[(u64, u8)]) -> Vec<u32> {
    let count = leaves.len();
    let mut weights: Vec<u64> = leaves.iter().map(|(weight, _)| *weight).collect();
    let mut parents = vec![0; 2 * count - 1];
    let (mut leaf, mut node) = (0, count);
    for parent in count..2 * count - 1 {
        let mut weight = 0;
        for _ in 0..2 {
            let take_leaf = leaf < count && (node >= parent || weights[leaf] <= weights[node]);
            let child = if take_leaf { &mut leaf } else { &mut node };
            weight += weights[*child];
            parents[*child] = parent;
            *child += 1;
        }
        weights.push(weight);
    }
    let mut depths = vec![0; 2 * count - 1];
    for child in (0..2 * count - 2).rev() {
        depths[child] = depths[parents[child]] + 1;
    }
    depths.truncate(count);
    depths
}

/// The code of each value, first bit lowest, and its bits.
fn codes(lengths: &[u8; 256]) -> [(u32, u32); 256] {
    let mut codes = [(0, 0); 256];
    let mut next = 0u32;
    for len in 1..=LONGEST {
        for byte in (0..256).filter(|&byte| u32::from(lengths[byte]) == len) {
            codes[byte] = (next.reverse_bits() >> (32 - len), len);
            next += 1;
        }
        next <<= 1;
    }
    codes
}

/// What each [`LONGEST`] bits begin with: the value in the low byte, the bits of its code in the high one. None unless the codes
/// leave no bits without one.
fn table(lengths: &[u8; 256]) -> Option<[u16; TABLE]> {
    let used = || lengths.iter().filter(|len| **len > 0);
    let room: usize = used().map(|&len| if u32::from(len) > LONGEST { TABLE + 1 } else { TABLE >> len }).sum();
    if room != TABLE || used().count() < 2 {
        return None;
    }
    let mut table = [0u16; TABLE];
    for (byte, (code, len)) in codes(lengths).into_iter().enumerate().filter(|(_, (_, len))| *len > 0) {
        for entry in table[code as usize..].iter_mut().step_by(1 << len) {
            *entry = byte as u16 | (len as u16) << 8;
        }
    }
    Some(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn there_and_back(bytes: &[u8]) -> Option<usize> {
        let mut coded = Vec::new();
        encode(bytes, &mut coded).then(|| {
            let mut back = vec![0xee; bytes.len()];
            assert_eq!(decode(&coded, &mut back), Some(()));
            assert!(back == bytes);
            coded.len()
        })
    }

    #[test]
    fn bytes_of_any_number_and_frequency_come_back() {
        let mut seed = 1u32;
        let mut random = || {
            seed = seed.wrapping_mul(1664525).wrapping_add(1013904223);
            seed >> 8
        };
        for len in (SMALLEST..200).chain([1000, 4095, 16384, 65537]) {
            for spread in [1, 2, 7, 20] {
                let bytes: Vec<u8> =
                    (0..len).map(|_| (random() % (1 << (random() % spread + 1)) % 251) as u8).collect();
                there_and_back(&bytes);
            }
        }
        // Frequencies of which the rarest would have codes of twenty bits.
        let steep: Vec<u8> = (0..20u8).flat_map(|byte| vec![byte; 1 << (19 - byte)]).collect();
        assert!(there_and_back(&steep).unwrap() < steep.len() / 3);
    }

    #[test]
    fn the_code_is_as_short_as_entropy_allows() {
        // Frequencies that are powers of two have an exact code: 1/2, 1/4, 1/8, 1/8.
        let bytes: Vec<u8> = (0..16000).map(|i| [9, 9, 9, 9, 7, 7, 200, 3][i % 8]).collect();
        let len = there_and_back(&bytes).unwrap();
        assert_eq!(len, 16000 * 7 / 4 / 8 + 2 + 99 + 12 + PAD);
    }

    #[test]
    fn what_would_not_be_smaller_is_refused() {
        let mut out = vec![1, 2, 3];
        assert!(!encode(&[7; 5000], &mut out), "one value");
        assert!(!encode(&(0..=255).cycle().take(5000).collect::<Vec<u8>>(), &mut out), "all equally frequent");
        assert!(!encode(&[1, 2], &mut out));
        assert_eq!(out, [1, 2, 3]);
    }
}
