//! Directory entries: how a content hash and a block id are written into the TOAST relation's unique index.
//!
//! `chunk_id` is 32 bits of the hash under the store's own key, so that nobody can grind collisions; `chunk_seq` is the
//! block id, so that keys are always unique and REINDEX works; the TID only has to look valid to nbtree.

use super::Hash;
use pgrx::pg_sys;

/// Offsets used per block number in a directory entry's TID; below `MaxHeapTuplesPerPage` (291).
const IDS_PER_PAGE: u32 = 200;

/// 32 bits of the keyed hash of `hash`.
pub fn chunk_id(key: &[u8; 32], hash: &Hash) -> u32 {
    let keyed = blake3::keyed_hash(key, hash);
    u32::from_le_bytes(keyed.as_bytes()[..4].try_into().expect("four bytes"))
}

/// The TID that stands for a block id.
pub fn tid_of(block_id: u32) -> pg_sys::ItemPointerData {
    let page = block_id / IDS_PER_PAGE;
    pg_sys::ItemPointerData {
        ip_blkid: pg_sys::BlockIdData { bi_hi: (page >> 16) as u16, bi_lo: page as u16 },
        ip_posid: (block_id % IDS_PER_PAGE + 1) as u16,
    }
}

/// The block id for which a TID stands.
pub fn block_id_of(tid: pg_sys::ItemPointerData) -> u32 {
    let page = u32::from(tid.ip_blkid.bi_hi) << 16 | u32::from(tid.ip_blkid.bi_lo);
    page * IDS_PER_PAGE + (u32::from(tid.ip_posid) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tids_stand_for_ids() {
        for id in [1, 199, 200, 201, 65535 * 200, u32::MAX] {
            let tid = tid_of(id);
            assert_eq!(block_id_of(tid), id);
            assert!(tid.ip_posid >= 1 && tid.ip_posid <= 291);
        }
    }

    #[test]
    fn chunk_ids_depend_on_the_key() {
        assert_ne!(chunk_id(&[1; 32], &[7; 32]), chunk_id(&[2; 32], &[7; 32]));
    }
}
