//! Appending pages to a relation's file, many at a time.
//!
//! New pages do not pass through shared buffers, as in an index build: whoever fills a page reads it first, or overwrites it
//! whole ([`super::buffer::Pinned::overwrite`]). Where the file system can, space is allocated without writing zeros, which
//! would be written again as soon as the pages are filled.

use super::relation::pages;
use super::{buffer, interrupt};
use pgrx::pg_sys;

/// Pages between two looks at pending interrupts.
const RUN: pg_sys::BlockNumber = 4096;

/// Appends zeroed pages until the relation has `wanted` of them.
///
/// The extension lock is held for the whole run, so that the pages of a tensor page follow each other in the file and
/// two backends never interleave. It is a heavyweight lock: no content lock may be held by the caller.
///
/// Errors (as PostgreSQL ERROR): the file system is full, or the file may not grow.
pub fn extend_to(rel: pg_sys::Relation, wanted: pg_sys::BlockNumber) {
    if pages(rel) >= wanted {
        return;
    }
    // SAFETY: `rel` is open and locked by the caller for writing; released on the normal path below, by abort otherwise.
    unsafe { pg_sys::LockRelationForExtension(rel, pg_sys::ExclusiveLock as pg_sys::LOCKMODE) };
    let mut have = pages(rel);
    while have < wanted {
        interrupt::check();
        have += append(rel, have, (wanted - have).min(RUN));
    }
    // SAFETY: taken above.
    unsafe { pg_sys::UnlockRelationForExtension(rel, pg_sys::ExclusiveLock as pg_sys::LOCKMODE) };
}

/// Appends up to `count` pages to a file of `have`, at least one. Returns how many.
#[cfg(not(any(feature = "pg14", feature = "pg15")))]
fn append(rel: pg_sys::Relation, have: pg_sys::BlockNumber, count: pg_sys::BlockNumber) -> pg_sys::BlockNumber {
    if count == 1 {
        drop(buffer::Pinned::extend(rel));
        return 1;
    }
    // SAFETY: `rel` is open, its extension lock held, and `have` the first page that it has not; `count` is small.
    unsafe {
        let smgr = pg_sys::RelationGetSmgr(rel);
        pg_sys::smgrzeroextend(smgr, pg_sys::ForkNumber::MAIN_FORKNUM, have, count as i32, false);
    }
    count
}

/// As above. PostgreSQL 15 itself appends page by page.
#[cfg(any(feature = "pg14", feature = "pg15"))]
fn append(rel: pg_sys::Relation, have: pg_sys::BlockNumber, count: pg_sys::BlockNumber) -> pg_sys::BlockNumber {
    if let Some(appended) = allocate::pages(rel, have, count) {
        return appended;
    }
    drop(buffer::Pinned::extend(rel));
    1
}

#[cfg(any(feature = "pg14", feature = "pg15"))]
mod allocate {
    use super::buffer::BLCKSZ;
    use pgrx::pg_sys;
    use std::ffi::{CStr, CString};
    use std::mem::MaybeUninit;

    /// As few pages as PostgreSQL 16 and later write rather than allocate (`mdzeroextend`).
    const WRITTEN: pg_sys::BlockNumber = 8;

    /// `InvalidBackendId` (backendid.h), which has no binding.
    const NO_BACKEND: i32 = -1;

    /// Appends up to `count` pages by allocating space for them, all in one segment file. `None` if that is not to be done, or
    /// did not succeed: page by page it does, or fails with PostgreSQL's own words.
    ///
    /// An operating system's crash before the next checkpoint can take these pages back; those that were filled by then come again
    /// from WAL.
    pub fn pages(
        rel: pg_sys::Relation,
        have: pg_sys::BlockNumber,
        count: pg_sys::BlockNumber,
    ) -> Option<pg_sys::BlockNumber> {
        let in_segment = have % pg_sys::RELSEG_SIZE;
        // The last page is left: PostgreSQL appends it, and registers the segment for the next checkpoint's fsync.
        let count = count.min(pg_sys::RELSEG_SIZE - in_segment).saturating_sub(1);
        // SAFETY: `rel` is open.
        let temporary = unsafe { (*(*rel).rd_rel).relpersistence } == pg_sys::RELPERSISTENCE_TEMP as std::ffi::c_char;
        // The first page of a segment makes its file.
        if temporary || count < WRITTEN || in_segment == 0 {
            return None;
        }
        let file = segment_file(rel, have / pg_sys::RELSEG_SIZE)?;
        // SAFETY: a transient descriptor, closed below; no ERROR is raised in between, after which abort would close it.
        unsafe {
            let descriptor = pg_sys::OpenTransientFile(file.as_ptr(), libc::O_RDWR);
            if descriptor < 0 {
                return None;
            }
            let (at, len) = (in_segment as usize * BLCKSZ, count as usize * BLCKSZ);
            let allocated = file_len(descriptor) == Some(at) && allocate(descriptor, at, len);
            pg_sys::CloseTransientFile(descriptor);
            allocated.then_some(count)
        }
    }

    /// The name of a segment's file of the main fork.
    fn segment_file(rel: pg_sys::Relation, segment: u32) -> Option<CString> {
        // SAFETY: `rel` is open; the path is a palloc'd C string.
        unsafe {
            let node = (*rel).rd_node;
            let main = pg_sys::ForkNumber::MAIN_FORKNUM;
            let path = pg_sys::GetRelationPath(node.dbNode, node.spcNode, node.relNode, NO_BACKEND, main);
            let mut name = CStr::from_ptr(path).to_bytes().to_vec();
            pg_sys::pfree(path.cast());
            if segment > 0 {
                name.extend_from_slice(format!(".{segment}").as_bytes());
            }
            CString::new(name).ok()
        }
    }

    fn file_len(descriptor: i32) -> Option<usize> {
        let mut status = MaybeUninit::<libc::stat>::uninit();
        // SAFETY: an open descriptor; `status` is filled if the call succeeds.
        unsafe { (libc::fstat(descriptor, status.as_mut_ptr()) == 0).then(|| status.assume_init().st_size as usize) }
    }

    #[cfg(target_os = "linux")]
    fn allocate(descriptor: i32, at: usize, len: usize) -> bool {
        // SAFETY: an open descriptor. Unlike posix_fallocate this does not write where a file system cannot allocate.
        unsafe { libc::fallocate(descriptor, 0, at as libc::off_t, len as libc::off_t) == 0 }
    }

    #[cfg(not(target_os = "linux"))]
    fn allocate(_descriptor: i32, _at: usize, _len: usize) -> bool {
        false
    }
}
