//! The compute thread: work that must not block its caller.
//!
//! Responsible for: running one job at a time on a thread of its own while the caller sleeps and, at least every
//! [`POLL_INTERVAL`], asks its `poll` whether to go on. PostgreSQL is single-threaded: only the caller's thread may
//! talk to it, so a job is given everything that it needs and calls nothing back.
//!
//! Invariants:
//! - one thread per process, made on first use (or by [`start`]), never made before a fork and used after it;
//! - nobody waits busily: a hand-off is a mutex and a condition variable, both ways;
//! - a job that was given up finishes the operator that it is in, then sees its cancel flag; its result is dropped on
//!   the thread. The next job waits for that, and can itself be given up while it waits;
//! - a panic in a job is an error of that job, and the thread lives on.
//!
//! The thread inherits the signal mask of whoever makes it. A caller whose signal handlers belong to one thread
//! blocks all signals, calls [`start`], and restores its mask.

use crate::error::ModelError;
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The longest time between two calls of `poll`.
pub const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Stack of the compute thread in bytes: virtual memory, of which only what is used becomes real. The analysis of a
/// deep graph recurses.
pub const STACK_BYTES: usize = 256 << 20;

type Job = Box<dyn FnOnce() + Send>;

/// What a job leaves for its caller: its result, and that it rang.
struct Place<T> {
    result: Option<Result<T, ModelError>>,
    rung: bool,
}

/// Where a job leaves its result, and how its caller hears of it.
type Outcome<T> = (Mutex<Place<T>>, Condvar);

/// By which a job asks its caller to call `poll` now.
#[derive(Clone)]
pub struct Bell(Arc<dyn Fn() + Send + Sync>);

impl Bell {
    /// Wakes the caller.
    pub fn ring(&self) {
        (self.0)();
    }
}

/// Where the callers leave a job. `busy` from the moment a job is left until it has ended.
#[derive(Default)]
struct Desk {
    job: Option<Job>,
    busy: bool,
}

#[derive(Default)]
struct Worker {
    desk: Mutex<Desk>,
    job_left: Condvar,
    job_ended: Condvar,
}

/// The worker and the process that it belongs to.
static WORKER: Mutex<Option<(u32, Arc<Worker>)>> = Mutex::new(None);

/// No invariant of ours spans a panic, so a poisoned lock is as good as another.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Worker {
    fn serve(&self) {
        loop {
            let job = {
                let mut desk = lock(&self.desk);
                loop {
                    if let Some(job) = desk.job.take() {
                        break job;
                    }
                    desk = self.job_left.wait(desk).unwrap_or_else(PoisonError::into_inner);
                }
            };
            job();
            lock(&self.desk).busy = false;
            self.job_ended.notify_all();
        }
    }
}

/// Makes the compute thread of this process if there is none yet.
///
/// # Errors
/// `Internal` if the operating system gives no thread.
pub fn start() -> Result<(), ModelError> {
    worker().map(|_| ())
}

fn worker() -> Result<Arc<Worker>, ModelError> {
    let mut place = lock(&WORKER);
    let process = std::process::id();
    if let Some((owner, worker)) = &*place
        && *owner == process
    {
        return Ok(worker.clone());
    }
    let worker = Arc::new(Worker::default());
    let served = worker.clone();
    std::thread::Builder::new()
        .name("tessera compute".into())
        .stack_size(STACK_BYTES)
        .spawn(move || served.serve())
        .map_err(|error| {
            ModelError::internal("could not start the compute thread")
                .detail(error.to_string())
                .hint("Check the limits on processes and on virtual memory of the server.")
        })?;
    *place = Some((process, worker.clone()));
    Ok(worker)
}

/// Runs `job` on the compute thread and sleeps until it has ended. While it runs, and while an earlier job that was
/// given up still ends, `poll` is called at least every [`POLL_INTERVAL`], and when the job rings its [`Bell`]; when it
/// says true, the job's flag is set and the call returns `Cancelled` at once.
///
/// # Errors
/// What the job returns, `Cancelled`, or `Internal` when the job panics or there is no thread.
pub fn run_interruptible<T, F>(job: F, poll: &mut dyn FnMut() -> bool) -> Result<T, ModelError>
where
    T: Send + 'static,
    F: FnOnce(&Arc<AtomicBool>, &Bell) -> Result<T, ModelError> + Send + 'static,
{
    let worker = worker()?;
    let cancel = Arc::new(AtomicBool::new(false));
    let outcome: Arc<Outcome<T>> = Arc::new((Mutex::new(Place { result: None, rung: false }), Condvar::new()));
    let (job_cancel, job_outcome) = (cancel.clone(), outcome.clone());
    let rings = outcome.clone();
    let bell = Bell(Arc::new(move || {
        lock(&rings.0).rung = true;
        rings.1.notify_one();
    }));
    let boxed: Job = Box::new(move || {
        let result = contain_panic("a job of the compute thread", || job(&job_cancel, &bell));
        let mut place = lock(&job_outcome.0);
        if !job_cancel.load(Ordering::Acquire) {
            place.result = Some(result);
        }
        drop(place);
        job_outcome.1.notify_one();
    });
    let mut desk = lock(&worker.desk);
    while desk.busy {
        let waited = worker.job_ended.wait_timeout(desk, POLL_INTERVAL).unwrap_or_else(PoisonError::into_inner);
        desk = waited.0;
        if waited.1.timed_out() && desk.busy {
            // The lock is given back first: what poll does is unknown, and it may unwind.
            drop(desk);
            if poll() {
                return Err(cancelled());
            }
            desk = lock(&worker.desk);
        }
    }
    desk.busy = true;
    desk.job = Some(boxed);
    drop(desk);
    worker.job_left.notify_one();

    // Whatever way this call ends, by an unwinding poll too, the job must not go on for nobody.
    let _give_up = GiveUp(&cancel);
    let mut place = lock(&outcome.0);
    loop {
        if let Some(result) = place.result.take() {
            return result;
        }
        let mut timed_out = false;
        if !place.rung {
            let waited = outcome.1.wait_timeout(place, POLL_INTERVAL).unwrap_or_else(PoisonError::into_inner);
            place = waited.0;
            timed_out = waited.1.timed_out();
        }
        let rung = std::mem::take(&mut place.rung);
        if (timed_out || rung) && place.result.is_none() {
            drop(place);
            if poll() {
                return Err(cancelled());
            }
            place = lock(&outcome.0);
        }
    }
}

/// Waits until no job is on the thread, but not longer than `limit`. True if there is none.
pub fn wait_idle(limit: Duration) -> bool {
    let Some((_, worker)) = lock(&WORKER).clone().filter(|(owner, _)| *owner == std::process::id()) else {
        return true;
    };
    let desk = lock(&worker.desk);
    let waited = worker.job_ended.wait_timeout_while(desk, limit, |desk| desk.busy);
    !waited.unwrap_or_else(PoisonError::into_inner).0.busy
}

struct GiveUp<'a>(&'a AtomicBool);

impl Drop for GiveUp<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

pub(crate) fn cancelled() -> ModelError {
    ModelError::cancelled("the computation was cancelled")
}

/// Runs `work` and makes a panic an error of kind `Internal` that names the step. A panic that carries something else
/// than a text is not one of ours but a caller's error that unwinds, and goes on.
pub(crate) fn contain_panic<T>(step: &str, work: impl FnOnce() -> Result<T, ModelError>) -> Result<T, ModelError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        if !panic.is::<&str>() && !panic.is::<String>() {
            resume_unwind(panic);
        }
        let text = panic_text(&*panic);
        // Dropping a panic's payload may panic again.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(panic)));
        Err(ModelError::internal(format!("unexpected failure in {step}")).detail(text))
    })
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => (*text).to_owned(),
        (_, Some(text)) => text.clone(),
        _ => "The panic carried no text.".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use std::sync::mpsc::channel;
    use std::time::Instant;

    // The worker is one per process: the tests take turns.
    static TURN: Mutex<()> = Mutex::new(());

    #[test]
    fn returns_what_the_job_returns() {
        let _turn = lock(&TURN);
        assert_eq!(run_interruptible(|_, _| Ok(7), &mut || false), Ok(7));
        let error = run_interruptible(|_, _| -> Result<(), _> { Err(ModelError::too_large("big")) }, &mut || false);
        assert_eq!(error.unwrap_err().kind, ErrorKind::TooLarge);
    }

    #[test]
    fn a_panic_is_an_error_and_the_thread_lives_on() {
        let _turn = lock(&TURN);
        let error = run_interruptible(|_, _| -> Result<(), _> { panic!("number {}", 7) }, &mut || false).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Internal);
        assert_eq!(error.detail.as_deref(), Some("number 7"));
        assert_eq!(run_interruptible(|_, _| Ok(8), &mut || false), Ok(8));
    }

    #[test]
    fn a_cancelled_job_returns_at_once_and_the_next_waits_interruptibly() {
        let _turn = lock(&TURN);
        let (release, released) = channel::<()>();
        let (saw, seen) = channel();
        let begin = Instant::now();
        let error = run_interruptible(
            move |cancel, _| {
                released.recv().ok();
                saw.send(cancel.load(Ordering::Acquire)).ok();
                Ok(())
            },
            &mut || true,
        );
        assert_eq!(error.unwrap_err().kind, ErrorKind::Cancelled);
        assert!(begin.elapsed() < Duration::from_millis(500));
        // The thread is still in the first job: a second can be given up while it waits.
        let error = run_interruptible(|_, _| Ok(()), &mut || true);
        assert_eq!(error.unwrap_err().kind, ErrorKind::Cancelled);
        let mut polls = 0;
        let answer = run_interruptible(|_, _| Ok(9), &mut || {
            polls += 1;
            if polls == 2 {
                release.send(()).ok();
            }
            false
        });
        assert_eq!(answer, Ok(9));
        assert_eq!(seen.recv(), Ok(true), "the first job's flag was set");
    }

    #[test]
    fn an_unwinding_poll_gives_the_job_up() {
        let _turn = lock(&TURN);
        let (saw, seen) = channel();
        let unwound = catch_unwind(AssertUnwindSafe(|| {
            run_interruptible(
                move |cancel, _| {
                    while !cancel.load(Ordering::Acquire) {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    saw.send(()).ok();
                    Ok(())
                },
                &mut || panic!("poll unwinds"),
            )
        }));
        assert!(unwound.is_err());
        assert_eq!(seen.recv_timeout(Duration::from_secs(10)), Ok(()));
        assert_eq!(run_interruptible(|_, _| Ok(1), &mut || false), Ok(1));
    }

    #[test]
    fn the_stack_is_deep() {
        fn depth(left: u32) -> u64 {
            let frame = std::hint::black_box([u64::from(left); 512]);
            if left == 0 { frame[0] } else { depth(left - 1) + frame[511] }
        }
        let _turn = lock(&TURN);
        // 16,384 frames of 4 kB: 64 MB, more than any thread has by default.
        assert!(run_interruptible(|_, _| Ok(depth(16_384)), &mut || false).unwrap() > 0);
    }
}
