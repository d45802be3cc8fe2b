"""What batches take at most: a backend's memory over long scans of wide rows, and the time until a cancelled query has ended.

Memory is the greatest anonymous memory of the backend, looked at each millisecond, above what the session had when it had run
the query over a few rows. The full run goes over a million rows.
"""

import os
import tempfile
import threading
import time
from pathlib import Path

import psycopg
import pytest
from generate import dense_net, dense_weights, save
from onnx import helper

from batch_models import NODE
from helpers import Background, cancelled_after, explained, timed_out_after

pytestmark = pytest.mark.newer

ROWS = 1_000_000 if os.environ.get("TESSERA_FULL") else 20_000
WIDTH = 1000
MODELS = {"narrow": [WIDTH, 8, 2], "wide": [WIDTH, 8, WIDTH], "widest": [4, 8, 10_000], "slow": [4, 2048, 2048, 2], "quick": [4, 8, 2]}
# Beyond tessera.batch_memory: half of it for what buffers have in reserve and the C library keeps between runs; some MB for a row
# in the making and the first blocks of PostgreSQL's memory contexts.
ALLOWANCE, ALLOWANCE_KB = 1.5, 3_000
LATE = 0.5

SOURCE = f"(SELECT array_fill((i % 1000)::real, ARRAY[{WIDTH}]) AS x FROM (SELECT generate_series(1, {{rows}}) AS i) AS s OFFSET 0) AS t"
QUERIES = {
    "a number a row": f"SELECT count((predict('narrow', x))[1]) FROM {SOURCE}",
    "wide outputs": f"SELECT count((predict('wide', x))[1]) FROM {SOURCE}",
    "wide rows beside them": f"SELECT count((predict('narrow', x))[1]), max(x) FROM {SOURCE}",
    "two calls, one of the other": f"SELECT count((predict('narrow', predict('wide', x)))[1]), max(x) FROM {SOURCE}",
    "conditions": f"SELECT max(x), max((predict('wide', x))[7]) FROM {SOURCE} WHERE (predict('narrow', x))[1] > -1e30 AND (predict('wide', x))[2] > -1e30",
    "rows that get wider": "SELECT count((predict('any', array_fill(i::real, ARRAY[CASE WHEN i < {rows} / 2 THEN 10 ELSE 20000 END])))[1])"
                           " FROM (SELECT generate_series(1, {rows} / 10 + {rows} / 2) AS i) AS s",
    "outputs much wider than inputs": "SELECT count((predict('widest', ARRAY[i, 1, 2, 3]::real[]))[1]) FROM (SELECT generate_series(1, {rows} / 5) AS i) AS s",
}
FEW = "(SELECT generate_series(1, 100) AS i OFFSET 0) AS s"
SETTINGS = [(65_536, "1MB"), (65_536, "16MB"), (1024, "4MB"), (65_536, "48MB")]


@pytest.fixture(scope="module", autouse=True)
def models(db):
    with db.connect() as conn, tempfile.TemporaryDirectory() as folder:
        for name, sizes in MODELS.items():
            model = dense_net(Path(folder), name, sizes, dense_weights(len(name), sizes, transposed=False), softmax=False)
            conn.execute("SELECT load_model(%s, %b)", (name, model.SerializeToString()))
        nodes = [helper.make_node("Tanh", ["x"], ["t"], "tanh"), helper.make_node("Relu", ["t"], ["y"], "relu")]
        model = save(Path(folder), "any", nodes, {"x": ["batch", "n"]}, {"y": ["batch", "n"]}, {})
        conn.execute("SELECT load_model('any', %b)", (model.SerializeToString(),))


class Watch:
    """The greatest anonymous memory of a process, in kB, while the block runs."""

    def __init__(self, pid: int):
        self.status = Path(f"/proc/{pid}/status")
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)

    def now(self) -> int:
        return next(int(line.split()[1]) for line in self.status.read_text().splitlines() if line.startswith("RssAnon"))

    def look(self) -> None:
        while not self.ended.wait(0.001):
            self.peak = max(self.peak, self.now())

    def __enter__(self) -> "Watch":
        self.peak = self.first = self.now()
        self.thread.start()
        return self

    def __exit__(self, *_error) -> None:
        self.ended.set()
        self.thread.join()
        self.peak = max(self.peak, self.now())


@pytest.mark.parametrize(("size", "memory"), SETTINGS)
@pytest.mark.parametrize("kind", QUERIES)
def test_memory_of_wide_rows(db, kind, size, memory):
    with db.connect() as conn:
        conn.execute(f"SET tessera.batch_size = {size}; SET tessera.batch_memory = '{memory}'; SET jit = off; SET work_mem = '1MB'; SET max_parallel_workers_per_gather = 0")
        query = QUERIES[kind]
        assert NODE in explained(conn, query.format(rows=10))
        conn.execute(query.format(rows=10))
        with Watch(conn.info.backend_pid) as watch:
            assert conn.execute(query.format(rows=ROWS)).fetchone()[0]
        limit, = conn.execute("SELECT pg_size_bytes(%s) / 1024", (memory,)).fetchone()
        print(f"{kind}, {size}, {memory}: {watch.peak - watch.first:,} kB above {watch.first:,}, {(watch.peak - watch.first) / limit:.2f} times the setting")
        assert watch.peak - watch.first <= ALLOWANCE * limit + ALLOWANCE_KB


# Queries that fail when some rows have been gathered: where the plan below fails, an argument, the model, what comes after.
FAILING = {
    "the plan below": f"SELECT predict('quick', ARRAY[i, 1, 2, 3]::real[]) FROM {FEW} WHERE 1 / (60 - i) > -9",
    "an argument": f"SELECT predict('quick', ARRAY[i, 1, 2, 1 / (60 - i)]::real[]) FROM {FEW}",
    "an argument of a later call": f"SELECT predict('quick', ARRAY[i, 1, 2, 1 / (60 - i)]::real[]) FROM {FEW} WHERE (predict('quick', ARRAY[i, 1, 2, 3]::real[]))[1] > -1e30",
    "an argument around a call": f"SELECT predict('quick', ARRAY[(predict('quick', ARRAY[i, 1, 2, 3]::real[]))[1], 1, 2, 1 / (60 - i)]::real[]) FROM {FEW}",
    "a condition between calls": f"SELECT predict('quick', ARRAY[i, 1, 2, 3]::real[]) FROM {FEW} WHERE (predict('quick', ARRAY[i, 1, 2, 4]::real[]))[1] / (60 - i) IS NOT NULL",
    "an array of another length": f"SELECT predict('quick', (ARRAY[i, 1, 2, 3])[1:CASE i WHEN 60 THEN 3 ELSE 4 END]::real[]) FROM {FEW}",
    "what comes after": f"SELECT 1 / (60 - i), predict('quick', ARRAY[i, 1, 2, 3]::real[]) FROM {FEW}",
}


@pytest.mark.parametrize("kind", FAILING)
def test_failing_queries_keep_nothing(db, kind):
    """Neither PostgreSQL's memory nor that of the C library grows with failures."""
    with db.connect() as conn:
        assert NODE in explained(conn, FAILING[kind])
        conn.execute("CREATE OR REPLACE FUNCTION pg_temp.failing(n int) RETURNS int LANGUAGE plpgsql AS $$ DECLARE failed int := 0; BEGIN FOR turn IN 1..n LOOP"
                     f" BEGIN PERFORM * FROM ({FAILING[kind]}) AS s; EXCEPTION WHEN division_by_zero OR invalid_parameter_value THEN failed := failed + 1; END;"
                     " END LOOP; RETURN failed; END $$")
        assert conn.execute("SELECT pg_temp.failing(500)").fetchone() == (500,)
        before = Watch(conn.info.backend_pid).now()
        assert conn.execute("SELECT pg_temp.failing(3000)").fetchone() == (3000,)
        grown = Watch(conn.info.backend_pid).now() - before
        assert grown < 300, f"{grown} kB for 3,000 failures"


SLOW = "predict('slow', ARRAY[i, 1, 2, 3]::real[])"
QUICK = "predict('narrow', array_fill(i::real, ARRAY[1000]))"
NUMBERS = "(SELECT generate_series(1, 100000000) AS i) AS s"
# Statements that do not end by themselves, and the settings that they run with.
ENDLESS = {
    "in batches that take seconds": (f"SELECT count(({SLOW})[1]) FROM {NUMBERS}", ["tessera.batch_size = 16384", "tessera.batch_memory = '1GB'"]),
    "between small batches": (f"SELECT count(({QUICK})[1]) FROM {NUMBERS}", ["tessera.batch_size = 1"]),
    "between large batches": (f"SELECT count(({QUICK})[1]) FROM {NUMBERS}", ["tessera.batch_size = 65536", "tessera.batch_memory = '256MB'"]),
    "rows that a condition drops": (f"SELECT i FROM {NUMBERS} WHERE ({QUICK})[1] > 1e30", ["tessera.batch_size = 65536", "tessera.batch_memory = '256MB'"]),
    "a later stage": (f"SELECT i FROM {NUMBERS} WHERE ({QUICK})[1] > -1e30 AND ({SLOW})[1] > 1e30", ["tessera.batch_size = 16384", "tessera.batch_memory = '1GB'"]),
    "row by row": (f"SELECT count(({SLOW})[1]) FROM {NUMBERS}", ["tessera.enable_batching = off"]),
    "workers": ("SELECT count((predict('slow', x[1:4]))[1]) FROM numbers", ["tessera.batch_size = 16384", "tessera.batch_memory = '512MB'", "parallel_setup_cost = 0",
                "parallel_tuple_cost = 0", "min_parallel_table_scan_size = 0", "max_parallel_workers_per_gather = 2"]),
    "a change": ("UPDATE numbers SET x = predict('slow', x[1:4])", ["tessera.batch_size = 16384", "tessera.batch_memory = '1GB'"]),
}


@pytest.fixture(scope="module")
def numbers(db, models):
    """A table whose predictions take some ten seconds. One batch of the largest size takes more than one."""
    with db.connect() as conn:
        conn.execute("CREATE TABLE numbers AS SELECT ARRAY[i, 1, 2, 3]::real[] AS x FROM generate_series(1, 100000) AS i")
        conn.execute("ANALYZE numbers")
        conn.execute("SELECT predict('slow', '{1,2,3,4}'::real[])")
        started = time.monotonic()
        conn.execute("SELECT (predict('slow', array_fill(0.5::real, ARRAY[16384, 4])))[1][1]")
        assert time.monotonic() - started > LATE, "a batch is too quick to be ended within"


@pytest.mark.parametrize("way", [cancelled_after, timed_out_after])
@pytest.mark.parametrize("kind", ENDLESS)
def test_cancelled_queries_end(db, numbers, kind, way):
    statement, settings = ENDLESS[kind]
    with db.connect() as conn:
        conn.execute("; ".join(f"SET {setting}" for setting in settings))
        conn.execute("SELECT predict('slow', '{1,2,3,4}'::real[])")
        for seconds in (0.1, 1.3) if "slow" in statement and "batch_size" in settings[0] else (0.4,):
            late = way(conn, statement, seconds)
            assert late < LATE, f"{kind}: it went on for {late:.2f} s"
        conn.execute("RESET ALL")
        assert conn.execute("SELECT count((predict('narrow', array_fill(i::real, ARRAY[1000])))[1]) FROM generate_series(1, 2000) AS i").fetchone() == (2000,)


@pytest.mark.parametrize("end", ["pg_cancel_backend", "pg_terminate_backend"])
def test_another_session_ends_a_batch(db, numbers, end):
    """In the midst of a run of seconds; the model's blocks are not held afterwards, and others go on predicting."""
    statement, settings = ENDLESS["in batches that take seconds"]
    with db.connect() as busy, db.connect() as other:
        busy.execute("; ".join(f"SET {setting}" for setting in settings))
        work = Background(busy.execute, statement)
        assert work.waits(2)
        started = time.monotonic()
        assert other.execute(f"SELECT {end}(%s)", (busy.info.backend_pid,)).fetchone() == (True,)
        with pytest.raises((psycopg.errors.QueryCanceled, psycopg.errors.AdminShutdown)):
            work.result(10)
        assert time.monotonic() - started < LATE
        other.execute("SELECT predict('slow', '{1,2,3,4}'::real[])")
        deadline = time.monotonic() + 20
        while other.execute("SELECT frames_pinned FROM tessera.block_cache_stats").fetchone()[0]:
            assert time.monotonic() < deadline, "blocks are still pinned"
            time.sleep(0.05)
        assert other.execute("SELECT * FROM tessera.check_cache()").fetchall() == []
