"""No stored reference leaves its table: what was copied out of a `tensor_block` table reads right after its source is gone.

The source is emptied, vacuumed twice, filled with other content under the ids' old space, or dropped. What is copied is compared
with digests that were taken before. Where a reference to heap's own TOAST would go stale (a plpgsql variable), the same
steps run on a heap table, and ours may at worst raise an error with the SQLSTATE that heap raises.
"""

import psycopg
import pytest

from helpers import Background

ROWS = 24
MAKE = """
CREATE TYPE whole AS (id int, blk tensor_block, b bytea);
CREATE FUNCTION content(seed int, size int) RETURNS bytea LANGUAGE sql IMMUTABLE AS
    $$SELECT substr(string_agg(sha512((seed * 1000 + i)::text::bytea), ''::bytea ORDER BY i), 1, size) FROM generate_series(0, size / 64) AS i$$;
CREATE FUNCTION floats(seed int, size int) RETURNS real[] LANGUAGE sql IMMUTABLE AS
    $$SELECT array_agg(((seed * 7919 + i * 31) % 4093)::real ORDER BY i) FROM generate_series(1, size) AS i$$;
CREATE TABLE expected (id int PRIMARY KEY, blk text, b text, t text, j text, a text);
CREATE VIEW sizes AS SELECT i AS id, (ARRAY[30, 700, 2100, 9000, 70000, 9])[i % 6 + 1] AS size FROM generate_series(1, 24) AS i;
CREATE FUNCTION fill(rel regclass, seed int) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('INSERT INTO %s SELECT id, floats(id + %2$s, size / 4 + 1)::tensor_block, content(id + %2$s, size),
        repeat(md5((id + %2$s)::text), size / 32 + 1), to_jsonb(encode(content(id + %2$s, size / 2), ''hex'')),
        floats(id + %2$s, size / 4) FROM sizes', rel, seed);
END $$;
"""
TABLE = "(id int PRIMARY KEY, blk tensor_block, b bytea, t text, j jsonb, a real[])"
DIGEST = "id, md5(blk::bytea) AS blk, md5(b) AS b, md5(t) AS t, md5(j::text) AS j, md5(a::text) AS a"
SOURCES = ("tensor_block", "heap")


def make(conn: psycopg.Connection, am: str) -> None:
    conn.execute(f"DROP TABLE IF EXISTS source, copy CASCADE; TRUNCATE expected; CREATE TABLE source {TABLE} USING {am}")
    conn.execute("SELECT fill('source', 0)")
    conn.execute(f"INSERT INTO expected SELECT {DIGEST} FROM source")


def overwrite(conn: psycopg.Connection) -> None:
    """Empties the source and stores other content of the same sizes, in the space that two vacuums gave back."""
    conn.execute("DELETE FROM source")
    for _ in range(3):
        conn.execute("VACUUM source")
    conn.execute("SELECT fill('source', 100)")


GONE = {
    "drop": lambda conn: conn.execute("DROP TABLE source CASCADE"),
    "overwrite": overwrite,
    "truncate": lambda conn: conn.execute("TRUNCATE source CASCADE; SELECT fill('source', 100)"),
}


@pytest.fixture(scope="module")
def made(db):
    with db.connect() as conn:
        conn.execute(MAKE)
    return db


@pytest.fixture
def conn(made):
    with made.connect() as connection:
        make(connection, "tensor_block")
        yield connection


def same(conn: psycopg.Connection, query: str, rows: int = ROWS) -> None:
    """`query` gives id, blk, b, t, j, a; each as it was in the source, and all `rows` of them."""
    sql = f"SELECT count(*), count(e.id) FROM (SELECT {DIGEST} FROM ({query}) AS q) AS d LEFT JOIN expected AS e USING (id, blk, b, t, j, a)"
    found, right = conn.execute(sql).fetchone()
    assert (found, right) == (rows, rows), f"{found} rows of {rows}, {right} of them right"


# How rows are copied, and a query that gives them back. The statements that need a table USING tensor_block name {am}.
COPIES = {
    "ctas into heap": ("CREATE TABLE copy AS SELECT * FROM source", "TABLE copy"),
    "ctas into ours": ("CREATE TABLE copy USING tensor_block AS SELECT * FROM source", "TABLE copy"),
    "insert select": ("CREATE TABLE copy (LIKE source); INSERT INTO copy SELECT * FROM source", "TABLE copy"),
    "insert select into ours": (
        "CREATE TABLE copy (LIKE source) USING tensor_block; INSERT INTO copy SELECT * FROM source", "TABLE copy"),
    "whole row": ("CREATE TABLE copy AS SELECT source AS r FROM source", "SELECT (r).* FROM copy"),
    "whole row into ours": ("CREATE TABLE copy USING tensor_block AS SELECT source AS r FROM source", "SELECT (r).* FROM copy"),
    "composite": (
        "CREATE TABLE copy AS SELECT ROW(id, blk, b)::whole AS r, t, j, a FROM source",
        "SELECT (r).id, (r).blk, (r).b, t, j, a FROM copy"),
    "array of composites": (
        "CREATE TABLE copy AS SELECT array_agg(source) AS r FROM source GROUP BY id % 3",
        "SELECT u.* FROM copy, unnest(r) AS u"),
    "array of composites into ours": (
        "CREATE TABLE copy USING tensor_block AS SELECT array_agg(ROW(id, blk, b)::whole) AS r FROM source GROUP BY id % 3",
        "SELECT u.id, u.blk, u.b, s.t, s.j, s.a FROM copy, unnest(r) AS u JOIN kept AS s USING (id)"),
    "array of values": (
        "CREATE TABLE copy AS SELECT array_agg(b ORDER BY id) AS b, array_agg(blk ORDER BY id) AS blk, array_agg(t ORDER BY id) AS t FROM source",
        "SELECT k.id, c.blk[k.id] AS blk, c.b[k.id] AS b, c.t[k.id] AS t, k.j, k.a FROM copy AS c, kept AS k"),
    "range of rows sorted on disk": (
        "SET work_mem = '64kB'; CREATE TABLE copy AS SELECT * FROM (SELECT * FROM source ORDER BY md5(id::text), b OFFSET 0) AS s; RESET work_mem",
        "TABLE copy"),
    "hash join in batches": (
        "SET work_mem = '64kB'; SET enable_mergejoin = off; SET enable_nestloop = off; SET enable_sort = off; CREATE TABLE copy AS SELECT s.* FROM source AS s "
        "JOIN (SELECT id, md5(b) AS h FROM source) AS d ON d.id = s.id AND d.h = md5(s.b); RESET ALL", "TABLE copy"),
    "window": (
        "CREATE TABLE copy AS SELECT id, first_value(blk) OVER w AS blk, last_value(b) OVER w AS b, "
        "nth_value(t, 1) OVER w AS t, lag(j, 0) OVER w AS j, lead(a, 0) OVER w AS a FROM source WINDOW w AS (PARTITION BY id)",
        "TABLE copy"),
    "recursive": (
        "CREATE TABLE copy AS WITH RECURSIVE r AS (SELECT * FROM source WHERE id = 1 UNION ALL "
        "SELECT s.* FROM r JOIN source AS s ON s.id = r.id + 1) SELECT * FROM r", "TABLE copy"),
    "materialized": (
        "CREATE TABLE copy AS WITH m AS MATERIALIZED (SELECT * FROM source) SELECT m.* FROM m, (SELECT 1) AS one", "TABLE copy"),
    "jsonb_agg": (
        "CREATE TABLE copy AS SELECT jsonb_agg(jsonb_build_object('id', id, 'b', b, 't', t, 'j', j, 'a', a)) AS r FROM source",
        "SELECT k.id, k.blk, (o->>'b')::bytea AS b, o->>'t' AS t, o->'j' AS j, k.a FROM copy, jsonb_array_elements(r) AS o, "
        "kept AS k WHERE k.id = (o->>'id')::int"),
    "to_jsonb": (
        "CREATE TABLE copy AS SELECT to_jsonb(source) - 'blk' AS r FROM source",
        "SELECT k.id, k.blk, (r->>'b')::bytea AS b, r->>'t' AS t, r->'j' AS j, k.a FROM copy, kept AS k WHERE k.id = (r->>'id')::int"),
    "sql function": (
        "CREATE FUNCTION every() RETURNS SETOF source LANGUAGE sql AS 'SELECT * FROM source'; CREATE TABLE copy AS SELECT * FROM every()",
        "TABLE copy"),
    "sql function of one column": (
        "CREATE FUNCTION one(i int) RETURNS bytea LANGUAGE sql AS 'SELECT b FROM source WHERE id = i'; "
        "CREATE TABLE copy AS SELECT id, blk, one(id) AS b, t, j, a FROM source", "TABLE copy"),
    "plpgsql set": (
        "CREATE FUNCTION every() RETURNS SETOF whole LANGUAGE plpgsql AS $$ DECLARE r whole; BEGIN FOR r IN SELECT id, blk, b FROM source LOOP "
        "RETURN NEXT r; END LOOP; END $$; CREATE TABLE copy AS SELECT e.*, t, j, a FROM every() AS e JOIN source USING (id)",
        "SELECT id, copy.blk, copy.b, t, j, a FROM copy"),
    "update returning": (
        "CREATE TABLE copy AS TABLE source WITH NO DATA; WITH u AS (UPDATE source SET t = t RETURNING *) INSERT INTO copy SELECT * FROM u",
        "TABLE copy"),
    "delete returning": (
        "CREATE TABLE copy AS TABLE source WITH NO DATA; WITH u AS (DELETE FROM source RETURNING *) INSERT INTO copy SELECT * FROM u",
        "TABLE copy"),
    "merge": (
        "CREATE TABLE copy (LIKE source) USING tensor_block; MERGE INTO copy USING source ON copy.id = source.id WHEN NOT MATCHED THEN "
        "INSERT VALUES (source.id, source.blk, source.b, source.t, source.j, source.a)", "TABLE copy"),
    "merge update": (
        "CREATE TABLE copy AS SELECT id, NULL::tensor_block AS blk, NULL::bytea AS b, t, j, a FROM source; MERGE INTO copy USING source "
        "ON copy.id = source.id WHEN MATCHED THEN UPDATE SET blk = source.blk, b = source.b", "TABLE copy"),
    "generated column": (
        "CREATE TABLE copy (id int, blk tensor_block, b bytea, t text, j jsonb, a real[], g bytea GENERATED ALWAYS AS (b) STORED) USING tensor_block; "
        "INSERT INTO copy SELECT * FROM source", "SELECT id, blk, g AS b, t, j, a FROM copy"),
    "generated column of heap": (
        "CREATE TABLE copy (id int, blk tensor_block, b bytea, t text, j jsonb, a real[], g tensor_block GENERATED ALWAYS AS (blk) STORED); "
        "INSERT INTO copy SELECT * FROM source", "SELECT id, g AS blk, b, t, j, a FROM copy"),
    "temporary table": ("CREATE TEMP TABLE copy USING tensor_block AS SELECT * FROM source", "TABLE copy"),
    "range type of text": (
        "CREATE TABLE copy AS SELECT id, blk, b, t, j, a, numrange(id, id + 1) AS r FROM source", "SELECT id, blk, b, t, j, a FROM copy"),
    "materialized view": ("CREATE MATERIALIZED VIEW mv AS SELECT * FROM source; CREATE TABLE copy AS TABLE mv", "TABLE copy"),
    "domain and array slots": (
        "CREATE DOMAIN d AS bytea; CREATE TABLE copy AS SELECT id, blk, b::d AS b, t, j, a FROM source", "TABLE copy"),
    "select into plpgsql record": (
        "CREATE TABLE copy (LIKE source); DO $$ DECLARE r source; BEGIN FOR r IN SELECT * FROM source LOOP INSERT INTO copy SELECT r.*; END LOOP; END $$",
        "TABLE copy"),
    "insert on conflict": (
        "CREATE TABLE copy (LIKE source, UNIQUE (id)); INSERT INTO copy SELECT id, NULL, NULL, t, j, a FROM source; "
        "INSERT INTO copy SELECT * FROM source ON CONFLICT (id) DO UPDATE SET blk = excluded.blk, b = excluded.b", "TABLE copy"),
}
OF_ROW_TYPE = ("whole row", "whole row into ours", "array of composites")


@pytest.mark.parametrize("gone", GONE)
def test_copies(conn, gone):
    """All ways of copying, in schemas of their own, then the source goes, then all copies are read."""
    conn.execute("DROP SCHEMA IF EXISTS kept CASCADE; CREATE SCHEMA kept; CREATE TABLE kept.kept AS TABLE source")
    # Columns of the table's own row type are dropped with it, and the last one leaves no rows.
    names = [name for name in COPIES if gone != "drop" or name not in OF_ROW_TYPE]
    names.sort(key=lambda name: name == "delete returning")
    for number, name in enumerate(names):
        conn.execute(f"DROP SCHEMA IF EXISTS c{number} CASCADE; CREATE SCHEMA c{number}; SET search_path = c{number}, public, kept, pg_temp")
        conn.execute(COPIES[name][0])
    conn.execute("RESET search_path; DISCARD PLANS")
    GONE[gone](conn)
    for number, name in enumerate(names):
        where = "pg_temp" if name == "temporary table" else f"c{number}"
        conn.execute(f"SET search_path = {where}, public, kept, pg_temp")
        try:
            same(conn, COPIES[name][1])
        except (AssertionError, psycopg.Error) as error:
            raise AssertionError(f"{name}, after {gone}: {error}") from error
    conn.execute("RESET search_path")
    for number in range(len(names)):
        conn.execute(f"DROP SCHEMA c{number} CASCADE")
    conn.execute("DROP TABLE IF EXISTS pg_temp.copy")


@pytest.mark.parametrize("gone", GONE)
def test_old_and_new_of_triggers(conn, gone):
    conn.execute(f"""
        DROP TABLE IF EXISTS olds, news, transitions, blocks; CREATE TABLE olds {TABLE}; CREATE TABLE news {TABLE} USING tensor_block;
        CREATE TABLE transitions {TABLE}; CREATE TABLE blocks (r source);
        CREATE OR REPLACE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO olds SELECT OLD.*; INSERT INTO news SELECT NEW.*; INSERT INTO blocks SELECT OLD; RETURN NEW; END $$;
        CREATE OR REPLACE FUNCTION keep_all() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO transitions SELECT * FROM old_rows; RETURN NULL; END $$;
        CREATE TRIGGER each BEFORE UPDATE ON source FOR EACH ROW EXECUTE FUNCTION keep();
        CREATE TRIGGER whole AFTER UPDATE ON source REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION keep_all()""")
    conn.execute("UPDATE source SET j = j")
    composites = conn.execute("SELECT count(*) FROM blocks").fetchone()[0]
    assert composites == ROWS
    conn.execute("CREATE TABLE unfolded AS SELECT (r).* FROM blocks; DROP TABLE blocks")
    conn.execute("DROP TRIGGER each ON source; DROP TRIGGER whole ON source")
    GONE[gone](conn)
    for table in ("olds", "news", "transitions", "unfolded"):
        same(conn, f"TABLE {table}")
    conn.execute("DROP TABLE unfolded")


def test_deferred_trigger_sees_the_row(conn):
    conn.execute(f"""
        DROP TABLE IF EXISTS olds; CREATE TABLE olds {TABLE};
        CREATE OR REPLACE FUNCTION keep_old() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO olds SELECT OLD.*; RETURN NULL; END $$;
        CREATE CONSTRAINT TRIGGER late AFTER DELETE ON source DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION keep_old()""")
    conn.execute("DELETE FROM source")
    overwrite(conn)
    same(conn, "TABLE olds", ROWS)


def test_foreign_key_actions(conn):
    conn.execute("DROP SCHEMA IF EXISTS kept CASCADE; CREATE SCHEMA kept; CREATE TABLE kept.kept AS TABLE source")
    conn.execute("CREATE TABLE child (id int REFERENCES source ON DELETE CASCADE ON UPDATE CASCADE, b bytea, blk tensor_block) USING tensor_block")
    conn.execute("INSERT INTO child SELECT id, b, blk FROM source; CREATE TABLE copy AS SELECT * FROM child")
    conn.execute("UPDATE source SET id = id + 1000 WHERE id > 20; DELETE FROM source WHERE id < 5")
    moved = "SELECT count(*) FROM child JOIN source USING (id) WHERE child.b = source.b AND child.blk = source.blk"
    assert conn.execute(moved).fetchone()[0] == ROWS - 4 == conn.execute("SELECT count(*) FROM child").fetchone()[0]
    conn.execute("DROP TABLE source, child")
    same(conn, "SELECT k.id, copy.blk, copy.b, k.t, k.j, k.a FROM copy JOIN kept.kept AS k USING (id)")
    conn.execute("DROP TABLE copy")


@pytest.mark.parametrize("gone", GONE)
def test_held_cursor(conn, gone):
    """A cursor WITH HOLD has its rows in a tuple store once its transaction has ended."""
    conn.execute("DROP TABLE IF EXISTS copy; CREATE TABLE copy AS TABLE source WITH NO DATA")
    conn.execute("BEGIN; DECLARE held CURSOR WITH HOLD FOR SELECT * FROM source; COMMIT")
    GONE[gone](conn)
    rows = conn.execute("FETCH ALL FROM held").fetchall()
    assert len(rows) == ROWS
    sums = dict(conn.execute("SELECT id, b FROM expected").fetchall())
    for row in rows:
        assert conn.execute("SELECT md5(%s::bytea)", (row[2],)).fetchone()[0] == sums[row[0]]
    conn.execute("CLOSE held; DROP TABLE copy")


@pytest.mark.parametrize("order", ["", " ORDER BY md5(id::text)", " ORDER BY id"])
@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ"])
def test_cursor_across_a_sweep(made, conn, order, isolation):
    """An open cursor reads its rows to the end while another session deletes them, vacuums, and stores other content."""
    with made.connect() as other:
        conn.execute(f"BEGIN ISOLATION LEVEL {isolation}")
        conn.execute(f"DECLARE c CURSOR FOR SELECT {DIGEST} FROM source{order}")
        rows = conn.execute("FETCH 3 FROM c").fetchall()
        overwrite(other)
        for _ in range(2):
            other.execute("VACUUM source")
        rows += conn.execute("FETCH ALL FROM c").fetchall()
        conn.execute("COMMIT")
    assert sorted(rows) == sorted(conn.execute("SELECT id, blk, b, t, j, a FROM expected").fetchall())


@pytest.mark.parametrize("form", ["", " (FORMAT binary)", " (FORMAT csv)"])
def test_copy_out_and_in(conn, form):
    with conn.cursor() as cursor:
        with cursor.copy(f"COPY (SELECT * FROM source) TO STDOUT{form}") as out:
            content = b"".join(bytes(part) for part in out)
        overwrite(conn)
        conn.execute(f"DROP TABLE IF EXISTS copy; CREATE TABLE copy {TABLE}")
        with cursor.copy(f"COPY copy FROM STDIN{form}") as into:
            into.write(content)
    same(conn, "TABLE copy")
    conn.execute("DROP TABLE copy")


PARTITIONED = """
DROP TABLE IF EXISTS parted CASCADE; CREATE TABLE parted (id int, part int, blk tensor_block, b bytea, t text, j jsonb, a real[], PRIMARY KEY (id, part))
    PARTITION BY LIST (part);
CREATE TABLE in_ours PARTITION OF parted FOR VALUES IN (1) USING tensor_block;
CREATE TABLE in_heap PARTITION OF parted FOR VALUES IN (2) USING heap;
CREATE TABLE in_ours_too PARTITION OF parted FOR VALUES IN (3) USING tensor_block;
INSERT INTO parted SELECT id, 1, blk, b, t, j, a FROM source;
"""


def test_rows_that_change_partition(conn):
    """Rows go from ours to heap, on to another of ours, and back; each partition they left is emptied and reused."""
    conn.execute(PARTITIONED)
    query = "SELECT id, blk, b, t, j, a FROM parted"
    for part in (2, 3, 1, 3, 2, 1):
        moved = conn.execute(f"UPDATE parted SET part = {part} WHERE part <> {part} RETURNING md5(blk::bytea), md5(b)").fetchall()
        assert len(moved) == ROWS
        for table in ("in_ours", "in_ours_too"):
            conn.execute(f"VACUUM {table}")
            conn.execute(f"VACUUM {table}")
        same(conn, query)
    conn.execute("INSERT INTO parted SELECT id, 2, blk, b, t, j, a FROM parted ON CONFLICT DO NOTHING")
    conn.execute("ALTER TABLE parted DETACH PARTITION in_ours; DROP TABLE in_ours")
    same(conn, query)
    conn.execute("DROP TABLE parted")


def test_partitions_are_exchanged(conn):
    """A table is attached in place of a partition: each keeps its own store, and the one that left is dropped."""
    conn.execute(PARTITIONED)
    conn.execute("CREATE TABLE fresh (LIKE parted INCLUDING ALL) USING tensor_block; INSERT INTO fresh SELECT id, 1, blk, b, t, j, a FROM in_ours")
    conn.execute("BEGIN; ALTER TABLE parted DETACH PARTITION in_ours; ALTER TABLE parted ATTACH PARTITION fresh FOR VALUES IN (1); COMMIT")
    same(conn, "SELECT id, blk, b, t, j, a FROM parted")
    conn.execute("UPDATE parted SET part = 3 WHERE id > 10; DROP TABLE in_ours, source")
    conn.execute("VACUUM fresh")
    conn.execute("VACUUM fresh")
    same(conn, "SELECT id, blk, b, t, j, a FROM parted")
    conn.execute("DROP TABLE parted")


@pytest.mark.parametrize("am", SOURCES)
def test_materialized_view(conn, am):
    """REFRESH, also CONCURRENTLY, copies: the view stays as it was when its source changes, and follows the next refresh."""
    conn.execute(f"CREATE MATERIALIZED VIEW mv USING {am} AS SELECT * FROM source; CREATE UNIQUE INDEX ON mv (id)")
    conn.execute("UPDATE source SET b = content(id + 500, 9000) WHERE id < 5; DELETE FROM source WHERE id > 20")
    conn.execute("VACUUM source")
    conn.execute("VACUUM source")
    same(conn, "TABLE mv")
    conn.execute("REFRESH MATERIALIZED VIEW CONCURRENTLY mv")
    assert conn.execute("SELECT count(*) FROM mv JOIN source USING (id, blk, b, t, j, a)").fetchone()[0] == 20
    assert conn.execute("SELECT count(*) FROM mv").fetchone()[0] == 20
    conn.execute("TRUNCATE source; SELECT fill('source', 0); REFRESH MATERIALIZED VIEW mv")
    same(conn, "TABLE mv")
    overwrite(conn)
    same(conn, "TABLE mv")


# A variable is filled, its source goes, and what is left in it is shown: in a block, or if it commits in a procedure.
VARIABLES = {
    "scalar": ("v bytea", "SELECT b INTO v FROM source WHERE id = 4", "md5(v)"),
    "tensor block": ("v tensor_block", "SELECT blk INTO v FROM source WHERE id = 4", "md5(v::bytea)"),
    "record": ("v record", "SELECT * INTO v FROM source WHERE id = 4", "md5(v.b) || md5(v.t) || md5(v.blk::bytea) || md5(v.a::text)"),
    "row": ("v source", "SELECT * INTO v FROM source WHERE id = 4", "md5(v.b) || md5(v.t) || md5(v.blk::bytea) || md5(v.a::text)"),
    "array": ("v bytea[]", "SELECT array_agg(b ORDER BY id) INTO v FROM source", "md5(array_to_string(v, '-'))"),
    "large array": ("v real[]", "SELECT a INTO v FROM source WHERE id = 4", "md5(v::text)"),
    "text": ("v text", "v := (SELECT t FROM source WHERE id = 4)", "md5(v)"),
    "json": ("v jsonb", "v := (SELECT j FROM source WHERE id = 4)", "md5(v::text)"),
    "composite": ("v whole", "v := (SELECT ROW(id, blk, b)::whole FROM source WHERE id = 4)", "md5(v.b) || md5(v.blk::bytea)"),
}
LEAVING = {
    "delete": ("DELETE FROM source", False),
    "drop": ("DROP TABLE source", False),
    "truncate": ("TRUNCATE source; PERFORM fill('source', 100)", False),
    "delete and commit": ("DELETE FROM source; COMMIT", True),
    "drop and commit": ("DROP TABLE source; COMMIT", True),
    "truncate and commit": ("TRUNCATE source; PERFORM fill('source', 100); COMMIT", True),
    "rollback": ("PERFORM 1; ROLLBACK; TRUNCATE source; PERFORM fill('source', 100); COMMIT", True),
    "sweep elsewhere": ("DELETE FROM source; COMMIT; PERFORM pg_advisory_lock(77); PERFORM pg_advisory_unlock(77)", True),
}


def in_a_block(made, am: str, variable: str, leaving: str) -> tuple[str, str]:
    """What a variable shows after its source is gone: ("reads", digest), ("WRONG", digest) or ("error", SQLSTATE)."""
    declared, filled, shown = VARIABLES[variable]
    steps, commits = LEAVING[leaving]
    with made.connect() as conn, made.connect() as other:
        make(conn, am)
        conn.execute("DROP TABLE IF EXISTS answer; CREATE TABLE answer (before text, after text); DROP PROCEDURE IF EXISTS p()")
        body = f"DECLARE {declared}; kept text; BEGIN {filled}; kept := {shown}; {steps}; INSERT INTO answer VALUES (kept, {shown}); END"
        call = f"DO $$ {body} $$"
        if commits:
            conn.execute(f"CREATE PROCEDURE p() LANGUAGE plpgsql AS $$ {body} $$")
            call = "CALL p()"
        try:
            if "elsewhere" not in leaving:
                conn.execute(call)
            else:
                other.execute("SELECT pg_advisory_lock(77)")
                task = Background(conn.execute, call)
                assert task.waits(0.15)
                overwrite(other)
                other.execute("SELECT pg_advisory_unlock(77)")
                task.result()
        except psycopg.Error as error:
            return "error", error.sqlstate
        before, after = conn.execute("SELECT before, after FROM answer").fetchone()
        return ("reads" if before == after else "WRONG"), after


@pytest.mark.parametrize("leaving", LEAVING)
@pytest.mark.parametrize("variable", VARIABLES)
def test_plpgsql_variable(made, variable, leaving):
    ours = in_a_block(made, "tensor_block", variable, leaving)
    assert ours[0] != "WRONG", "a stale reference shows other data"
    if ours[0] == "error":
        theirs = in_a_block(made, "heap", variable, leaving)
        assert theirs == ours, f"heap {theirs}, tensor_block {ours}"
