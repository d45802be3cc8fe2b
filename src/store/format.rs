//! Page formats of the block store: metapage, map pages, locators. See `README.md` beside this file for the diagrams.
//!
//! Structs are read from and written to page bytes by copy, so nothing depends on a page's alignment in memory. Magic and
//! version come first; fields that a later version retires keep their place and name.

use crate::pg::buffer::{PAGE_BYTES, PAGE_HEADER};
use crate::pg::varlena::StandIn;
use tensor_blocks::encoding::Encoding;

/// 'TSRA', the first bytes of a metapage behind the page header.
pub const META_MAGIC: u32 = u32::from_le_bytes(*b"TSRA");
/// 'TSMP', a map page.
pub const MAP_MAGIC: u32 = u32::from_le_bytes(*b"TSMP");
/// 'TSLC', a page of locators.
pub const LOCATOR_MAGIC: u32 = u32::from_le_bytes(*b"TSLC");
/// 'TSFP', a page that was one of locators and is free for the tree and for gaps.
pub const FREE_MAGIC: u32 = u32::from_le_bytes(*b"TSFP");
/// 'TSGP', a page of gaps.
pub const GAP_MAGIC: u32 = u32::from_le_bytes(*b"TSGP");
/// Version that this library writes. It reads this one and all before it.
pub const FORMAT_VERSION: u16 = 1;

/// Pages at the start of a store: the metapage and the first map and locator pages.
pub const HEAD_PAGES: u32 = 8;
/// 8 kB pages of one tensor page: eight blocks of 64 kB with their headers, packed by bytes across page boundaries.
pub const EXTENT_PAGES: u32 = 65;
/// Payload bytes of one tensor page.
pub const EXTENT_BYTES: u64 = EXTENT_PAGES as u64 * PAGE_BYTES as u64;
/// Map entries of one map page.
pub const MAP_FANOUT: u32 = ((PAGE_BYTES - MAP_HEADER) / 4) as u32;
/// Locators of one locator page.
pub const LOCATORS: u32 = ((PAGE_BYTES - MAP_HEADER) / LOCATOR_BYTES) as u32;
/// Root entries of the metapage: enough for 2^32 block ids.
pub const ROOTS: usize = 16;
/// Bytes of magic, level and padding before the entries of a map or locator page.
pub const MAP_HEADER: usize = 8;
/// Bytes of one locator.
pub const LOCATOR_BYTES: usize = 64;
/// Bytes of magic, level, next page and count before the entries of a gap page.
pub const GAP_HEADER: usize = 16;
/// Gaps of one gap page.
pub const GAPS: usize = (PAGE_BYTES - GAP_HEADER) / 16;

const _: () = assert!(std::mem::size_of::<Meta>() == 168 && std::mem::size_of::<Locator>() == LOCATOR_BYTES);
const _: () = assert!(LEAF_NUMBER + 4 <= PAGE_HEADER + PAGE_BYTES);
const _: () = assert!(ROOTS as u64 * MAP_FANOUT as u64 * MAP_FANOUT as u64 * LOCATORS as u64 >= 1 << 32);

/// The metapage's content, behind the page header.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meta {
    /// [`META_MAGIC`].
    pub magic: u32,
    /// [`FORMAT_VERSION`] of the library that made the store.
    pub version: u16,
    /// None are defined; zero.
    pub flags: u16,
    /// Random key of this store: chunk ids are hashes keyed with it, so that collisions cannot be ground.
    pub hash_key: [u8; 32],
    /// The id that the next block gets. Ids only grow and skip 0.
    pub next_block_id: u32,
    /// Extents handed out so far, as tensor pages or as map extents.
    pub next_extent: u32,
    /// Next free page for maps, locators and gaps.
    pub map_next: u32,
    /// One past the last page set aside for these.
    pub map_end: u32,
    /// Content position at which the next payload begins, a multiple of 8.
    pub fill_at: u64,
    /// Content position at which the free run that is being filled ends.
    pub fill_end: u64,
    /// Blocks that have a locator.
    pub stored_blocks: u64,
    /// Their stored bytes.
    pub stored_bytes: u64,
    /// Upper map pages, 0 where there is none.
    pub roots: [u32; ROOTS],
    /// First page of gaps, 0 where there is none. These pages are chained, and kept when they are empty.
    pub gap_first: u32,
    /// Page of gaps from which space is taken; 0 when there are none left.
    pub gap_page: u32,
    /// First page of the chain of pages that are free for the tree and for gaps; 0 where there is none.
    pub map_free: u32,
    /// For later versions; zero.
    pub reserved: u32,
}

/// What a locator's block is, besides being condemned or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Whole: payload and directory entry are there.
    Live,
    /// Space is reserved; the payload or the directory entry may be missing. Stays so after a crash or an ERROR.
    Reserved,
    /// Being removed: no row references it, and the directory entry may be gone.
    Dying,
}

/// Where a block's payload is, and what it is.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Locator {
    /// BLAKE3 of the decompressed bytes: the block's identity.
    pub hash: [u8; 32],
    /// Page of the payload's first byte.
    pub page: u32,
    /// Offset of that byte behind the page's header.
    pub offset: u32,
    /// Stored bytes (low 30 bits) and compression method, as `va_extinfo`. 0: no such block. What rows say of a block in a
    /// small form is another thing: see [`Locator::reference`].
    pub ext_info: u32,
    /// Bytes of the value without its header, decompressed.
    pub raw_len: u32,
    /// Counts moves of the payload: who copies re-reads it and tries again if it changed.
    pub version: u32,
    /// [`State`]: 0 live, 1 reserved, 2 dying.
    pub state: u8,
    /// Code of the small form that is stored ([`Encoding`]), 0 for none.
    pub encoding: u8,
    /// For later versions; zero.
    pub reserved: u16,
    /// Full transaction id since which no row references the block; 0: not condemned.
    pub condemn_xid: u64,
}

impl Meta {
    /// The content of a new store's metapage.
    pub fn new(hash_key: [u8; 32]) -> Meta {
        Meta {
            magic: META_MAGIC,
            version: FORMAT_VERSION,
            flags: 0,
            hash_key,
            next_block_id: 1,
            next_extent: 0,
            map_next: 1,
            map_end: HEAD_PAGES,
            fill_at: 0,
            fill_end: 0,
            stored_blocks: 0,
            stored_bytes: 0,
            roots: [0; ROOTS],
            gap_first: 0,
            gap_page: 0,
            map_free: 0,
            reserved: 0,
        }
    }

    /// Reads a metapage. `Err` says what is wrong with it.
    pub fn read(page: &[u8]) -> Result<Meta, FormatError> {
        let mut r = Reader(&page[PAGE_HEADER..]);
        let meta = Meta {
            magic: r.u32(),
            version: r.u16(),
            flags: r.u16(),
            hash_key: r.array(),
            next_block_id: r.u32(),
            next_extent: r.u32(),
            map_next: r.u32(),
            map_end: r.u32(),
            fill_at: r.u64(),
            fill_end: r.u64(),
            stored_blocks: r.u64(),
            stored_bytes: r.u64(),
            roots: std::array::from_fn(|_| r.u32()),
            gap_first: r.u32(),
            gap_page: r.u32(),
            map_free: r.u32(),
            reserved: r.u32(),
        };
        if meta.magic != META_MAGIC {
            return Err(FormatError::Magic { found: meta.magic, expected: META_MAGIC });
        }
        if meta.version == 0 || meta.version > FORMAT_VERSION {
            return Err(FormatError::Newer { found: meta.version });
        }
        if !meta.is_sound() {
            return Err(FormatError::Unsound);
        }
        Ok(meta)
    }

    /// False if the fields contradict each other: who trusted them would write over pages that are in use.
    fn is_sound(&self) -> bool {
        let end = extent_start(self.next_extent);
        end <= u64::from(u32::MAX) // no page beyond
            && (1..=self.map_end).contains(&self.map_next)
            && u64::from(self.map_end) <= end
            && self.fill_at <= self.fill_end
            && self.fill_end <= position_of(end)
    }

    /// Writes the content behind the page header.
    pub fn write(&self, page: &mut [u8]) {
        let mut w = Writer(&mut page[PAGE_HEADER..]);
        w.put(&self.magic.to_le_bytes());
        w.put(&self.version.to_le_bytes());
        w.put(&self.flags.to_le_bytes());
        w.put(&self.hash_key);
        for v in [self.next_block_id, self.next_extent, self.map_next, self.map_end] {
            w.put(&v.to_le_bytes());
        }
        for v in [self.fill_at, self.fill_end, self.stored_blocks, self.stored_bytes] {
            w.put(&v.to_le_bytes());
        }
        for v in self.roots.iter().chain([&self.gap_first, &self.gap_page, &self.map_free, &self.reserved]) {
            w.put(&v.to_le_bytes());
        }
    }
}

impl Locator {
    /// Stored bytes of the payload; 0 where there is no block.
    pub fn stored_len(&self) -> u32 {
        self.ext_info & ((1 << 30) - 1)
    }

    /// The small form in which the payload is stored; `None` for one that this version does not know.
    pub fn encoding(&self) -> Option<Encoding> {
        Encoding::from_code(self.encoding)
    }

    /// What rows say of this block, number `block_id`. A small form is the store's own affair: to the world outside such a
    /// block is stored as it is, so that slices of it can be asked for, and its rows are the same in a copy that has it in
    /// another form.
    pub fn reference(&self, block_id: u32) -> StandIn {
        let ext_info = if self.encoding == 0 { self.ext_info } else { self.raw_len };
        StandIn { raw_len: self.raw_len, block_id, ext_info }
    }

    /// What the block is; `None` for a locator without a block, or with a state that this version does not know.
    pub fn state(&self) -> Option<State> {
        match (self.stored_len(), self.state) {
            (0, _) => None,
            (_, 0) => Some(State::Live),
            (_, 1) => Some(State::Reserved),
            (_, 2) => Some(State::Dying),
            _ => None,
        }
    }

    /// Sets what the block is.
    pub fn set_state(&mut self, state: State) {
        self.state = match state {
            State::Live => 0,
            State::Reserved => 1,
            State::Dying => 2,
        };
    }

    /// No block.
    pub const NONE: Locator = Locator {
        hash: [0; 32],
        page: 0,
        offset: 0,
        ext_info: 0,
        raw_len: 0,
        version: 0,
        state: 0,
        encoding: 0,
        reserved: 0,
        condemn_xid: 0,
    };

    /// Content positions that the payload takes.
    pub fn range(&self) -> std::ops::Range<u64> {
        let start = u64::from(self.page) * PAGE_BYTES as u64 + u64::from(self.offset);
        start..start + u64::from(self.stored_len())
    }

    /// Reads locator `slot` of a locator page.
    pub fn read(page: &[u8], slot: u32) -> Locator {
        let at = PAGE_HEADER + MAP_HEADER + slot as usize * LOCATOR_BYTES;
        let mut r = Reader(&page[at..at + LOCATOR_BYTES]);
        Locator {
            hash: r.array(),
            page: r.u32(),
            offset: r.u32(),
            ext_info: r.u32(),
            raw_len: r.u32(),
            version: r.u32(),
            state: r.u8(),
            encoding: r.u8(),
            reserved: r.u16(),
            condemn_xid: r.u64(),
        }
    }

    /// Writes locator `slot` of a locator page.
    pub fn write(&self, page: &mut [u8], slot: u32) {
        let at = PAGE_HEADER + MAP_HEADER + slot as usize * LOCATOR_BYTES;
        let mut w = Writer(&mut page[at..at + LOCATOR_BYTES]);
        w.put(&self.hash);
        for v in [self.page, self.offset, self.ext_info, self.raw_len, self.version] {
            w.put(&v.to_le_bytes());
        }
        w.put(&[self.state, self.encoding]);
        w.put(&self.reserved.to_le_bytes());
        w.put(&self.condemn_xid.to_le_bytes());
    }
}

/// The way from the metapage to a block's locator: indexes at each level of the radix tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    /// Number of the locator page among all: the ids from `leaf * LOCATORS` on.
    pub leaf: u32,
    /// Entry of the metapage's roots.
    pub root: u32,
    /// Entry of the upper map page.
    pub upper: u32,
    /// Entry of the lower map page.
    pub lower: u32,
    /// Locator of the locator page.
    pub slot: u32,
}

impl Path {
    /// The path of a block id.
    pub fn of(block_id: u32) -> Path {
        let leaf = block_id / LOCATORS;
        let lower_page = leaf / MAP_FANOUT;
        Path {
            leaf,
            root: lower_page / MAP_FANOUT,
            upper: lower_page % MAP_FANOUT,
            lower: leaf % MAP_FANOUT,
            slot: block_id % LOCATORS,
        }
    }
}

/// Offset of a locator page's own number, behind its locators.
const LEAF_NUMBER: usize = PAGE_HEADER + MAP_HEADER + LOCATORS as usize * LOCATOR_BYTES;

/// Writes magic, level and number of a locator page.
pub fn write_leaf_header(page: &mut [u8], leaf: u32) {
    write_map_header(page, LOCATOR_MAGIC, 0);
    page[LEAF_NUMBER..LEAF_NUMBER + 4].copy_from_slice(&leaf.to_le_bytes());
}

/// Checks that a page is the locator page of that number: one that was freed may have become anything of the tree.
pub fn check_leaf(page: &[u8], leaf: u32) -> Result<(), FormatError> {
    check_map_header(page, LOCATOR_MAGIC, 0)?;
    match Reader(&page[LEAF_NUMBER..]).u32() {
        found if found == leaf => Ok(()),
        found => Err(FormatError::Magic { found, expected: leaf }),
    }
}

/// Writes a free page of the chain whose next page is `next`.
pub fn write_free_page(page: &mut [u8], next: u32) {
    write_map_header(page, FREE_MAGIC, 0);
    page[PAGE_HEADER + MAP_HEADER..PAGE_HEADER + MAP_HEADER + 4].copy_from_slice(&next.to_le_bytes());
}

/// The page that follows in the chain of free pages.
pub fn next_free_page(page: &[u8]) -> u32 {
    Reader(&page[PAGE_HEADER + MAP_HEADER..]).u32()
}

/// Writes magic and level of a map or locator page.
pub fn write_map_header(page: &mut [u8], magic: u32, level: u16) {
    page[PAGE_HEADER..PAGE_HEADER + 4].copy_from_slice(&magic.to_le_bytes());
    page[PAGE_HEADER + 4..PAGE_HEADER + 6].copy_from_slice(&level.to_le_bytes());
}

/// Checks magic and level of a map or locator page.
pub fn check_map_header(page: &[u8], magic: u32, level: u16) -> Result<(), FormatError> {
    let mut r = Reader(&page[PAGE_HEADER..]);
    let (found, found_level) = (r.u32(), r.u16());
    if found != magic || found_level != level {
        return Err(FormatError::Magic { found, expected: magic });
    }
    Ok(())
}

/// The magic of a page that has one where magics are.
pub fn page_magic(page: &[u8]) -> Option<u32> {
    let magic = Reader(&page[PAGE_HEADER..]).u32();
    [META_MAGIC, MAP_MAGIC, LOCATOR_MAGIC, GAP_MAGIC, FREE_MAGIC].contains(&magic).then_some(magic)
}

/// Entries in use of a map page.
pub fn map_entries(page: &[u8]) -> i64 {
    (0..MAP_FANOUT).filter(|&at| map_entry(page, at) != 0).count() as i64
}

/// Locators in use of a locator page.
pub fn locator_entries(page: &[u8]) -> i64 {
    (0..LOCATORS).filter(|&slot| Locator::read(page, slot).stored_len() > 0).count() as i64
}

/// Reads entry `at` of a map page: a page number, 0 where there is none.
pub fn map_entry(page: &[u8], at: u32) -> u32 {
    let at = PAGE_HEADER + MAP_HEADER + at as usize * 4;
    u32::from_le_bytes(page[at..at + 4].try_into().expect("four bytes"))
}

/// Writes entry `at` of a map page.
pub fn set_map_entry(page: &mut [u8], at: u32, value: u32) {
    let at = PAGE_HEADER + MAP_HEADER + at as usize * 4;
    page[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// First page of an extent.
pub fn extent_start(extent: u32) -> u64 {
    HEAD_PAGES as u64 + extent as u64 * EXTENT_PAGES as u64
}

/// Content position of a page's first byte behind its header. Positions count the content of all pages of the file as
/// one run of bytes.
pub fn position_of(page: u64) -> u64 {
    page * PAGE_BYTES as u64
}

/// The extent in which a content position lies. The head pages are in none.
pub fn extent_of(position: u64) -> u32 {
    ((position / PAGE_BYTES as u64 - u64::from(HEAD_PAGES)) / u64::from(EXTENT_PAGES)) as u32
}

/// A run of free bytes in tensor pages, as content positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Gap {
    /// First free position, a multiple of 8.
    pub start: u64,
    /// One past the last.
    pub end: u64,
}

/// Content of a gap page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GapPage {
    /// The next page of the chain, 0 for the last.
    pub next: u32,
    /// The gaps, lowest first; at most [`GAPS`].
    pub gaps: Vec<Gap>,
}

impl GapPage {
    /// Reads a page whose magic was checked. A count beyond the page is cut off: gaps are taken only if they hold.
    pub fn read(page: &[u8]) -> GapPage {
        let mut r = Reader(&page[PAGE_HEADER + 8..]);
        let (next, count) = (r.u32(), r.u32());
        let gaps = (0..(count as usize).min(GAPS)).map(|_| Gap { start: r.u64(), end: r.u64() }).collect();
        GapPage { next, gaps }
    }

    /// The gaps that may be used: those that lie in extents below `next_extent`.
    pub fn usable(&self, next_extent: u32) -> impl Iterator<Item = (usize, &Gap)> {
        let within = position_of(u64::from(HEAD_PAGES))..=position_of(extent_start(next_extent));
        let sound = move |gap: &Gap| gap.start <= gap.end && within.contains(&gap.start) && within.contains(&gap.end);
        self.gaps.iter().enumerate().filter(move |(_, gap)| sound(gap))
    }

    /// False for a payload whose bytes happen to begin like a gap page.
    pub fn is_plausible(&self, pages: u32) -> bool {
        let limit = position_of(u64::from(pages).next_multiple_of(u64::from(EXTENT_PAGES)) + u64::from(EXTENT_PAGES));
        self.next < pages && self.gaps.iter().all(|gap| gap.start < gap.end && gap.end <= limit)
    }

    /// Writes the content behind the page header.
    pub fn write(&self, page: &mut [u8]) {
        write_map_header(page, GAP_MAGIC, 0);
        let mut w = Writer(&mut page[PAGE_HEADER + 8..]);
        w.put(&self.next.to_le_bytes());
        w.put(&(self.gaps.len() as u32).to_le_bytes());
        for gap in &self.gaps {
            w.put(&gap.start.to_le_bytes());
            w.put(&gap.end.to_le_bytes());
        }
    }
}

/// What is wrong with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FormatError {
    /// Not the kind of page that was expected.
    Magic { found: u32, expected: u32 },
    /// Written by a newer library.
    Newer { found: u16 },
    /// Its fields contradict each other.
    Unsound,
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> [u8; N] {
        let (head, tail) = self.0.split_at(N);
        self.0 = tail;
        head.try_into().expect("split at N")
    }
    fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.array())
    }
    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }
    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }
    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }
}

struct Writer<'a>(&'a mut [u8]);

impl Writer<'_> {
    fn put(&mut self, bytes: &[u8]) {
        let (head, tail) = std::mem::take(&mut self.0).split_at_mut(bytes.len());
        head.copy_from_slice(bytes);
        self.0 = tail;
    }
}

#[cfg(test)]
#[path = "format_tests.rs"]
mod tests;
