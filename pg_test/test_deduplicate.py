"""deduplicate_model: what it merges, what it measures, what it refuses, and what is left when it does not end."""

import time

import numpy as np
import onnxruntime
import psycopg
import pytest
from psycopg import errors

from helpers import Background, assert_close, cancelled_after, fails, load, predict_rows, timed_out_after
from near_models import CLASSES, ROWS, TILE, Task, split, tiles, weights

pytestmark = pytest.mark.newer

QUERY = "SELECT x, label FROM v ORDER BY id"
TABLES = ("model", "model_version", "graph", "tensor", "weight")


@pytest.fixture
def task(fresh):
    """Models `a` and, with noise, `b`; the rows in `v`."""
    made = Task()
    with fresh.connect() as conn:
        made.conn, made.base = conn, fresh
        made.table(conn)
        made.b = made.noised()
        made.load(conn, "a", made.first)
        made.load(conn, "b", made.b)
        yield made


def deduplicate(conn: psycopg.Connection, name: str = "b", query: str = QUERY, **options) -> dict:
    named = "".join(f", {option} => %s" for option in options)
    with conn.cursor(row_factory=psycopg.rows.dict_row) as cursor:
        return cursor.execute(f"SELECT * FROM deduplicate_model(%s, %s{named})", (name, query, *options.values())).fetchone()


def exported(conn: psycopg.Connection, spec: str) -> bytes:
    name, _, version = spec.partition("@")
    return conn.execute("SELECT export_model(%s, %s)", (name, int(version) if version else None)).fetchone()[0]


def runtime(content: bytes, rows: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, {"x": rows})[0]


def assert_whole(conn: psycopg.Connection, task: Task, name: str = "b") -> None:
    """The model predicts as ONNX Runtime does with the exported file; the store is sound."""
    assert_close(predict_rows(conn, name, task.x), runtime(exported(conn, name), task.x), name)
    assert conn.execute("SELECT * FROM check_store('tessera.weight')").fetchall() == []


def counts(conn: psycopg.Connection) -> list:
    """Everything that is stored."""
    rows = [conn.execute(f"SELECT count(*), max(t::text) FROM tessera.{table} AS t").fetchone() for table in TABLES[:1]]
    rows += [conn.execute(f"SELECT count(*) FROM tessera.{table}").fetchone() for table in TABLES[1:]]
    return rows + conn.execute("SELECT count(*) FROM tessera.store_blocks('tessera.weight')").fetchall()


def test_near_duplicates_are_merged(task):
    conn = task.conn
    before = exported(conn, "b")
    report = deduplicate(conn, max_drop=0.05)
    assert report["version"] == 2
    first, second = weights(exported(conn, "b")).values()
    merged = [np.array_equal(is_now, other) for (_, _, is_now), (_, _, other) in zip(tiles(first), tiles(task.first))]
    kept = [np.array_equal(is_now, other) for (_, _, is_now), (_, _, other) in zip(tiles(first), tiles(task.b))]
    assert all(a != b for a, b in zip(merged, kept)), "a block is neither the model's nor the other's"
    assert sum(merged) >= 30, "few of the 32 blocks of the first layer were merged"
    in_second = report["merged"] - sum(merged)
    assert 0 <= in_second <= 2 and (in_second > 0) != np.array_equal(second, weights(before)["w2"])
    assert report["blocks"] == 34 and report["blocks_skipped"] == report["blocks_shared"] == 0
    assert report["candidates"] >= report["tried"] >= report["merged"]
    assert report["metric_before"] - report["metric_after"] <= 0.05 + 1e-9
    assert report["bytes_saved"] > 4000 * report["merged"]
    assert exported(conn, "b@1") == before
    assert_whole(conn, task)
    # The content hash is the one that a load of the same tensors has: such a load stores nothing.
    blocks = conn.execute("SELECT count(*) FROM tessera.store_blocks('tessera.weight')").fetchone()
    load(conn, "again", exported(conn, "b"))
    hashes = conn.execute("SELECT DISTINCT v.content_hash FROM tessera.model_version v JOIN tessera.model m ON m.id = v.model WHERE (m.name, v.version) IN (('b', 2), ('again', 1))").fetchall()
    assert len(hashes) == 1
    conn.execute("SELECT drop_model('again')")
    assert conn.execute("SELECT count(*) FROM tessera.store_blocks('tessera.weight')").fetchone() >= blocks


def test_space_comes_back(task):
    conn = task.conn
    conn.execute("VACUUM tessera.weight")
    stored = "SELECT count(*), sum(stored_bytes) FROM tessera.store_blocks('tessera.weight')"
    blocks, bytes_before = conn.execute(stored).fetchone()
    report = deduplicate(conn, max_drop=1)
    assert report["merged"] > 30
    conn.execute("SELECT drop_model('b', 1)")
    conn.execute("VACUUM tessera.weight")
    conn.execute("VACUUM tessera.weight")
    blocks_after, bytes_after = conn.execute(stored).fetchone()
    assert (blocks - blocks_after, bytes_before - bytes_after) == (report["merged"], report["bytes_saved"])
    assert_whole(conn, task)
    conn.execute("SELECT drop_model('a')")
    conn.execute("VACUUM tessera.weight")
    conn.execute("VACUUM tessera.weight")
    assert_whole(conn, task)


def test_metric_is_that_of_onnx_runtime(task):
    report = deduplicate(task.conn, max_drop=1)
    for when, spec in (("before", "b@1"), ("after", "b@2")):
        right = (runtime(exported(task.conn, spec), task.x).argmax(axis=1) == task.labels).mean()
        assert (report[f"metric_{when}"] + report[f"guide_{when}"]) / 2 == pytest.approx(right, abs=1e-9)


def test_rows_are_split_by_the_seed(task):
    """Each part has the accuracy that its rows have; other seeds and shares choose other rows."""
    right = runtime(exported(task.conn, "b"), task.x).argmax(axis=1) == task.labels
    seen = set()
    for seed, holdout in ((0, 0.5), (7, 0.5), (-3, 0.25), (0, 0.9)):
        report = deduplicate(task.conn, seed=seed, holdout=holdout, dry_run=True)
        guide, held = split(ROWS, holdout, seed)
        assert report["guide_before"] == pytest.approx(right[sorted(guide)].mean(), abs=1e-9)
        assert report["metric_before"] == pytest.approx(right[sorted(held)].mean(), abs=1e-9)
        seen.add(report["guide_before"])
    assert len(seen) > 1


def test_bad_candidate_stays(task):
    """Alike in 26 of 32 rows, and far off in the others: the last to be tried, and not merged."""
    conn, bad = task.conn, task.noised()
    spoiled = bad[:TILE, TILE : 2 * TILE]
    spoiled[10:16] += 8
    task.load(conn, "bad", bad, task.second(bad, slice(TILE, 2 * TILE)))
    report = deduplicate(conn, "bad", max_drop=0.02)
    assert report["candidates"] > report["merged"] >= 30
    now = weights(exported(conn, "bad"))["w1"]
    for row, col, tile in tiles(now):
        other = task.first[row * TILE : (row + 1) * TILE, col * TILE : (col + 1) * TILE]
        if (row, col) == (0, 1):
            assert np.array_equal(tile, spoiled)
    assert_whole(conn, task, "bad")
    assert report["guide_before"] - report["guide_after"] <= 0.02 + 1e-9
    # Had it been merged, the metric would have told.
    everything = deduplicate(conn, "bad@1", max_drop=1, dry_run=True)
    assert everything["merged"] > report["merged"] and everything["metric_before"] - everything["metric_after"] > 0.02


def test_steps_end_where_the_bound_is(task):
    conn = task.conn
    halves = deduplicate(conn, max_drop=1, dry_run=True)
    assert halves["evaluations"] == 1
    steps = deduplicate(conn, max_drop=1, dry_run=True, step=5)
    assert steps["merged"] == halves["merged"] and steps["evaluations"] == -(-steps["merged"] // 5)


def test_dry_run_stores_nothing(task):
    before = counts(task.conn)
    report = deduplicate(task.conn, max_drop=1, dry_run=True)
    assert report["version"] is None and report["merged"] > 30 and report["bytes_saved"] > 0
    assert counts(task.conn) == before


def test_a_second_run_finds_nothing(task):
    deduplicate(task.conn, max_drop=1)
    before = counts(task.conn)
    report = deduplicate(task.conn, max_drop=1)
    assert (report["version"], report["candidates"], report["blocks_shared"]) == (None, 0, 34)
    assert report["note"] and report["evaluations"] == 0 and report["metric_after"] == report["metric_before"]
    assert counts(task.conn) == before


def test_a_named_version(task):
    conn = task.conn
    task.load(conn, "b", task.noised(0.5))
    report = deduplicate(conn, "b@1", max_drop=1)
    assert report["version"] == 3 and report["merged"] > 30
    assert_whole(conn, task)
    assert conn.execute("SELECT active FROM tessera.models WHERE name = 'b' AND version = 3").fetchone() == (True,)


def test_within_a_model(fresh):
    """Two near-equal halves of one matrix; no other model is there."""
    made = Task(3)
    half = made.first[:, :256]
    whole = np.hstack([half, half + made.random.normal(0, 0.001, half.shape).astype(np.float32)])
    with fresh.connect() as conn:
        made.table(conn)
        made.load(conn, "b", whole)
        report = deduplicate(conn, max_drop=1)
        assert report["merged"] == 16
        now = weights(exported(conn, "b"))["w1"]
        assert np.array_equal(now[:, :256], now[:, 256:])
        assert_whole(conn, made)


def test_one_row_at_a_time(fresh):
    """A model whose input is one row."""
    from near_models import classifier

    made = Task(4)
    with fresh.connect() as conn:
        made.table(conn)
        made.load(conn, "a", made.first)
        noised = made.noised()
        conn.execute("SELECT load_model('b', %b, 4096)", (classifier(noised, made.second(noised), rows=1),))
        report = deduplicate(conn, max_drop=0.1)
        assert report["merged"] > 30
        one = np.array([predict_rows(conn, "b", row) for row in made.x[:5]])
        session = onnxruntime.InferenceSession(exported(conn, "b"), providers=["CPUExecutionProvider"])
        assert_close(one, np.vstack([session.run(None, {"x": row[None]})[0] for row in made.x[:5]]), "b")


def embedding(table: np.ndarray) -> bytes:
    """The mean of the rows of a table that are asked for."""
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        [helper.make_node("Gather", ["e", "x"], ["g"], axis=0), helper.make_node("ReduceMean", ["g"], ["y"], axes=[1], keepdims=0)],
        "embedding",
        [helper.make_tensor_value_info("x", TensorProto.INT64, ["n", "words"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", table.shape[1]])],
        [numpy_helper.from_array(table, "e")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def test_embeddings_and_rows_of_several_widths(fresh):
    """Look-ups read few blocks; sentences differ in length. What nobody looks up is merged as well."""
    random = np.random.default_rng(5)
    table = random.normal(0, 0.1, (2000, 64)).astype(np.float32)
    tuned = (table + random.normal(0, 0.001, table.shape)).astype(np.float32)
    tuned[64:80] += 1  # words that the rows below use
    with fresh.connect() as conn:
        for name, content in (("base", table), ("tuned", tuned)):
            conn.execute("SELECT load_model(%s, %b, 16384)", (name, embedding(content)))
        conn.execute("CREATE TABLE s (x integer[], y float8[])")
        for length in (1, 3, 8, 3, 1, 5) * 8:
            words = random.integers(64, 80, length)
            conn.execute("INSERT INTO s VALUES (%s::int[], %s::float8[])", (words.tolist(), tuned[words].mean(axis=0).astype(float).tolist()))
        report = deduplicate(conn, "tuned", "SELECT x, y FROM s", metric="mse", max_drop=0.0001)
        assert report["candidates"] == 32 and report["merged"] >= 16, report
        assert report["metric_before"] < 1e-9 and report["metric_after"] <= 0.0001
        now = weights(exported(conn, "tuned"))["e"]
        assert np.array_equal(now[64:80], tuned[64:80])
        for words in ([70], [64, 1999, 3]):
            answer = conn.execute("SELECT predict('tuned', %s::int[])", (words,)).fetchone()[0]
            assert_close(np.array(answer), now[words].mean(axis=0), str(words))
        assert conn.execute("SELECT * FROM check_store('tessera.weight')").fetchall() == []


@pytest.mark.parametrize("cast", ["real[]", "double precision[]", "numeric[]"])
def test_types_of_features(task, cast):
    report = deduplicate(task.conn, query=f"SELECT x::{cast}, label::bigint FROM v ORDER BY id", max_drop=1, dry_run=True)
    same = deduplicate(task.conn, max_drop=1, dry_run=True)
    assert report["metric_before"] == same["metric_before"] and report["merged"] == same["merged"] > 30


def test_mean_square_and_cosine(task):
    conn, one_hot = task.conn, np.eye(CLASSES)[task.labels]
    is_now = runtime(exported(conn, "b"), task.x).astype(np.float64)
    report = deduplicate(conn, query="SELECT x, one_hot FROM v", metric="mse", max_drop=0.01, dry_run=True)
    assert (report["metric_before"] + report["guide_before"]) / 2 == pytest.approx(((is_now - one_hot) ** 2).mean(), rel=1e-4)
    assert report["merged"] > 0 and report["metric_after"] - report["metric_before"] <= 0.01
    report = deduplicate(conn, query="SELECT x, one_hot::float8[] FROM v", metric="cosine", max_drop=0.01, dry_run=True)
    cosine = (is_now * one_hot).sum(axis=1) / np.linalg.norm(is_now, axis=1)
    assert (report["metric_before"] + report["guide_before"]) / 2 == pytest.approx(cosine.mean(), rel=1e-4)
    # Nothing may be lost: merging makes an error, however small.
    report = deduplicate(conn, query="SELECT x, one_hot FROM v", metric="mse", max_drop=0, dry_run=True)
    assert report["merged"] < report["candidates"]


RIGHT = """CREATE FUNCTION "Right"(prediction real[], label text) RETURNS double precision LANGUAGE plpgsql AS $$
BEGIN
    RETURN (SELECT (i - 1)::text = label FROM unnest(prediction) WITH ORDINALITY AS p(o, i) ORDER BY o DESC LIMIT 1)::int;
END $$"""


@pytest.mark.parametrize("name", ['"Right"', 'public."Right"', '"Right"(real[], text)'])
def test_a_function_as_metric(task, name):
    task.conn.execute(RIGHT)
    wanted = deduplicate(task.conn, max_drop=0.02, dry_run=True)
    report = deduplicate(task.conn, query="SELECT x, label::text FROM v ORDER BY id", metric=name, max_drop=0.02, dry_run=True)
    for field in ("metric_before", "metric_after", "guide_before", "guide_after", "merged", "evaluations"):
        assert report[field] == wanted[field], field


def test_rows_that_were_held_out_are_heard(task):
    """What guides allows all; what was held out is worse as soon as anything is merged."""
    conn = task.conn
    _, held = split(ROWS, 0.5, 0)
    conn.execute("CREATE TABLE held (id int PRIMARY KEY, y real[])")
    before = predict_rows(conn, "b", task.x)
    with conn.cursor() as cursor:
        cursor.executemany("INSERT INTO held VALUES (%s, %s::real[])", [(int(i), before[i].tolist()) for i in held])
    conn.execute("""CREATE FUNCTION same(prediction real[], id int) RETURNS double precision LANGUAGE sql AS
        $$SELECT CASE WHEN max(abs(a - b)) > 1e-4 THEN 0 ELSE 1 END::float8 FROM held h, unnest(h.y, prediction) AS u(a, b) WHERE h.id = same.id HAVING count(*) > 0
          UNION ALL SELECT 1 WHERE NOT EXISTS (SELECT FROM held h WHERE h.id = same.id)$$""")
    stored = counts(conn)
    report = deduplicate(conn, query="SELECT x, id FROM v ORDER BY id", metric="same", max_drop=0.1)
    assert (report["version"], report["merged"], report["bytes_saved"]) == (None, 0, 0)
    assert report["tried"] > 30 and "held out" in report["note"]
    assert (report["guide_before"], report["guide_after"], report["metric_before"]) == (1, 1, 1) and report["metric_after"] < 0.5
    assert counts(conn) == stored


BAD = [
    ("no rows", "SELECT x, label FROM v WHERE false", {}, "02000"),
    ("one row", "SELECT x, label FROM v LIMIT 1", {}, "02000"),
    ("text features", "SELECT x::text, label FROM v", {}, "42804"),
    ("a number as features", "SELECT label, label FROM v", {}, "42804"),
    ("text labels", "SELECT x, label::text FROM v", {}, "42804"),
    ("array labels for accuracy", "SELECT x, one_hot FROM v", {}, "42804"),
    ("null features", "SELECT nullif(x, x), label FROM v", {}, "22004"),
    ("null label", "SELECT x, nullif(label, 2) FROM v", {}, "22004"),
    ("null element", "SELECT array_append(x[2:], NULL), label FROM v", {}, "22004"),
    ("narrow", "SELECT x[2:], label FROM v", {}, "22023"),
    ("one narrow row", "SELECT CASE id WHEN 9 THEN x[2:] ELSE x END, label FROM v", {}, "22023"),
    ("no features", "SELECT '{}'::real[], label FROM v", {}, "22023"),
    ("two dimensions", "SELECT ARRAY[x, x], label FROM v", {}, "2202E"),
    ("one column", "SELECT x FROM v", {}, "42804"),
    ("three columns", "SELECT x, label, id FROM v", {}, "42804"),
    ("no column", "SELECT FROM v", {}, "42804"),
    ("no class", "SELECT x, label + 1 FROM v", {}, "22023"),
    ("half a class", "SELECT x, label + 0.5 FROM v", {}, "22023"),
    ("label of another width", "SELECT x, one_hot[2:] FROM v", {"metric": "mse"}, "22023"),
    ("cosine of a number", "SELECT x, label FROM v", {"metric": "cosine"}, "42804"),
    ("empty", "", {}, "42601"),
    ("comment", "-- nothing", {}, "42601"),
    ("two statements", "SELECT x, label FROM v; SELECT x, label FROM v", {}, "42601"),
    ("syntax", "SELEC x", {}, "42601"),
    ("no table", "SELECT x, label FROM nowhere", {}, "42P01"),
    ("insert", "INSERT INTO v SELECT id + 1000, x, label, one_hot FROM v RETURNING x, label", {}, "42601"),
    ("update in WITH", "WITH w AS (UPDATE v SET label = 0 RETURNING x, label) SELECT * FROM w", {}, "25006"),
    ("locks", "SELECT x, label FROM v FOR UPDATE", {}, "25006"),
    ("into", "SELECT x, label INTO w FROM v", {}, "42601"),
    ("utility", "DROP TABLE v", {}, "42601"),
    ("explain", "EXPLAIN SELECT x, label FROM v", {}, "42601"),
    ("copy", "COPY v TO STDOUT", {}, "42601"),
    ("parameter", "SELECT x, $1 FROM v", {}, "42P02"),
    ("a function that writes", "SELECT x, written(label) FROM v", {}, "25006"),
    ("a function that fails", "SELECT x, 1 / (label - label) FROM v", {}, "22012"),
    ("unknown metric", QUERY, {"metric": "nothing"}, "42883"),
    ("metric without a name", QUERY, {"metric": ""}, "42602"),
    ("metric of another type", QUERY, {"metric": "of_text"}, "42883"),
    ("metric that returns text", QUERY, {"metric": "gives_text"}, "42804"),
    ("metric of one argument", QUERY, {"metric": "abs(integer)"}, "42804"),
    ("metric that returns null", QUERY, {"metric": "gives_null"}, "22000"),
    ("metric that returns NaN", QUERY, {"metric": "gives_nan"}, "22000"),
    ("metric that fails", QUERY, {"metric": "gives_error"}, "P0001"),
    ("negative max_drop", QUERY, {"max_drop": -0.1}, "22023"),
    ("max_drop NaN", QUERY, {"max_drop": float("nan")}, "22023"),
    ("holdout 0", QUERY, {"holdout": 0}, "22023"),
    ("holdout 1", QUERY, {"holdout": 1}, "22023"),
    ("share", QUERY, {"share": 1.5}, "22023"),
    ("bands", QUERY, {"bands": 0}, "22023"),
    ("many bands", QUERY, {"bands": 2_000_000_000}, "22023"),
    ("step", QUERY, {"step": -1}, "22023"),
    ("radius", QUERY, {"radius": 0.0}, "22023"),
    ("span", QUERY, {"span": "all"}, "22023"),
    ("importance", QUERY, {"importance": "percentile101"}, "22023"),
    ("null metric", QUERY, {"metric": None}, "22004"),
    ("null max_drop", QUERY, {"max_drop": None}, "22004"),
    ("no model", QUERY, {"name": "nobody"}, "42704"),
    ("no version", QUERY, {"name": "b@9"}, "42704"),
]

FUNCTIONS = """
CREATE TABLE log (n int);
CREATE FUNCTION written(n int) RETURNS int LANGUAGE plpgsql AS $$ BEGIN INSERT INTO log VALUES (n); RETURN n; END $$;
CREATE FUNCTION of_text(p real[], l text) RETURNS float8 LANGUAGE sql AS 'SELECT 1';
CREATE FUNCTION gives_text(p real[], l int) RETURNS text LANGUAGE sql AS $$SELECT '1'$$;
CREATE FUNCTION gives_null(p real[], l int) RETURNS float8 LANGUAGE sql AS 'SELECT NULL::float8';
CREATE FUNCTION gives_nan(p real[], l int) RETURNS float8 LANGUAGE sql AS $$SELECT 'NaN'::float8$$;
CREATE FUNCTION gives_error(p real[], l int) RETURNS float8 LANGUAGE plpgsql AS $$ BEGIN RAISE 'no such luck'; END $$;
"""


@pytest.fixture(scope="module")
def stored(db):
    made = Task()
    with db.connect() as conn:
        made.table(conn)
        made.load(conn, "a", made.first)
        made.load(conn, "b", made.noised())
        conn.execute(FUNCTIONS)
    return made


@pytest.mark.parametrize(("query", "options", "sqlstate"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_calls(conn, stored, query, options, sqlstate):
    before = counts(conn)
    options = {"name": "b"} | options
    named = "".join(f", {option} => %s" for option in options if option != "name")
    values = [options["name"], query, *(value for option, value in options.items() if option != "name")]
    ours = sqlstate not in ("42P01", "42P02", "22012", "P0001", "42602") and query != "SELEC x" and "written" not in query
    error = fails(conn, f"SELECT deduplicate_model(%s, %s{named})", values, sqlstate, hint=ours)
    if options.get("metric") == "gives_error":
        assert "no such luck" in str(error) and "gives_error" in error.diag.context
    assert counts(conn) == before
    # The session is as it was: it may write, and nothing is shown as under way.
    conn.execute("INSERT INTO log VALUES (0)")
    assert conn.execute("SELECT count(*) FROM tessera.progress").fetchone() == (0,)


def test_writing_goes_on_after_a_refusal(conn, stored):
    """Also within the transaction, and after a success."""
    conn.execute("BEGIN; SAVEPOINT s")
    with pytest.raises(errors.ReadOnlySqlTransaction):
        conn.execute("SELECT deduplicate_model('b', 'SELECT x, written(label) FROM v')")
    conn.execute("ROLLBACK TO s")
    conn.execute("INSERT INTO log VALUES (1)")
    deduplicate(conn, dry_run=True)
    conn.execute("INSERT INTO log VALUES (2)")
    assert conn.execute("SHOW transaction_read_only").fetchone() == ("off",)
    conn.execute("ROLLBACK")


def test_read_only_transaction(conn, stored):
    """Told at once, and not after the search; a dry run goes through."""
    conn.execute("BEGIN READ ONLY")
    assert deduplicate(conn, dry_run=True, max_drop=1)["merged"] > 30
    with pytest.raises(errors.ReadOnlySqlTransaction):
        conn.execute("SELECT deduplicate_model('b', 'SELECT nowhere')")
    conn.execute("ROLLBACK")


def test_rows_have_to_fit_in_memory(conn, stored):
    conn.execute("SET maintenance_work_mem = '1MB'")
    many = "SELECT array_fill(0.5::real, ARRAY[64]), 1 FROM generate_series(1, 100000000)"
    error = fails(conn, "SELECT deduplicate_model('b', %s)", (many,), "54000")
    assert "maintenance_work_mem" in str(error)
    wide = "SELECT x, repeat('z', 100000) FROM v, generate_series(1, 1000)"
    conn.execute("CREATE FUNCTION any_text(p real[], l text) RETURNS float8 LANGUAGE sql AS 'SELECT 1'")
    fails(conn, "SELECT deduplicate_model('b', %s, 'any_text')", (wide,), "54000")
    conn.execute("RESET maintenance_work_mem")


def test_rollback(task):
    conn = task.conn
    before = counts(conn)[:-1]
    conn.execute("BEGIN")
    assert deduplicate(conn, max_drop=1)["version"] == 2
    assert_close(predict_rows(conn, "b", task.x), runtime(exported(conn, "b"), task.x), "b")
    conn.execute("ROLLBACK")
    assert counts(conn)[:-1] == before
    assert deduplicate(conn, max_drop=1)["version"] == 2
    assert_whole(conn, task)


@pytest.fixture
def roles(task):
    conn = task.conn
    for role in ("keeper", "other"):
        conn.execute(f"DROP ROLE IF EXISTS {role}")
        conn.execute(f"CREATE ROLE {role} LOGIN")
    conn.execute("GRANT SELECT ON v TO keeper, other")
    conn.execute("ALTER DOMAIN tessera_model.b OWNER TO keeper")
    yield conn
    conn.execute("RESET ROLE")
    for role in ("keeper", "other"):
        conn.execute(f"DROP OWNED BY {role}")
        conn.execute(f"DROP ROLE {role}")


def test_only_the_owner(roles):
    roles.execute("SET ROLE other")
    fails(roles, "SELECT deduplicate_model('b', %s)", (QUERY,), "42501")
    roles.execute("SET ROLE keeper")
    assert deduplicate(roles, max_drop=1)["version"] == 2


def test_the_query_has_the_callers_rights(roles):
    roles.execute("CREATE TABLE secret AS SELECT * FROM v")
    roles.execute("SET ROLE keeper")
    fails(roles, "SELECT deduplicate_model('b', 'SELECT x, label FROM secret')", (), "42501", hint=False)
    fails(roles, "SELECT deduplicate_model('b', 'SELECT x, (SELECT count(*)::int FROM tessera.model) FROM v')", (), "42501", hint=False)


def test_the_metric_has_the_callers_rights(roles):
    roles.execute("CREATE FUNCTION who(p real[], l int) RETURNS float8 LANGUAGE plpgsql AS $$ BEGIN ASSERT current_user = 'keeper'; RETURN 1; END $$")
    roles.execute("CREATE FUNCTION mine(p real[], l int) RETURNS float8 LANGUAGE sql AS 'SELECT 1'; REVOKE EXECUTE ON FUNCTION mine FROM PUBLIC")
    roles.execute("SET ROLE keeper")
    assert deduplicate(roles, metric="who", dry_run=True)["metric_before"] == 1
    fails(roles, "SELECT deduplicate_model('b', %s, 'mine')", (QUERY,), "42501")


def test_models_that_may_not_be_used_are_left_alone(roles):
    roles.execute("REVOKE USAGE ON DOMAIN tessera_model.a FROM PUBLIC")
    roles.execute("SET ROLE keeper")
    assert deduplicate(roles, max_drop=1)["candidates"] == 0
    roles.execute("RESET ROLE")
    roles.execute("GRANT USAGE ON DOMAIN tessera_model.a TO keeper")
    roles.execute("SET ROLE keeper")
    assert deduplicate(roles, max_drop=1)["merged"] > 30


# Once the rows have been measured before.
WAITS = f"""CREATE FUNCTION waits(prediction real[], label int) RETURNS double precision LANGUAGE plpgsql AS $$
DECLARE calls int := 1 + coalesce(nullif(current_setting('test.calls', true), ''), '0')::int;
BEGIN
    PERFORM set_config('test.calls', calls::text, false);
    IF calls > {ROWS} THEN PERFORM pg_advisory_lock_shared(42); PERFORM pg_advisory_unlock_shared(42); END IF;
    RETURN 1;
END $$"""


def held_up(task: Task, other: psycopg.Connection) -> Background:
    """A deduplication of `b` in a session of its own that waits for `other` to let go of advisory lock 42."""
    def run():
        with task.base.connect() as conn:
            return deduplicate(conn, metric="waits", max_drop=1)

    other.execute(WAITS)
    other.execute("SELECT pg_advisory_lock(42)")
    session = Background(run)
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND wait_event = 'advisory'"
    deadline = time.monotonic() + 30
    while not other.execute(waiting).fetchone()[0]:
        assert time.monotonic() < deadline and session.waits(0.02), session.error
    return session


def test_the_other_model_is_dropped_meanwhile(task):
    """Its blocks stay as long as the search may refer to them, whatever is vacuumed, and after that the new version has them."""
    with task.base.connect() as other:
        session = held_up(task, other)
        other.execute("SELECT drop_model('a')")
        for _ in range(3):
            other.execute("VACUUM tessera.weight")
        other.execute("SELECT pg_advisory_unlock(42)")
        assert session.result()["merged"] > 30
        for _ in range(3):
            other.execute("VACUUM tessera.weight")
        other.execute("SELECT reset_cache_stats()")
    assert_whole(task.conn, task)
    first = weights(exported(task.conn, "b"))["w1"]
    assert sum(np.array_equal(a, b) for (_, _, a), (_, _, b) in zip(tiles(first), tiles(task.first))) > 30


def test_the_model_is_changed_meanwhile(task):
    with task.base.connect() as other:
        for change in ("SELECT activate_model('b', 1)", "SELECT drop_model('b')"):
            task.load(other, "b", task.noised())
            session = held_up(task, other)
            other.execute(change)
            other.execute("SELECT pg_advisory_unlock(42)")
            with pytest.raises((errors.ObjectNotInPrerequisiteState, errors.UndefinedObject)):
                session.result()
            other.execute("DROP FUNCTION waits")
        assert other.execute("SELECT * FROM check_store('tessera.weight')").fetchall() == []


def test_rows_that_change_meanwhile_change_nothing(task):
    with task.base.connect() as other:
        session = held_up(task, other)
        other.execute("UPDATE v SET x = NULL, label = -1")
        other.execute("SELECT pg_advisory_unlock(42)")
        assert session.result()["version"] == 2


def test_two_at_a_time(task):
    """Of two deduplications of one model one stores, the other is told that the model has changed."""
    sessions = [task.base.connect() for _ in range(2)]
    runs = [Background(deduplicate, conn, "b", QUERY) for conn in sessions]
    outcomes = []
    for run in runs:
        try:
            outcomes.append(run.result()["version"])
        except errors.ObjectNotInPrerequisiteState:
            outcomes.append(None)
    for conn in sessions:
        conn.close()
    assert 2 in outcomes and set(outcomes) <= {2, None}
    assert_whole(task.conn, task)


@pytest.mark.parametrize("way", [cancelled_after, timed_out_after])
def test_it_can_be_cancelled(task, way):
    conn = task.conn
    conn.execute("CREATE FUNCTION slow(p real[], l int) RETURNS float8 LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.0005); RETURN 1; END $$")
    before = counts(conn)[:-1]
    for name, query in {
        "reading": "SELECT deduplicate_model('b', 'SELECT x, label FROM v WHERE pg_sleep(0.01)::text = $$$$')",
        "measuring": f"SELECT deduplicate_model('b', '{QUERY}', 'slow', step => 1)",
        "large": "SELECT deduplicate_model('b', 'SELECT x, label FROM v, generate_series(1, 300)', step => 1)",
    }.items():
        for wait in (0.1, 0.6):
            late = way(conn, query, wait)
            assert late < 0.5, f"{name}: it went on for {late:.2f} s"
    assert counts(conn)[:-1] == before
    assert deduplicate(conn, max_drop=1)["version"] == 2


def test_progress(task):
    with task.base.connect(row_factory=psycopg.rows.dict_row) as watch:
        conn = task.base.connect()
        pid, seen = conn.info.backend_pid, []
        run = Background(deduplicate, conn, "b", "SELECT x, label FROM v, generate_series(1, 50)")
        while run.waits(0.001):
            seen += [row for row in watch.execute("SELECT * FROM tessera.progress").fetchall() if row["pid"] == pid]
        assert run.result()["version"] == 2
        conn.close()
    assert {row["command"] for row in seen} == {"deduplicate"} and {tuple(row["models"]) for row in seen} == {("b@1",)}
    order = ["reading rows", "compiling", "reading blocks", "comparing blocks", "trying merges", "storing blocks"]
    phases = [order.index(row["phase"]) for row in seen]
    assert phases == sorted(phases) and order.index("trying merges") in phases
    assert all(row["blocks_done"] <= row["blocks_total"] for row in seen if row["blocks_total"])
