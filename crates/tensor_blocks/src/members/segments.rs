//! How a model's tensors are cut into segments.

use super::UNIT;
use std::ops::Range;

/// Most bytes of a segment: a frame of the block cache.
pub const SEGMENT_MAX: usize = 64 << 10;
/// Most segments of a member: their numbers have 16 bits.
const COUNT_MAX: usize = u16::MAX as usize;

/// A part of a tensor that lies in one segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Number of the tensor.
    pub tensor: usize,
    /// Its first byte in the tensor.
    pub from: usize,
    /// The segment.
    pub segment: usize,
    /// Its first byte in the segment.
    pub at: usize,
    /// Its bytes.
    pub bytes: usize,
}

/// Why tensors cannot be cut.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SegmentsError {
    /// More segments than can be numbered.
    #[error("the parameters make more than 65535 segments of at most 64 kB")]
    TooMany,
}

/// The segments of every member of an architecture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segments {
    pieces: Vec<Piece>,
    /// By tensor, its pieces.
    of_tensor: Vec<Range<usize>>,
    sizes: Vec<usize>,
}

impl Segments {
    /// For tensors of so many bytes and dimensions, in the order of the graph. A tensor of two or more dimensions begins a layer
    /// and so a segment; what follows, such as its bias, belongs to it. A tensor above [`SEGMENT_MAX`] has several.
    ///
    /// # Errors
    /// [`SegmentsError::TooMany`].
    pub fn new(tensors: impl IntoIterator<Item = (usize, usize)>) -> Result<Segments, SegmentsError> {
        let mut made = Segments { pieces: Vec::new(), of_tensor: Vec::new(), sizes: Vec::new() };
        // Bytes of the segment that is open; none is with 0.
        let mut used = 0usize;
        for (tensor, (bytes, rank)) in tensors.into_iter().enumerate() {
            let first = made.pieces.len();
            let fits_alone = bytes <= SEGMENT_MAX;
            if (rank >= 2 || (fits_alone && used + bytes > SEGMENT_MAX)) && used > 0 {
                used = made.close(used);
            }
            let mut from = 0;
            while from < bytes {
                if used == SEGMENT_MAX {
                    used = made.close(used);
                }
                let count = (bytes - from).min(SEGMENT_MAX - used);
                made.pieces.push(Piece { tensor, from, segment: made.sizes.len(), at: used, bytes: count });
                (from, used) = (from + count, (used + count).next_multiple_of(UNIT));
            }
            made.of_tensor.push(first..made.pieces.len());
        }
        if used > 0 {
            made.close(used);
        }
        if made.sizes.len() > COUNT_MAX { Err(SegmentsError::TooMany) } else { Ok(made) }
    }

    fn close(&mut self, used: usize) -> usize {
        self.sizes.push(used);
        0
    }

    /// Number of segments.
    pub fn count(&self) -> usize {
        self.sizes.len()
    }

    /// Bytes of a segment.
    pub fn size(&self, segment: usize) -> usize {
        self.sizes[segment]
    }

    /// Bytes of all segments.
    pub fn bytes(&self) -> usize {
        self.sizes.iter().sum()
    }

    /// Number of tensors.
    pub fn tensors(&self) -> usize {
        self.of_tensor.len()
    }

    /// The pieces of a tensor, in order; none if it is empty.
    pub fn pieces(&self, tensor: usize) -> &[Piece] {
        &self.pieces[self.of_tensor[tensor].clone()]
    }

    /// Appends the tensors' bytes to `out` as one run of all segments, in order.
    ///
    /// # Panics
    /// If a tensor has not the bytes that it was announced with.
    pub fn gather<'a>(&self, tensor: impl Fn(usize) -> &'a [u8], out: &mut Vec<u8>) {
        let first = out.len();
        out.resize(first + self.bytes(), 0);
        let starts = self.starts();
        for number in 0..self.tensors() {
            let (bytes, pieces) = (tensor(number), self.pieces(number));
            assert_eq!(bytes.len(), pieces.iter().map(|piece| piece.bytes).sum::<usize>(), "bytes of tensor {number}");
            for piece in pieces {
                let to = first + starts[piece.segment] + piece.at;
                out[to..to + piece.bytes].copy_from_slice(&bytes[piece.from..piece.from + piece.bytes]);
            }
        }
    }

    /// Appends a tensor's bytes to `out`; `segment` gives the bytes of one.
    ///
    /// # Panics
    /// If a segment is shorter than it has to be.
    pub fn scatter<'a>(&self, tensor: usize, segment: impl Fn(usize) -> &'a [u8], out: &mut Vec<u8>) {
        for piece in self.pieces(tensor) {
            out.extend_from_slice(&segment(piece.segment)[piece.at..piece.at + piece.bytes]);
        }
    }

    /// Where each segment begins in the run of all, and behind the last where that ends.
    pub fn starts(&self) -> Vec<usize> {
        let mut starts = vec![0];
        starts.extend(self.sizes.iter().scan(0, |sum, size| {
            *sum += size;
            Some(*sum)
        }));
        starts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_follow_layers() {
        let net = [(960, 2), (192, 1), (9216, 2), (192, 1), (9216, 2), (192, 1), (192, 2), (4, 1)];
        let segments = Segments::new(net).unwrap();
        assert_eq!(segments.sizes, [1152, 9408, 9408, 196]);
        assert_eq!(segments.bytes(), 4 * 5041);
        assert_eq!(segments.pieces(1), [Piece { tensor: 1, from: 0, segment: 0, at: 960, bytes: 192 }]);
    }

    #[test]
    fn what_is_gathered_comes_back() {
        // Large ones, odd sizes, empty ones, one that does not fit behind another.
        let sizes = [(3, 1), (150_001, 2), (0, 2), (7, 0), (40_000, 1), (30_000, 1), (65_536, 2), (1, 1)];
        let tensors: Vec<Vec<u8>> = sizes
            .iter()
            .enumerate()
            .map(|(n, (bytes, _))| (0..*bytes).map(|at| (at * 31 + n * 7) as u8).collect())
            .collect();
        let segments = Segments::new(sizes).unwrap();
        assert!(
            (0..segments.count()).all(|n| segments.size(n) <= SEGMENT_MAX && segments.size(n).is_multiple_of(UNIT))
        );
        let (mut run, starts) = (Vec::new(), segments.starts());
        segments.gather(|n| &tensors[n], &mut run);
        assert_eq!(run.len(), *starts.last().unwrap());
        for (n, tensor) in tensors.iter().enumerate() {
            let mut back = Vec::new();
            segments.scatter(n, |segment| &run[starts[segment]..starts[segment + 1]], &mut back);
            assert_eq!(&back, tensor, "tensor {n}");
        }
        // A tensor that fits into one segment is in one.
        assert!((0..8).filter(|&n| n != 1).all(|n| segments.pieces(n).len() <= 1));
    }

    #[test]
    fn too_many_segments_are_refused() {
        assert_eq!(Segments::new((0..70_000).map(|_| (4, 2))), Err(SegmentsError::TooMany));
    }
}
