//! Work on a thread beside, a piece at a time, while this one goes on. The work knows no PostgreSQL.

use super::{compute, error};
use pgrx::prelude::*;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

/// The thread's two ends. It ends when this is dropped, also by an ERROR.
struct Thread<T> {
    to: SyncSender<T>,
    from: Receiver<T>,
}

/// Pieces of work, one of which is with the thread.
pub struct Beside<T> {
    name: &'static str,
    work: Arc<dyn Fn(&mut T) + Send + Sync>,
    /// None before the first piece, and if there is no thread to be had.
    thread: Option<Thread<T>>,
    /// Whether the thread has a piece.
    busy: bool,
}

impl<T: Send + 'static> Beside<T> {
    /// For pieces with which `work` is done, on a thread of this name.
    pub fn new(name: &'static str, work: impl Fn(&mut T) + Send + Sync + 'static) -> Beside<T> {
        Beside { name, work: Arc::new(work), thread: None, busy: false }
    }

    /// Does the work of a piece here.
    pub fn here(&self, mut piece: T) -> T {
        (self.work)(&mut piece);
        piece
    }

    /// Hands a piece over, and gives the one before when that is done; without a thread, this one.
    pub fn exchange(&mut self, piece: T) -> Option<T> {
        let before = self.collect();
        if self.thread.is_none() {
            self.thread = self.start();
        }
        let Some(thread) = &self.thread else { return Some(self.here(piece)) };
        thread.to.send(piece).unwrap_or_else(|_| lost(self.name));
        self.busy = true;
        before
    }

    /// The piece that the thread has, when it is done.
    pub fn collect(&mut self) -> Option<T> {
        if !std::mem::take(&mut self.busy) {
            return None;
        }
        // Pieces are small, so that nobody waits for long.
        let thread = self.thread.as_ref()?;
        Some(thread.from.recv().unwrap_or_else(|_| lost(self.name)))
    }

    fn start(&self) -> Option<Thread<T>> {
        let (to, pieces) = sync_channel::<T>(1);
        let (done, from) = sync_channel::<T>(1);
        let work = self.work.clone();
        let run = move || {
            while let Ok(mut piece) = pieces.recv() {
                work(&mut piece);
                if done.send(piece).is_err() {
                    return;
                }
            }
        };
        compute::spawn(self.name, run).then_some(Thread { to, from })
    }
}

fn lost(name: &str) -> ! {
    error::raise(PgSqlErrorCode::ERRCODE_INTERNAL_ERROR, format!("the thread \"{name}\" has ended"), "", "")
}
