//! Reservation of a block id and of space, on the metapage alone.
//!
//! A pure function of the metapage, so that it can be tried before the pages exist: the caller extends the file first
//! (the extension lock is never waited for under a content lock), then applies the same plan under the exclusive lock.

use super::format::{EXTENT_BYTES, EXTENT_PAGES, HEAD_PAGES, MAP_FANOUT, Meta, Path, ROOTS, extent_start};
use crate::pg::buffer::PAGE_BYTES;

/// What a new block gets, and the metapage after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reservation {
    /// The block's id.
    pub block_id: u32,
    /// Page of the payload's first byte.
    pub page: u32,
    /// Its offset behind the page header.
    pub offset: u32,
    /// Pages that the file must have before the reservation is applied.
    pub pages_needed: u32,
    /// The metapage afterwards.
    pub meta: Meta,
}

/// Why no block can be added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// All 2^32 - 1 block ids were handed out.
    BlockIds,
    /// The relation has reached PostgreSQL's limit of pages.
    Pages,
}

/// New map pages that the next id needs, above those that exist: decided by the caller, who alone can read map pages.
pub type NewMaps = u32;

/// Plans a block of `len` stored bytes (above 0) that needs `new_maps` new map or locator pages.
///
/// Payloads go to the current tensor page while they fit, else to the next one; a payload larger than a tensor page
/// takes as many consecutive ones as it needs. Offsets are multiples of 8.
pub fn plan(meta: &Meta, len: u32, new_maps: NewMaps) -> Result<Reservation, Full> {
    let mut after = *meta;
    let block_id = meta.next_block_id;
    if block_id == 0 {
        return Err(Full::BlockIds);
    }
    after.next_block_id = block_id.wrapping_add(1); // 0 after the last one
    if Path::of(block_id).root as usize >= ROOTS {
        return Err(Full::BlockIds);
    }

    let mut last_page = 0u64;
    if u64::from(after.map_next) + u64::from(new_maps) > u64::from(after.map_end) {
        let start = take_extents(&mut after, 1)?;
        after.map_next = start;
        after.map_end = start + EXTENT_PAGES;
    }
    if new_maps > 0 {
        last_page = last_page.max(u64::from(after.map_next) + u64::from(new_maps) - 1);
        // map_next itself moves when the caller makes the pages.
    }

    let len = u64::from(len);
    let used = u64::from(after.fill_used);
    let position = if used > 0 && used + len <= EXTENT_BYTES {
        extent_start(after.fill_extent) * PAGE_BYTES as u64 + used
    } else {
        let extents = len.div_ceil(EXTENT_BYTES).max(1) as u32;
        let start = take_extents(&mut after, extents)?;
        after.fill_extent = (start - HEAD_PAGES) / EXTENT_PAGES + extents - 1;
        u64::from(start) * PAGE_BYTES as u64
    };
    let end = position + len;
    let fill_start = extent_start(after.fill_extent) * PAGE_BYTES as u64;
    after.fill_used = (end - fill_start).next_multiple_of(8).min(EXTENT_BYTES) as u32;
    after.stored_blocks += 1;
    after.stored_bytes += len;
    last_page = last_page.max((end - 1) / PAGE_BYTES as u64);

    Ok(Reservation {
        block_id,
        page: (position / PAGE_BYTES as u64) as u32,
        offset: (position % PAGE_BYTES as u64) as u32,
        pages_needed: u32::try_from(last_page + 1).map_err(|_| Full::Pages)?,
        meta: after,
    })
}

fn take_extents(meta: &mut Meta, count: u32) -> Result<u32, Full> {
    let start = extent_start(meta.next_extent);
    let end = start + u64::from(count) * u64::from(EXTENT_PAGES);
    // MaxBlockNumber is 0xFFFFFFFE.
    if end > 0xFFFF_FFFE {
        return Err(Full::Pages);
    }
    meta.next_extent += count;
    Ok(start as u32)
}

const _: () = assert!(MAP_FANOUT > 2000);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_blocks_of_64_kb_fill_a_tensor_page() {
        let mut meta = Meta::new([0; 32]);
        let mut extents = Vec::new();
        for _ in 0..17 {
            let r = plan(&meta, 65536 + 12, 0).unwrap();
            extents.push((r.page - HEAD_PAGES) / EXTENT_PAGES);
            meta = r.meta;
        }
        assert_eq!(extents, [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2]);
        assert_eq!(meta.stored_blocks, 17);
    }

    #[test]
    fn payloads_never_overlap_and_ids_only_grow() {
        let mut meta = Meta::new([0; 32]);
        let mut end = 0u64;
        let mut seed = 1u64;
        for id in 1..5000u32 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let len = match seed >> 60 {
                0 => 3_000_000,
                n => 25 + (seed >> 33) as u32 % (n as u32 * 9000),
            };
            let r = plan(&meta, len, 0).unwrap();
            let start = u64::from(r.page) * PAGE_BYTES as u64 + u64::from(r.offset);
            assert!(start >= end && start.is_multiple_of(8) && r.block_id == id, "{id}");
            end = start + u64::from(len);
            assert!(u64::from(r.pages_needed) * PAGE_BYTES as u64 >= end);
            if len as u64 <= EXTENT_BYTES {
                let extent = |p: u64| (p / PAGE_BYTES as u64 - u64::from(HEAD_PAGES)) / u64::from(EXTENT_PAGES);
                assert_eq!(extent(start), extent(end - 1), "a block stays within its tensor page");
            }
            meta = r.meta;
        }
    }

    #[test]
    fn maps_get_an_extent_of_their_own_when_the_head_is_full() {
        let mut meta = Meta::new([0; 32]);
        meta.map_next = HEAD_PAGES - 1;
        let r = plan(&meta, 100, 2).unwrap();
        assert_eq!(r.meta.map_next, HEAD_PAGES);
        assert_eq!(r.meta.map_end, HEAD_PAGES + EXTENT_PAGES);
        assert_eq!(r.page, HEAD_PAGES + EXTENT_PAGES);
    }

    #[test]
    fn the_last_id_is_the_last() {
        let mut meta = Meta::new([0; 32]);
        meta.next_block_id = u32::MAX;
        let r = plan(&meta, 100, 0).unwrap();
        assert_eq!(r.block_id, u32::MAX);
        assert_eq!(plan(&r.meta, 100, 0), Err(Full::BlockIds));
        meta.next_extent = (u32::MAX - HEAD_PAGES) / EXTENT_PAGES;
        assert_eq!(plan(&meta, 600_000, 0), Err(Full::Pages));
    }
}
