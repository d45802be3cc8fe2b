//! Runs on the compute thread whose blocks come from the calling thread.
//!
//! Responsible for: taking an operator's wish, for blocks or for a temporary file, to the thread that may grant it, and
//! frames and bytes back. Only the caller's
//! thread may talk to its database; the compute thread asks, rings, and sleeps until it has frames or is given up.
//!
//! While the compute thread computes on one window of blocks, the calling thread gets the next one ready.
//!
//! Invariants: the source is called on the calling thread only; when the call ends, however it does, an asking compute
//! thread gets `Cancelled`, and the frames that it holds are gone within [`PATIENCE`] unless one operation takes longer.

use crate::error::ModelError;
use crate::plan::Plan;
use crate::tensor::HostTensor;
use crate::weights::{BlockSource, Frame, SpillFile, WINDOW};
use crate::worker::{self, Bell, cancelled};
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long a call that was given up waits for its frames to be released.
const PATIENCE: Duration = Duration::from_millis(250);

type Frames = Result<Vec<Box<dyn Frame>>, ModelError>;

/// What the compute thread wants done.
enum Wish {
    Pin(u32, Vec<u32>),
    NewFile,
    Append(usize, Vec<u8>),
    Read(usize, u64, usize),
    Close(usize),
}

/// What was done.
enum Answer {
    Frames(Frames),
    File(Result<Option<usize>, ModelError>),
    Done(Result<(), ModelError>),
    Bytes(Result<Vec<u8>, ModelError>),
}

#[derive(Default)]
struct Counter {
    wishes: VecDeque<(u64, Wish)>,
    answers: HashMap<u64, Answer>,
    tickets: u64,
    closed: bool,
}

/// Where the two threads meet.
#[derive(Default)]
struct Exchange {
    counter: Mutex<Counter>,
    answered: Condvar,
}

/// The calling thread's files, by number.
#[derive(Default)]
struct Files(Vec<Option<Box<dyn SpillFile>>>);

impl Files {
    fn get(&mut self, file: usize) -> Result<&mut Box<dyn SpillFile>, ModelError> {
        self.0.get_mut(file).and_then(Option::as_mut).ok_or_else(|| ModelError::internal("no such temporary file"))
    }

    fn make(&mut self, source: &dyn BlockSource) -> Result<Option<usize>, ModelError> {
        let Some(file) = source.spill_file()? else { return Ok(None) };
        self.0.push(Some(file));
        Ok(Some(self.0.len() - 1))
    }
}

impl Exchange {
    fn lock(&self) -> MutexGuard<'_, Counter> {
        self.counter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does what the compute thread wishes for, if anything.
    fn serve(&self, source: &dyn BlockSource, files: &mut Files) {
        loop {
            // Not locked while it is done: that may unwind.
            let Some((ticket, wish)) = self.lock().wishes.pop_front() else { return };
            let answer = match wish {
                Wish::Pin(tensor, wanted) => Answer::Frames(source.pin(tensor, &wanted)),
                Wish::NewFile => Answer::File(files.make(source)),
                Wish::Append(file, bytes) => Answer::Done(files.get(file).and_then(|file| file.append(bytes))),
                Wish::Read(file, offset, len) => Answer::Bytes(files.get(file).and_then(|file| file.read(offset, len))),
                Wish::Close(file) => {
                    if let Some(place) = files.0.get_mut(file) {
                        *place = None;
                    }
                    continue;
                }
            };
            self.lock().answers.insert(ticket, answer);
            self.answered.notify_one();
        }
    }
}

/// The compute thread's end.
#[derive(Clone)]
struct Line {
    exchange: Arc<Exchange>,
    bell: Bell,
}

impl Line {
    fn wish(&self, wish: Wish) -> u64 {
        let mut counter = self.exchange.lock();
        counter.tickets += 1;
        let ticket = counter.tickets;
        counter.wishes.push_back((ticket, wish));
        drop(counter);
        self.bell.ring();
        ticket
    }

    fn wait(&self, ticket: u64) -> Result<Answer, ModelError> {
        let mut counter = self.exchange.lock();
        loop {
            if counter.closed {
                return Err(cancelled());
            }
            if let Some(answer) = counter.answers.remove(&ticket) {
                return Ok(answer);
            }
            counter = self.exchange.answered.wait(counter).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn wrong_answer<T>() -> Result<T, ModelError> {
    Err(ModelError::internal("the calling thread gave another answer than was asked for"))
}

/// What was wished for ahead of its use: its ticket, the tensor, and the blocks.
type Ahead = Option<(u64, u32, Vec<u32>)>;

/// The source of blocks that the compute thread sees.
struct Remote {
    line: Line,
    operator_memory: u64,
    ahead: Mutex<Ahead>,
}

impl Remote {
    fn new(exchange: Arc<Exchange>, bell: Bell, operator_memory: u64) -> Remote {
        Remote { line: Line { exchange, bell }, operator_memory, ahead: Mutex::default() }
    }

    /// Wishes for the leading blocks of `wanted`, and tells what is wanted next.
    fn wish(&self, tensor: u32, wanted: &[u32]) -> u64 {
        self.line.wish(Wish::Pin(tensor, wanted[..wanted.len().min(2 * WINDOW)].to_vec()))
    }
}

impl BlockSource for Remote {
    fn pin(&self, tensor: u32, wanted: &[u32]) -> Frames {
        let mut ahead = self.ahead.lock().unwrap_or_else(PoisonError::into_inner);
        let ticket = match ahead.take() {
            Some((ticket, other, numbers)) if other == tensor && wanted.starts_with(&numbers) => ticket,
            Some((ticket, ..)) => {
                // An operator ended early.
                drop(self.line.wait(ticket)?);
                self.wish(tensor, wanted)
            }
            None => self.wish(tensor, wanted),
        };
        let Answer::Frames(frames) = self.line.wait(ticket)? else { return wrong_answer() };
        let frames = frames?;
        let rest = wanted.get(frames.len()..).unwrap_or(&[]);
        if !rest.is_empty() {
            let numbers = rest[..rest.len().min(WINDOW)].to_vec();
            *ahead = Some((self.wish(tensor, rest), tensor, numbers));
        }
        Ok(frames)
    }

    fn operator_memory(&self) -> u64 {
        self.operator_memory
    }

    fn spill_file(&self) -> Result<Option<Box<dyn SpillFile>>, ModelError> {
        let Answer::File(file) = self.line.wait(self.line.wish(Wish::NewFile))? else { return wrong_answer() };
        Ok(file?.map(|number| Box::new(RemoteFile { line: self.line.clone(), number }) as Box<dyn SpillFile>))
    }
}

/// A file of the calling thread.
struct RemoteFile {
    line: Line,
    number: usize,
}

impl SpillFile for RemoteFile {
    fn append(&mut self, bytes: Vec<u8>) -> Result<(), ModelError> {
        let Answer::Done(done) = self.line.wait(self.line.wish(Wish::Append(self.number, bytes)))? else {
            return wrong_answer();
        };
        done
    }

    fn read(&mut self, offset: u64, len: usize) -> Result<Vec<u8>, ModelError> {
        let Answer::Bytes(bytes) = self.line.wait(self.line.wish(Wish::Read(self.number, offset, len)))? else {
            return wrong_answer();
        };
        bytes
    }
}

impl Drop for RemoteFile {
    fn drop(&mut self) {
        self.line.wish(Wish::Close(self.number));
    }
}

/// Closes the exchange, also when the calling thread unwinds.
struct Close(Arc<Exchange>);

impl Drop for Close {
    fn drop(&mut self) {
        let mut counter = self.0.lock();
        counter.closed = true;
        let left = std::mem::take(&mut counter.answers);
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
    let operator_memory = source.operator_memory();
    let mut files = Files::default();
    let result = worker::run_interruptible(
        move |cancel, bell| {
            let source = Arc::new(Remote::new(theirs, bell.clone(), operator_memory));
            plan.run_on_blocks(inputs, source, cancel)
        },
        &mut || {
            exchange.serve(source, &mut files);
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
        let mut files = Files::default();
        worker::run_interruptible(
            move |cancel, bell| {
                let remote = Arc::new(Remote::new(theirs, bell.clone(), u64::MAX));
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
                exchange.serve(source, &mut files);
                poll()
            },
        )
    }

    #[test]
    fn blocks_come_from_the_calling_thread_and_an_error_of_it_ends_the_run() {
        let source = Counting(AtomicUsize::new(0), std::thread::current().id());
        let seen = walk(&source, &mut || false).unwrap();
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
