//! Shared memory of the server: asking for it, its locks, condition variables, and the end of a process.
//!
//! A [`Region`] is memory that is zeros at first: the server's shared memory if the library was preloaded, otherwise
//! memory of this process alone, for which locks and condition variables are nothing. What stands in a region are
//! atomics, so that a reference to it can be shared.

use pgrx::pg_sys;
use pgrx::prelude::*;
use std::ffi::CStr;
use std::sync::atomic::{AtomicPtr, Ordering};

/// Whether the server is reading `shared_preload_libraries`, the one moment to ask for shared memory.
pub fn preloading() -> bool {
    // SAFETY: backend state.
    unsafe { pg_sys::process_shared_preload_libraries_in_progress }
}

/// What the extension wants of shared memory.
#[derive(Clone, Copy)]
pub struct Request {
    /// Name of the area and of its locks.
    pub name: &'static CStr,
    /// Bytes, asked for when all settings are read.
    pub bytes: fn() -> usize,
    /// Number of locks.
    pub locks: i32,
    /// Makes a new area, which is zeros; or looks whether one that was there is of the kind that is expected.
    pub set_up: fn(&Region, found: bool) -> bool,
}

static mut REQUEST: Option<Request> = None;
static mut BYTES: usize = 0;
static mut PREVIOUS_STARTUP: pg_sys::shmem_startup_hook_type = None;
#[cfg(not(feature = "pg14"))]
static mut PREVIOUS_REQUEST: pg_sys::shmem_request_hook_type = None;
static BASE: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());

/// Asks for shared memory. Called while the library is preloaded.
pub fn request(request: Request) {
    // SAFETY: the postmaster is one thread, and hooks are chained as every extension does it.
    unsafe {
        REQUEST = Some(request);
        #[cfg(feature = "pg14")]
        ask();
        #[cfg(not(feature = "pg14"))]
        {
            PREVIOUS_REQUEST = pg_sys::shmem_request_hook;
            pg_sys::shmem_request_hook = Some(on_request);
        }
        PREVIOUS_STARTUP = pg_sys::shmem_startup_hook;
        pg_sys::shmem_startup_hook = Some(on_startup);
    }
}

#[cfg(not(feature = "pg14"))]
#[pg_guard]
unsafe extern "C-unwind" fn on_request() {
    // SAFETY: the previous hook is one of the server's kind.
    unsafe {
        if let Some(previous) = PREVIOUS_REQUEST {
            pg_sys::submodules::ffi::pg_guard_ffi_boundary(|| previous());
        }
        ask();
    }
}

/// # Safety
/// In the postmaster, when shared memory may be asked for.
unsafe fn ask() {
    // SAFETY: as above.
    unsafe {
        let Some(request) = REQUEST else { return };
        BYTES = (request.bytes)();
        pg_sys::RequestAddinShmemSpace(BYTES);
        pg_sys::RequestNamedLWLockTranche(request.name.as_ptr(), request.locks);
    }
}

/// Runs in the postmaster, and again when it starts anew after a crash of a backend.
#[pg_guard]
unsafe extern "C-unwind" fn on_startup() {
    // SAFETY: the previous hook is one of the server's kind; the area has the size that was asked for.
    unsafe {
        if let Some(previous) = PREVIOUS_STARTUP {
            pg_sys::submodules::ffi::pg_guard_ffi_boundary(|| previous());
        }
        let Some(request) = REQUEST else { return };
        let mut found = false;
        let base = pg_sys::ShmemInitStruct(request.name.as_ptr(), BYTES, &mut found).cast::<u8>();
        let locks = pg_sys::GetNamedLWLockTranche(request.name.as_ptr());
        let region = Region { base, bytes: BYTES, locks, shared: true };
        BASE.store(if (request.set_up)(&region, found) { base } else { std::ptr::null_mut() }, Ordering::Relaxed);
    }
}

/// Processes that can use shared memory at a time, at least.
pub fn most_processes() -> usize {
    // SAFETY: settings of the server, read when they are final.
    let known = unsafe { pg_sys::MaxBackends };
    if known > 0 {
        return known as usize;
    }
    // PostgreSQL 14 counts them only after shared memory was asked for. Autovacuum's workers do not predict, by rule.
    // SAFETY: as above.
    let known = unsafe { pg_sys::MaxConnections + pg_sys::max_worker_processes + pg_sys::max_wal_senders };
    known as usize + 16
}

/// A piece of memory for atomics, with locks. It is there until the process ends.
#[derive(Clone)]
pub struct Region {
    base: *mut u8,
    bytes: usize,
    locks: *mut pg_sys::LWLockPadded,
    shared: bool,
}

// SAFETY: what a region holds are atomics and bytes that are handed out under the rules of `bytes_at`.
unsafe impl Send for Region {}
// SAFETY: as above; locks and condition variables are used by the main thread only, which pgrx checks.
unsafe impl Sync for Region {}

impl Region {
    /// The server's shared memory; `None` if the library was not preloaded.
    pub fn shared() -> Option<Region> {
        let base = BASE.load(Ordering::Relaxed);
        if base.is_null() {
            return None;
        }
        // SAFETY: set in the postmaster, whose child this is.
        unsafe {
            let request = REQUEST?;
            let locks = pg_sys::GetNamedLWLockTranche(request.name.as_ptr());
            Some(Region { base, bytes: BYTES, locks, shared: true })
        }
    }

    /// `bytes` zeros of this process, of which those take memory that are written to; `None` if there are not as many.
    pub fn private(bytes: usize) -> Option<Region> {
        // SAFETY: a new mapping.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        (base != libc::MAP_FAILED).then(|| Region {
            base: base.cast(),
            bytes,
            locks: std::ptr::null_mut(),
            shared: false,
        })
    }

    /// Whether other processes use it too.
    pub fn is_shared(&self) -> bool {
        self.shared
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn place(&self, offset: usize, len: usize, align: usize) -> *mut u8 {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.bytes), "a piece lies in its region");
        // SAFETY: inside the region.
        let place = unsafe { self.base.add(offset) };
        assert!((place as usize).is_multiple_of(align), "a piece is aligned");
        place
    }

    /// `count` atomics structures at `offset`.
    ///
    /// # Safety
    /// `T` consists of atomics, for which zeros are a value, and this place is used as `T` only.
    pub unsafe fn slice<T: Sync>(&self, offset: usize, count: usize) -> &'static [T] {
        let len = count.checked_mul(size_of::<T>()).expect("sizes were added up before");
        let place = self.place(offset, len, align_of::<T>()).cast::<T>();
        // SAFETY: inside the region, which is never unmapped; the rest as the caller says.
        unsafe { std::slice::from_raw_parts(place, count) }
    }

    /// Address of `len` plain bytes at `offset`, at which reading and writing is the caller's business.
    pub fn bytes_at(&self, offset: usize, len: usize) -> *mut u8 {
        self.place(offset, len, 1)
    }

    /// How far the first address that is a multiple of `align` is from the region's begin.
    pub fn aligned_offset(&self, from: usize, align: usize) -> usize {
        (self.base as usize + from).next_multiple_of(align) - self.base as usize
    }

    /// Takes lock number `n`. Until it is dropped nothing may raise an ERROR; if something does, transaction abort lets
    /// the lock go.
    pub fn lock(&self, n: usize, exclusive: bool) -> LockGuard {
        if !self.shared {
            return LockGuard(std::ptr::null_mut());
        }
        let mode = if exclusive { pg_sys::LWLockMode::LW_EXCLUSIVE } else { pg_sys::LWLockMode::LW_SHARED };
        // SAFETY: the tranche has this lock.
        unsafe {
            let lock = &raw mut (*self.locks.add(n)).lock;
            pg_sys::LWLockAcquire(lock, mode);
            LockGuard(lock)
        }
    }

    /// Bytes of a condition variable.
    pub const CONDITION_BYTES: usize = size_of::<pg_sys::ConditionVariable>().next_multiple_of(16);

    fn condition(&self, offset: usize) -> *mut pg_sys::ConditionVariable {
        self.place(offset, Self::CONDITION_BYTES, 16).cast()
    }

    /// Makes a condition variable at `offset`.
    pub fn init_condition(&self, offset: usize) {
        // SAFETY: the place is one for a condition variable, and the area is being made.
        unsafe { pg_sys::ConditionVariableInit(self.condition(offset)) }
    }

    /// Gets this process ready to be woken, so that what it looks at next cannot change without a wake-up.
    pub fn prepare_to_wait(&self, offset: usize) {
        if self.shared {
            // SAFETY: made by `init_condition`.
            unsafe { pg_sys::ConditionVariablePrepareToSleep(self.condition(offset)) }
        }
    }

    /// Waits to be woken, `milliseconds` at most. Serves interrupts.
    pub fn wait(&self, offset: usize, milliseconds: i64) {
        if self.shared {
            // SAFETY: made by `init_condition`.
            unsafe {
                pg_sys::ConditionVariableTimedSleep(self.condition(offset), milliseconds, super::wait::block_load());
            }
        }
    }

    /// Ends what `prepare_to_wait` began.
    pub fn end_wait(&self) {
        if self.shared {
            // SAFETY: no condition; also legal without a wait.
            unsafe {
                pg_sys::ConditionVariableCancelSleep();
            }
        }
    }

    /// Wakes all that wait.
    pub fn wake(&self, offset: usize) {
        if self.shared {
            // SAFETY: made by `init_condition`.
            unsafe { pg_sys::ConditionVariableBroadcast(self.condition(offset)) }
        }
    }
}

/// A lock that is held. Dropped on the normal path only: while a panic unwinds it is left to transaction abort.
pub struct LockGuard(*mut pg_sys::LWLock);

impl Drop for LockGuard {
    fn drop(&mut self) {
        if !self.0.is_null() && !std::thread::panicking() {
            // SAFETY: taken by `lock`, in this process.
            unsafe { pg_sys::LWLockRelease(self.0) }
        }
    }
}

/// Calls `f` when this process lets go of shared memory, however it ends by its own will: FATAL included.
pub fn at_exit(f: fn()) {
    #[pg_guard]
    unsafe extern "C-unwind" fn run(_code: i32, arg: pg_sys::Datum) {
        // SAFETY: what `at_exit` passed.
        let f: fn() = unsafe { std::mem::transmute::<usize, fn()>(arg.value()) };
        f();
    }
    // SAFETY: the callback stays loaded; the argument is a function of this library.
    unsafe { pg_sys::on_shmem_exit(Some(run), pg_sys::Datum::from(f as usize)) }
}

/// This process.
pub fn process_id() -> u32 {
    // SAFETY: backend state.
    unsafe { pg_sys::MyProcPid as u32 }
}

/// Whether a process takes part in this server.
pub fn process_lives(id: u32) -> bool {
    // SAFETY: takes a lock of the server's and lets it go.
    unsafe { !pg_sys::BackendPidGetProc(id as i32).is_null() }
}
