//! Tests of the page formats.

use super::*;
use crate::pg::buffer::BLCKSZ;

#[test]
fn a_metapage_reads_back() {
    let mut page = vec![0u8; BLCKSZ];
    let mut meta = Meta::new([9; 32]);
    meta.roots[15] = 77;
    meta.stored_bytes = u64::MAX - 3;
    (meta.fill_at, meta.fill_end) = (16, 40);
    (meta.gap_page, meta.map_free) = (5, 6);
    meta.write(&mut page);
    assert_eq!(Meta::read(&page), Ok(meta));
}

#[test]
fn a_metapage_that_contradicts_itself_is_refused() {
    let mut page = vec![0u8; BLCKSZ];
    let mut meta = Meta::new([9; 32]);
    (meta.fill_at, meta.fill_end) = (48, 40);
    meta.write(&mut page);
    assert_eq!(Meta::read(&page), Err(FormatError::Unsound));
}

#[test]
fn a_newer_metapage_is_refused() {
    let mut page = vec![0u8; BLCKSZ];
    let mut meta = Meta::new([0; 32]);
    meta.version = FORMAT_VERSION + 1;
    meta.write(&mut page);
    assert_eq!(Meta::read(&page), Err(FormatError::Newer { found: FORMAT_VERSION + 1 }));
}

#[test]
fn locators_do_not_touch_their_neighbours() {
    let mut page = vec![0u8; BLCKSZ];
    let locator = |n: u32| Locator {
        hash: [n as u8; 32],
        page: n,
        offset: n + 1,
        ext_info: n + 2,
        raw_len: n + 3,
        version: n + 4,
        state: (n % 3) as u8,
        encoding: n as u8,
        reserved: n as u16 * 9,
        condemn_xid: u64::from(n) << 40,
    };
    for slot in 0..LOCATORS {
        locator(slot).write(&mut page, slot);
    }
    for slot in 0..LOCATORS {
        assert_eq!(Locator::read(&page, slot), locator(slot));
    }
}

#[test]
fn paths_are_unique_and_in_range() {
    let mut seen = std::collections::HashSet::new();
    for id in [1, 126, 127, 128, LOCATORS * MAP_FANOUT - 1, LOCATORS * MAP_FANOUT, u32::MAX - 1, u32::MAX] {
        let p = Path::of(id);
        assert!((p.root as usize) < ROOTS && p.upper < MAP_FANOUT && p.lower < MAP_FANOUT && p.slot < LOCATORS);
        assert!(seen.insert((p.root, p.upper, p.lower, p.slot)), "{id}");
    }
}

#[test]
fn a_row_says_of_a_block_what_is_there_unless_its_form_is_small() {
    let locator = Locator { ext_info: 77 | 1 << 30, raw_len: 100, ..Locator::NONE };
    assert_eq!(locator.reference(7), StandIn { raw_len: 100, block_id: 7, ext_info: 77 | 1 << 30 });
    let small = Locator { ext_info: 14, encoding: 1, ..locator };
    assert_eq!(small.reference(7), StandIn { raw_len: 100, block_id: 7, ext_info: 100 });
    assert_eq!((small.stored_len(), Locator { encoding: 99, ..small }.encoding()), (14, None));
}
