"""Work under way, as another session sees it; how far a LIMIT reads; what EXPLAIN counts of parallel workers."""

import threading
import time

import psycopg
import pytest
from psycopg import errors

from helpers import load, onnx_file

pytestmark = pytest.mark.newer

P = "predict('encoder', x)"


@pytest.fixture
def t(fresh):
    with fresh.connect() as conn:
        load(conn, "encoder", "encoder_fc")
        conn.execute("CREATE TABLE t AS SELECT id, (SELECT array_agg((sin(id * i) * 2)::real) FROM generate_series(1, 76) AS i) AS x FROM generate_series(1, 3000) AS id")
        conn.execute("ANALYZE t")
        conn.execute("SET max_parallel_workers_per_gather = 0")
        conn.base = fresh
        yield conn


def node(conn: psycopg.Connection, query: str) -> dict:
    """The node of the plan that predicts."""
    plan = conn.execute(f"EXPLAIN (ANALYZE, FORMAT json) {query}").fetchone()[0][0]["Plan"]
    while plan.get("Custom Plan Provider") != "Tessera Predict":
        plan = plan["Plans"][0]
    return plan


@pytest.mark.parametrize(
    ("limit", "rows"), [("LIMIT 7", 7), ("LIMIT 7 OFFSET 4", 11), ("LIMIT 0", 0), ("LIMIT 2 + 1", 3), ("OFFSET 2990", 3000), ("LIMIT NULL", 3000)]
)
def test_limit_reads_no_row_more(t, limit, rows):
    read = node(t, f"SELECT {P} FROM t {limit}")
    assert read["Rows Predicted" if rows else "Actual Loops"] == rows
    if rows:
        assert read["Plans"][0]["Actual Rows"] == rows
    assert len(t.execute(f"SELECT {P} FROM (SELECT * FROM t) AS s {limit}").fetchall()) == (10 if "2990" in limit else rows - 4 * ("4" in limit))


def test_error_behind_a_limit(t):
    query = "SELECT id, predict('encoder', array_fill((1 / (5 - id))::real, ARRAY[76])) FROM (SELECT id FROM t ORDER BY id) AS s LIMIT %s"
    for prepare in (False, True):
        assert [id for id, _ in t.execute(query, (4,), prepare=prepare).fetchall()] == [1, 2, 3, 4]
        with pytest.raises(errors.DivisionByZero):
            t.execute(query, (5,), prepare=prepare)
    # A condition above takes rows away: then more are read, and all that are left are found.
    high = t.execute(f"SELECT count(*) FROM t WHERE ({P})[1] > 0").fetchone()[0]
    assert 0 < high < 3000
    assert len(t.execute(f"SELECT id FROM t WHERE ({P})[1] > 0 LIMIT 3000").fetchall()) == high


def test_limit_again_and_again(t):
    """The bound begins anew with each scan."""
    query = f"SELECT count(*), sum((p)[1]) FROM generate_series(1, 5) AS n, LATERAL (SELECT {P} AS p FROM t WHERE id > n * 10 LIMIT 6) AS s"
    made = t.execute(query).fetchone()
    t.execute("SET tessera.enable_batching = off")
    assert made[0] == 30 and t.execute(query).fetchone()[0] == 30
    assert made[1] == pytest.approx(t.execute(query).fetchone()[1], abs=1e-5)


def test_counts_of_workers(t):
    t.execute("SET max_parallel_workers_per_gather = 2; SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0; SET min_parallel_table_scan_size = 0")
    for query in (f"SELECT sum(({P})[1]) FROM t", f"SELECT id FROM t WHERE ({P})[1] > 0"):
        plan = t.execute(f"EXPLAIN (ANALYZE, FORMAT json) {query}").fetchone()[0][0]["Plan"]
        while plan["Node Type"] != "Gather":
            plan = plan["Plans"][0]
        assert plan["Workers Launched"] > 0
        counted = node(t, query)
        assert (counted["Rows Predicted"], counted["Parallel Aware"]) == (3000, True)
        assert counted["Cache Hits"] > 0 and counted["Batches"] >= 3000 / 1024


def test_cache_hits_are_counted(t):
    first, second = (node(t, f"SELECT {P} FROM t WHERE id < 50") for _ in range(2))
    assert first["Cache Hits"] + first["Cache Misses"] == second["Cache Hits"] > 0
    assert second["Cache Misses"] == 0


def seen(base, work: str, parameters: tuple = ()) -> list[dict]:
    """What tessera.progress showed while a statement ran."""
    rows, done = [], threading.Event()

    def run() -> None:
        with base.connect() as conn:
            pid.append(conn.info.backend_pid)
            conn.execute(work, parameters)
        done.set()

    pid: list[int] = []
    with base.connect(row_factory=psycopg.rows.dict_row) as conn:
        thread = threading.Thread(target=run)
        thread.start()
        while not done.is_set() and thread.is_alive():
            rows += [row for row in conn.execute("SELECT * FROM tessera.progress").fetchall() if row["pid"] in pid]
            time.sleep(0.002)
        thread.join()
        assert done.is_set()
        assert conn.execute("SELECT count(*) AS n FROM tessera.progress WHERE pid = ANY (%s)", (pid,)).fetchone()["n"] == 0
    return rows


def test_progress_of_a_prediction(t):
    rows = seen(t.base, f"SELECT sum(({P})[1]) FROM t, generate_series(1, 10)")
    assert {(row["command"], row["phase"], *row["models"]) for row in rows} == {("predict", "predicting", "encoder@1")}
    counts = [row["rows"] for row in rows]
    assert counts == sorted(counts) and 0 < counts[-1] <= 30_000


def test_progress_of_a_load(t):
    rows = seen(t.base, "SELECT load_model('sentences', %b, 4096)", (onnx_file("minilm"),))
    phases = [row["phase"] for row in rows if row["command"] == "load"]
    assert phases and phases == sorted(phases, key=["reading model", "compiling", "storing blocks"].index)
    storing = [row for row in rows if row["phase"] == "storing blocks"]
    assert storing and all(0 <= row["blocks_done"] <= row["blocks_total"] for row in storing)
    assert storing[-1]["blocks_done"] > storing[0]["blocks_done"]


def test_progress_is_of_those_who_may_know(t):
    t.execute("CREATE ROLE stranger LOGIN")
    try:
        stop = threading.Event()

        def run() -> None:
            with t.base.connect() as conn:
                while not stop.is_set():
                    conn.execute(f"SELECT sum(({P})[1]) FROM t")

        thread = threading.Thread(target=run)
        thread.start()
        with t.base.connect(user="stranger") as conn:
            conn.execute("SET search_path = public")
            until = time.monotonic() + 20
            rows = []
            while not rows and time.monotonic() < until:
                rows = conn.execute("SELECT pid IS NOT NULL, command, models, rows FROM tessera.progress").fetchall()
        stop.set()
        thread.join()
        assert rows[0] == (True, None, None, None)
    finally:
        stop.set()
        t.execute("DROP ROLE stranger")


def test_an_error_ends_it(t):
    """Also one that is caught."""
    t.execute("CREATE FUNCTION caught() RETURNS text LANGUAGE plpgsql AS $$ BEGIN PERFORM predict('encoder', x || CASE WHEN id = 2500 THEN '{1}' ELSE '{}' END::real[]) FROM t; EXCEPTION WHEN OTHERS THEN RETURN sqlerrm; END $$")
    assert "77" in t.execute("SELECT caught()").fetchone()[0]
    assert t.execute("SELECT count(*) FROM tessera.progress").fetchone() == (0,)
