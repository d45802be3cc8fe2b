//! Runs on the compute thread whose blocks come from the calling thread.
//!
//! Responsible for: taking a block operator's wish to the thread that may read blocks, and the frames back. Only the caller's
//! thread may talk to its database; the compute thread asks, rings, and sleeps until it has frames or is given up.
//!
//! While the compute thread computes on one window of blocks, the calling thread gets the next one ready.
//!
//! Invariants: the source is called on the calling thread only; when the call ends, however it does, an asking compute
//! thread gets `Cancelled`, and the frames that it holds are gone within [`PATIENCE`] unless one operation takes longer.

use crate::error::ModelError;
use crate::plan::Plan;
use crate::tensor::HostTensor;
use crate::weights::{BlockSource, Frame, WINDOW};
use crate::worker::{self, Bell, cancelled};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long a call that was given up waits for its frames to be released.
const PATIENCE: Duration = Duration::from_millis(250);

type Frames = Result<Vec<Box<dyn Frame>>, ModelError>;

#[derive(Default)]
struct Counter {
    wish: Option<(u32, Vec<u32>)>,
    frames: Option<Frames>,
    closed: bool,
}

/// Where the two threads meet.
#[derive(Default)]
struct Exchange {
    counter: Mutex<Counter>,
    answered: Condvar,
}

impl Exchange {
    fn lock(&self) -> MutexGuard<'_, Counter> {
        self.counter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Grants what the compute thread wishes for, if anything.
    fn serve(&self, source: &dyn BlockSource) {
        let wish = self.lock().wish.take();
        if let Some((tensor, wanted)) = wish {
            let frames = source.pin(tensor, &wanted);
            self.lock().frames = Some(frames);
            self.answered.notify_one();
        }
    }
}

/// The compute thread's end.
struct Remote {
    exchange: Arc<Exchange>,
    bell: Bell,
    /// What was wished for ahead of its use.
    ahead: Mutex<Option<(u32, Vec<u32>)>>,
}

impl Remote {
    fn new(exchange: Arc<Exchange>, bell: Bell) -> Remote {
        Remote { exchange, bell, ahead: Mutex::default() }
    }

    /// The leading blocks of `wanted` and what is wanted next, as a wish.
    fn wish(&self, tensor: u32, wanted: &[u32]) {
        let wanted = &wanted[..wanted.len().min(2 * WINDOW)];
        self.exchange.lock().wish = Some((tensor, wanted.to_vec()));
        self.bell.ring();
    }

    fn wait(&self) -> Frames {
        let mut counter = self.exchange.lock();
        loop {
            if counter.closed {
                return Err(cancelled());
            }
            if let Some(frames) = counter.frames.take() {
                return frames;
            }
            counter = self.exchange.answered.wait(counter).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl BlockSource for Remote {
    fn pin(&self, tensor: u32, wanted: &[u32]) -> Frames {
        let mut ahead = self.ahead.lock().unwrap_or_else(PoisonError::into_inner);
        match ahead.take() {
            Some((other, numbers)) if other == tensor && wanted.starts_with(&numbers) => {}
            Some(_) => {
                // An operator ended early.
                drop(self.wait());
                self.wish(tensor, wanted);
            }
            None => self.wish(tensor, wanted),
        }
        let frames = self.wait()?;
        let rest = wanted.get(frames.len()..).unwrap_or(&[]);
        if !rest.is_empty() {
            self.wish(tensor, rest);
            *ahead = Some((tensor, rest[..rest.len().min(WINDOW)].to_vec()));
        }
        Ok(frames)
    }
}

/// Closes the exchange, also when the calling thread unwinds.
struct Close(Arc<Exchange>);

impl Drop for Close {
    fn drop(&mut self) {
        let mut counter = self.0.lock();
        counter.closed = true;
        let left = counter.frames.take();
        drop(counter);
        drop(left);
        self.0.answered.notify_one();
        worker::wait_idle(PATIENCE);
    }
}

/// Runs a plan on the compute thread; its blocks are taken from `source` on this one. `poll` as in
/// [`worker::run_interruptible`].
///
/// # Errors
/// As [`Plan::run`], what the source gives, and `Cancelled`.
pub fn run_on_blocks(
    plan: Arc<Plan>,
    inputs: Vec<(String, HostTensor)>,
    source: &dyn BlockSource,
    poll: &mut dyn FnMut() -> bool,
) -> Result<Vec<(String, HostTensor)>, ModelError> {
    let exchange = Arc::new(Exchange::default());
    let theirs = exchange.clone();
    let close = Close(exchange.clone());
    let result = worker::run_interruptible(
        move |cancel, bell| {
            let source = Arc::new(Remote::new(theirs, bell.clone()));
            plan.run_on_blocks(inputs, source, cancel)
        },
        &mut || {
            exchange.serve(source);
            poll()
        },
    );
    drop(close);
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::{AlignedBytes, StoredTensor, for_each_block, with_source};
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tensor_blocks::{DType, Tiling, View};

    struct Counting(AtomicUsize, std::thread::ThreadId);

    impl BlockSource for Counting {
        fn pin(&self, _: u32, wanted: &[u32]) -> Frames {
            assert_eq!(std::thread::current().id(), self.1, "the source is called on the calling thread");
            self.0.fetch_add(1, Ordering::Relaxed);
            let frame = |_| Box::new(AlignedBytes::zeroed(4)) as Box<dyn Frame>;
            // One frame at a time, however many are asked for.
            Ok(wanted.iter().take(1).map(frame).collect())
        }
    }

    fn walk(source: &dyn BlockSource, poll: &mut dyn FnMut() -> bool) -> Result<usize, ModelError> {
        let exchange = Arc::new(Exchange::default());
        let theirs = exchange.clone();
        let _close = Close(exchange.clone());
        worker::run_interruptible(
            move |cancel, bell| {
                let remote = Arc::new(Remote::new(theirs, bell.clone()));
                let tiling = Tiling::new(&[1, 1000], View::RowsByLast, DType::Float32, 64).unwrap();
                let tensor = StoredTensor { ordinal: 0, dims: vec![1, 1000], tiling };
                let wanted: Vec<u32> = (0..60).collect();
                let mut seen = 0;
                with_source(remote, cancel.clone(), || {
                    for_each_block(&tensor, &wanted, |_, _| {
                        seen += 1;
                        Ok(())
                    })
                })?;
                Ok(seen)
            },
            &mut || {
                exchange.serve(source);
                poll()
            },
        )
    }

    #[test]
    fn blocks_come_from_the_calling_thread_and_an_error_of_it_ends_the_run() {
        let source = Counting(AtomicUsize::new(0), std::thread::current().id());
        let seen = loop {
            // The worker is one per process and may be in a test that gives jobs up.
            match walk(&source, &mut || false) {
                Ok(seen) => break seen,
                Err(error) => panic!("{error}"),
            }
        };
        assert_eq!((seen, source.0.load(Ordering::Relaxed)), (60, 60));

        struct Raising;
        impl BlockSource for Raising {
            fn pin(&self, _: u32, _: &[u32]) -> Frames {
                std::panic::panic_any(7u32)
            }
        }
        let raised = catch_unwind(AssertUnwindSafe(|| walk(&Raising, &mut || false)));
        assert_eq!(raised.unwrap_err().downcast_ref::<u32>(), Some(&7));
        assert!(worker::wait_idle(Duration::from_secs(5)), "the compute thread has given up");
    }
}
