"""Batches in statements that change rows, cursors, prepared statements, concurrent updates, and under faults."""

import time

import psycopg
import pytest

from batch_models import SCORE, assert_same, outcome, plan, prepare
from helpers import Background

FINAL = "SELECT * FROM t ORDER BY id"
CHANGES = {
    "UPDATE": f"UPDATE t SET x = predict('m', x) || 1::real, a = 5 WHERE {SCORE} > 0 RETURNING id, predict('m', x)",
    "UPDATE FROM": "UPDATE t SET x = predict('m', t.x) || u.w[1] FROM u WHERE u.k = t.id AND (predict('m2', u.w))[1] > 0",
    "UPDATE by subquery": "UPDATE t SET (s, a) = (SELECT u.id::text, (1000 * (predict('m2', u.w))[1])::int FROM u WHERE u.k = t.id), "
                          "x = predict('m', x) || 1::real",
    "DELETE": f"DELETE FROM t USING u WHERE u.k = t.id AND {SCORE} > 0 RETURNING t.id",
    "INSERT": f"INSERT INTO t SELECT id + 1000, g, a, s, predict('m', x) FROM t WHERE {SCORE} > 0",
    "ON CONFLICT": "INSERT INTO t SELECT id, 1, 1, '', x FROM t ON CONFLICT (id) DO UPDATE SET x = predict('m', excluded.x)",
    "MERGE": f"MERGE INTO t USING (SELECT id, predict('m', x) AS p FROM t WHERE {SCORE} > -2) AS n ON n.id = t.id "
             "WHEN MATCHED AND n.p[1] > 0 THEN UPDATE SET x = predict('m', t.x) WHEN MATCHED THEN DELETE",
    "CTE": f"WITH gone AS (DELETE FROM t WHERE {SCORE} > 0 RETURNING *) INSERT INTO t SELECT id + 1000, g, a, s, predict('m', x) FROM gone",
}
CURSORS = {
    "scan": f"SELECT id, {SCORE} FROM t WHERE {SCORE} > 0",
    "sort": "SELECT id, predict('m', x) FROM t ORDER BY g, id",
    "join": f"SELECT t.id, {SCORE} FROM t JOIN u ON u.k = t.id",
    "append": f"SELECT id, {SCORE} FROM t UNION ALL SELECT id, (predict('m2', w))[1] FROM u",
    "subquery": f"SELECT * FROM (SELECT id, {SCORE} AS p FROM t OFFSET 2) AS s WHERE p > 0",
}


@pytest.fixture(scope="module", autouse=True)
def tables(db):
    with db.connect() as conn:
        prepare(conn)


@pytest.mark.parametrize("kind", CHANGES)
def test_change(conn, kind):
    found = assert_same(conn, "BEGIN", CHANGES[kind], FINAL, "ROLLBACK")
    assert found[2] != outcome(conn, FINAL)[0], "nothing was changed"


@pytest.mark.parametrize("scroll", ["", "SCROLL", "NO SCROLL"])
@pytest.mark.parametrize("kind", CURSORS)
def test_cursor(conn, kind, scroll):
    declare = f"DECLARE c {scroll} CURSOR FOR {CURSORS[kind]}"
    assert_same(conn, "BEGIN", declare, "FETCH 3 c", "MOVE 5 c", "FETCH 2 c", "FETCH BACKWARD 3 c", "ROLLBACK", errors=True)
    assert_same(conn, "BEGIN", declare, "FETCH 3 c", "UPDATE t SET s = 'here' WHERE CURRENT OF c RETURNING id", "ROLLBACK", errors=True)


def test_current_of_is_the_row_that_was_fetched(conn):
    for scroll in ("", "SCROLL", "NO SCROLL"):
        with conn.transaction(force_rollback=True):
            conn.execute(f"DECLARE c {scroll} CURSOR FOR SELECT id, predict('m', x) FROM t")
            fetched = conn.execute("FETCH 5 c").fetchall()[-1][0]
            assert conn.execute("DELETE FROM t WHERE CURRENT OF c RETURNING id").fetchone()[0] == fetched


def test_prepared(conn):
    """A kept plan follows the model: another version, none, a name from a parameter, no privilege."""
    for mode in ("force_generic_plan", "force_custom_plan"):
        conn.execute(f"SET plan_cache_mode = {mode}")
        conn.execute(f"PREPARE {mode}(text, int) AS SELECT predict($1, x) FROM t WHERE id > $2 ORDER BY id")
        run = f"EXECUTE {mode}('m', 280)"
        first = outcome(conn, run)[0]
        assert len(first) == 20 and outcome(conn, f"EXECUTE {mode}(NULL, 299)")[0] == ["(None,)"]
        conn.execute("SELECT rename_model('m', 'other')")
        assert outcome(conn, run)[0][0] == "42704" and outcome(conn, f"EXECUTE {mode}('other', 280)")[0] == first
        conn.execute("SELECT rename_model('other', 'm')")
        assert outcome(conn, run)[0] == first


@pytest.mark.parametrize("lock", ["", "FOR UPDATE SKIP LOCKED", "FOR UPDATE"])
def test_rows_that_another_session_changes(db, conn, lock):
    """A row whose change is waited for is predicted anew, as it is then."""
    statement = f"SELECT id, predict('m', x) FROM t WHERE {SCORE} IS NOT NULL AND id < 20 {lock}" if lock else \
        f"UPDATE t SET s = ((predict('m', x))[1])::text WHERE {SCORE} IS NOT NULL AND id < 20 RETURNING id, s"
    found = {}
    for batching in ("off", "on"):
        with db.connect() as other:
            conn.execute(f"BEGIN; SET LOCAL tessera.enable_batching = {batching}")
            other.execute("BEGIN")
            other.execute("UPDATE t SET x = ARRAY[id, 2, 3] WHERE id IN (3, 5)")
            other.execute("UPDATE t SET x = NULL WHERE id = 7")
            waiting = Background(outcome, conn, statement)
            assert waiting.waits() == (lock != "FOR UPDATE SKIP LOCKED")
            other.execute("COMMIT")
            found[batching] = waiting.result()
            conn.execute("ROLLBACK")
            other.execute("UPDATE t SET x = ARRAY[sin(id), cos(id * 3), sin(id * id)]::real[] WHERE id IN (3, 5, 7)")
    assert sorted(found["on"][0]) == sorted(found["off"][0])
    assert len(found["on"][0]) == (15 if "SKIP" in lock else 17)


def test_row_security(db, conn):
    """A function that tells what it sees is called for no row that the policy hides."""
    conn.execute("CREATE ROLE reader; GRANT SELECT ON t TO reader; GRANT USAGE ON DOMAIN tessera_model.m TO reader; "
                 "ALTER TABLE t ENABLE ROW LEVEL SECURITY")
    conn.execute(f"CREATE POLICY p ON t USING ({SCORE} > 0)")
    conn.execute("CREATE FUNCTION tell(n int) RETURNS bool LANGUAGE plpgsql STABLE COST 0.0001 AS $$BEGIN RAISE NOTICE '%', n; RETURN true; END$$")
    try:
        with db.connect() as other:
            said = []
            other.add_notice_handler(lambda notice: said.append(int(notice.message_primary)))
            other.execute("SET ROLE reader")
            scores = dict(conn.execute(f"SELECT id, {SCORE} FROM t WHERE {SCORE} > 0").fetchall())
            middle, visible = sorted(scores.values())[len(scores) // 2], set(scores)
            seen = {row[0] for row in other.execute(f"SELECT id FROM t WHERE tell(id) AND {SCORE} < {middle}::real")}
            assert seen and set(said) == visible and seen < visible
            assert_same(other, "SELECT predict('m2', w) FROM (SELECT ARRAY[id, 1]::real[] AS w FROM t) AS s", errors=True)
    finally:
        conn.execute("DROP POLICY p ON t; ALTER TABLE t DISABLE ROW LEVEL SECURITY; DROP OWNED BY reader; DROP ROLE reader")


def memory(conn: psycopg.Connection, field: str = "VmRSS") -> int:
    """Kilobytes of the backend."""
    with open(f"/proc/{conn.info.backend_pid}/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field))


def test_failures_keep_nothing(conn):
    conn.execute("""CREATE FUNCTION failing(n int) RETURNS int LANGUAGE plpgsql AS $$
        DECLARE failed int := 0;
        BEGIN
            FOR i IN 1..n LOOP
                BEGIN
                    PERFORM (predict('m', CASE WHEN id = 20 THEN ARRAY[1, 2]::real[] ELSE coalesce(x, '{1,2,3}') END))[1] FROM t ORDER BY id;
                EXCEPTION WHEN invalid_parameter_value OR array_subscript_error THEN failed := failed + 1;
                END;
            END LOOP;
            RETURN failed;
        END$$""")
    assert conn.execute("SELECT failing(1000)").fetchone()[0] == 1000
    before = memory(conn)
    assert conn.execute("SELECT failing(4000)").fetchone()[0] == 4000
    assert memory(conn) - before < 4000


def test_memory_of_wide_rows(conn):
    """Batches of 65,536 rows are cut to tessera.batch_memory, whatever is held for a row."""
    conn.execute("SET tessera.batch_size = 65536; SET tessera.batch_memory = '8MB'; SET jit = off")
    query = "SELECT count((predict('m', x))[1]), max(length(wide)) FROM (SELECT x, repeat(md5(i::text), 100) AS wide FROM t, " \
            "generate_series(1, {}) AS i WHERE x IS NOT NULL OFFSET 0) AS s"
    conn.execute(query.format(10))
    before = memory(conn, "VmHWM")
    assert conn.execute(query.format(400)).fetchone()[0] == 400 * 273
    assert memory(conn, "VmHWM") - before < 40_000


@pytest.mark.parametrize("size", [1, 1024, 65536])
def test_cancelled(conn, size):
    conn.execute(f"SET tessera.batch_size = {size}; SET statement_timeout = 300")
    started = time.monotonic()
    with pytest.raises(psycopg.errors.QueryCanceled):
        conn.execute("SELECT max((predict('m', t.x))[1]) FROM t, t AS b, t AS c")
    assert time.monotonic() - started < 0.8
