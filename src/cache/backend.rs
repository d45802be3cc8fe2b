//! What this process pins.
//!
//! A pin is a count in the frame, and the frame's number in the process's row. Both change together, under a mutex of
//! this process, which the end of the process takes as well: after that there is nothing left to release, so a pin that
//! is dropped later, by a thread that still computes, is nothing.

use super::area::area;
use super::layout::{Area, NONE, PINS, State};
use crate::pg::shmem;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard};

struct Local {
    row: Option<usize>,
    /// A bit for each place of the row that is taken.
    taken: u128,
    over: bool,
}

const _: () = assert!(PINS == u128::BITS as usize);

static LOCAL: Mutex<Local> = Mutex::new(Local { row: None, taken: 0, over: false });

fn local() -> MutexGuard<'static, Local> {
    LOCAL.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Takes a row for this process, if it has none. False if there is none left, or the process is at its end.
pub fn join(area: &Area) -> bool {
    let mut me = local();
    if me.over {
        return false;
    }
    if me.row.is_none() {
        let id = shmem::process_id();
        me.row = area
            .backends
            .iter()
            .position(|row| row.process.compare_exchange(0, id, Ordering::AcqRel, Ordering::Relaxed).is_ok());
        if me.row.is_some() {
            shmem::at_exit(leave);
        }
    }
    me.row.is_some()
}

/// How many more pins this process can have. Only the main thread makes it less.
pub fn room() -> usize {
    let me = local();
    if me.over || me.row.is_none() { 0 } else { PINS - me.taken.count_ones() as usize }
}

/// A pin, or a claim, of this process. Dropping it ends it, on any thread.
pub struct Hold {
    area: &'static Area,
    frame: u32,
    place: usize,
    claim: bool,
}

impl Hold {
    /// Notes a pin that was counted in the frame already.
    ///
    /// The caller has seen that there is room.
    pub fn note(area: &'static Area, frame: u32, claim: bool) -> Hold {
        let mut me = local();
        let place = me.taken.trailing_ones() as usize;
        let row = me.row.expect("the process has joined");
        area.backends[row].pins[place].store(frame + 1, Ordering::Release);
        me.taken |= 1 << place;
        Hold { area, frame, place, claim }
    }

    /// The frame's number.
    pub fn frame(&self) -> u32 {
        self.frame
    }

    /// Publishes a frame that was claimed: from now on it is a pin.
    pub fn publish(&mut self) {
        self.area.frames[self.frame as usize].change(State::Loading, State::Valid);
        self.claim = false;
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut me = local();
        if me.over {
            return;
        }
        let Some(row) = me.row else { return };
        me.taken &= !(1 << self.place);
        self.area.backends[row].pins[self.place].store(0, Ordering::Release);
        let_go(self.area, self.frame, self.claim);
    }
}

/// Ends a pin, or a claim in whatever state it is. Atomics only.
fn let_go(area: &Area, number: u32, claim: bool) {
    let frame = &area.frames[number as usize];
    if claim && frame.change(State::Taken, State::Free) {
        frame.entry.store(NONE, Ordering::Relaxed);
        frame.pins.store(0, Ordering::Release);
        super::replace::set_free(area, number);
        return;
    }
    if claim {
        frame.change(State::Loading, State::Abandoned);
    }
    frame.pins.fetch_sub(1, Ordering::AcqRel);
}

/// The process ends: its pins and claims with it. Runs on FATAL as well, when nothing unwinds.
fn leave() {
    let mut me = local();
    let area = area();
    if let Some(row) = me.row.take() {
        let row = &area.backends[row];
        for pin in &row.pins {
            let frame = pin.swap(0, Ordering::AcqRel);
            if frame != 0 {
                // Only a loader pins a frame in these states.
                let state = area.frames[frame as usize - 1].state();
                let_go(area, frame - 1, matches!(state, State::Taken | State::Loading));
            }
        }
        row.process.store(0, Ordering::Release);
    }
    me.over = true;
}
