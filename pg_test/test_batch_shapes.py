"""Shapes of queries in which a batch could show: joins of every method, groups, windows, odd rows, locks; what EXPLAIN may know."""

import pytest

from batch_models import NODE, SCORE, assert_same, prepare
from helpers import explained

pytestmark = pytest.mark.newer

SHAPES = {
    "two conditions": f"SELECT id FROM t WHERE {SCORE} > 0 AND s <> 'z' AND (predict('m2', predict('m', x)))[2] > 0 ORDER BY id",
    "branch of a condition": f"SELECT id, predict('m', x) FROM t WHERE (predict('m2', x[1:2]))[1] > -9 AND CASE WHEN a = 1 THEN g > 1 "
                             f"ELSE {SCORE} > -9 END ORDER BY id",
    "nested": "SELECT id, predict('m2', predict('m', x)), predict('m', x) FROM t",
    "aggregates": f"SELECT g, sum({SCORE} ORDER BY id), count(DISTINCT {SCORE}), max({SCORE}) FILTER (WHERE {SCORE} > 0) "
                  f"FROM t GROUP BY g HAVING max({SCORE}) > 0 ORDER BY g",
    "ordered set": f"SELECT g, percentile_cont(0.5) WITHIN GROUP (ORDER BY {SCORE}) FROM t GROUP BY g ORDER BY g",
    "rollup": f"SELECT x, predict('m', x), count({SCORE}) FROM t GROUP BY ROLLUP (x) ORDER BY 1, 2, 3",
    "grouping sets": f"SELECT g, a, grouping(g, a), sum({SCORE}) FROM t GROUP BY GROUPING SETS ((g, a), (g), ()) ORDER BY 1, 2, 3",
    "windows": f"SELECT id, sum({SCORE}) FILTER (WHERE {SCORE} > 0) OVER (PARTITION BY g ORDER BY id ROWS 2 PRECEDING), "
               f"lag({SCORE}) OVER (ORDER BY id), rank() OVER (ORDER BY {SCORE}) FROM t ORDER BY id",
    "first of a window": "SELECT * FROM (SELECT id, predict('m', x), row_number() OVER (PARTITION BY g ORDER BY id) AS n FROM t) AS s "
                         "WHERE n <= 3 ORDER BY id",
    "sets of rows": "SELECT id, unnest(predict('m', x)), generate_series(1, 2) FROM t",
    "recursion": "WITH RECURSIVE r AS (SELECT id, x FROM t WHERE id < 4 UNION ALL SELECT t.id, t.x FROM r JOIN t ON t.id = r.id * 2 "
                 "WHERE (predict('m', t.x))[1] > -5) SELECT * FROM r ORDER BY id",
    "lateral": f"SELECT u.id, l.* FROM u LEFT JOIN LATERAL (SELECT id, {SCORE} FROM t WHERE t.id = u.k LIMIT 2) AS l ON true ORDER BY 1",
    "limit": "SELECT id, predict('m', x) FROM t ORDER BY id LIMIT 7 OFFSET 3",
    "semi-join": f"SELECT id FROM u WHERE k IN (SELECT id FROM t WHERE {SCORE} > 0) ORDER BY id",
    "a branch of an argument": "SELECT id, predict('m2', ARRAY[CASE WHEN g > 3 THEN (predict('m', x))[1] ELSE a END, 1]::real[]), predict('m', x) "
                               "FROM t WHERE x IS NOT NULL ORDER BY id",
    "a branch of an argument, with a condition between": "SELECT id, predict('m', x) FROM t WHERE x IS NOT NULL AND "
        "(predict('m2', ARRAY[CASE WHEN g > 3 THEN (predict('m', predict('m', x) || 1::real))[1] ELSE a END, 1]::real[]))[1] > -9 AND "
        "(predict('m', predict('m', x) || 1::real))[2] > -9 ORDER BY id",
    "a branch of an aggregate's argument": "SELECT g, max((predict('m2', ARRAY[CASE WHEN g > 3 THEN (predict('m', x))[1] ELSE a END, 1]::real[]))[1]), "
        "min((predict('m', x))[2]) FROM t WHERE x IS NOT NULL GROUP BY g ORDER BY g",
    "no array": "SELECT id, predict('m', x), (predict('m', x))[3] IS NULL FROM t WHERE x IS NULL ORDER BY id",
}


# Over rows in the order in which they lie: what a LIMIT leaves out is told by what it takes.
LIMITS = [
    "SELECT id, predict('m', x) FROM t LIMIT 7 OFFSET 3", f"SELECT id FROM t WHERE {SCORE} > 0 LIMIT 20", f"SELECT id FROM t WHERE {SCORE} > 0 LIMIT 5 OFFSET 60",
    "SELECT id, predict('m', x) FROM t LIMIT 0", "SELECT id, predict('m', x) FROM t LIMIT NULL OFFSET 290", "SELECT id, predict('m', x) FROM t OFFSET 290",
    "SELECT id, predict('m', x) FROM t LIMIT (SELECT 3) OFFSET (SELECT 1)", "SELECT id, predict('m', x) FROM t LIMIT 10000000000",
    f"SELECT * FROM (SELECT id, {SCORE} AS p FROM t LIMIT 30) AS s WHERE p > 0", f"SELECT * FROM (SELECT id, {SCORE} AS p FROM t OFFSET 0) AS s WHERE p > 0 LIMIT 30",
    "SELECT id, predict('m', x) FROM t WHERE g = 1 UNION ALL SELECT id, predict('m2', w) FROM u LIMIT 60",
    f"(SELECT id, {SCORE} FROM t LIMIT 3) UNION ALL (SELECT id, {SCORE} FROM t LIMIT 4) LIMIT 6",
    "SELECT u.id, l.id, p FROM u, LATERAL (SELECT id, predict('m', x) AS p FROM t WHERE t.id > u.k LIMIT 2) AS l WHERE u.id < 40",
    "SELECT u.id, l.id, p FROM u, LATERAL (SELECT id, predict('m', x) AS p FROM t WHERE t.id > u.k LIMIT u.id % 4 OFFSET u.id % 3) AS l WHERE u.id < 40",
    "SELECT u.id, (SELECT max(p[1]) FROM (SELECT predict('m', x) AS p FROM t WHERE t.g = u.id % 7 LIMIT 5) AS s) FROM u WHERE id < 30",
    "SELECT id, g, predict('m', x) FROM (SELECT * FROM t ORDER BY id) AS s ORDER BY id FETCH FIRST 5 ROWS WITH TIES",
    f"SELECT id, unnest(predict('m', x)) FROM t LIMIT 9", "SELECT id, predict('m', x) FROM parted LIMIT 150",
]


@pytest.fixture(scope="module", autouse=True)
def tables(db):
    with db.connect() as conn:
        prepare(conn)


@pytest.mark.parametrize("shape", SHAPES)
def test_shape(conn, shape):
    assert NODE in explained(conn, SHAPES[shape])
    (rows,) = assert_same(conn, SHAPES[shape])
    assert rows, "no row to compare"


@pytest.mark.parametrize("query", LIMITS)
def test_limit(conn, query):
    assert_same(conn, query)
    assert_same(conn, "BEGIN", f"DECLARE c SCROLL CURSOR FOR {query}", "FETCH 4 c", "FETCH BACKWARD 2 c", "FETCH ALL c", "FETCH BACKWARD 3 c", "ROLLBACK")


def test_limit_of_a_parameter(conn):
    """A generic plan bounds its batches by the value of each execution."""
    conn.execute("SET plan_cache_mode = force_generic_plan")
    conn.execute("PREPARE part(bigint, bigint) AS SELECT id, predict('m', x) FROM t LIMIT $1 OFFSET $2")
    found = assert_same(conn, *(f"EXECUTE part({ends})" for ends in ("5, 0", "300, 100", "NULL, NULL", "2, NULL", "NULL, 295", "0, 0", "9223372036854775807, 299")))
    assert [len(rows) for rows in found] == [5, 200, 300, 2, 5, 0, 1]
    assert_same(conn, "EXECUTE part(-1, 0)", "EXECUTE part(1, -1)", errors=True)


@pytest.mark.parametrize("off", ["hashjoin, nestloop, material", "hashjoin, mergejoin", "nestloop, mergejoin", "hashagg", "sort"])
@pytest.mark.parametrize("kind", ["JOIN", "LEFT JOIN", "FULL JOIN"])
def test_join(conn, kind, off):
    for method in off.split(", "):
        conn.execute(f"SET enable_{method} = off")
    assert_same(conn, f"SELECT a.id, b.id, predict('m', a.x) FROM t AS a {kind} (SELECT * FROM u WHERE (predict('m2', w))[1] > 0) AS b "
                      "ON a.id = b.k ORDER BY 1, 2",
                f"SELECT count(*) FROM (SELECT * FROM t WHERE {SCORE} > 0) AS a {kind} (SELECT * FROM t WHERE {SCORE} < 0.5) AS b ON a.g = b.g")


def test_columns_of_a_group_are_null_in_other_grouping_sets(conn):
    """The call in the target list is of the group, the equal one in the aggregate of the row."""
    call = "predict('m', ARRAY[g, 1, 2]::real[])"
    wanted = assert_same(conn, f"SELECT g, {call}, sum(({call})[1]) FROM t GROUP BY ROLLUP (g)", errors=True)
    assert wanted[0][0] == "22004"


def test_models_that_no_row_needs(conn):
    found = assert_same(conn, f"SELECT predict('none', x) FROM t WHERE {SCORE} > 1e30", "SELECT predict('none', x) FROM t WHERE x IS NULL",
                        "SELECT predict(NULL::text, x) FROM t")
    assert len(found[1]) == 27 and set(found[1]) == {"(None,)"}
    found = assert_same(conn, "SELECT predict('none', x) FROM t", f"SELECT predict('m@x', x) FROM t WHERE {SCORE} > 0",
                        "SELECT predict('m@9', x) FROM t", errors=True)
    assert [state for state, _ in found] == ["42704", "22023", "42704"]


def test_rows_that_make_no_batch(conn):
    conn.execute("CREATE TEMP TABLE odd AS SELECT i AS id, CASE i % 4 WHEN 0 THEN NULL WHEN 1 THEN '{1,2,3}' WHEN 2 THEN '{{1,2,3},{4,5,6}}' "
                 "ELSE '[0:2]={1,NaN,Infinity}' END::real[] AS x FROM generate_series(1, 40) AS i")
    conn.execute("INSERT INTO odd VALUES (41, '{1,2}'), (42, '{}'), (43, '{1,NULL,3}')")
    found = assert_same(conn, "SELECT id, predict('m', x) FROM odd WHERE id < 41", "SELECT id, predict('m', x) FROM odd LIMIT 40",
                        "SELECT predict('m', x) FROM odd", "SELECT predict('m', x) FROM odd WHERE id > 41",
                        "SELECT predict('m', x) FROM odd WHERE id > 42", "SELECT predict('m', x::float8[]) FROM odd WHERE id < 41", errors=True)
    assert [isinstance(one, tuple) for one in found] == [False, False, True, True, True, False]


def test_locks_in_subplans_are_not_taken_ahead(conn):
    """A condition that locks rows is evaluated for the rows that are asked for only."""
    query = f"SELECT id, {SCORE} FROM t WHERE (SELECT u.id FROM u WHERE u.k = t.id + t.id * 2 FOR UPDATE) > 0"
    assert NODE not in explained(conn, query)
    assert NODE in explained(conn, query.replace(" FOR UPDATE", ""))


def test_explain_does_not_run_the_query(conn):
    """The model's name may come from a part of the query, or from parameters."""
    first = "SELECT predict((SELECT 'm'::text FROM u ORDER BY id LIMIT 1), x) FROM t"
    inner = "SELECT (SELECT max((predict(o.s, x))[1]) FROM t) FROM t AS o"
    for query in (first, inner):
        assert NODE in explained(conn, query) and "Model" not in explained(conn, query, "VERBOSE")
    assert "Model: m, version 1" in explained(conn, first, "ANALYZE")
    conn.execute("PREPARE p(text) AS SELECT predict($1, x) FROM t")
    conn.execute("SET plan_cache_mode = force_generic_plan")
    assert "Model: m, version 1" in explained(conn, "EXECUTE p('m')", "VERBOSE")


def test_auto_explain(conn):
    conn.execute("LOAD 'auto_explain'")
    conn.execute("SET auto_explain.log_min_duration = 0; SET auto_explain.log_analyze = on; SET client_min_messages = log")
    said = []
    conn.add_notice_handler(lambda notice: said.append(notice.message_primary))
    assert len(conn.execute("SELECT predict('m', x) FROM t").fetchall()) == 300
    assert any("Tessera Predict" in text for text in said)
