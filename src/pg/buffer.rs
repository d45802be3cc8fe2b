//! Shared buffers: a pin, and content locks that borrow it.

use pgrx::pg_sys;
use pgrx::prelude::*;

/// Bytes of a page.
pub const BLCKSZ: usize = pg_sys::BLCKSZ as usize;
/// Bytes of `PageHeaderData` before its line pointers.
pub const PAGE_HEADER: usize = std::mem::offset_of!(pg_sys::PageHeaderData, pd_linp);
/// Bytes of a page behind its header.
pub const PAGE_BYTES: usize = BLCKSZ - PAGE_HEADER;

/// `P_NEW` (bufmgr.h), which has no binding: appends a page.
const P_NEW: pg_sys::BlockNumber = pg_sys::InvalidBlockNumber;

/// A pinned buffer of a relation's main fork.
pub struct Pinned {
    buffer: pg_sys::Buffer,
}

impl Pinned {
    /// Pins block `block`, reading it if needed.
    ///
    /// Errors (as PostgreSQL ERROR): the block lies past the end, or fails its checksum, or `block` is no block's number:
    /// that comes from a damaged page, and PostgreSQL would take it for the wish to append one (`P_NEW`).
    pub fn read(rel: pg_sys::Relation, block: pg_sys::BlockNumber) -> Pinned {
        Self::read_with(rel, block, std::ptr::null_mut())
    }

    /// As [`Pinned::read`], through a buffer access strategy (a ring for bulk reads; null for none).
    pub fn read_with(
        rel: pg_sys::Relation,
        block: pg_sys::BlockNumber,
        strategy: pg_sys::BufferAccessStrategy,
    ) -> Pinned {
        if block == P_NEW {
            super::error::raise(
                PgSqlErrorCode::ERRCODE_DATA_CORRUPTED,
                "a page of a block store refers to a page that cannot be",
                "",
                "The table is damaged; restore it from a backup.",
            );
        }
        Self::get(rel, block, pg_sys::ReadBufferMode::RBM_NORMAL, strategy)
    }

    fn get(
        rel: pg_sys::Relation,
        block: pg_sys::BlockNumber,
        mode: pg_sys::ReadBufferMode::Type,
        strategy: pg_sys::BufferAccessStrategy,
    ) -> Pinned {
        // SAFETY: `rel` is an open relation, by the contract of every caller in `store`.
        let buffer =
            unsafe { pg_sys::ReadBufferExtended(rel, pg_sys::ForkNumber::MAIN_FORKNUM, block, mode, strategy) };
        Pinned { buffer }
    }

    /// Appends one zeroed page and pins it. The caller holds the relation's extension lock.
    pub fn extend(rel: pg_sys::Relation) -> Pinned {
        Self::get(rel, P_NEW, pg_sys::ReadBufferMode::RBM_NORMAL, std::ptr::null_mut())
    }

    /// Pins block `block`, which the file has, for a change of all of it under the exclusive content lock, which `change` gets:
    /// what the page was is not read. Nobody else has anything on it.
    pub fn overwrite<R>(
        rel: pg_sys::Relation,
        block: pg_sys::BlockNumber,
        change: impl FnOnce(&mut Exclusive<'_>) -> R,
    ) -> R {
        let mode = pg_sys::ReadBufferMode::RBM_ZERO_AND_LOCK;
        let pin = Self::get(rel, block, mode, std::ptr::null_mut());
        // PostgreSQL has taken the lock.
        change(&mut Exclusive { pin: &pin })
    }

    /// Takes the content lock in share mode.
    pub fn share(&self) -> Shared<'_> {
        // SAFETY: the buffer is pinned as long as `self` lives.
        unsafe { pg_sys::LockBuffer(self.buffer, pg_sys::BUFFER_LOCK_SHARE as i32) };
        Shared { pin: self }
    }

    /// Takes the content lock in exclusive mode.
    pub fn exclusive(&self) -> Exclusive<'_> {
        // SAFETY: the buffer is pinned as long as `self` lives.
        unsafe { pg_sys::LockBuffer(self.buffer, pg_sys::BUFFER_LOCK_EXCLUSIVE as i32) };
        Exclusive { pin: self }
    }

    fn page(&self) -> *mut u8 {
        // SAFETY: the buffer is pinned, so its page stays where it is.
        unsafe { pg_sys::BufferGetPage(self.buffer).cast() }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: the pin was taken by this guard and is released once. On unwinding, abort releases it.
            unsafe { pg_sys::ReleaseBuffer(self.buffer) }
        }
    }
}

fn unlock(pin: &Pinned) {
    if !std::thread::panicking() {
        // SAFETY: the guard that calls this holds the content lock. On unwinding, abort releases it.
        unsafe { pg_sys::LockBuffer(pin.buffer, pg_sys::BUFFER_LOCK_UNLOCK as i32) }
    }
}

/// A page under a shared content lock.
pub struct Shared<'a> {
    pin: &'a Pinned,
}

impl Shared<'_> {
    /// All `BLCKSZ` bytes of the page.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: pinned and share-locked; only hint bits of heap pages change under a share lock, and no store page has any.
        unsafe { std::slice::from_raw_parts(self.pin.page(), BLCKSZ) }
    }
}

impl Drop for Shared<'_> {
    fn drop(&mut self) {
        unlock(self.pin);
    }
}

/// A page under an exclusive content lock. It is changed through [`crate::pg::wal`] only.
pub struct Exclusive<'a> {
    pin: &'a Pinned,
}

impl Exclusive<'_> {
    /// All `BLCKSZ` bytes of the page.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: pinned and exclusively locked by this guard.
        unsafe { std::slice::from_raw_parts(self.pin.page(), BLCKSZ) }
    }

    /// The buffer's number, for calls into PostgreSQL.
    pub fn raw(&self) -> pg_sys::Buffer {
        self.pin.buffer
    }

    /// The page, to be changed inside a critical section of [`crate::pg::wal`].
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: pinned and exclusively locked by this guard, which is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.pin.page(), BLCKSZ) }
    }
}

impl Drop for Exclusive<'_> {
    fn drop(&mut self) {
        unlock(self.pin);
    }
}

/// True for a page that was appended and never written: all zeroes, which PostgreSQL takes for a free page.
pub fn is_new(page: &[u8]) -> bool {
    // pd_upper is zero on a new page and on no other (bufpage.h, PageIsNew).
    let at = std::mem::offset_of!(pg_sys::PageHeaderData, pd_upper);
    page[at] == 0 && page[at + 1] == 0
}

/// Writes a valid header for a page without a hole, so that generic WAL, `CREATE DATABASE` by WAL and the masks of
/// `wal_consistency_checking` keep every byte: `pd_lower = pd_upper = pd_special = BLCKSZ`.
pub fn init_page(page: &mut [u8]) {
    page[PAGE_HEADER..].fill(0);
    init_header(page);
}

/// As [`init_page`], for a page whose bytes behind the header are written next.
pub fn init_header(page: &mut [u8]) {
    assert_eq!(page.len(), BLCKSZ);
    page[..PAGE_HEADER].fill(0);
    let end = (BLCKSZ as u16).to_ne_bytes();
    for at in [
        std::mem::offset_of!(pg_sys::PageHeaderData, pd_lower),
        std::mem::offset_of!(pg_sys::PageHeaderData, pd_upper),
        std::mem::offset_of!(pg_sys::PageHeaderData, pd_special),
    ] {
        page[at..at + 2].copy_from_slice(&end);
    }
    let at = std::mem::offset_of!(pg_sys::PageHeaderData, pd_pagesize_version);
    let size_version = (BLCKSZ as u16) | pg_sys::PG_PAGE_LAYOUT_VERSION as u16;
    page[at..at + 2].copy_from_slice(&size_version.to_ne_bytes());
}

/// Makes what lies behind `end` the page's hole (`pd_lower`): it is zero, and PostgreSQL leaves it out of images.
pub fn set_content_end(page: &mut [u8], end: usize) {
    assert!((PAGE_HEADER..=BLCKSZ).contains(&end));
    let at = std::mem::offset_of!(pg_sys::PageHeaderData, pd_lower);
    page[at..at + 2].copy_from_slice(&(end as u16).to_ne_bytes());
}

/// The position behind a page's content: `pd_lower`.
pub fn content_end(page: &[u8]) -> usize {
    let at = std::mem::offset_of!(pg_sys::PageHeaderData, pd_lower);
    usize::from(u16::from_ne_bytes([page[at], page[at + 1]]))
}
