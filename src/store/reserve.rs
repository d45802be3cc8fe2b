//! Reservation of a block id and of space, on the metapage alone.
//!
//! A pure function of the metapage, so that it can be tried before the pages exist: the caller extends the file first
//! (the extension lock is never waited for under a content lock), then applies the same plan under the exclusive lock.

use super::format::{
    EXTENT_BYTES, EXTENT_PAGES, HEAD_PAGES, Locator, MAP_FANOUT, Meta, Path, ROOTS, extent_of, extent_start,
    position_of,
};
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

impl Reservation {
    /// Position of the payload's first byte, in bytes behind page headers.
    pub fn position(&self) -> u64 {
        position_of(u64::from(self.page)) + u64::from(self.offset)
    }
}

/// Why no block can be added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// All 2^32 - 1 block ids were handed out.
    BlockIds,
    /// The relation has reached PostgreSQL's limit of pages.
    Pages,
}

/// Where a payload of `len` bytes may begin in the free run `at .. end`; `None` if it does not fit.
///
/// A multiple of 8, and within one extent if the payload fits one; else at the beginning of one.
pub fn place(at: u64, end: u64, len: u32) -> Option<u64> {
    let len = u64::from(len);
    let mut start = at.next_multiple_of(8);
    if start >= end || start < position_of(u64::from(HEAD_PAGES)) {
        return None;
    }
    let extent = extent_of(start);
    let extent_at = position_of(extent_start(extent));
    if len > EXTENT_BYTES {
        if start != extent_at {
            start = position_of(extent_start(extent + 1));
        }
    } else if start + len > extent_at + EXTENT_BYTES {
        start = position_of(extent_start(extent + 1));
    }
    (start + len <= end).then_some(start)
}

/// Plans a block of `len` stored bytes (above 0) that needs `new_maps` new map or locator pages: with the next id, or
/// with `given` in a copy of another store.
///
/// Payloads go to the run that is being filled while they fit, else to a fresh extent; a payload larger than an extent
/// takes as many consecutive ones as it needs.
pub fn plan(meta: &Meta, len: u32, new_maps: u32, given: Option<u32>) -> Result<Reservation, Full> {
    let mut after = *meta;
    let block_id = given.unwrap_or(meta.next_block_id);
    if block_id == 0 || Path::of(block_id).root as usize >= ROOTS {
        return Err(Full::BlockIds);
    }
    if given.is_none() {
        after.next_block_id = block_id.wrapping_add(1); // 0 after the last one
    }

    let mut last_page = 0u64;
    if new_maps > 0 {
        last_page = u64::from(set_maps_aside(&mut after, new_maps)?) + u64::from(new_maps) - 1;
        // map_next itself moves when the caller makes the pages.
    }

    let position = match place(after.fill_at, after.fill_end, len) {
        Some(position) => position,
        None => {
            let extents = u64::from(len).div_ceil(EXTENT_BYTES) as u32;
            let start = take_extents(&mut after, extents)?;
            after.fill_end = position_of(u64::from(start) + u64::from(extents) * u64::from(EXTENT_PAGES));
            position_of(u64::from(start))
        }
    };
    let end = position + u64::from(len);
    after.fill_at = end.next_multiple_of(8).min(after.fill_end);
    after.stored_blocks = after.stored_blocks.saturating_add(1);
    after.stored_bytes = after.stored_bytes.saturating_add(u64::from(len));
    last_page = last_page.max((end - 1) / PAGE_BYTES as u64);

    Ok(Reservation {
        block_id,
        page: (position / PAGE_BYTES as u64) as u32,
        offset: (position % PAGE_BYTES as u64) as u32,
        pages_needed: u32::try_from(last_page + 1).map_err(|_| Full::Pages)?,
        meta: after,
    })
}

/// Plans those of `what`, from the first on, that lie behind the last of `run` without a gap of more than the alignment, and whose
/// locators are on the same page, so that all of them are written together.
pub fn plan_neighbours(run: &mut Vec<Reservation>, what: &[Locator]) {
    for locator in what {
        let last = &run[run.len() - 1];
        let (meta, len) = (&last.meta, locator.stored_len());
        let next = place(meta.fill_at, meta.fill_end, len).filter(|&start| start == meta.fill_at);
        if next.is_none() || Path::of(meta.next_block_id).leaf != Path::of(last.block_id).leaf {
            return;
        }
        let Ok(reservation) = plan(meta, len, 0, None) else { return };
        run.push(reservation);
    }
}

/// Makes sure that `count` pages are set aside for maps, and returns the first; taking them is the caller's.
pub fn set_maps_aside(meta: &mut Meta, count: u32) -> Result<u32, Full> {
    if u64::from(meta.map_next) + u64::from(count) > u64::from(meta.map_end) {
        let start = take_extents(meta, 1)?;
        meta.map_next = start;
        meta.map_end = start + EXTENT_PAGES;
    }
    Ok(meta.map_next)
}

/// Hands out `count` consecutive fresh extents; returns the first one's first page.
pub fn take_extents(meta: &mut Meta, count: u32) -> Result<u32, Full> {
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
            let r = plan(&meta, 65536 + 12, 0, None).unwrap();
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
            let r = plan(&meta, len, 0, None).unwrap();
            let start = u64::from(r.page) * PAGE_BYTES as u64 + u64::from(r.offset);
            assert!(start >= end && start.is_multiple_of(8) && r.block_id == id, "{id}");
            end = start + u64::from(len);
            assert!(u64::from(r.pages_needed) * PAGE_BYTES as u64 >= end);
            if len as u64 <= EXTENT_BYTES {
                assert_eq!(extent_of(start), extent_of(end - 1), "a block stays within its tensor page");
            }
            meta = r.meta;
        }
    }

    #[test]
    fn a_free_run_is_filled_before_a_fresh_extent_is_taken() {
        let mut meta = Meta::new([0; 32]);
        meta.next_extent = 7;
        let extent = position_of(extent_start(3));
        (meta.fill_at, meta.fill_end) = (extent + 16, extent + 16 + 1000);
        let r = plan(&meta, 900, 0, None).unwrap();
        assert_eq!((position_of(r.page.into()) + u64::from(r.offset), r.meta.next_extent), (extent + 16, 7));
        let r = plan(&r.meta, 200, 0, None).unwrap();
        assert_eq!((extent_of(position_of(r.page.into())), r.meta.next_extent), (7, 8));
    }

    #[test]
    fn places_keep_to_extents() {
        let at = |extent: u32| position_of(extent_start(extent));
        assert_eq!(place(at(0) + 1, at(2), 100), Some(at(0) + 8));
        assert_eq!(place(at(1) - 50, at(2), 100), Some(at(1)), "not across the boundary");
        assert_eq!(place(at(1) - 50, at(1), 100), None);
        assert_eq!(place(at(0) + 8, at(3), EXTENT_BYTES as u32 + 1), Some(at(1)));
        assert_eq!(place(at(0) + 8, at(2), EXTENT_BYTES as u32 + 1), None);
        assert_eq!(place(0, 0, 1), None);
    }

    #[test]
    fn neighbours_follow_each_other_on_one_page_of_locators() {
        let what = |len: u32| Locator { ext_info: len, raw_len: len, ..Locator::NONE };
        let mut meta = Meta::new([0; 32]);
        let lens: Vec<u32> = (0..1000u32).map(|i| 25 + i * 7919 % 90_001).collect();
        let mut left = &lens[..];
        let mut runs = 0;
        while let Some((&first, rest)) = left.split_first() {
            let mut run = vec![plan(&meta, first, 0, None).unwrap()];
            plan_neighbours(&mut run, &rest.iter().map(|&len| what(len)).collect::<Vec<_>>());
            for ((before, now), &len) in run.iter().zip(&run[1..]).zip(left) {
                let end = (before.position() + u64::from(len)).next_multiple_of(8);
                assert_eq!((now.position(), now.block_id), (end, before.block_id + 1));
                assert_eq!(Path::of(now.block_id).leaf, Path::of(before.block_id).leaf);
                assert_eq!(extent_of(now.position()), extent_of(before.position()));
            }
            // Planned one by one they would lie at the same places.
            for (at, &len) in run.iter().zip(left) {
                assert_eq!(plan(&meta, len, 0, None).unwrap(), *at);
                meta = at.meta;
            }
            left = &left[run.len()..];
            runs += 1;
        }
        assert!((80..200).contains(&runs), "{runs} runs");
        meta.next_block_id = u32::MAX;
        let mut last = vec![plan(&meta, 100, 0, None).unwrap()];
        plan_neighbours(&mut last, &[what(100)]);
        assert_eq!(last.len(), 1, "there is no id behind the last");
    }

    #[test]
    fn maps_get_an_extent_of_their_own_when_the_head_is_full() {
        let mut meta = Meta::new([0; 32]);
        meta.map_next = HEAD_PAGES - 1;
        let r = plan(&meta, 100, 2, None).unwrap();
        assert_eq!(r.meta.map_next, HEAD_PAGES);
        assert_eq!(r.meta.map_end, HEAD_PAGES + EXTENT_PAGES);
        assert_eq!(r.page, HEAD_PAGES + EXTENT_PAGES);
    }

    #[test]
    fn a_given_id_leaves_the_next_one_alone() {
        let meta = Meta::new([0; 32]);
        let r = plan(&meta, 100, 0, Some(77)).unwrap();
        assert_eq!((r.block_id, r.meta.next_block_id), (77, 1));
    }

    #[test]
    fn the_last_id_is_the_last() {
        let mut meta = Meta::new([0; 32]);
        meta.next_block_id = u32::MAX;
        let r = plan(&meta, 100, 0, None).unwrap();
        assert_eq!(r.block_id, u32::MAX);
        assert_eq!(plan(&r.meta, 100, 0, None), Err(Full::BlockIds));
        meta.next_extent = (u32::MAX - HEAD_PAGES) / EXTENT_PAGES;
        assert_eq!(plan(&meta, 600_000, 0, None), Err(Full::Pages));
    }
}
