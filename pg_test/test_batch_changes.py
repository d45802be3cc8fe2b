"""Batches beside writes, cursors, locks, side effects, errors and cancels."""

import threading
import time

import psycopg
import pytest
from psycopg import errors

from helpers import explained, load

pytestmark = pytest.mark.newer

P = "predict('fraud', x)"
NODE = "Tessera Predict"


@pytest.fixture
def t(fresh):
    with fresh.connect() as conn:
        load(conn, "fraud", "fraud_fc_256")
        conn.execute("CREATE TABLE t AS SELECT id, (SELECT array_agg((sin(id * i) * 2)::real) FROM generate_series(1, 28) AS i) AS x, NULL::real[] AS p FROM generate_series(1, 1000) AS id")
        conn.execute("CREATE UNIQUE INDEX ON t (id)")
        conn.execute("ANALYZE t")
        conn.execute("SET max_parallel_workers_per_gather = 0")
        conn.base = fresh
        yield conn


def alone(conn: psycopg.Connection, query: str) -> list[tuple]:
    with conn.transaction():
        conn.execute("SET LOCAL tessera.enable_batching = off")
        return conn.execute(query).fetchall()


def test_writes(t):
    wanted = alone(t, f"SELECT id, {P} FROM t ORDER BY id")
    t.execute(f"CREATE TABLE made AS SELECT id, {P} AS p FROM t")
    for write in (f"CREATE TABLE more AS SELECT id, {P} AS p FROM t", f"INSERT INTO made SELECT id, {P} FROM t", f"UPDATE t SET p = {P}"):
        assert NODE in explained(t, write)
    assert t.execute("SELECT * FROM made ORDER BY id").fetchall() == wanted
    t.execute("TRUNCATE made")
    t.execute(f"INSERT INTO made SELECT id, {P} FROM t")
    assert t.execute("SELECT * FROM made ORDER BY id").fetchall() == wanted
    returned = t.execute(f"UPDATE t SET p = {P} RETURNING id, p").fetchall()
    assert sorted(returned) == wanted == t.execute("SELECT id, p FROM t ORDER BY id").fetchall()
    high = alone(t, f"SELECT count(*) FROM t WHERE ({P})[1] > 0.5")[0][0]
    assert t.execute(f"DELETE FROM t WHERE ({P})[1] > 0.5").rowcount == high > 0
    t.execute(f"INSERT INTO t SELECT id, x, {P} FROM t WHERE id % 2 = 0 ON CONFLICT (id) DO UPDATE SET p = predict('fraud', excluded.x)")
    merge = f"MERGE INTO t USING (SELECT id, {P} AS p FROM t) AS s ON t.id = s.id WHEN MATCHED THEN UPDATE SET p = s.p"
    assert t.execute(merge).rowcount == 1000 - high
    assert t.execute(f"SELECT count(*) FROM t WHERE p IS DISTINCT FROM {P}").fetchone() == (0,)


def test_cursors(t):
    wanted = alone(t, f"SELECT id, {P} FROM t ORDER BY id")
    query = f"SELECT id, {P} FROM t"
    with t.transaction():
        t.execute(f"DECLARE c SCROLL CURSOR FOR {query}")
        assert t.execute("FETCH 300 FROM c").fetchall() == wanted[:300]
        assert t.execute("FETCH BACKWARD 10 FROM c").fetchall() == wanted[289:299][::-1]
        assert t.execute("FETCH ABSOLUTE 1000 FROM c").fetchall() == wanted[-1:]
        t.execute(f"DECLARE e CURSOR FOR {query}")
        assert t.execute("FETCH 300 FROM e").fetchall() == wanted[:300]
        assert t.execute("FETCH BACKWARD 10 FROM e").fetchall() == wanted[289:299][::-1]
        t.execute("SELECT reset_model_stats()")
        t.execute(f"DECLARE d NO SCROLL CURSOR WITH HOLD FOR {query}")
        assert t.execute("FETCH 30 FROM d").fetchall() == wanted[:30]
        assert t.execute("SELECT batches FROM tessera.model_stats").fetchone()[0] < 10
    assert t.execute("FETCH ALL FROM d").fetchall() == wanted[30:]


@pytest.mark.parametrize("kind", ["", "NO SCROLL", "SCROLL"])
def test_a_row_of_a_cursor_is_changed(t, kind):
    with t.transaction():
        t.execute(f"DECLARE c {kind} CURSOR FOR SELECT id, {P} FROM t")
        for wanted in range(1, 30):
            (found, _), = t.execute("FETCH c").fetchall()
            assert found == wanted
            if found % 3 == 0:
                t.execute("UPDATE t SET p = '{7}' WHERE CURRENT OF c")
    assert [row for (row,) in t.execute("SELECT id FROM t WHERE p = '{7}' ORDER BY id")] == list(range(3, 30, 3))


def test_a_locked_row_is_predicted_as_it_is_now(t):
    """The recheck of a row that changed while its lock was waited for predicts with the new values."""
    new = "array_fill(0.25::real, ARRAY[28])"
    with t.base.connect() as other:
        other.autocommit = False
        other.execute(f"UPDATE t SET x = {new} WHERE id IN (5, 600)")
        found = []
        reader = threading.Thread(target=lambda: found.extend(t.execute(f"SELECT id, {P} FROM t WHERE id IN (4, 5, 600) ORDER BY id FOR UPDATE").fetchall()))
        reader.start()
        time.sleep(0.5)
        other.commit()
        reader.join(30)
    wanted = t.execute(f"SELECT predict('fraud', {new})").fetchone()[0]
    assert [row[0] for row in found] == [4, 5, 600]
    assert found[1][1] == found[2][1] == wanted != found[0][1]


def test_an_update_of_rows_that_changed(t):
    with t.base.connect() as other:
        other.autocommit = False
        other.execute("UPDATE t SET x = array_fill(0.25::real, ARRAY[28]) WHERE id = 700")
        writer = threading.Thread(target=lambda: t.execute(f"UPDATE t SET p = {P}"))
        writer.start()
        time.sleep(0.5)
        other.commit()
        writer.join(30)
    assert t.execute(f"SELECT count(*), count(*) FILTER (WHERE p = {P}) FROM t").fetchone() == (1000, 1000)


def test_side_effects_are_as_many_and_in_order(t):
    t.execute("CREATE SEQUENCE s")
    rows = t.execute(f"SELECT id, nextval('s'), {P} FROM t LIMIT 10").fetchall()
    assert [row[1] for row in rows] == list(range(1, 11))
    assert t.execute("SELECT last_value FROM s").fetchone() == (10,)
    t.execute(f"SELECT {P} FROM t WHERE nextval('s') > 0 LIMIT 5")
    assert t.execute("SELECT last_value FROM s").fetchone() == (15,)
    t.execute(f"SELECT {P} FROM t WHERE ({P})[1] > -1 AND nextval('s') > 0 LIMIT 5")
    assert t.execute("SELECT last_value FROM s").fetchone() == (20,)
    t.execute(f"SELECT p FROM (SELECT {P} AS p, nextval('s') FROM t OFFSET 0) q LIMIT 5")
    assert t.execute("SELECT last_value FROM s").fetchone() == (25,)


def test_a_bad_row_raises_when_its_turn_has_come(t):
    t.execute("UPDATE t SET x = x[1:27] WHERE id = 50")
    t.execute("UPDATE t SET x = ARRAY[x, x] WHERE id = 20")
    t.execute("CLUSTER t USING t_id_idx")
    query = f"SELECT id, {P} FROM t"
    assert t.execute(f"{query} LIMIT 49").fetchall() == alone(t, f"{query} LIMIT 49")
    with pytest.raises(errors.InvalidParameterValue, match="takes 28 values per row, not 27"):
        t.execute(f"{query} LIMIT 50")
    t.execute("UPDATE t SET x[3] = NULL WHERE id = 50")
    with pytest.raises(errors.NullValueNotAllowed):
        t.execute(query)


def test_a_model_that_changes_between_executions(t):
    t.execute("SET plan_cache_mode = force_generic_plan")
    t.execute("PREPARE q (text) AS SELECT sum((predict($1, x))[1]) FROM t")
    first = t.execute("EXECUTE q ('fraud')").fetchone()
    load(t, "fraud", "fraud_fc_256_tuned")
    second = t.execute("EXECUTE q ('fraud')").fetchone()
    assert first != second and t.execute("EXECUTE q ('fraud@1')").fetchone() == first
    assert t.execute("EXECUTE q (NULL)").fetchone() == (None,)
    t.execute("SELECT drop_model('fraud')")
    with pytest.raises(errors.UndefinedObject):
        t.execute("EXECUTE q ('fraud')")


def test_a_policy_keeps_rows_from_leaky_conditions(t):
    t.execute("CREATE FUNCTION seen(id int) RETURNS boolean LANGUAGE plpgsql COST 0.0001 AS 'BEGIN INSERT INTO leak VALUES (id); RETURN true; END'")
    t.execute("CREATE TABLE leak (id int)")
    t.execute(f"CREATE VIEW those WITH (security_barrier) AS SELECT * FROM t WHERE ({P})[1] > 0.5")
    t.execute("SELECT count(*) FROM those WHERE seen(id)")
    leaked = t.execute(f"SELECT count(*) FROM leak JOIN t USING (id) WHERE ({P})[1] <= 0.5").fetchone()
    assert leaked == (0,)


@pytest.mark.parametrize("query", [f"SELECT count({P}) FROM t, generate_series(1, 100000)", f"SELECT count({P}) FROM t a JOIN t b USING (id, x), generate_series(1, 100000) WHERE (predict('fraud', x))[1] > -1"])
def test_a_statement_ends_in_time(t, query):
    t.execute("SET statement_timeout = '300ms'")
    begin = time.monotonic()
    with pytest.raises(errors.QueryCanceled):
        t.execute(query)
    assert time.monotonic() - begin < 0.3 + 0.5
    t.execute("RESET statement_timeout")
    assert t.execute(f"SELECT count({P}) FROM t").fetchone() == (1000,)


def test_failing_queries_leave_nothing(t):
    t.execute("INSERT INTO t SELECT 5000, '{1,2}'")
    t.execute("CREATE FUNCTION fail(n int) RETURNS bigint LANGUAGE plpgsql AS $$ BEGIN FOR i IN 1..n LOOP"
              f" BEGIN PERFORM {P} FROM t; EXCEPTION WHEN invalid_parameter_value THEN NULL; END; END LOOP;"
              " RETURN (SELECT sum(total_bytes) FROM pg_backend_memory_contexts); END $$")
    t.execute("SELECT fail(50)")
    before, after = t.execute("SELECT fail(50)").fetchone()[0], t.execute("SELECT fail(300)").fetchone()[0]
    assert after < before + (1 << 20)


def test_errors_keep_their_context(t):
    """Of functions below the node, in its inputs and conditions, and of what the planner evaluates in any query."""
    t.execute("CREATE FUNCTION boom(i int) RETURNS real[] LANGUAGE plpgsql STABLE AS $$ BEGIN IF i > 3 THEN RAISE 'boom %', i; END IF; RETURN array_fill(1::real, ARRAY[28]); END $$")
    t.execute("CREATE FUNCTION logarithm(x int) RETURNS double precision LANGUAGE sql IMMUTABLE AS 'SELECT ln(x) WHERE x < 10'")
    where = "PL/pgSQL function boom(integer) line 1 at RAISE"
    for query in (
        "SELECT predict('fraud', boom(id)) FROM t",
        f"SELECT {P} FROM t WHERE boom(id) IS NOT NULL",
        f"SELECT count(*) FROM t WHERE ({P})[1] > (boom(id))[1]",
        f"SELECT {P}, boom(id) FROM t",
    ):
        assert NODE in explained(t, query)
        with pytest.raises(errors.RaiseException) as caught:
            t.execute(query)
        assert (caught.value.diag.message_primary, caught.value.diag.context) == ("boom 4", where)
        assert caught.value.diag.source_function == "exec_stmt_raise"
    with pytest.raises(errors.InvalidArgumentForLogarithm) as caught:
        t.execute("SELECT logarithm(0)")
    assert caught.value.diag.context == 'SQL function "logarithm" statement 1'


def test_errors_leave_no_memory_behind(t):
    """An error leaves the node's frames without a look back."""
    t.execute("CREATE FUNCTION boom(i int) RETURNS real[] LANGUAGE plpgsql STABLE AS $$ BEGIN IF i > 500 THEN RAISE 'boom'; END IF; RETURN array_fill(1::real, ARRAY[28]); END $$")
    t.execute(f"""CREATE FUNCTION fail(n int) RETURNS void LANGUAGE plpgsql AS $$ BEGIN FOR i IN 1..n LOOP
        BEGIN PERFORM predict('fraud', boom(id)) FROM t; EXCEPTION WHEN raise_exception THEN NULL; END;
        BEGIN PERFORM 1 FROM t WHERE ({P})[1] > -1 AND (predict('fraud', boom(id)))[1] > -1; EXCEPTION WHEN raise_exception THEN NULL; END;
        END LOOP; END $$""")

    def resident() -> int:
        with open(f"/proc/{t.info.backend_pid}/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

    assert NODE in explained(t, "SELECT predict('fraud', boom(id)) FROM t")
    t.execute("SELECT fail(20)")
    before = resident()
    t.execute("SELECT fail(400)")
    # A batch's vectors take some 100 kB each time.
    assert resident() - before < 4096
