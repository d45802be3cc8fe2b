//! Tests of the access method in one backend. What needs a second one, a crash or another server is in `pg_test/`.

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
             CREATE TABLE t (k int, data bytea) USING tensor_block;
             CREATE TABLE h (k int, data bytea);",
        )
        .expect("set-up");
    }

    fn store_blocks(table: &str) -> i64 {
        one(&format!("SELECT blocks_stored FROM tessera.store_totals('{table}')"))
    }

    #[pg_test]
    fn equal_values_are_stored_once() {
        setup();
        Spi::run("INSERT INTO t SELECT i, noise(65536, i % 3) FROM generate_series(1, 30) i").expect("insert");
        assert_eq!(store_blocks("t"), 3);
        assert!(one::<bool>("SELECT bool_and(data = noise(65536, k % 3)) FROM t"));
        assert_eq!(one::<i64>("SELECT blocks_referenced FROM tessera.store_totals('t')"), 30);
    }

    #[pg_test]
    fn values_of_every_size_read_back() {
        setup();
        Spi::run(
            "INSERT INTO t SELECT n, noise(n, 1) FROM unnest(ARRAY[0, 16, 32, 2000, 2032, 2048, 8160, 8192, 65536, 530912, 530928, 2000000]) n;
             INSERT INTO h SELECT * FROM t",
        )
        .expect("insert");
        assert!(one::<bool>("SELECT bool_and(data IS NOT DISTINCT FROM noise(k, 1)) FROM t"));
        assert!(one::<bool>("SELECT bool_and(data IS NOT DISTINCT FROM noise(k, 1)) FROM h"), "copies into heap");
        assert!(one::<bool>(
            "SELECT bool_and(substring(data FROM 8150 FOR 100) = substring(noise(k, 1) FROM 8150 FOR 100)) FROM t WHERE k > 9000"
        ));
    }

    #[pg_test]
    fn compressible_values_are_stored_compressed() {
        Spi::run(
            "CREATE TABLE c (k int, a text, b text) USING tensor_block;
             INSERT INTO c SELECT i, repeat('abc', i * 10), repeat(md5(i::text), i) FROM generate_series(1, 400) i",
        )
        .expect("insert");
        assert!(one::<bool>("SELECT bool_and(a = repeat('abc', k * 10) AND b = repeat(md5(k::text), k)) FROM c"));
        let (raw, stored) = (
            one::<i64>("SELECT sum(length(b))::bigint FROM c WHERE tessera.block_id(b) IS NOT NULL"),
            one::<i64>("SELECT bytes_stored FROM tessera.store_totals('c')"),
        );
        assert!(stored < raw / 4, "{stored} of {raw}");
    }

    #[pg_test]
    fn a_row_wide_by_many_narrow_columns_stays_whole() {
        // heapam's own toaster looks at such a row and must find nothing to do: it would write heap pages into the store.
        let columns: Vec<String> = (0..150).map(|i| format!("c{i} text")).collect();
        Spi::run(&format!("CREATE TABLE wide ({}) USING tensor_block", columns.join(", "))).expect("create");
        let values: Vec<String> = (0..150).map(|i| format!("'{:020}'", i)).collect();
        Spi::run(&format!("INSERT INTO wide VALUES ({})", values.join(", "))).expect("insert");
        assert!(one::<bool>("SELECT c0 = lpad('0', 20, '0') AND c149 = lpad('149', 20, '0') FROM wide"));
        assert_eq!(store_blocks("wide"), 0);
    }

    #[pg_test]
    fn savepoints_and_truncate_roll_back() {
        setup();
        Spi::run(
            "INSERT INTO t VALUES (1, noise(9000, 1));
             DO $$ BEGIN INSERT INTO t VALUES (2, noise(9000, 2)); RAISE EXCEPTION 'undo'; EXCEPTION WHEN raise_exception THEN END $$;
             DO $$ BEGIN TRUNCATE t; RAISE EXCEPTION 'undo'; EXCEPTION WHEN raise_exception THEN END $$;",
        )
        .expect("statements");
        assert_eq!(one::<i64>("SELECT count(*) FROM t"), 1);
        assert!(one::<bool>("SELECT data = noise(9000, 1) FROM t"));
        Spi::run("TRUNCATE t; INSERT INTO t VALUES (3, noise(9000, 3))").expect("truncate");
        assert_eq!(store_blocks("t"), 1);
    }

    #[pg_test]
    fn indexes_find_rows_built_before_and_after() {
        setup();
        Spi::run(
            "INSERT INTO t SELECT i, noise(4000, i) FROM generate_series(1, 50) i;
             CREATE UNIQUE INDEX t_k ON t (k);
             CREATE INDEX t_expr ON t (length(data)) WHERE k > 10;
             INSERT INTO t SELECT i, noise(4000, i) FROM generate_series(51, 100) i;
             REINDEX TABLE t;
             SET LOCAL enable_seqscan = off;",
        )
        .expect("statements");
        assert_eq!(one::<i64>("SELECT sum(k) FROM t WHERE k IN (7, 50, 51, 99)"), 207);
        assert!(one::<bool>("SELECT data = noise(4000, 99) FROM t WHERE k = 99"));
        assert_eq!(one::<i64>("SELECT count(*) FROM t WHERE length(data) = 4000 AND k > 10"), 90);
        // The directory was built anew from the locators: equal content is still found.
        Spi::run("INSERT INTO t VALUES (101, noise(4000, 5))").expect("insert");
        assert_eq!(store_blocks("t"), 100);
    }

    #[pg_test]
    #[should_panic(expected = "duplicate key value")]
    fn a_unique_index_refuses_duplicates() {
        setup();
        Spi::run("INSERT INTO t VALUES (1, 'a'); CREATE UNIQUE INDEX ON t (k); INSERT INTO t VALUES (1, 'b')")
            .expect("insert");
    }

    #[pg_test]
    fn rows_have_system_columns() {
        setup();
        Spi::run("INSERT INTO t SELECT i, noise(5000, i) FROM generate_series(1, 3) i").expect("insert");
        assert!(one::<bool>(
            "SELECT bool_and(xmin::text <> '0' AND tableoid = 't'::regclass AND ctid IS NOT NULL) FROM t"
        ));
        assert!(one::<bool>(
            "WITH i AS (INSERT INTO t VALUES (4, noise(5000, 4)) RETURNING xmin, ctid, data)
             SELECT xmin::text <> '0' AND ctid IS NOT NULL AND data = noise(5000, 4) FROM i"
        ));
        assert_eq!(
            one::<i64>("WITH d AS (DELETE FROM t WHERE k <= 2 RETURNING data) SELECT sum(length(data)) FROM d"),
            9984
        );
        assert_eq!(one::<i32>("SELECT k FROM t WHERE ctid = (SELECT min(ctid) FROM t)"), 3);
    }

    #[pg_test]
    fn copies_outlive_the_table() {
        setup();
        Spi::run(
            "INSERT INTO t SELECT i, noise(70000, i) FROM generate_series(1, 4) i;
             CREATE TABLE copy1 AS SELECT * FROM t;
             CREATE TABLE copy2 AS SELECT t AS whole_row FROM t;
             CREATE TABLE copy3 USING tensor_block AS SELECT * FROM t;
             CREATE MATERIALIZED VIEW copy4 USING tensor_block AS SELECT * FROM t;
             DROP TABLE t CASCADE;",
        )
        .expect("statements");
        for (table, data) in [("copy1", "data"), ("copy2", "(whole_row).data"), ("copy3", "data")] {
            if table == "copy2" {
                continue; // its type went with the table
            }
            assert_eq!(one::<i64>(&format!("SELECT sum(length({data})) FROM {table}")), 280_000, "{table}");
        }
    }

    #[pg_test]
    fn alter_table_moves_rows_between_access_methods() {
        setup();
        Spi::run(
            "INSERT INTO h SELECT i, noise(20000, i % 2) FROM generate_series(1, 6) i;
             ALTER TABLE h ADD COLUMN later text DEFAULT 'x';
             INSERT INTO t SELECT k, data FROM h;
             ALTER TABLE t ADD COLUMN later text DEFAULT 'y';
             ALTER TABLE t ALTER COLUMN k TYPE bigint;",
        )
        .expect("statements");
        assert!(one::<bool>("SELECT bool_and(data = noise(20000, (k % 2)::int) AND later = 'y') FROM t"));
        assert_eq!(store_blocks("t"), 2);
    }

    #[pg_test]
    fn unlogged_and_temporary_tables_work() {
        setup();
        for kind in ["UNLOGGED", "TEMPORARY"] {
            Spi::run(&format!(
                "CREATE {kind} TABLE u (k int, data bytea) USING tensor_block;
                 INSERT INTO u SELECT i, noise(65536, i % 2) FROM generate_series(1, 4) i"
            ))
            .expect("statements");
            assert!(one::<bool>("SELECT bool_and(data = noise(65536, k % 2)) FROM u"), "{kind}");
            Spi::run("DROP TABLE u").expect("drop");
        }
    }

    #[pg_test]
    fn samples_bitmaps_and_statistics_read_rows() {
        setup();
        Spi::run(
            "INSERT INTO t SELECT i, noise(3000, i) FROM generate_series(1, 200) i;
             CREATE INDEX ON t (k);
             ANALYZE t;
             SET LOCAL enable_seqscan = off; SET LOCAL enable_indexscan = off;",
        )
        .expect("statements");
        assert_eq!(one::<i64>("SELECT count(*) FROM t WHERE k < 20 OR k > 190"), 29);
        assert_eq!(one::<i64>("SELECT count(*) FROM t TABLESAMPLE system (100)"), 200);
        assert_eq!(one::<f32>("SELECT reltuples FROM pg_class WHERE oid = 't'::regclass"), 200.0);
    }

    /// Each statement that this version cannot do says so, with a hint.
    fn is_refused(statement: &str) {
        let sqlstate = PgTryBuilder::new(|| {
            Spi::run(statement).expect("an ERROR instead");
            None
        })
        .catch_others(|e| match e {
            pgrx::pg_sys::panic::CaughtError::ErrorReport(report)
            | pgrx::pg_sys::panic::CaughtError::PostgresError(report) => {
                Some((report.sql_error_code(), report.hint().is_some()))
            }
            other => other.rethrow(),
        })
        .execute();
        assert_eq!(sqlstate, Some((PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED, true)), "{statement}");
    }

    #[pg_test]
    fn a_block_store_is_no_table() {
        setup();
        Spi::run("INSERT INTO t VALUES (1, noise(70000, 1))").expect("insert");
        let store = one::<String>("SELECT reltoastrelid::regclass::text FROM pg_class WHERE oid = 't'::regclass");
        is_refused(&format!("SELECT * FROM {store}"));
    }
}
