//! Changes to pages, logged. Two ways, as in DESIGN "WAL": small changes by generic WAL, freshly filled pages as full
//! images by the core's own record, so that replay needs no code of this extension.

use super::buffer::{BLCKSZ, Exclusive, PAGE_HEADER, init_header, init_page, set_content_end};
use super::relation;
use pgrx::pg_sys;
use std::cell::Cell;
use std::ops::Range;

/// A generic WAL record under construction: up to four pages that change together or not at all.
///
/// Dropping it without [`GenericRecord::finish`] leaves the pages as they were: changes go to copies until then.
pub struct GenericRecord {
    state: *mut pg_sys::GenericXLogState,
}

impl GenericRecord {
    /// Starts a record for pages of `rel`. For an unlogged or temporary relation the same calls apply the change unlogged.
    pub fn start(rel: pg_sys::Relation) -> GenericRecord {
        // SAFETY: `rel` is an open relation; the state lives in the current memory context.
        let state = unsafe { pg_sys::GenericXLogStart(rel) };
        GenericRecord { state }
    }

    /// Registers a page and returns the copy to change. `fresh`: the page is new, log it whole.
    pub fn page<'p>(&self, page: &'p mut Exclusive<'_>, fresh: bool) -> &'p mut [u8] {
        let flags = if fresh { pg_sys::GENERIC_XLOG_FULL_IMAGE as i32 } else { 0 };
        // SAFETY: the buffer is exclusively locked for as long as the returned borrow lives. Each registered page has
        // its own copy inside the state, so two borrows never alias (PostgreSQL returns the same copy only for the same
        // buffer, and `page` is borrowed by then).
        unsafe {
            let copy = pg_sys::GenericXLogRegisterBuffer(self.state, page.raw(), flags);
            std::slice::from_raw_parts_mut(copy.cast::<u8>(), super::buffer::BLCKSZ)
        }
    }

    /// Applies the changes to the buffers and writes the record, in one critical section.
    pub fn finish(self) {
        // SAFETY: the registered buffers are still locked: `page` borrows their guards for the record's life.
        unsafe { pg_sys::GenericXLogFinish(self.state) };
    }
}

/// Fills the bytes `range` of a new page, which lie behind its header, by `fill`, which gets them, whatever is in them, and writes
/// all; and logs it as a full image (`log_newpage_buffer`) where the relation needs WAL. What is before the range is zero; what is
/// behind it as well, and is left out of the image, as the page's hole.
pub fn write_new_page(
    rel: pg_sys::Relation,
    page: &mut Exclusive<'_>,
    range: Range<usize>,
    fill: impl FnOnce(&mut [u8]),
) {
    let logged = relation::needs_wal(rel);
    let buffer = page.raw();
    // SAFETY: a critical section as START_CRIT_SECTION makes it: no ERROR may leave it, and nothing between the two
    // counts can raise one short of a PANIC (`fill` copies bytes whose bounds were checked before).
    unsafe {
        pg_sys::CritSectionCount += 1;
        let bytes = page.bytes_mut();
        if range == (PAGE_HEADER..BLCKSZ) {
            init_header(bytes);
        } else {
            init_page(bytes);
        }
        set_content_end(bytes, range.end);
        fill(&mut bytes[range]);
        pg_sys::MarkBufferDirty(buffer);
        if logged {
            pg_sys::log_newpage_buffer(buffer, true);
        }
        pg_sys::CritSectionCount -= 1;
    }
}

/// Bytes of WAL after which the WAL writer is told.
const TOLD_EVERY: u64 = 1 << 20;

thread_local! {
    /// Where WAL ended when the WAL writer was told last.
    static TOLD: Cell<u64> = const { Cell::new(0) };
}

/// Lets the WAL writer write and flush what this backend has logged, as after an asynchronous commit, if that is much. Who logs
/// much otherwise writes it himself, a page at a time, when the WAL buffers are full, and waits for all of it at commit.
pub fn write_in_background() {
    // SAFETY: reads this backend's own position, raises one in shared memory, and sets a latch.
    unsafe {
        // The end of this backend's last record, as at a commit. Where the next one will begin can lie behind all that there is.
        let end = pg_sys::XactLastRecEnd;
        if end.saturating_sub(TOLD.get()) < TOLD_EVERY {
            return;
        }
        TOLD.set(end);
        pg_sys::XLogSetAsyncXactLSN(end);
    }
}
