"""Statements that change rows, triggers, cursors, prepared statements and concurrent updates do the same with batches as without."""

import pytest

from batch_models import NODE, SCORE, assert_same, outcome, prepare
from helpers import Background, explained

pytestmark = pytest.mark.newer

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
    "a view": f"WITH v AS (UPDATE high SET x = predict('m', x) || 7::real WHERE g > 2 RETURNING id) SELECT count(*) FROM v",
}
CURSORS = {
    "scan": f"SELECT id, {SCORE} FROM t WHERE {SCORE} > 0",
    "sort": "SELECT id, predict('m', x) FROM t ORDER BY g, id",
    "join": f"SELECT t.id, {SCORE} FROM t JOIN u ON u.k = t.id",
    "append": f"SELECT id, {SCORE} FROM t UNION ALL SELECT id, (predict('m2', w))[1] FROM u",
    "subquery": f"SELECT * FROM (SELECT id, {SCORE} AS p FROM t OFFSET 2) AS s WHERE p > 0",
}
# What a trigger does to the row, and when.
TRIGGERS = {
    "BEFORE ROW": ("BEFORE INSERT OR UPDATE ON t FOR EACH ROW", "NEW.x := (predict('m', coalesce(NEW.x, '{1,2,3}')) || NEW.id::real); RETURN NEW;"),
    "BEFORE ROW, a query": ("BEFORE INSERT OR UPDATE ON t FOR EACH ROW",
                            "NEW.s := (SELECT max((predict('m', x))[1])::text FROM t WHERE g = NEW.g); RETURN NEW;"),
    "BEFORE ROW that drops": ("BEFORE INSERT OR UPDATE ON t FOR EACH ROW", "RETURN CASE WHEN (predict('m', NEW.x))[1] > 0 THEN NEW END;"),
    "AFTER ROW": ("AFTER INSERT OR UPDATE OR DELETE ON t FOR EACH ROW",
                  "INSERT INTO seen SELECT TG_OP, coalesce(NEW.id, OLD.id), predict('m', coalesce(NEW.x, OLD.x, '{1,2,3}'))::text; RETURN NULL;"),
    "AFTER ROW WHEN": ("AFTER UPDATE ON t FOR EACH ROW WHEN ((predict('m', NEW.x))[1] < (predict('m', NEW.x))[2])",
                       "INSERT INTO seen VALUES (TG_OP, NEW.id, NULL); RETURN NULL;"),
    "AFTER STATEMENT": ("AFTER UPDATE ON t REFERENCING OLD TABLE AS before NEW TABLE AS after FOR EACH STATEMENT",
                        "INSERT INTO seen SELECT 'OLD', id, (predict('m', x))::text FROM before ORDER BY id; "
                        "INSERT INTO seen SELECT 'NEW', a.id, (predict('m', a.x))::text FROM after AS a JOIN before AS b USING (id) "
                        "WHERE (predict('m', b.x))[1] > 0 ORDER BY a.id; RETURN NULL;"),
}


@pytest.fixture(scope="module", autouse=True)
def tables(db):
    with db.connect() as conn:
        prepare(conn)
        conn.execute(f"CREATE VIEW high AS SELECT * FROM t WHERE {SCORE} > 0")
        conn.execute("CREATE TABLE seen (operation text, id int, p text)")


@pytest.mark.parametrize("kind", CHANGES)
def test_change(conn, kind):
    found = assert_same(conn, "BEGIN", CHANGES[kind], FINAL, "ROLLBACK")
    assert found[2] != outcome(conn, FINAL)[0], "nothing was changed"


@pytest.mark.parametrize("kind", TRIGGERS)
def test_trigger(conn, kind):
    """Triggers that predict, below statements that predict; what they see of the table is the same row by row."""
    when, body = TRIGGERS[kind]
    found = assert_same(conn, "BEGIN", f"CREATE FUNCTION act() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} END $$",
                        f"CREATE TRIGGER tr {when} EXECUTE FUNCTION act()",
                        f"UPDATE t SET x = predict('m', x) || g::real WHERE {SCORE} IS NOT NULL",
                        f"INSERT INTO t SELECT id + 1000, g, a, s, x FROM t WHERE {SCORE} > 0",
                        f"DELETE FROM t WHERE {SCORE} < -0.2", FINAL, "SELECT * FROM seen", "ROLLBACK")
    assert found[6] != outcome(conn, FINAL)[0]
    assert found[7] or "BEFORE" in kind, "the trigger has seen nothing"


def test_row_movement(conn):
    """An UPDATE that moves rows to other partitions, with a trigger there, and a foreign key that points at them."""
    wanted = outcome(conn, "SELECT count(*) FROM parted WHERE a = 0")
    update = f"UPDATE parted SET a = CASE WHEN {SCORE} > 0 THEN 1 ELSE 0 END, x = predict('m', x) || 1::real WHERE {SCORE} IS NOT NULL"
    found = assert_same(
        conn, "BEGIN", "CREATE FUNCTION act() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "NEW.s := TG_TABLE_NAME || (predict('m', NEW.x))[1]::text; RETURN NEW; END $$",
        "CREATE TRIGGER tr BEFORE INSERT OR UPDATE ON parted FOR EACH ROW EXECUTE FUNCTION act()",
        f"{update} RETURNING id, tableoid::regclass, predict('m', x)", "SELECT tableoid::regclass, * FROM parted ORDER BY id",
        "SELECT count(*) FROM parted WHERE a = 0", "ROLLBACK")
    assert found[5] != wanted, "no row has moved"
    assert found[5] != ["(0,)"]


def test_row_movement_under_a_waiting_update(db, conn):
    """A row that another session moves while it is waited for: the same error or the same rows with batches and without."""
    update = f"UPDATE parted SET s = 'here' WHERE {SCORE} IS NOT NULL AND id BETWEEN 3 AND 8 RETURNING id"
    found = {}
    for batching in ("off", "on"):
        with db.connect() as other:
            conn.execute(f"BEGIN; SET LOCAL tessera.enable_batching = {batching}")
            other.execute("BEGIN")
            assert other.execute("UPDATE parted SET a = (a + 1) % 3 WHERE id = 5").rowcount == 1
            waiting = Background(outcome, conn, update)
            assert waiting.waits()
            other.execute("COMMIT")
            found[batching] = waiting.result()
            conn.execute("ROLLBACK")
            other.execute("UPDATE parted SET a = 2 WHERE id = 5")
    assert found["on"] == found["off"]
    assert found["on"][0][0] == "40001"


@pytest.mark.parametrize("scroll", ["", "SCROLL", "NO SCROLL"])
@pytest.mark.parametrize("kind", CURSORS)
def test_cursor(conn, kind, scroll):
    declare = f"DECLARE c {scroll} CURSOR FOR {CURSORS[kind]}"
    assert_same(conn, "BEGIN", declare, "FETCH 3 c", "MOVE 5 c", "FETCH 2 c", "FETCH BACKWARD 3 c", "ROLLBACK", errors=True)
    assert_same(conn, "BEGIN", declare, "FETCH 3 c", "UPDATE t SET s = 'here' WHERE CURRENT OF c RETURNING id", "ROLLBACK", errors=True)


def test_prepared(conn):
    """A kept plan follows the model: another name, none, a name from a parameter."""
    for mode in ("force_generic_plan", "force_custom_plan"):
        conn.execute(f"SET plan_cache_mode = {mode}")
        conn.execute(f"PREPARE {mode}(text, int) AS SELECT predict($1, x) FROM t WHERE id > $2 ORDER BY id")
        run = f"EXECUTE {mode}('m', 280)"
        assert NODE in explained(conn, run)
        first = outcome(conn, run)[0]
        assert len(first) == 20 and outcome(conn, f"EXECUTE {mode}(NULL, 299)")[0] == ["(None,)"]
        conn.execute("SELECT rename_model('m', 'other')")
        assert outcome(conn, run)[0][0] == "42704" and outcome(conn, f"EXECUTE {mode}('other', 280)")[0] == first
        conn.execute("SELECT rename_model('other', 'm')")
        assert outcome(conn, run)[0] == first


def test_functions_that_keep_plans(conn):
    """SQL and PL/pgSQL functions: loops over queries, cursors as results, dynamic statements, exceptions."""
    conn.execute("""
        CREATE FUNCTION walk(above real) RETURNS SETOF text LANGUAGE plpgsql AS $$
        DECLARE r record; c refcursor; n int := 0;
        BEGIN
            FOR r IN SELECT id, predict('m', x) AS p FROM t WHERE (predict('m', x))[1] > above ORDER BY id LOOP
                n := n + 1;
                EXIT WHEN n > 20;
                RETURN NEXT r::text;
            END LOOP;
            OPEN c FOR EXECUTE 'SELECT id, predict($1, x) AS p FROM t ORDER BY id' USING 'm';
            MOVE FORWARD 7 FROM c;
            FETCH c INTO r;
            RETURN NEXT r::text;
            CLOSE c;
            BEGIN
                PERFORM predict('m', x || 1::real) FROM t;
            EXCEPTION WHEN invalid_parameter_value THEN RETURN NEXT sqlerrm;
            END;
            RETURN QUERY SELECT predict('m', x)::text FROM t WHERE g = 3 ORDER BY id;
        END $$;
        CREATE FUNCTION inlined(above real) RETURNS TABLE (id int, p real[]) LANGUAGE sql STABLE
        AS 'SELECT id, predict(''m'', x) FROM t WHERE (predict(''m'', x))[1] > above';
    """)
    assert NODE in explained(conn, "SELECT * FROM inlined(0.05)")
    found = assert_same(conn, "SELECT walk(0.05)", "SELECT walk(-0.05)", "SELECT * FROM inlined(0.05) ORDER BY id")
    assert len(found[0]) > 60 and found[2]


def test_queries_within_commands(conn):
    """COPY of a query, materialized views and their refresh, temporary tables, VALUES."""
    query = f"SELECT id, predict('m', x) AS p, {SCORE} AS s FROM t WHERE {SCORE} > -0.1"

    def copied() -> bytes:
        with conn.cursor().copy(f"COPY ({query}) TO STDOUT") as out:
            return b"".join(bytes(piece) for piece in out)

    conn.execute("SET tessera.enable_batching = off")
    alone = copied()
    conn.execute("RESET tessera.enable_batching")
    assert copied() == alone and alone.count(b"\n") > 100
    found = assert_same(conn, "BEGIN", f"CREATE MATERIALIZED VIEW kept AS {query} ORDER BY id", "SELECT * FROM kept", "UPDATE t SET x = x || 1::real WHERE false",
                        "UPDATE t SET x = ARRAY[g, a, 1] WHERE id < 50", "REFRESH MATERIALIZED VIEW kept", "SELECT * FROM kept",
                        f"CREATE TEMP TABLE taken AS {query} WITH DATA", "SELECT * FROM taken", f"SELECT id, predict('m', x) INTO TEMP more FROM t WHERE {SCORE} > 0",
                        "SELECT * FROM more", "ROLLBACK")
    assert found[2] != found[6] and found[6] and found[8] and found[10]


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
