//! What the policies keep. Each test has a process, and a small cache, of its own.

#[pgrx::pg_schema]
mod tests {
    use crate::cache::area::use_private;
    use crate::cache::settings::{Policy, WISHED};
    use crate::cache::tests::blocks::{get, key, model, walk};
    use crate::cache::{self, BlockKey};
    use pgrx::prelude::*;

    fn wish(policy: Policy) {
        assert!(WISHED.set(policy).is_ok());
    }

    fn keys(seed: u64, range: std::ops::Range<u64>) -> Vec<BlockKey> {
        range.map(|n| key(seed, n)).collect()
    }

    fn run(seed: u64, number: u64, keys: &[BlockKey]) -> usize {
        let slot = model(seed, number);
        cache::note_run(slot);
        walk(slot, keys)
    }

    struct Random(u64);

    impl Random {
        fn below(&mut self, n: u64) -> u64 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) % n
        }
    }

    #[pg_test]
    fn lru_is_lru() {
        use_private(40);
        wish(Policy::Lru);
        let mut random = Random(20);
        // By the book: the last one was used last.
        let mut book: Vec<u64> = Vec::new();
        for _ in 0..5000 {
            let n = random.below(10) * random.below(10);
            let known = book.iter().position(|&block| block == n);
            let loads = get(model(20, 0), &[key(20, n)]).1;
            assert_eq!(loads, usize::from(known.is_none()));
            if let Some(at) = known {
                book.remove(at);
            } else if book.len() == 40 {
                book.remove(0);
            }
            book.push(n);
        }
        assert!(cache::check().is_empty());
    }

    #[pg_test]
    fn clock_gives_a_second_chance() {
        use_private(8);
        wish(Policy::Clock);
        let slot = model(21, 0);
        let all = keys(21, 0..9);
        for key in &all[..8] {
            get(slot, &[*key]);
        }
        get(slot, &[all[8]]); // a whole round clears every bit; the first frame goes
        get(slot, &[all[1]]); // used again
        assert_eq!(get(slot, &[all[0]]).1, 1, "it went");
        assert_eq!(get(slot, &[all[1]]).1, 0, "the one behind it was used since");
        assert_eq!(get(slot, &[all[2]]).1, 1, "so the next one went");
        assert!(cache::check().is_empty());
    }

    #[pg_test]
    fn sharing_keeps_most_of_a_walk_that_is_too_long() {
        use_private(40);
        wish(Policy::Sharing);
        let all = keys(22, 0..50);
        run(22, 0, &all);
        let loads: usize = (0..20).map(|_| run(22, 0, &all)).sum();
        assert!(loads <= 20 * 12, "{loads} loads in 20 walks over 50 blocks with 40 frames");
        assert!(cache::check().is_empty());
    }

    #[pg_test]
    fn sharing_keeps_what_many_models_use() {
        use_private(40);
        wish(Policy::Sharing);
        let blocks = |m: u64| [keys(23, 0..30), keys(23, 100 + 20 * m..120 + 20 * m)].concat();
        for m in 0..10 {
            run(23, m, &blocks(m));
        }
        for turn in 0..3 {
            for m in 0..10 {
                let loads = run(23, m, &blocks(m));
                assert!(loads <= 20, "turn {turn}, model {m}: {loads} loads, of which a shared block is one");
            }
        }
    }

    #[pg_test]
    fn sharing_keeps_the_busy_model() {
        use_private(40);
        wish(Policy::Sharing);
        let blocks = |m: u64| keys(24, 100 * m..100 * m + 30);
        let mut random = Random(24);
        let mut loads = 0;
        for turn in 0..600 {
            let busy = random.below(4) > 0;
            let m = if busy { 0 } else { 1 + random.below(5) };
            let loaded = run(24, m, &blocks(m));
            if turn > 100 && m == 0 {
                loads += loaded;
            }
        }
        assert!(loads < 30, "{loads} loads of a model that makes three of four runs");
    }

    #[pg_test]
    fn sharing_follows_a_change() {
        use_private(40);
        wish(Policy::Sharing);
        let blocks = |m: u64| keys(25, 100 * m..100 * m + 35);
        for _ in 0..2000 {
            run(25, 0, &blocks(0));
        }
        let loads: Vec<usize> = (0..40).map(|_| run(25, 1, &blocks(1))).collect();
        assert!(loads[20..].iter().sum::<usize>() == 0, "{loads:?}");
    }

    #[pg_test]
    fn sharing_knows_what_a_run_touches() {
        use_private(40);
        wish(Policy::Sharing);
        let mut random = Random(26);
        // Of a table of 400 blocks a run touches eight, half of them among the same four.
        let mut run_once = || {
            let mut wanted: Vec<BlockKey> = (0..4).map(|n| key(26, n)).collect();
            wanted.extend((0..4).map(|_| key(26, 4 + random.below(396))));
            run(26, 0, &wanted)
        };
        (0..300).for_each(|_| {
            run_once();
        });
        for _ in 0..200 {
            assert!(run_once() <= 4, "one of those that every run touches was evicted");
        }
    }

    #[pg_test]
    fn kept_models_go_last() {
        use_private(64);
        wish(Policy::Sharing);
        // SAFETY: backend state.
        let database = unsafe { pgrx::pg_sys::MyDatabaseId };
        let content = key(27, u64::MAX).hash;
        assert!(cache::keep(database, &content));
        run(27, 0, &keys(27, 0..30));
        for turn in 0..50 {
            run(27, 1 + turn % 3, &keys(27, 1000 * (turn % 3 + 1)..1000 * (turn % 3 + 1) + 60));
        }
        assert_eq!(run(27, 0, &keys(27, 0..30)), 0, "30 of 64 frames are kept");
        assert!(cache::release(database, &content) && !cache::release(database, &content));
        for turn in 0..50 {
            run(27, 1 + turn % 3, &keys(27, 1000 * (turn % 3 + 1)..1000 * (turn % 3 + 1) + 60));
        }
        assert!(run(27, 0, &keys(27, 0..30)) > 0, "released");
        // More than half of the cache is not kept for one model.
        assert!(cache::keep(database, &content));
        run(27, 0, &keys(27, 0..60));
        for _ in 0..50 {
            run(27, 1, &keys(27, 1000..1030));
        }
        assert_eq!(run(27, 1, &keys(27, 1000..1030)), 0, "the other half is for the others");
        assert!(cache::check().is_empty());
    }
}
