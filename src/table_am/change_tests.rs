//! Tests of changes to rows and blocks in one backend: updates, conflicts, CLUSTER, repacking, and faults in between.

#[pgrx::pg_schema]
mod tests {
    use pgrx::prelude::*;

    fn one<T: FromDatum + IntoDatum>(query: &str) -> T {
        Spi::get_one::<T>(query).expect("the query runs").expect("the query has a value")
    }

    fn setup() {
        Spi::run(
            "CREATE FUNCTION noise(n int, seed int) RETURNS bytea LANGUAGE sql IMMUTABLE AS
               $$ SELECT decode(string_agg(md5(i || '/' || seed), ''), 'hex') FROM generate_series(1, n / 16) i $$;
             CREATE TABLE t (k int PRIMARY KEY, n int, data bytea) USING tensor_block;
             INSERT INTO t SELECT i, i % 5, noise(20000, i % 40) FROM generate_series(1, 100) i",
        )
        .expect("set-up");
    }

    fn wrong_rows() -> i64 {
        one("SELECT count(*) FROM t WHERE data <> noise(20000, k % 40)")
    }

    fn faults() -> i64 {
        one("SELECT count(*) FROM check_store('t')")
    }

    fn stored() -> i64 {
        one("SELECT blocks_stored FROM tessera.store_totals('t')")
    }

    #[pg_test]
    fn an_update_of_another_column_keeps_the_block() {
        setup();
        let before = one::<i64>("SELECT sum(tessera.block_id(data))::bigint FROM t");
        Spi::run("UPDATE t SET n = n + 1").expect("update");
        assert_eq!(one::<i64>("SELECT sum(tessera.block_id(data))::bigint FROM t"), before);
        assert_eq!((wrong_rows(), stored(), faults()), (0, 40, 0));
    }

    #[pg_test]
    fn an_update_of_the_value_stores_the_new_one() {
        setup();
        Spi::run("UPDATE t SET k = k + 1000, data = noise(20000, (k + 1000) % 40) WHERE k <= 50").expect("update");
        assert_eq!((wrong_rows(), one::<i64>("SELECT count(*) FROM t"), faults()), (0, 100, 0));
        Spi::run("UPDATE t SET data = 'short' WHERE k = 1001").expect("update");
        assert!(one::<bool>("SELECT data = 'short' AND tessera.block_id(data) IS NULL FROM t WHERE k = 1001"));
    }

    #[pg_test]
    fn an_update_returns_old_columns_and_new_ones() {
        setup();
        assert!(one::<bool>(
            "WITH u AS (UPDATE t SET data = noise(9000, 7) WHERE k = 3 RETURNING k, n, data, xmin::text <> '0' AS x)
             SELECT k = 3 AND n = 3 AND data = noise(9000, 7) AND x FROM u"
        ));
    }

    #[pg_test]
    fn conflicts_do_nothing_or_update() {
        setup();
        Spi::run(
            "INSERT INTO t SELECT i, 0, noise(20000, i % 40) FROM generate_series(91, 110) i ON CONFLICT DO NOTHING;
             INSERT INTO t SELECT i, -1, noise(20000, i % 40) FROM generate_series(101, 120) i
               ON CONFLICT (k) DO UPDATE SET n = excluded.n, data = excluded.data",
        )
        .expect("insert");
        assert_eq!(one::<i64>("SELECT count(*) FROM t"), 120);
        assert_eq!(one::<i64>("SELECT count(*) FROM t WHERE n = -1"), 20);
        assert_eq!((wrong_rows(), faults()), (0, 0));
    }

    #[pg_test]
    fn a_rewritten_table_that_needs_no_store_takes_its_values_in() {
        Spi::run(
            "CREATE TABLE n (k int, a varchar(30), b varchar(30), wide text) USING tensor_block;
             ALTER TABLE n ALTER wide SET STORAGE MAIN;
             INSERT INTO n SELECT i, repeat('a', 30), 'b' || i, string_agg(md5(j::text), '')
               FROM generate_series(1, 20) i, generate_series(1, 90) j GROUP BY i;
             CREATE INDEX by_k ON n (a, k);
             ALTER TABLE n DROP wide",
        )
        .expect("set-up");
        assert!(one::<bool>("SELECT bool_and(tessera.block_id(a) IS NOT NULL) FROM n"));
        Spi::run("CLUSTER n USING by_k").expect("rewrite");
        assert!(one::<bool>("SELECT reltoastrelid = 0 FROM pg_class WHERE oid = 'n'::regclass"));
        assert!(one::<bool>("SELECT count(*) = 20 AND bool_and(a = repeat('a', 30) AND b = 'b' || k) FROM n"));
    }

    #[pg_test]
    fn cluster_keeps_rows_and_block_ids() {
        setup();
        Spi::run("CREATE INDEX by_n ON t (n, k); DELETE FROM t WHERE k > 60").expect("index");
        let ids = one::<i64>("SELECT sum(k * tessera.block_id(data))::bigint FROM t");
        Spi::run("CLUSTER t USING by_n").expect("cluster");
        assert_eq!(one::<i64>("SELECT sum(k * tessera.block_id(data))::bigint FROM t"), ids);
        assert!(one::<bool>(
            "SELECT bool_and(ordered) FROM (SELECT (n, k) >= lag((n, k)) OVER (ORDER BY ctid) AS ordered FROM t) q"
        ));
        assert_eq!((wrong_rows(), faults()), (0, 0));
        // New blocks get new ids.
        let highest = one::<i64>("SELECT max(tessera.block_id(data)) FROM t");
        Spi::run("INSERT INTO t VALUES (5000, 0, noise(21000, 1))").expect("insert");
        assert!(one::<i64>("SELECT tessera.block_id(data) FROM t WHERE k = 5000") > highest);
    }

    #[pg_test]
    fn ids_go_on_after_truncate() {
        setup();
        let highest = one::<i64>("SELECT max(tessera.block_id(data)) FROM t");
        Spi::run("TRUNCATE t; INSERT INTO t VALUES (1, 0, noise(20000, 1))").expect("truncate");
        assert!(one::<i64>("SELECT tessera.block_id(data) FROM t") > highest);
        assert_eq!((wrong_rows(), faults()), (0, 0));
    }

    #[pg_test]
    fn repacking_brings_the_blocks_of_a_tensor_together() {
        setup();
        let pages = "SELECT max(pages)::bigint FROM (SELECT count(DISTINCT tensor_page) AS pages
                     FROM t JOIN tessera.store_blocks('t') b ON b.block_id = tessera.block_id(data) GROUP BY n) q";
        Spi::run("INSERT INTO t SELECT i, i % 5, noise(60000, i) FROM generate_series(1001, 1100) i").expect("insert");
        let before = one::<i64>(pages);
        assert!(one::<i64>("SELECT repack('t', 'n')") >= 140);
        assert!(one::<i64>(pages) < before, "{} of {before}", one::<i64>(pages));
        assert_eq!(one::<i64>("SELECT repack('t', 'n')"), 0, "packed already");
        assert_eq!(one::<i64>("SELECT count(*) FROM t WHERE data <> noise(60000, k) AND k > 1000"), 0);
        assert_eq!(
            (one::<i64>("SELECT count(*) FROM t WHERE data <> noise(20000, k % 40) AND k <= 100"), faults()),
            (0, 0)
        );
    }

    /// An ERROR at each point of a change: the block is not there, and the next insertion of the same content is whole.
    #[pg_test]
    fn an_error_in_the_middle_of_an_insertion_loses_nothing() {
        setup();
        let points = ["store after reserve", "store after payload", "store after directory"];
        for (seed, point) in (90..).zip(points) {
            Spi::run(&format!(
                "DO $$ BEGIN
                   SET LOCAL tessera_test.fault = '{point}';
                   INSERT INTO t VALUES (2000, 0, noise(30000, {seed}));
                   RAISE 'no fault';
                 EXCEPTION WHEN internal_error THEN END $$"
            ))
            .expect("the fault is caught");
            assert_eq!((wrong_rows(), faults(), one::<i64>("SELECT count(*) FROM t")), (0, 0, 100), "{point}");
            Spi::run(&format!("INSERT INTO t VALUES (2000, 0, noise(30000, {seed}))")).expect("insert");
            assert!(one::<bool>(&format!("SELECT data = noise(30000, {seed}) FROM t WHERE k = 2000")), "{point}");
            assert_eq!(faults(), 0, "{point}");
            Spi::run("DELETE FROM t WHERE k = 2000").expect("delete");
        }
    }

    #[pg_test]
    fn an_error_in_the_middle_of_repacking_loses_nothing() {
        setup();
        Spi::run("INSERT INTO t SELECT i, i % 5, noise(20000, i % 40) FROM generate_series(101, 140) i")
            .expect("insert");
        Spi::run(
            "DO $$ BEGIN
               SET LOCAL tessera_test.fault = 'repack before locator';
               PERFORM repack('t', 'n');
               RAISE 'no fault';
             EXCEPTION WHEN internal_error THEN END $$",
        )
        .expect("the fault is caught");
        assert_eq!((wrong_rows(), faults()), (0, 0));
        Spi::run("SELECT repack('t', 'n')").expect("repack");
        assert_eq!((wrong_rows(), faults()), (0, 0));
    }

    /// Rows that come together have their blocks stored together; an ERROR in between leaves some of them reserved.
    #[pg_test]
    fn an_error_in_the_middle_of_many_rows_loses_nothing() {
        setup();
        Spi::run(
            "CREATE FUNCTION block(seed int) RETURNS tensor_block LANGUAGE sql IMMUTABLE AS
               $$ SELECT ('float32[10000]:' || translate(encode(noise(40000, seed), 'base64'), E'\n', ''))::tensor_block $$;
             CREATE TABLE b (k int, data tensor_block) USING tensor_block;
             DO $$ BEGIN
               EXECUTE format('COPY (SELECT k, block(k %% 70) FROM generate_series(1, 100) k) TO %L WITH (FORMAT binary)',
                              current_setting('data_directory') || '/many_rows');
             END $$",
        )
        .expect("set-up");
        let copy =
            "EXECUTE format('COPY b FROM %L WITH (FORMAT binary)', current_setting('data_directory') || '/many_rows')";
        let wrong = "SELECT count(*) FILTER (WHERE data::text <> block(k % 70)::text) FROM b";
        let found = "SELECT count(*) FROM check_store('b')";
        for point in ["store after reserve", "store after payload", "store after directory"] {
            Spi::run(&format!(
                "DO $$ BEGIN
                   SET LOCAL tessera_test.fault = '{point}';
                   {copy};
                   RAISE 'no fault';
                 EXCEPTION WHEN internal_error THEN END $$"
            ))
            .expect("the fault is caught");
            assert_eq!((one::<i64>("SELECT count(*) FROM b"), one::<i64>(found)), (0, 0), "{point}");
        }
        Spi::run(&format!("DO $$ BEGIN {copy}; {copy}; END $$")).expect("copy");
        assert_eq!((one::<i64>(wrong), one::<i64>("SELECT count(*) FROM b"), one::<i64>(found)), (0, 200, 0));
        assert_eq!(one::<i64>("SELECT count(DISTINCT tessera.block_id(data)) FROM b"), 70);
    }
}
