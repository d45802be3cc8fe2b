//! How a block store fills its tensor pages, and what reading a tensor then costs.

use std::collections::BTreeMap;

/// Bytes of payload on a tensor page of the block store: eight blocks of 65,548 bytes, and 6.5 kB.
pub const TENSOR_PAGE_BYTES: u64 = 530_920;

/// Payloads start at multiples of this.
const ALIGNMENT: u64 = 8;

/// A block, as its place on pages depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockUse<'a> {
    /// Stored bytes; 0 is taken as 1.
    pub bytes: u32,
    /// Keys of the tensors that reference the block. Any order will do; one that comes twice counts once.
    pub tensors: &'a [u64],
}

/// What reading one tensor costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorReads {
    /// The tensor's key.
    pub tensor: u64,
    /// Tensor pages that hold bytes of its blocks.
    pub pages: u64,
    /// Stored bytes of its blocks.
    pub bytes: u64,
    /// Pages that so many bytes fill: ceil(`bytes` / capacity). A tensor of blocks that leave a rest on each page
    /// cannot always be had with so few.
    pub fewest: u64,
}

/// What an order of blocks costs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageReads {
    /// Tensor pages that are taken.
    pub pages: u64,
    /// Each tensor that references a block, by key.
    pub tensors: Vec<TensorReads>,
}

impl PageReads {
    /// Pages read when every tensor is read once.
    pub fn pages_read(&self) -> u64 {
        self.tensors.iter().map(|reads| reads.pages).sum()
    }

    /// The sum of [`TensorReads::fewest`].
    pub fn fewest(&self) -> u64 {
        self.tensors.iter().map(|reads| reads.fewest).sum()
    }

    /// Read amplification over all tensors: pages read by fewest; 1 where there is nothing to read.
    pub fn amplification(&self) -> f64 {
        if self.fewest() == 0 { 1.0 } else { self.pages_read() as f64 / self.fewest() as f64 }
    }
}

/// The cost of laying out `blocks` in `order` (indexes into `blocks`) on tensor pages of `page_bytes`.
///
/// An index that is none of a block is passed over. Time O(R log T) for R references of T tensors.
pub fn page_reads(blocks: &[BlockUse], order: &[u32], page_bytes: u64) -> PageReads {
    let mut filler = Filler::new(page_bytes);
    let mut reads: BTreeMap<u64, (Seen, u64)> = BTreeMap::new();
    let mut tensors = Vec::new();
    for block in order.iter().filter_map(|&at| blocks.get(at as usize)) {
        let place = filler.add(u64::from(block.bytes));
        tensors.clear();
        tensors.extend_from_slice(block.tensors);
        tensors.sort_unstable();
        tensors.dedup();
        for tensor in &tensors {
            let (seen, bytes) = reads.entry(*tensor).or_default();
            seen.see(place);
            *bytes += u64::from(block.bytes.max(1));
        }
    }
    let tensors = reads
        .into_iter()
        .map(|(tensor, (seen, bytes))| TensorReads {
            tensor,
            pages: seen.pages,
            bytes,
            fewest: bytes.div_ceil(page_bytes.max(1)),
        })
        .collect();
    PageReads { pages: filler.pages, tensors }
}

/// Pages of a block, by number: the first and the last.
pub(super) type Place = (u64, u64);

/// The store's rule: a block goes to the current page if it fits there, else to a new one; one that is larger than a
/// page starts a page and takes as many as it needs. The rest of its last page is filled further.
pub(super) struct Filler {
    page_bytes: u64,
    /// Pages taken; the last of them is the current one.
    pub pages: u64,
    used: u64,
}

impl Filler {
    pub fn new(page_bytes: u64) -> Filler {
        Filler { page_bytes: page_bytes.max(1), pages: 0, used: 0 }
    }

    /// Whether a block of `bytes` would go to the current page.
    pub fn fits(&self, bytes: u64) -> bool {
        self.used > 0 && self.used + bytes.max(1) <= self.page_bytes
    }

    pub fn add(&mut self, bytes: u64) -> Place {
        let bytes = bytes.max(1);
        if !self.fits(bytes) {
            let first = self.pages;
            self.pages += bytes.div_ceil(self.page_bytes);
            self.used = bytes - (self.pages - first - 1) * self.page_bytes;
            self.align();
            return (first, self.pages - 1);
        }
        self.used += bytes;
        self.align();
        (self.pages - 1, self.pages - 1)
    }

    fn align(&mut self) {
        self.used = self.used.next_multiple_of(ALIGNMENT).min(self.page_bytes);
    }
}

/// Room that a block takes on a page with others.
pub(super) fn room(bytes: u32) -> u64 {
    u64::from(bytes.max(1)).next_multiple_of(ALIGNMENT)
}

/// Pages on which a tensor was met, while pages are filled one after the other.
#[derive(Clone, Copy, Default)]
pub(super) struct Seen {
    pub pages: u64,
    /// Pages before this one were counted if they had to be.
    next: u64,
}

impl Seen {
    pub fn see(&mut self, (first, last): Place) {
        if last >= self.next {
            self.pages += last + 1 - first.max(self.next);
            self.next = last + 1;
        }
    }
}
