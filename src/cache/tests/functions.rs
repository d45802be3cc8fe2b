//! SQL functions for tests with several sessions, and for the benchmark of policies: they use the cache with artificial
//! blocks.

use super::blocks::{self, fill, is_right, model};
use crate::cache::{self, BlockKey, Pin, pin};
use crate::pg::interrupt;
use inference::weights::WINDOW;
use pgrx::prelude::*;
use std::cell::RefCell;
use std::time::{Duration, Instant};

thread_local! {
    static HELD: RefCell<Vec<Pin>> = const { RefCell::new(Vec::new()) };
}

fn keys(seed: i64, numbers: &[i32], bytes: i32) -> Vec<BlockKey> {
    numbers.iter().map(|&n| BlockKey { bytes: bytes as u32, ..blocks::key(seed as u64, n as u64) }).collect()
}

#[pg_schema]
mod tests {
    use super::*;

    /// One run of an artificial model, which walks over the blocks in their order. Returns how many were loaded.
    #[pg_extern]
    fn cache_run(seed: i64, number: i32, numbers: Vec<i32>, bytes: i32) -> i64 {
        let slot = model(seed as u64, number as u64);
        cache::note_run(slot);
        let keys = keys(seed, &numbers, bytes);
        blocks::walk(slot, &keys) as i64
    }

    /// Pins one block until `cache_let_go`. The load takes some milliseconds, and then fails if that is wished; it serves
    /// interrupts.
    #[pg_extern]
    fn cache_hold(seed: i64, number: i32, load_ms: i32, fail: default!(bool, false)) -> bool {
        let keys = keys(seed, &[number], 65536);
        let mut loaded = false;
        let pins = pin(model(seed as u64, 0), &keys, &mut |n, out| {
            loaded = true;
            let until = Instant::now() + Duration::from_millis(load_ms as u64);
            while Instant::now() < until {
                interrupt::check();
                std::thread::sleep(Duration::from_millis(2));
            }
            if fail {
                error!("the load fails");
            }
            fill(&keys[n], out);
        });
        assert!(is_right(&keys[0], pins[0].bytes()));
        HELD.with_borrow_mut(|held| held.extend(pins));
        loaded
    }

    /// Unpins what `cache_hold` pinned, and returns how many blocks there were.
    #[pg_extern]
    fn cache_let_go() -> i64 {
        HELD.take().len() as i64
    }

    /// For some seconds: windows of random blocks out of `count`, each checked byte by byte while it is pinned. Returns
    /// how many blocks it checked.
    #[pg_extern]
    fn cache_hammer(seed: i64, count: i32, seconds: f64, random: i64) -> i64 {
        let all: Vec<i32> = (0..count).collect();
        let keys = keys(seed, &all, 65536);
        let (mut state, mut checked) = (random as u64 | 1, 0);
        let until = Instant::now() + Duration::from_secs_f64(seconds);
        while Instant::now() < until {
            interrupt::check();
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let slot = model(seed as u64, state % 7);
            cache::note_run(slot);
            let at = (state >> 20) as usize % keys.len();
            let window = &keys[at..keys.len().min(at + 1 + (state >> 40) as usize % WINDOW)];
            let (pins, _) = blocks::get(slot, window);
            for (pin, key) in pins.iter().zip(window).rev() {
                assert!(is_right(key, pin.bytes()), "a pinned block has changed");
                checked += 1;
            }
        }
        checked
    }
}
