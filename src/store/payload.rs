//! Payload bytes: runs of pages whose 8,168 bytes behind the header follow each other without gaps.

use crate::pg::buffer::{PAGE_BYTES, PAGE_HEADER, Pinned, content_end, is_new, set_content_end};
use crate::pg::relation::needs_wal;
use crate::pg::wal::{self, GenericRecord, write_new_page};
use crate::pg::{error, interrupt};
use pgrx::pg_sys;
use pgrx::prelude::*;

/// Pages between two looks at pending interrupts: 512 kB, well below a millisecond.
const PAGES_PER_CHECK: usize = 64;

/// Splits `len` bytes at `offset` behind the header of `page` into runs within pages: `(page, offset in page, range)`.
fn pieces(page: u32, offset: u64, len: usize) -> impl Iterator<Item = (u32, usize, std::ops::Range<usize>)> {
    let mut done = 0usize;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let at = offset + done as u64;
        let in_page = (at % PAGE_BYTES as u64) as usize;
        let n = (PAGE_BYTES - in_page).min(len - done);
        let range = done..done + n;
        done += n;
        Some((page + (at / PAGE_BYTES as u64) as u32, in_page, range))
    })
}

/// Writes payloads to space that was reserved for them and that the file already has: `parts` are the bytes of each, ascending by
/// where they begin behind `offset`. What lies between two of them belongs to nobody.
///
/// A page that nobody has written yet, or that is written whole, is logged as a full image, which leaves out what is not
/// filled yet; a page that holds the end of the block before is changed by generic WAL. So each byte is logged once. Neighbours write to the same page under its exclusive lock, each only its own bytes.
pub fn write(rel: pg_sys::Relation, page: u32, offset: u32, parts: &[(usize, &[u8])]) {
    let len = parts.last().map_or(0, |(start, bytes)| start + bytes.len());
    for (i, (page, at, range)) in pieces(page, u64::from(offset), len).enumerate() {
        if i % PAGES_PER_CHECK == PAGES_PER_CHECK - 1 {
            interrupt::check();
        }
        let (from, to) = (PAGE_HEADER + at, PAGE_HEADER + at + range.len());
        if range.len() == PAGE_BYTES {
            Pinned::overwrite(rel, page, |locked| {
                write_new_page(rel, locked, from..to, |out| copy(parts, range.start, out))
            });
            continue;
        }
        let pin = Pinned::read(rel, page);
        let mut locked = pin.exclusive();
        if is_new(locked.bytes()) {
            write_new_page(rel, &mut locked, from..to, |out| copy(parts, range.start, out));
        } else {
            let record = GenericRecord::start(rel);
            let copy = record.page(&mut locked, false);
            if content_end(copy) < to {
                set_content_end(copy, to);
            }
            self::copy(parts, range.start, &mut copy[from..to]);
            record.finish();
        }
    }
    if needs_wal(rel) {
        wal::write_in_background();
    }
}

/// Fills `out` with what the parts have from `start` on, and with zeros between them.
fn copy(parts: &[(usize, &[u8])], start: usize, out: &mut [u8]) {
    let mut done = 0;
    let first = parts.partition_point(|(at, bytes)| at + bytes.len() <= start);
    for (at, bytes) in &parts[first..] {
        let from = start + done;
        if at.saturating_sub(start) >= out.len() {
            break;
        }
        let to = at.saturating_sub(start).max(done);
        out[done..to].fill(0);
        let bytes = &bytes[from.saturating_sub(*at)..];
        let n = bytes.len().min(out.len() - to);
        out[to..to + n].copy_from_slice(&bytes[..n]);
        done = to + n;
    }
    out[done..].fill(0);
}

/// Reads `out.len()` bytes from `offset` behind the header of `page` (the offset may lie pages further).
pub fn read(rel: pg_sys::Relation, page: u32, offset: u64, out: &mut [u8]) {
    if let Err(page) = try_read(rel, page, offset, out) {
        error::raise(
            PgSqlErrorCode::ERRCODE_DATA_CORRUPTED,
            format!("page {page} of a block store is empty where a block should be"),
            "",
            "The table is damaged; restore it from a backup.",
        );
    }
}

/// Asks for the pages of a payload to be read ahead.
pub fn prefetch(rel: pg_sys::Relation, page: u32, offset: u64, len: usize) {
    let first = u64::from(page) + offset / PAGE_BYTES as u64;
    let last = u64::from(page) + (offset + len.max(1) as u64 - 1) / PAGE_BYTES as u64;
    if last < u64::from(pg_sys::InvalidBlockNumber) {
        prefetch_pages(rel, first..=last);
    }
}

fn prefetch_pages(rel: pg_sys::Relation, pages: std::ops::RangeInclusive<u64>) {
    let most = pages.start() + PAGES_PER_CHECK as u64;
    // A payload is written and read as a whole: if its last page is in memory, the others most probably are.
    for ahead in (*pages.start()..=(*pages.end()).min(most)).rev() {
        // SAFETY: `rel` is open; a prefetch past the end is ignored.
        let found = unsafe { pg_sys::PrefetchBuffer(rel, pg_sys::ForkNumber::MAIN_FORKNUM, ahead as u32) };
        if found.recent_buffer != pg_sys::InvalidBuffer as pg_sys::Buffer {
            break;
        }
    }
}

/// As [`read`]; `Err` has the number of a page that is empty.
pub fn try_read(rel: pg_sys::Relation, page: u32, offset: u64, out: &mut [u8]) -> Result<(), u32> {
    let last = page as u64 + (offset + out.len() as u64 - 1) / PAGE_BYTES as u64;
    let first = page as u64 + offset / PAGE_BYTES as u64;
    if last >= u64::from(pg_sys::InvalidBlockNumber) {
        return Err(page); // a damaged locator
    }
    prefetch_pages(rel, first + 1..=last);
    for (i, (page, at, range)) in pieces(page, offset, out.len()).enumerate() {
        if i % PAGES_PER_CHECK == PAGES_PER_CHECK - 1 {
            interrupt::check();
        }
        let pin = Pinned::read(rel, page);
        let locked = pin.share();
        if is_new(locked.bytes()) {
            return Err(page);
        }
        let (from, to) = (PAGE_HEADER + at, PAGE_HEADER + at + range.len());
        out[range].copy_from_slice(&locked.bytes()[from..to]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_copied_with_zeros_between_them() {
        let bytes: Vec<u8> = (1..=200).collect();
        let parts: Vec<(usize, &[u8])> =
            vec![(0, &bytes[..5]), (8, &bytes[5..6]), (16, &bytes[6..100]), (112, &bytes[100..])];
        let mut whole = vec![0u8; 212];
        parts.iter().for_each(|(at, bytes)| whole[*at..at + bytes.len()].copy_from_slice(bytes));
        for start in 0..whole.len() {
            for end in start..=whole.len() {
                let mut out = vec![255; end - start];
                copy(&parts, start, &mut out);
                assert_eq!(out, whole[start..end], "{start}..{end}");
            }
        }
    }

    #[test]
    fn pieces_cover_every_byte_once_and_cross_pages() {
        for (offset, len) in [(0u64, 1usize), (8167, 2), (8, 65548), (9000, 10), (0, PAGE_BYTES * 3)] {
            let mut next = 0;
            let mut position = offset;
            for (page, at, range) in pieces(10, offset, len) {
                assert_eq!(range.start, next);
                assert_eq!((page as u64 - 10) * PAGE_BYTES as u64 + at as u64, position);
                assert!(at + range.len() <= PAGE_BYTES);
                position += range.len() as u64;
                next = range.end;
            }
            assert_eq!(next, len);
        }
    }
}
