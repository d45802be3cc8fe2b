"""Batches give a role what it would get row by row: row security, views, SECURITY DEFINER functions, privileges that change."""

import pytest

from batch_models import NODE, SCORE, assert_same, outcome, prepare
from helpers import explained

pytestmark = pytest.mark.newer

QUERY = "SELECT id, predict('m', x) FROM t ORDER BY id"


@pytest.fixture(scope="module", autouse=True)
def tables(db):
    """`reader` reads the tables and predicts with `m2` only."""
    with db.connect() as conn:
        prepare(conn)
        conn.execute("CREATE ROLE batch_reader; GRANT SELECT ON t, u TO batch_reader; GRANT CREATE ON SCHEMA public TO batch_reader;"
                     " REVOKE USAGE ON DOMAIN tessera_model.m FROM PUBLIC; GRANT USAGE ON DOMAIN tessera_model.m2 TO batch_reader")
        yield
        conn.execute("DROP OWNED BY batch_reader; DROP ROLE batch_reader")


@pytest.fixture
def reader(db, tables):
    with db.connect() as connection:
        connection.execute("SET ROLE batch_reader")
        yield connection


@pytest.fixture
def granted(conn):
    conn.execute("GRANT USAGE ON DOMAIN tessera_model.m TO batch_reader")
    yield
    conn.execute("REVOKE USAGE ON DOMAIN tessera_model.m FROM batch_reader")


def test_row_security(conn, reader, granted):
    """A function that tells what it sees is called for no row that the policy hides."""
    conn.execute(f"ALTER TABLE t ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON t USING ({SCORE} > 0)")
    conn.execute("CREATE FUNCTION tell(n int) RETURNS bool LANGUAGE plpgsql STABLE COST 0.0001 AS $$BEGIN RAISE NOTICE '%', n; RETURN true; END$$")
    try:
        said = []
        reader.add_notice_handler(lambda notice: said.append(int(notice.message_primary)))
        scores = dict(conn.execute(f"SELECT id, {SCORE} FROM t WHERE {SCORE} > 0").fetchall())
        middle, visible = sorted(scores.values())[len(scores) // 2], set(scores)
        query = f"SELECT id FROM t WHERE tell(id) AND {SCORE} < {middle}::real"
        assert NODE in explained(reader, query)
        seen = {row[0] for row in reader.execute(query)}
        assert seen and set(said) == visible and seen < visible
        assert_same(reader, "SELECT predict('m2', w) FROM (SELECT ARRAY[id, 1]::real[] AS w FROM t) AS s", QUERY)
    finally:
        conn.execute("DROP POLICY p ON t; ALTER TABLE t DISABLE ROW LEVEL SECURITY")


def test_a_policy_that_needs_a_model_of_others(conn, reader):
    """Policies run with the rights of who asks: without the right to the model no row comes, in a batch as alone."""
    conn.execute(f"ALTER TABLE t ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON t USING ({SCORE} > 0)")
    try:
        (refused, other) = assert_same(reader, "SELECT id FROM t", "SELECT id, (predict('m2', x[1:2]))[1] FROM t WHERE false", errors=True)
        assert refused[0] == "42501" and other == []
    finally:
        conn.execute("DROP POLICY p ON t; ALTER TABLE t DISABLE ROW LEVEL SECURITY")


def test_a_model_that_the_role_may_not_use(reader):
    """Refused where a row needs it, and only there; the other model of the query is no way around."""
    found = assert_same(reader, QUERY, f"SELECT id FROM t WHERE (predict('m2', x[1:2]))[1] > -9 AND {SCORE} > 0",
                        f"SELECT id FROM t WHERE (predict('m2', x[1:2]))[1] > 1e30 AND {SCORE} > 0",
                        "SELECT id, predict('m', x) FROM t WHERE x IS NULL ORDER BY id", f"SELECT sum({SCORE}) FROM t", errors=True)
    assert [one[0] for one in (found[0], found[1], found[4])] == ["42501"] * 3
    assert found[2] == [] and len(found[3]) == 27


def test_definer_functions(conn, reader):
    """Within them the model is the owner's to use, outside of them it is not, also in one query."""
    conn.execute(f"""
        CREATE FUNCTION total() RETURNS float8 LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = public, pg_temp
        AS $$ BEGIN RETURN (SELECT sum({SCORE}::float8) FROM t); END $$;
        CREATE FUNCTION listed() RETURNS TABLE (id int, p real[]) LANGUAGE sql STABLE SECURITY DEFINER
        AS $$ SELECT id, predict('m', x) FROM t WHERE {SCORE} > 0 ORDER BY id $$;
        CREATE FUNCTION scored(x real[]) RETURNS real[] LANGUAGE sql STABLE SECURITY DEFINER AS $$ SELECT predict('m', x) $$;
        CREATE FUNCTION inlined(x real[]) RETURNS real[] LANGUAGE sql STABLE AS $$ SELECT predict('m', x) $$;
    """)
    found = assert_same(reader, "SELECT total()", "SELECT * FROM listed()", "SELECT id, scored(x) FROM t ORDER BY id",
                        "SELECT id, predict('m2', x[1:2]) FROM t WHERE (scored(x))[1] > 0 ORDER BY id", "SELECT id, p, predict('m2', p) FROM listed() ORDER BY id")
    assert all(found)
    found = assert_same(reader, "SELECT id, predict('m', x) FROM listed() JOIN t USING (id)", "SELECT id, inlined(x) FROM t",
                        "SELECT id, scored(x), inlined(x) FROM t", errors=True)
    assert [state for state, _ in found] == ["42501"] * 3


def test_views(conn, reader):
    """A view gives the right to its tables; a function in it, and so the model, is still that of who asks."""
    conn.execute(f"""
        CREATE TABLE hidden AS SELECT * FROM t;
        CREATE VIEW open_view AS SELECT id, predict('m2', x[1:2]) AS q, x FROM hidden;
        CREATE VIEW closed_view AS SELECT id, {SCORE} AS p FROM hidden;
        CREATE VIEW invoker_view WITH (security_invoker) AS SELECT id, predict('m2', x[1:2]) AS q FROM hidden;
        GRANT SELECT ON open_view, closed_view, invoker_view TO batch_reader;
    """)
    (rows, count) = assert_same(reader, "SELECT id, q FROM open_view WHERE q[1] > 0 ORDER BY id", "SELECT count(*) FROM closed_view")
    assert rows and count == ["(300,)"]
    found = assert_same(reader, "SELECT * FROM closed_view", "SELECT * FROM invoker_view", "SELECT predict('m', x) FROM open_view", errors=True)
    assert [state for state, _ in found] == ["42501"] * 3
    assert NODE in explained(reader, "SELECT id, q FROM open_view")


def test_the_role_changes_between_fetches(conn, reader, granted):
    """What is fetched after the role was changed needs that role's right, but for rows whose batch is computed already."""
    conn.execute(f"BEGIN; DECLARE c CURSOR FOR {QUERY.replace(' ORDER BY id', '')}")
    assert len(conn.execute("FETCH 100 FROM c").fetchall()) == 100
    conn.execute("REVOKE USAGE ON DOMAIN tessera_model.m FROM batch_reader")
    conn.execute("SET LOCAL ROLE batch_reader")
    (rest,) = outcome(conn, "FETCH ALL FROM c")
    assert rest[0] == "42501"
    conn.execute("ROLLBACK")


def test_the_role_changes_within_a_query(conn):
    """set_config is volatile: rows behind the change are refused, rows before it are not."""
    change = "CASE WHEN id = 100 THEN set_config('role', 'batch_reader', true) END"
    found = assert_same(conn, "BEGIN", f"SELECT id, {change}, predict('m', x) FROM t WHERE id <= 99", "ROLLBACK",
                        "BEGIN", f"SELECT id, {change}, predict('m', x) FROM t LIMIT 150", "ROLLBACK",
                        "BEGIN", f"SELECT id, predict('m', x) FROM t WHERE {change} IS NULL LIMIT 150", "ROLLBACK", errors=True)
    assert len(found[1]) == 99 and found[4][0] == found[7][0] == "42501"


def test_a_revoked_right_between_fetches(conn, reader, granted):
    """A REVOKE of another session is seen by the next statement; a cursor that is open goes on or is refused, alike."""
    found = {}
    for batching in ("off", "on"):
        conn.execute("GRANT USAGE ON DOMAIN tessera_model.m TO batch_reader")
        reader.execute(f"SET tessera.enable_batching = {batching}; BEGIN; DECLARE c CURSOR FOR SELECT id, predict('m', x) FROM t")
        first = outcome(reader, "FETCH 3 FROM c")
        conn.execute("REVOKE USAGE ON DOMAIN tessera_model.m FROM batch_reader")
        found[batching] = first + outcome(reader, "FETCH ALL FROM c", "ROLLBACK", QUERY)
    assert found["on"] == found["off"]
    assert found["on"][3][0] == "42501"
