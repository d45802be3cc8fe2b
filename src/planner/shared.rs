//! What parallel workers did, for EXPLAIN: each writes its counts to the memory of the parallel query, and the leader adds
//! them up before that goes.

use super::batch::Done;
use super::scan::Scan;
use pgrx::pg_sys;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

/// What lies in the memory of the parallel query: as many participants as workers were planned.
#[repr(C)]
pub struct Shared {
    workers: u64,
    // Behind it: the counts of each.
}

type Counts = [AtomicU64; Done::COUNTS];

/// Its bytes.
pub fn bytes(workers: usize) -> usize {
    size_of::<Shared>() + workers * size_of::<Counts>()
}

impl Shared {
    /// # Safety
    /// At `place` there is room for [`bytes`] of so many workers, aligned for them.
    pub unsafe fn set_up(place: *mut Shared, workers: usize) {
        // SAFETY: by the contract; zeros are valid counts.
        unsafe {
            std::ptr::write_bytes(place.cast::<u8>(), 0, bytes(workers));
            (*place).workers = workers as u64;
        }
    }

    /// # Safety
    /// `place` was made by [`Shared::set_up`], and is still mapped.
    unsafe fn counts<'a>(place: *const Shared) -> &'a [Counts] {
        // SAFETY: by the contract.
        unsafe { std::slice::from_raw_parts(place.add(1).cast::<Counts>(), (*place).workers as usize) }
    }
}

impl Scan {
    /// A worker shows what it has done so far.
    pub(super) fn publish(&self) {
        if self.shared.is_null() {
            return;
        }
        // SAFETY: the memory stays until the worker ends, or the leader has forgotten it.
        unsafe {
            let number = usize::try_from(pg_sys::ParallelWorkerNumber).ok();
            let Some(mine) = number.and_then(|number| Shared::counts(self.shared).get(number)) else { return };
            for (counter, value) in mine.iter().zip(self.done.to_counts()) {
                counter.store(value, Relaxed);
            }
        }
    }

    /// The leader adds up what the workers have shown, and forgets where that was.
    pub(super) fn collect_workers(&mut self) {
        // SAFETY: called while the memory is mapped. Workers number themselves from 0, the leader is -1.
        unsafe {
            if self.shared.is_null() || pg_sys::ParallelWorkerNumber >= 0 {
                return;
            }
            for worker in Shared::counts(self.shared) {
                self.of_workers.add(Done::of_counts(worker.each_ref().map(|counter| counter.load(Relaxed))));
            }
        }
        self.shared = std::ptr::null_mut();
    }
}
