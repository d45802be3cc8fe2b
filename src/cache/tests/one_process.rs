//! What one process sees of the cache. The tests' server has one of 4,096 frames, which other tests use too.

#[pgrx::pg_schema]
mod tests {
    use crate::cache::area::use_private;
    use crate::cache::tests::blocks::{self, get, key, model, walk};
    use crate::cache::{self, BlockKey, pin};
    use pgrx::prelude::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    fn sound() {
        let problems = cache::check();
        assert!(problems.is_empty(), "{problems:?}");
    }

    /// Pins that there are on a model's frames.
    fn pins_on(seed: u64) -> u32 {
        let hash = key(seed, u64::MAX).hash;
        let is_mine = |frame: &&cache::FrameView| frame.owners.iter().any(|(_, owner)| *owner == hash);
        cache::frames().iter().filter(is_mine).map(|frame| frame.pins).sum()
    }

    fn counts() -> cache::Counts {
        cache::totals().counts
    }

    #[pg_test]
    fn the_cache_is_the_servers() {
        let (pins, _) = get(model(1, 0), &[key(1, 0)]);
        assert!(pins[0].is_cached());
        let totals = cache::totals();
        assert!(totals.shared && totals.frames == 4096 && totals.frames_used >= 1 && totals.frames_pinned >= 1);
        sound();
    }

    #[pg_test]
    fn a_second_walk_loads_nothing() {
        let keys: Vec<BlockKey> = (0..100).map(|n| key(2, n)).collect();
        let slot = model(2, 0);
        cache::note_run(slot);
        assert_eq!(walk(slot, &keys), 100);
        cache::note_run(slot);
        assert_eq!(walk(slot, &keys), 0);
        let hash = key(2, u64::MAX).hash;
        let mine = cache::models().into_iter().find(|m| m.content_hash == hash).expect("the model was used");
        assert_eq!((mine.runs, mine.frames, mine.bytes), (2, 100, 100 * 65536));
        assert_eq!(mine.counts, [100, 100, 100, 100 * 65536, 0, 0, 0]);
        sound();
    }

    #[pg_test]
    fn blocks_of_one_content_are_one() {
        let keys: Vec<BlockKey> = (0..10).map(|n| key(3, n % 3)).collect();
        assert_eq!(walk(model(3, 0), &keys), 3);
        assert_eq!(walk(model(3, 1), &keys), 0);
        sound();
    }

    #[pg_test]
    fn a_large_block_is_private() {
        let large = BlockKey { bytes: 65537 * 8, ..key(4, 0) };
        for _ in 0..2 {
            let (pins, loads) = get(model(4, 0), &[large, key(4, 1)]);
            assert_eq!((pins.len(), loads, pins[0].is_cached()), (1, 1, false));
        }
        let (pins, _) = get(model(4, 0), &[key(4, 1), large, key(4, 2)]);
        assert_eq!(pins.len(), 1);
        sound();
    }

    #[pg_test]
    fn an_error_of_the_loader_leaves_nothing() {
        let keys: Vec<BlockKey> = (0..8).map(|n| key(5, n)).collect();
        let slot = model(5, 0);
        let failed = catch_unwind(AssertUnwindSafe(|| {
            pin(slot, &keys, &mut |n, out| {
                assert_ne!(n, 3, "this load fails");
                blocks::fill(&keys[n], out);
            })
        }));
        assert!(failed.is_err());
        sound();
        assert_eq!(walk(slot, &keys), 5, "three were loaded before the fourth failed");
        assert_eq!(walk(slot, &keys), 0);
        assert_eq!(pins_on(5), 0);
        sound();
    }

    #[pg_test]
    fn pins_end_on_another_thread() {
        let (pins, _) = get(model(6, 0), &[key(6, 0), key(6, 1)]);
        assert_eq!(pins_on(6), 2);
        std::thread::spawn(move || drop(pins)).join().expect("the thread ends");
        assert_eq!(pins_on(6), 0);
        sound();
    }

    #[pg_test]
    fn a_process_has_so_many_pins() {
        let slot = model(7, 0);
        let mut held = Vec::new();
        for n in 0..127 {
            let (pins, _) = get(slot, &[key(7, n)]);
            assert!(pins[0].is_cached(), "pin {n}");
            held.extend(pins);
        }
        let (pins, _) = get(slot, &[key(7, 0)]);
        assert!(!pins[0].is_cached(), "beyond that, memory is private");
        sound();
        drop(held);
        assert!(get(slot, &[key(7, 0)]).0[0].is_cached());
        sound();
    }

    #[pg_test]
    fn two_frames_are_enough_for_one() {
        use_private(2);
        let keys: Vec<BlockKey> = (0..50).map(|n| key(8, n)).collect();
        for _ in 0..3 {
            walk(model(8, 0), &keys);
        }
        let [hits, misses, loads, bytes, evictions, waits, fallbacks] = counts();
        assert_eq!((hits + misses, misses, bytes), (150, loads, loads * 65536));
        assert_eq!((evictions, waits, fallbacks), (loads - 2, 0, 0));
        sound();
    }

    #[pg_test]
    fn with_all_frames_pinned_memory_is_private() {
        use_private(8);
        let slot = model(9, 0);
        let held: Vec<_> = (0..8).flat_map(|n| get(slot, &[key(9, n)]).0).collect();
        assert!(held.iter().all(cache::Pin::is_cached));
        let (pins, loads) = get(slot, &[key(9, 8), key(9, 9)]);
        assert_eq!((pins.len(), loads, pins[0].is_cached()), (1, 1, false));
        assert_eq!(counts()[6], 1);
        assert!(get(slot, &[key(9, 3)]).0[0].is_cached(), "what is there is found");
        sound();
        drop(held);
        assert!(get(slot, &[key(9, 8)]).0[0].is_cached());
        sound();
    }

    #[pg_test]
    fn one_caller_gets_a_quarter() {
        use_private(64);
        let keys: Vec<BlockKey> = (0..40).map(|n| key(10, n)).collect();
        assert_eq!(get(model(10, 0), &keys).0.len(), 4, "it loads a sixteenth at a time");
        walk(model(10, 0), &keys);
        assert_eq!(get(model(10, 0), &keys).0.len(), 16);
        sound();
    }

    #[pg_test]
    fn a_walk_lies_in_ascending_frames() {
        use_private(200);
        let keys: Vec<BlockKey> = (0..150).map(|n| key(11, n)).collect();
        walk(model(11, 0), &keys);
        let (pins, _) = get(model(11, 0), &keys[40..90]);
        assert_eq!(pins.len(), 50);
        assert!(pins.windows(2).all(|two| two[0].bytes().as_ptr_range().end == two[1].bytes().as_ptr()));
        sound();
    }

    #[pg_test]
    fn many_blocks_pass_through_a_small_cache() {
        use_private(24);
        let keys: Vec<BlockKey> = (0..1000).map(|n| key(12, n)).collect();
        let mut random = 12u64;
        for turn in 0..3000 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let at = (random >> 33) as usize % 995;
            let slot = model(12, random >> 60);
            cache::note_run(slot);
            get(slot, &keys[at..at + 5]);
            if turn % 500 == 0 {
                sound();
            }
        }
        sound();
        assert_eq!(counts()[6], 0, "no fall-back");
    }

    #[pg_test]
    fn more_models_than_slots() {
        use_private(64);
        for turn in 0..20 {
            for n in 0..200 {
                let slot = model(13, n);
                cache::note_run(slot);
                walk(slot, &[key(13, 0), key(13, n + 1)]);
            }
            if turn % 5 == 0 {
                sound();
            }
        }
        assert_eq!(cache::models().len(), 63);
        // One that runs often gets a slot when others have been idle for long.
        for _ in 0..1100 {
            cache::note_run(model(13, 500));
        }
        walk(model(13, 500), &[key(13, 501)]);
        assert!(cache::models().iter().any(|m| m.content_hash == key(13, u64::MAX - 500).hash));
        sound();
    }
}
