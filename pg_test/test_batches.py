"""Queries of many shapes give the same rows with batches as row by row, and EXPLAIN says what ran."""

import json
import xml.etree.ElementTree as ElementTree

import psycopg
import pytest

from helpers import explained, load

pytestmark = pytest.mark.newer

P = "predict('fraud', x)"

# Queries, and how many nodes compute predictions in them with the default settings.
SHAPES = [
    (f"SELECT id, {P} FROM t ORDER BY id", 1),
    (f"SELECT id, ({P})[1] FROM t WHERE ({P})[1] > 0.5 ORDER BY id", 1),
    (f"SELECT id FROM t WHERE id < 500 AND ({P})[1] > 0.5 AND n > 1 ORDER BY id", 1),
    (f"SELECT count(*), sum(({P})[1]::numeric) FROM t", 1),  # workers add in any order: a sum of float4 depends on it
    (f"SELECT k, max(({P})[2]) FROM t GROUP BY k ORDER BY k", 1),
    (f"SELECT k, max(({P})[2]) FROM t GROUP BY k HAVING max(({P})[1]) > 0.2 ORDER BY k", 1),
    ("SELECT k, predict('fraud', (array_agg(id ORDER BY id))[1:28]::real[]) FROM t GROUP BY k HAVING (predict('fraud', (array_agg(id ORDER BY id))[1:28]::real[]))[1] >= 0 ORDER BY k", 1),
    ("SELECT a.id, predict('fraud', a.x) FROM t a JOIN t b ON a.id = b.id + 1 WHERE b.k = 3 ORDER BY 1", 1),
    ("SELECT a.id, b.id, predict('fraud', b.x) FROM t a LEFT JOIN t b ON a.id = b.id + 1 AND b.k = 3 ORDER BY 1", 1),
    (f"WITH q AS MATERIALIZED (SELECT id, {P} AS p FROM t) SELECT id, p[1] FROM q WHERE p[2] > 0.3 ORDER BY id", 1),
    (f"SELECT id, {P} FROM t WHERE k = 1 UNION ALL SELECT id, {P} FROM t WHERE k = 2 ORDER BY 1", 2),
    (f"SELECT id, {P} FROM t WHERE k = 1 UNION SELECT id, {P} FROM t WHERE k = 1 ORDER BY 1", 2),
    (f"SELECT id, {P} FROM parts ORDER BY id", 2),
    (f"SELECT id, CASE WHEN n IS NULL THEN NULL ELSE {P} END FROM t ORDER BY id", 0),
    (f"SELECT id, coalesce(n::real, ({P})[1]) FROM t ORDER BY id", 0),
    (f"SELECT id, ({P})[1] + ({P})[2], predict('encoder', (x || x || x)[1:76]) IS NULL FROM t ORDER BY id LIMIT 50", 1),
    (f"SELECT DISTINCT ({P})[1] > 0.5 FROM t ORDER BY 1", 1),
    (f"SELECT id, row_number() OVER (ORDER BY ({P})[1], id), count(({P})[1]) OVER (PARTITION BY k ORDER BY id) FROM t ORDER BY id", 1),
    (f"SELECT id, unnest({P}) FROM t ORDER BY id, 2", 1),
    (f"SELECT * FROM (SELECT id, x FROM t ORDER BY id LIMIT 20) s, LATERAL (SELECT {P} AS p) l", 1),
    (f"SELECT id, (SELECT ({P})[1]) FROM t ORDER BY id LIMIT 30", 0),
    ("SELECT id FROM t WHERE EXISTS (SELECT FROM t u WHERE u.id = t.id + 1 AND (predict('fraud', u.x))[1] > 0.5) ORDER BY id", 1),
    (f"SELECT count(({P})[1]) FILTER (WHERE n > 2), count(*) FILTER (WHERE ({P})[1] > 0.5) FROM t", 1),
    (f"SELECT k, n, count(({P})[1]) FROM t GROUP BY ROLLUP (k, n) ORDER BY k, n", 1),
    (f"SELECT id, predict('fraud', array_fill((({P})[1])::real, ARRAY[28])) FROM t WHERE x IS NOT NULL ORDER BY id", 1),
    (f"SELECT id, p[1] FROM (SELECT id, {P} AS p FROM t OFFSET 0) s WHERE p[1] > 0.3 ORDER BY id", 1),
    (f"WITH RECURSIVE r AS (SELECT id, {P} AS p FROM t WHERE id = 1 UNION ALL SELECT t.id, predict('fraud', t.x) FROM t JOIN r ON t.id = r.id + 1 WHERE t.id < 20) SELECT * FROM r ORDER BY id", 2),
    ("SELECT id, predict('fraud', x::float8[]) FROM t ORDER BY id", 1),
    ("SELECT id, predict('fraud', x::int[]) FROM t ORDER BY id", 1),
    ("SELECT id, predict('fraud', x::numeric[]) FROM t WHERE id < 300 ORDER BY id", 1),
    (f"SELECT id, {P} FROM t WHERE {P} IS NULL OR n IS NULL ORDER BY id", 1),
    (f"SELECT t, {P} FROM t ORDER BY id", 1),
    (f"SELECT ctid, tableoid::regclass, {P} FROM t ORDER BY id", 1),
    (f"SELECT id, ({P})[1] FROM t WHERE id IN (SELECT id FROM t WHERE ({P})[1] > 0.5) ORDER BY id", 2),
    (f"SELECT id FROM t WHERE n > 1 OR ({P})[1] > 0.5 ORDER BY id", 0),
    (f"SELECT id, ({P})[1] FROM t WHERE (predict('wide', x))[1] > -9 AND CASE WHEN k = 1 THEN n > 1 ELSE ({P})[1] > 0.5 END ORDER BY id", 1),
    ("SELECT k, predict('fraud', array_fill(coalesce(k, 9)::real, ARRAY[28])), max((predict('fraud', array_fill(coalesce(k, 9)::real, ARRAY[28])))[1]) FROM t GROUP BY ROLLUP (k) ORDER BY k", None),
    ("VALUES (predict('fraud', array_fill(1::real, ARRAY[28])))", 0),
    (f"SELECT id, {P} FROM t TABLESAMPLE bernoulli (20) REPEATABLE (3) ORDER BY id", 1),
    ("SELECT id, predict(m, x) FROM t, (SELECT 'fraud'::text AS m OFFSET 0) s ORDER BY id LIMIT 20", None),
    ("SELECT id, predict('fraud', ARRAY[id,k,n,id,k,n,id,k,n,id,k,n,id,k,n,id,k,n,id,k,n,id,k,n,id,k,n,id]::real[]) FROM t WHERE n IS NOT NULL ORDER BY id", 1),
    (f"SELECT id, predict(NULL, x), {P} FROM t ORDER BY id", 1),
    ("SELECT id, predict('softmax_of_rows', x) FROM t WHERE x IS NOT NULL ORDER BY id LIMIT 40", 1),
]

SETTINGS = {
    "batches of 7": ["tessera.batch_size = 7"],
    "little memory": ["tessera.batch_memory = '1kB'"],
    "parallel": ["parallel_setup_cost = 0", "parallel_tuple_cost = 0", "min_parallel_table_scan_size = 0", "max_parallel_workers_per_gather = 2"],
    "merge joins": ["enable_hashjoin = off", "enable_hashagg = off", "enable_nestloop = off"],
    "nested loops": ["enable_hashjoin = off", "enable_mergejoin = off", "enable_seqscan = off"],
    "compiled": ["jit_above_cost = 0"],
}


@pytest.fixture(scope="module")
def tables(db):
    with db.connect() as conn:
        load(conn, "fraud", "fraud_fc_256")
        load(conn, "wide", "fraud_fc_512")
        load(conn, "encoder", "encoder_fc")
        load(conn, "softmax_of_rows", "fraud_fc_512")
        conn.execute("SELECT declare_independent_rows('softmax_of_rows', false)")
        conn.execute("CREATE TABLE t AS SELECT id, id % 7 AS k, CASE WHEN id % 11 > 0 THEN (SELECT array_agg((sin(id * i) * 2)::real) FROM generate_series(1, 28) AS i) END AS x,"
                     " CASE WHEN id % 97 > 0 THEN id % 5 END AS n FROM generate_series(1, 2000) AS id")
        conn.execute("CREATE INDEX ON t (id)")
        conn.execute("CREATE TABLE parts (id int, k int, x real[]) PARTITION BY LIST (k)")
        conn.execute("CREATE TABLE parts_0 PARTITION OF parts FOR VALUES IN (0, 1, 2)")
        conn.execute("CREATE TABLE parts_1 PARTITION OF parts FOR VALUES IN (3, 4, 5, 6)")
        conn.execute("INSERT INTO parts SELECT id, k, x FROM t")
        conn.execute("ANALYZE")
    return db


@pytest.fixture
def t(tables):
    with tables.connect() as conn:
        conn.execute("SET max_parallel_workers_per_gather = 0")
        yield conn


def answer(conn: psycopg.Connection, query: str, settings: list[str] = ()) -> list[tuple]:
    for setting in settings:
        conn.execute(f"SET LOCAL {setting}")
    return conn.execute(query).fetchall()


@pytest.mark.parametrize(("query", "nodes"), SHAPES)
def test_the_same_rows(t, query, nodes):
    with t.transaction():
        wanted = answer(t, query, ["tessera.enable_batching = off"])
    assert wanted
    shown = explained(t, query).count("Custom Scan (Tessera Predict)")
    assert nodes is None or shown == nodes
    assert answer(t, query) == wanted
    for name, settings in SETTINGS.items():
        with t.transaction():
            assert answer(t, query, settings) == wanted, name


def test_the_node_is_switched_off(t):
    t.execute("SET tessera.enable_batching = off")
    assert "Tessera Predict" not in explained(t, f"SELECT {P} FROM t")


def test_a_kept_plan_obeys_the_switch(t):
    t.execute("SET plan_cache_mode = force_generic_plan")
    t.execute(f"PREPARE q (int) AS SELECT count({P}) FROM t WHERE id > $1")
    whole = t.execute("EXECUTE q (0)").fetchone()
    t.execute("SET tessera.enable_batching = off")
    assert t.execute("EXECUTE q (0)").fetchone() == whole


def node_of(plan: dict) -> dict:
    if plan.get("Custom Plan Provider") == "Tessera Predict":
        return plan
    return next(found for child in plan.get("Plans", []) if (found := node_of(child)))


def test_explain_in_every_format(t):
    query = f"SELECT id, {P} FROM t WHERE ({P})[1] > 0.5"
    text = explained(t, query, "ANALYZE, VERBOSE")
    assert "Model: fraud, version 1" in text and "Batch Size: 1024" in text and "Inference Time" in text
    plan = t.execute(f"EXPLAIN (ANALYZE, FORMAT json) {query}").fetchone()[0][0]["Plan"]
    node = node_of(plan)
    assert node["Rows Predicted"] == 2000 - 2000 // 11 and 1 < node["Batches"] < 30
    assert node["Actual Rows"] + node["Rows Removed by Filter"] == 2000
    ElementTree.fromstring(t.execute(f"EXPLAIN (ANALYZE, FORMAT xml) {query}").fetchone()[0])
    assert "Custom Plan Provider: \"Tessera Predict\"" in t.execute(f"EXPLAIN (ANALYZE, FORMAT yaml) {query}").fetchone()[0]
    assert json.dumps(plan)
    assert "Model: no such model" in explained(t, "SELECT predict('no such model', x) FROM t")


def test_equal_calls_are_computed_once(t):
    node = node_of(t.execute(f"EXPLAIN (ANALYZE, FORMAT json) SELECT {P}, ({P})[1] FROM t WHERE ({P})[2] > -1").fetchone()[0][0]["Plan"])
    assert node["Rows Predicted"] == 2000 - 2000 // 11


def test_a_limit_computes_little_more(t):
    plan = t.execute(f"EXPLAIN (ANALYZE, FORMAT json) SELECT {P} FROM t WHERE x IS NOT NULL LIMIT 100").fetchone()[0][0]["Plan"]
    assert 100 <= node_of(plan)["Rows Predicted"] <= 200


def test_dropped_rows_are_not_predicted_by_what_follows(t):
    query = f"SELECT id FROM t WHERE ({P})[1] > 2 AND (predict('softmax_of_rows', x))[1] > 0"
    t.execute("SELECT reset_model_stats()")
    assert t.execute(query).fetchall() == []
    assert t.execute("SELECT sum(rows) FROM tessera.model_stats WHERE model = 'softmax_of_rows'").fetchone() == (None,)
