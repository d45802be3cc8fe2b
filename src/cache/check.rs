//! The cache's invariants, looked at while nobody can change them.

use super::area::existing;
use super::layout::{Area, LOCKS, NONE, PARTITIONS, REPLACEMENT_LOCK, SLOTS_LOCK, State};
use super::partition;
use crate::pg::shmem::{self, LockGuard};
use std::collections::HashSet;
use std::sync::atomic::Ordering::Acquire;
use std::time::Duration;

/// What is wrong: kind, place, details. Empty when all is well, and when there is no cache yet.
pub fn check() -> Vec<(&'static str, Option<u32>, String)> {
    let Some(area) = existing() else { return Vec::new() };
    let mut problems = Vec::new();
    // Asked before the locks are held, for it takes one of the server's.
    let dead: Vec<u32> = processes(area).into_iter().filter(|&id| !shmem::process_lives(id)).collect();
    for id in dead {
        if processes(area).contains(&id) {
            problems.push(("row of a process that is gone", None, format!("process {id}")));
        }
    }
    // Pins are dropped without a lock, as a change of two numbers: who sees one of them changed looks again.
    for turn in 0..50 {
        let pins = {
            let _locks = lock_all(area);
            let pins = check_pins(area);
            if pins.is_empty() || turn == 49 {
                check_lookup(area, &mut problems);
            }
            pins
        };
        if pins.is_empty() || turn == 49 {
            problems.extend(pins);
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    problems
}

fn processes(area: &Area) -> Vec<u32> {
    area.backends.iter().map(|row| row.process.load(Acquire)).filter(|&id| id != 0).collect()
}

fn lock_all(area: &Area) -> Vec<LockGuard> {
    let mut locks = Vec::with_capacity(LOCKS);
    for n in [SLOTS_LOCK, REPLACEMENT_LOCK].into_iter().chain(0..PARTITIONS) {
        locks.push(area.region.lock(n, true));
    }
    locks
}

/// The pins that frames count are those that processes have noted.
fn check_pins(area: &Area) -> Vec<(&'static str, Option<u32>, String)> {
    let mut problems = Vec::new();
    let mut noted = vec![0u32; area.frames.len()];
    for row in area.backends {
        let process = row.process.load(Acquire);
        for pin in row.pins.iter().map(|pin| pin.load(Acquire)).filter(|&pin| pin != 0) {
            match noted.get_mut(pin as usize - 1) {
                Some(noted) => *noted += 1,
                None => problems.push(("pin of no frame", None, format!("process {process}, frame {}", pin - 1))),
            }
            if process == 0 {
                problems.push(("pin of no process", Some(pin - 1), String::new()));
            }
        }
    }
    for (n, (frame, noted)) in area.frames.iter().zip(noted).enumerate() {
        let pins = frame.pins.load(Acquire);
        if pins != noted {
            problems.push(("pins disagree", Some(n as u32), format!("{pins} counted, {noted} noted by processes")));
        }
        let state = frame.state();
        if matches!(state, State::Loading | State::Taken) && pins == 0 {
            problems.push(("frame in nobody's hands", Some(n as u32), state.name().to_owned()));
        }
        let free = area.free[n / 64].load(Acquire) & (1 << (n % 64)) != 0;
        if free != (state == State::Free) {
            problems.push(("free list disagrees", Some(n as u32), format!("{} frame", state.name())));
        }
    }
    problems
}

/// Chains, entries and frames agree.
fn check_lookup(area: &Area, problems: &mut Vec<(&'static str, Option<u32>, String)>) {
    let mut chained = HashSet::new();
    for (n, chain) in area.chains.iter().enumerate() {
        let partition = n / area.plan.chains;
        let mut at = chain.load(Acquire);
        while at != NONE {
            let Some(entry) = area.entries.get(at as usize) else {
                problems.push(("chain leads to no entry", None, format!("chain {n}, entry {at}")));
                break;
            };
            if !chained.insert(at) {
                problems.push(("entry in two chains", None, format!("chain {n}, entry {at}")));
                break;
            }
            let here = partition::of_entry(area, at) == partition && partition::number_of(entry.key()) == partition;
            if !here || entry.bytes.load(Acquire) == 0 {
                problems.push(("entry in a wrong chain", None, format!("chain {n}, entry {at}")));
            }
            at = entry.next.load(Acquire);
        }
    }
    let mut blocks = HashSet::new();
    for (n, entry) in area.entries.iter().enumerate() {
        let n = n as u32;
        if entry.bytes.load(Acquire) == 0 {
            continue;
        }
        if !chained.contains(&n) {
            problems.push(("entry in no chain", None, format!("entry {n}")));
        }
        if !blocks.insert((entry.key(), entry.bytes.load(Acquire))) {
            problems.push(("two entries of one block", None, format!("entry {n}")));
        }
        let frame = entry.frame.load(Acquire);
        if frame != NONE && area.frames.get(frame as usize).is_none_or(|frame| frame.entry.load(Acquire) != n) {
            problems.push(("entry and frame disagree", Some(frame), format!("entry {n}")));
        }
    }
    for (n, frame) in area.frames.iter().enumerate() {
        let entry = frame.entry.load(Acquire);
        let has_block = matches!(frame.state(), State::Loading | State::Valid | State::Abandoned);
        if has_block != (entry != NONE) {
            problems.push(("frame without its block", Some(n as u32), frame.state().name().to_owned()));
        }
        if entry != NONE && area.entries.get(entry as usize).is_none_or(|e| e.frame.load(Acquire) != n as u32) {
            problems.push(("frame and entry disagree", Some(n as u32), format!("entry {entry}")));
        }
    }
}
