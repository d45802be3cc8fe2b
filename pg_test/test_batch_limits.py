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
from generate import dense_net, dense_weights

from batch_models import NODE
from helpers import cancelled_after, explained, timed_out_after

pytestmark = pytest.mark.newer

ROWS = 1_000_000 if os.environ.get("TESSERA_FULL") else 30_000
WIDTH = 1000
MODELS = {"narrow": [WIDTH, 8, 2], "wide": [WIDTH, 8, WIDTH], "widest": [4, 8, 10_000]}
# Beyond twice tessera.batch_memory, once for the rows and once for what the model computes: a row in the making, what the C
# library and PostgreSQL's memory contexts keep between batches.
ALLOWANCE_KB = 6_000

SOURCE = f"(SELECT array_fill((i % 1000)::real, ARRAY[{WIDTH}]) AS x FROM (SELECT generate_series(1, {{rows}}) AS i) AS s OFFSET 0) AS t"
QUERIES = {
    "a number a row": f"SELECT count((predict('narrow', x))[1]) FROM {SOURCE}",
    "wide outputs": f"SELECT count((predict('wide', x))[1]) FROM {SOURCE}",
    "wide rows beside them": f"SELECT count((predict('narrow', x))[1]), max(x) FROM {SOURCE}",
    "two calls, one of the other": f"SELECT count((predict('narrow', predict('wide', x)))[1]), max(x) FROM {SOURCE}",
    "conditions": f"SELECT max(x), max((predict('wide', x))[7]) FROM {SOURCE} WHERE (predict('narrow', x))[1] > -1e30 AND (predict('wide', x))[2] > -1e30",
    "outputs much wider than inputs": "SELECT count((predict('widest', ARRAY[i, 1, 2, 3]::real[]))[1]) FROM (SELECT generate_series(1, {rows} / 5) AS i) AS s",
}
SETTINGS = [(65_536, "1MB"), (65_536, "16MB"), (1024, "4MB"), (65_536, "48MB")]


@pytest.fixture(scope="module", autouse=True)
def models(db):
    with db.connect() as conn, tempfile.TemporaryDirectory() as folder:
        for name, sizes in MODELS.items():
            model = dense_net(Path(folder), name, sizes, dense_weights(len(name), sizes, transposed=False), softmax=False)
            conn.execute("SELECT load_model(%s, %b)", (name, model.SerializeToString()))


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
        assert watch.peak - watch.first <= 2 * limit + ALLOWANCE_KB
