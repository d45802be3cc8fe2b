"""A user's own table USING tensor_block: everything this release has loses nothing, the rest is refused with a hint."""

import psycopg
import pytest

from helpers import assert_error, storage, store_size

pytestmark = pytest.mark.newer

MAKE = """
CREATE TABLE w (id int PRIMARY KEY, note text, data tensor_block) USING tensor_block;
CREATE FUNCTION value(i int) RETURNS real[] LANGUAGE sql IMMUTABLE AS
    'SELECT array_agg(((i * 7919 + k) % 4093)::real ORDER BY k) FROM generate_series(1, 4096) AS k';
INSERT INTO w SELECT i, 'row ' || i, value(i % 10)::tensor_block FROM generate_series(1, 100) AS i;
"""
WRONG = "SELECT count(*) FROM w WHERE data::real[] IS DISTINCT FROM value((id % 10)::int) OR note <> 'row ' || id"


@pytest.fixture
def conn(fresh):
    with fresh.connect() as connection:
        connection.execute(MAKE)
        yield connection


def check(conn: psycopg.Connection, rows: int) -> None:
    assert conn.execute("SELECT count(*) FROM w").fetchone()[0] == rows
    assert conn.execute(WRONG).fetchone()[0] == 0


def test_equal_blocks_once(conn):
    check(conn, 100)
    line = storage(conn, "w")
    assert (line["blocks_referenced"], line["blocks_stored"]) == (100, 10)
    assert line["deduplication_ratio"] == pytest.approx(10, rel=0.01)


def test_delete_and_vacuum(conn):
    conn.execute("DELETE FROM w WHERE id > 15")
    for _ in range(3):
        conn.execute("VACUUM w")
        check(conn, 15)
    conn.execute("INSERT INTO w SELECT i, 'row ' || i, value(i % 10)::tensor_block FROM generate_series(16, 100) AS i")
    check(conn, 100)


def test_deleted_in_a_transaction_that_aborts(conn):
    conn.execute("BEGIN")
    conn.execute("DELETE FROM w")
    conn.execute("ROLLBACK")
    conn.execute("VACUUM w")
    conn.execute("VACUUM w")
    check(conn, 100)


def test_old_snapshot_during_vacuum(fresh, conn):
    with fresh.connect() as old:
        old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        check(old, 100)
        conn.execute("DELETE FROM w WHERE id > 5")
        for _ in range(3):
            conn.execute("VACUUM w")
        check(old, 100)
        old.execute("COMMIT")
        check(old, 5)


def test_truncate(conn):
    conn.execute("BEGIN")
    conn.execute("TRUNCATE w")
    check(conn, 0)
    conn.execute("ROLLBACK")
    check(conn, 100)
    conn.execute("TRUNCATE w")
    check(conn, 0)
    assert storage(conn, "w")["blocks_stored"] == 0
    assert store_size(conn, "w") < 100_000
    conn.execute("INSERT INTO w SELECT i, 'row ' || i, value(i % 10)::tensor_block FROM generate_series(1, 20) AS i")
    check(conn, 20)


@pytest.mark.parametrize("form", ["", " (FORMAT binary)", " (FORMAT csv)"])
def test_copy(conn, form):
    conn.execute("CREATE TABLE copied (id int, note text, data tensor_block) USING tensor_block")
    with conn.cursor() as cursor:
        with cursor.copy(f"COPY w TO STDOUT{form}") as out:
            content = b"".join(bytes(part) for part in out)
        with cursor.copy(f"COPY copied FROM STDIN{form}") as into:
            into.write(content)
    same = "SELECT count(*) FROM w JOIN copied USING (id, note) WHERE w.data = copied.data AND w.data::bytea = copied.data::bytea"
    assert conn.execute(same).fetchone()[0] == 100
    line = storage(conn, "copied")
    assert (line["blocks_referenced"], line["blocks_stored"]) == (100, 10)


def test_copies_survive_their_source(conn):
    conn.execute("CREATE TABLE plain AS SELECT * FROM w")
    conn.execute("CREATE TABLE composite AS SELECT w AS whole FROM w")
    conn.execute("CREATE TABLE blocks USING tensor_block AS SELECT * FROM w")
    conn.execute("CREATE TEMP TABLE passing USING tensor_block AS SELECT * FROM w")
    conn.execute("ALTER TABLE composite ALTER whole TYPE text USING (whole).note || md5((whole).data::bytea)")
    conn.execute("DROP TABLE w")
    wanted = "SELECT count(*) FROM {} WHERE data::real[] = value(id % 10)"
    for table in ("plain", "blocks", "passing"):
        assert conn.execute(wanted.format(table)).fetchone()[0] == 100
    sql = "SELECT count(*) FROM composite JOIN plain ON whole = note || md5(data::bytea)"
    assert conn.execute(sql).fetchone()[0] == 100


def test_savepoints(conn):
    conn.execute("BEGIN")
    conn.execute("SAVEPOINT a")
    conn.execute("INSERT INTO w VALUES (101, 'row 101', value(77)::tensor_block)")
    conn.execute("ROLLBACK TO a")
    conn.execute("INSERT INTO w VALUES (101, 'row 101', value(1)::tensor_block)")
    conn.execute("COMMIT")
    check(conn, 101)


def test_index_scan(conn):
    conn.execute("ANALYZE w")
    conn.execute("SET enable_seqscan = off")
    conn.execute("SET enable_bitmapscan = off")
    plan = conn.execute("EXPLAIN SELECT * FROM w WHERE id = 42").fetchall()
    assert "Index Scan" in str(plan)
    assert conn.execute("SELECT note, data::real[] = value(2) FROM w WHERE id = 42").fetchall() == [("row 42", True)]
    conn.execute("SET enable_indexscan = off")
    conn.execute("SET enable_bitmapscan = on")
    assert conn.execute("SELECT count(*) FROM w WHERE id BETWEEN 10 AND 19 AND data::real[] = value(id % 10)").fetchone()[0] == 10


def test_unique_violation(conn):
    with pytest.raises(psycopg.errors.UniqueViolation):
        conn.execute("INSERT INTO w VALUES (1, 'again', value(1)::tensor_block)")
    check(conn, 100)


def test_system_columns_in_triggers(conn):
    conn.execute("""
        CREATE TABLE seen (op text, id int, x xid, at tid, rel regclass);
        CREATE FUNCTION look() RETURNS trigger LANGUAGE plpgsql AS $$
          BEGIN
            INSERT INTO seen VALUES (tg_op, OLD.id, OLD.xmin, OLD.ctid, OLD.tableoid);
            RETURN CASE tg_op WHEN 'DELETE' THEN OLD ELSE NEW END;
          END $$;
        CREATE TRIGGER before BEFORE UPDATE OR DELETE ON w FOR EACH ROW EXECUTE FUNCTION look();
        CREATE TRIGGER after AFTER UPDATE OR DELETE ON w FOR EACH ROW EXECUTE FUNCTION look()""")
    rows = conn.execute("SELECT id, xmin, ctid, 'w' FROM w WHERE id IN (3, 4) ORDER BY id").fetchall()
    conn.execute("UPDATE w SET note = note WHERE id = 3")
    conn.execute("DELETE FROM w WHERE id = 4")
    for op, row in zip(("UPDATE", "DELETE"), rows, strict=True):
        assert conn.execute("SELECT id, x, at, rel::text FROM seen WHERE op = %s", (op,)).fetchall() == [row, row]


@pytest.mark.parametrize(
    ("statement", "context"),
    [
        ("UPDATE w SET note = 'mine' WHERE id = 7", "while updating tuple (0,7) in relation \"w\""),
        ("DELETE FROM w WHERE id = 7", "while deleting tuple (0,7) in relation \"w\""),
        ("SELECT 1 FROM w WHERE id = 7 FOR UPDATE", "while locking tuple (0,7) in relation \"w\""),
    ],
)
def test_an_error_says_at_which_row_it_waited(fresh, conn, statement, context):
    with fresh.connect() as other:
        other.execute("BEGIN")
        other.execute("UPDATE w SET note = 'theirs' WHERE id = 7")
        conn.execute("SET lock_timeout = '50ms'")
        with pytest.raises(psycopg.errors.LockNotAvailable) as caught:
            conn.execute(statement)
        assert caught.value.diag.context == context
        other.execute("ROLLBACK")


def test_an_error_in_an_index_expression_says_what_it_says_with_heap(conn):
    conn.execute("CREATE TABLE h AS SELECT id FROM w")
    conn.execute("CREATE FUNCTION inner_one(i int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS 'BEGIN RETURN 1 / (i - 50); END'")
    conn.execute("CREATE FUNCTION outer_one(i int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS 'BEGIN RETURN public.inner_one(i); END'")
    conn.execute(
        "CREATE FUNCTION caught(i int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS "
        "'BEGIN RETURN public.inner_one(i); EXCEPTION WHEN division_by_zero THEN RETURN 0; END'"
    )
    for statement in (
        "DO 'BEGIN CREATE INDEX ON {} (outer_one(id)); END'",
        "CREATE INDEX CONCURRENTLY ON {} (outer_one(id))",
        # An error that is caught on the way leaves nothing behind.
        "CREATE INDEX ON {} (caught(50 + 0 * id), caught(id), outer_one(id))",
    ):
        contexts = []
        for table in ("h", "w"):
            with pytest.raises(psycopg.errors.DivisionByZero) as caught:
                conn.execute(statement.format(table))
            contexts.append(caught.value.diag.context.replace(f"ON {table} ", ""))
        assert contexts[0] == contexts[1]
        assert "PL/pgSQL function outer_one(integer) line 1 at RETURN" in contexts[0]
    conn.execute("CREATE INDEX ON w (caught(50 + 0 * id), caught(id))")


def test_restart(server, fresh):
    with fresh.connect() as conn:
        conn.execute(MAKE)
    server.stop("immediate")
    server.start()
    with fresh.connect() as conn:
        check(conn, 100)
        conn.execute("VACUUM w")
        check(conn, 100)


@pytest.mark.parametrize("how", ["INDEX", "INDEX CONCURRENTLY"])
def test_directory_built_in_parallel(conn, how):
    """PostgreSQL asks for workers to build an index of a large relation: also for the directory of a block store."""
    (index,) = conn.execute("SELECT indexrelid::regclass::text FROM pg_index JOIN pg_class t ON indrelid = reltoastrelid WHERE t.oid = 'w'::regclass").fetchone()
    conn.execute("SET min_parallel_table_scan_size = 0")
    conn.execute("SET maintenance_work_mem = '256MB'")
    conn.execute(f"REINDEX {how} {index}")
    assert conn.execute("SELECT * FROM check_store('w')").fetchall() == []
    conn.execute("INSERT INTO w SELECT i, 'row ' || i, value(i % 10)::tensor_block FROM generate_series(101, 120) AS i")
    assert storage(conn, "w")["blocks_stored"] == 10, "the new index does not find what is there"
    check(conn, 120)


# Every operation beyond this release's list works wholly, or says that it does not yet.
OTHERS = [
    "UPDATE w SET note = note",
    "UPDATE w SET data = data",
    "SELECT * FROM w FOR UPDATE",
    "SELECT * FROM w FOR KEY SHARE",
    "INSERT INTO w VALUES (1, 'row 1', value(1)::tensor_block) ON CONFLICT DO NOTHING",
    "INSERT INTO w VALUES (1, 'row 1', value(1)::tensor_block) ON CONFLICT (id) DO UPDATE SET note = 'row 1'",
    "MERGE INTO w USING (VALUES (1)) AS v (id) ON w.id = v.id WHEN MATCHED THEN UPDATE SET note = 'row 1'",
    "VACUUM FULL w",
    "CLUSTER w USING w_pkey",
    "ALTER TABLE w SET ACCESS METHOD heap",
    "ALTER TABLE w ADD COLUMN extra int DEFAULT 5; ALTER TABLE w DROP COLUMN extra",
    "ALTER TABLE w ADD COLUMN extra float8 DEFAULT random(); ALTER TABLE w DROP COLUMN extra",
    "ALTER TABLE w ALTER id TYPE bigint",
    "ALTER TABLE w SET UNLOGGED",
    "SELECT count(*) FROM w TABLESAMPLE SYSTEM (50)",
    "SELECT count(*) FROM w TABLESAMPLE BERNOULLI (50)",
    "CREATE INDEX ON w (note)",
    "CREATE INDEX CONCURRENTLY ON w (note)",
    "CREATE INDEX ON w USING hash (note)",
    "CREATE INDEX ON w USING brin (id)",
    "CREATE INDEX ON w ((md5(note)))",
    "CREATE INDEX ON w (id) WHERE id > 50",
    "REINDEX TABLE w",
    "REINDEX TABLE CONCURRENTLY w",
    "ANALYZE w",
    "VACUUM (FREEZE) w",
    "VACUUM (ANALYZE, DISABLE_PAGE_SKIPPING) w",
    "CREATE MATERIALIZED VIEW mv USING tensor_block AS SELECT * FROM w; REFRESH MATERIALIZED VIEW mv",
    "CREATE TABLE child (id int REFERENCES w); INSERT INTO child VALUES (1)",
    "CREATE TABLE parts (id int, data tensor_block) PARTITION BY RANGE (id)",
    "CREATE UNLOGGED TABLE u (data tensor_block) USING tensor_block",
    "ALTER TABLE w ADD CHECK (id > 0)",
    "ALTER TABLE w ALTER data SET STORAGE plain",
    "LOCK TABLE w IN EXCLUSIVE MODE",
    "SELECT ctid, xmin, tableoid FROM w LIMIT 1",
    "SELECT * FROM w WHERE ctid = '(0,1)'",
    "SELECT * FROM w WHERE ctid > '(0,1)'",
    "DECLARE c SCROLL CURSOR WITH HOLD FOR SELECT * FROM w; FETCH LAST FROM c; FETCH FIRST FROM c; CLOSE c",
    "CREATE PUBLICATION p FOR TABLE w; DELETE FROM w WHERE id = 200; DROP PUBLICATION p",
]


@pytest.mark.parametrize("sql", OTHERS, ids=lambda sql: sql[:50])
def test_works_or_is_refused(conn, sql):
    statements = sql.split("; ")
    inside = not sql.startswith(("VACUUM", "REINDEX", "CREATE INDEX CONC", "CLUSTER"))
    try:
        with conn.transaction() if inside else conn.cursor():
            for statement in statements:
                conn.execute(statement)
    except psycopg.Error as error:
        assert_error(error, "0A000")
    check(conn, 100)
    conn.execute("VACUUM w")
    check(conn, 100)
