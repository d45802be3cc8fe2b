"""Predictions in plain queries beside what one would do without this extension, and the bounds of scan and network.

`SELECT sum((predict('model', x))[1]) FROM t` stands beside PL/Python with ONNX Runtime for each row and over arrays of the best
size, a client that reads by binary COPY, computes and writes back by binary COPY, and `SELECT sum(x[1])`. All ways run in one
server, one after the other in each round; the medians are compared. Every way's sum must agree before anything is timed.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts" / "models"), str(ROOT / "pg_test")]

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402

from bench import PYTHON_ROW, PYTHON_ROWS, machine, report  # noqa: E402
from cluster import Cluster, Database  # noqa: E402
from helpers import onnx_file  # noqa: E402
from paths import MODELS  # noqa: E402

HEAD = b"PGCOPY\n\xff\r\n\0" + bytes(8)


SERVER = ("shared_preload_libraries = 'pg_tessera'", "shared_buffers = '1GB'", "work_mem = '64MB'", "max_wal_size = '8GB'")


def session(model: str | Path) -> onnxruntime.InferenceSession:
    """Of a model of the zoo, or of a file; one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(MODELS / f"{model}.onnx" if isinstance(model, str) else model), options, providers=["CPUExecutionProvider"])


def row_type(width: int) -> np.dtype:
    """A row of one real[] of this width, as binary COPY has it."""
    array = [("ndim", ">i4"), ("nulls", ">i4"), ("type", ">u4"), ("dim", ">i4"), ("lower", ">i4"), ("items", [("len", ">i4"), ("x", ">f4")], (width,))]
    return np.dtype([("fields", ">i2"), ("len", ">i4"), *array])


class Client:
    """Reads, computes and writes back, a piece at a time."""

    def __init__(self, conn, model: str, table: str, width: int, shape: tuple[int, ...], piece: int):
        self.conn, self.table, self.piece = conn, table, piece
        self.model, self.shape, self.rows = session(model), shape, row_type(width)

    def answers(self, raw: bytes) -> np.ndarray:
        x = np.frombuffer(raw, dtype=self.rows)["items"]["x"].astype(np.float32).reshape(-1, *self.shape)
        return self.model.run(None, {"x": x})[0].reshape(len(x), -1)

    def run(self) -> float:
        total, size = 0.0, self.rows.itemsize * self.piece
        with self.conn.cursor() as cursor:
            cursor.execute("TRUNCATE written")
            made: list[np.ndarray] = []
            with cursor.copy(f"COPY (SELECT x FROM {self.table}) TO STDOUT (FORMAT binary)") as out:
                pending, headed = bytearray(), False
                for data in out:
                    pending += data
                    if not headed and len(pending) >= len(HEAD):
                        headed = True
                        del pending[:len(HEAD)]
                    while headed and len(pending) >= size:
                        made.append(self.answers(bytes(pending[:size])))
                        del pending[:size]
                rest = len(pending) // self.rows.itemsize * self.rows.itemsize
                if rest:
                    made.append(self.answers(bytes(pending[:rest])))
            kind = row_type(made[0].shape[1])
            with cursor.copy("COPY written FROM STDIN (FORMAT binary)") as back:
                back.write(HEAD)
                for answers in made:
                    rows = np.zeros(len(answers), dtype=kind)
                    rows["fields"], rows["len"], rows["ndim"], rows["type"] = 1, kind.itemsize - 6, 1, 700
                    rows["dim"], rows["lower"] = answers.shape[1], 1
                    rows["items"]["len"], rows["items"]["x"] = 4, answers
                    back.write(rows.tobytes())
                    total += float(answers[:, 0].sum(dtype=np.float64))
                back.write(b"\xff\xff")
        return total


def fill(conn, table: str, width: int, rows: int) -> None:
    """A table of `rows` arrays; the first 5,000 are repeated."""
    values = f"(SELECT array_agg((((id * 31 + k * 17) % 256) / 256.0 - 0.5)::real ORDER BY k) FROM generate_series(1, {width}) AS k WHERE id >= 0)"
    few = min(rows, 5000)
    conn.execute(f"CREATE TABLE few_{table} AS SELECT id, {values} AS x FROM generate_series(0, {few - 1}) AS id")
    conn.execute(f"CREATE TABLE {table} AS SELECT id + {few} * turn AS id, x FROM few_{table}, generate_series(0, {max(rows // few, 1) - 1}) AS turn")
    conn.execute(f"ALTER TABLE {table} SET (parallel_workers = 1)")
    conn.execute(f"VACUUM (ANALYZE) {table}")


def prepare(conn, model: str, width: int, rows: int) -> None:
    fill(conn, f"rows_{model}", width, rows)
    conn.execute("SELECT load_model(%s, %b)", (model, onnx_file(model)))


def python_shape(sql: str, shape: tuple[int, ...]) -> str:
    """A function whose model takes rows of this shape."""
    inner = ", ".join(map(str, shape))
    return sql.replace("rows[None]", f"rows.reshape(1, {inner})").replace('"x": rows}', f'"x": rows.reshape(-1, {inner})}}')


def timed(work) -> tuple[float, float]:
    started = time.perf_counter()
    answer = work()
    return time.perf_counter() - started, answer


def network(model: str | Path, shape: tuple[int, ...], sizes: tuple[int, ...] = (8, 32, 128, 512, 1024, 2048)) -> tuple[float, int]:
    """Rows/s of the bare network in ONNX Runtime at the best of these batch sizes, and that size."""
    bare, best = session(model), (0.0, 0)
    for size in sizes:
        x, seconds = np.zeros((size, *shape), dtype=np.float32), []
        for _ in range(5):
            seconds.append(timed(lambda: bare.run(None, {"x": x}))[0])
        best = max(best, (size / min(seconds), size))
    return best


def compare(conn, model: str, width: int, shape: tuple[int, ...], rows: int, rounds: int, workers: int) -> list[str]:
    table = f"rows_{model}"
    rows = conn.execute(f"SELECT count(*) FROM {table}").fetchone()[0]

    def query(sql: str):
        return lambda: conn.execute(sql).fetchone()[0]

    def arrays(size: int) -> str:
        return (f"SELECT sum(p::float8) FROM (SELECT python_{model}_rows(x) AS answers FROM (SELECT array_agg(x) AS x FROM {table} GROUP BY id / {size}) AS groups OFFSET 0)"
                " AS batches, LATERAL (SELECT sum(answers[i][1]) FROM generate_subscripts(answers, 1) AS i) AS s (p)")

    conn.execute(f"SET max_parallel_workers_per_gather = {workers}")
    found = {size: timed(query(arrays(size)))[0] for size in (32, 256, 1024, 4096)}
    best = min(found, key=found.get)
    client = Client(conn, model, table, width, shape, 4096 if rows > 100_000 else 256)
    ways = {"pg_tessera": query(f"SELECT sum((predict('{model}', x))[1]::float8) FROM {table}"),
            "(a) PL/Python, a row a call": query(f"SELECT sum(p[1]::float8) FROM (SELECT python_{model}(x) AS p FROM {table} OFFSET 0) AS answers"),
            f"(b) PL/Python, arrays of {best:,} rows": query(arrays(best)),
            "(c) client, binary COPY both ways": client.run,
            "(d) sum(x[1])": query(f"SELECT sum(x[1]::float8) FROM {table}")}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    sums = {name: work() for name, work in ways.items() if not name.startswith("(d)")}
    if max(sums.values()) - min(sums.values()) > 1e-4 * max(1.0, abs(sums["pg_tessera"])):
        sys.exit(f"the ways do not agree on {model}: {sums}")
    plan = "\n".join(row[0] for row in conn.execute(f"EXPLAIN SELECT sum((predict('{model}', x))[1]::float8) FROM {table}"))
    if "Tessera Predict" not in plan or ("Gather" in plan) != (workers > 0):
        sys.exit(f"another plan than was to be measured:\n{plan}")
    for _ in range(rounds):
        for name, work in ways.items():
            seconds[name].append(timed(work)[0])
    rate = {name: rows / statistics.median(took) for name, took in seconds.items()}
    bare, size = network(model, shape)
    ours, a, b, c, d = rate.values()
    bound = 1 / (1 / d + 1 / bare)
    lines = [f"### `{model}`, {rows:,} rows, {1 + workers} process{'es' if workers else ''}", "", "| way | rows/s (median) | pg_tessera is faster by |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {value:,.0f} | {ours / value:.2f} |" for name, value in rate.items()]
    lines += [f"| the bare network in ONNX Runtime, {size:,} rows a run, one thread | {bare:,.0f} | {ours / bare:.2f} |",
              f"| bound 1 / (1/(d) + 1/bare network) | {bound:,.0f} | {ours / bound:.2f} |", ""]
    return lines


def latency(cluster: Cluster, database: str, seconds: int, rounds: int) -> list[str]:
    """p50 and p99 of prepared statements over a socket, in microseconds, from pgbench's log."""
    folder = cluster.home / "latency"
    folder.mkdir(exist_ok=True)
    row = ",".join(f"{n / 28:.3f}" for n in range(28))
    scripts = {"SELECT 1": "SELECT 1;", "pg_tessera": f"\\set n random(1, 9)\nSELECT predict('fraud_fc_256', ARRAY[:n,{row[6:]}]::real[]);",
               "PL/Python": f"\\set n random(1, 9)\nSELECT python_fraud_fc_256(ARRAY[:n,{row[6:]}]::real[]);"}
    took: dict[str, list[int]] = {name: [] for name in scripts}
    for _ in range(rounds):
        for name, script in scripts.items():
            (folder / "script.sql").write_text(script)
            for old in folder.glob("log.*"):
                old.unlink()
            command = [str(cluster.programs() / "pgbench"), "-n", "-M", "prepared", "-T", str(seconds), "-f", "script.sql", "-l", "--log-prefix=log", database]
            done = subprocess.run(command, env=os.environ | cluster.environment, cwd=folder, capture_output=True, text=True)
            if done.returncode or not re.search("tps", done.stdout):
                sys.exit(done.stdout + done.stderr)
            for log in folder.glob("log.*"):
                took[name] += [int(line.split()[2]) for line in log.read_text().splitlines()[200:]]
    points = {name: np.percentile(values, (50, 99)) for name, values in took.items()}
    lines = ["### Latency of one row", "", "A prepared statement over a socket, one client, in microseconds (pgbench).", "", "| statement | p50 | p99 |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {p50:,.0f} | {p99:,.0f} |" for name, (p50, p99) in points.items()]
    return [*lines, "", f"- p50 of pg_tessera : PL/Python = **{points['pg_tessera'][0] / points['PL/Python'][0]:.2f}**", ""]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--rows", type=int, default=1_000_000, help="rows of the table for fraud_fc_256")
    options.add_argument("--seconds", type=int, default=5, help="seconds of a run of pgbench")
    options.add_argument("--only", choices=("fraud_fc_256", "encoder_fc", "cnn", "latency"))
    options.add_argument("--markdown", type=Path, help="writes the figures to this file too")
    chosen = options.parse_args()

    os.environ["PYTHONPATH"] = os.environ["SERVER_PYTHONPATH"]  # the server inherits it
    cluster = Cluster("queries", settings=SERVER)
    cluster.remove()
    cluster.start()
    try:
        with Database(cluster, "queries") as database, database.connect() as conn:
            conn.execute("CREATE EXTENSION plpython3u")
            conn.execute("CREATE UNLOGGED TABLE written (p real[])")
            # Two processes are asked for, also where the planner finds them too dear for a small table.
            conn.execute("SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0; SET min_parallel_table_scan_size = 0")
            lines = [f"{machine(conn)} {chosen.rounds} rounds, interleaved.", ""]
            for model, width, shape, rows in (("fraud_fc_256", 28, (28,), chosen.rows), ("encoder_fc", 76, (76,), chosen.rows // 50), ("cnn", 3072, (3, 32, 32), 2000)):
                if chosen.only not in (None, model) and (chosen.only != "latency" or model != "fraud_fc_256"):
                    continue
                prepare(conn, model, width, rows)
                for function in (PYTHON_ROW, PYTHON_ROWS):
                    sql = python_shape(function, shape).format(model=model, path=(MODELS / f"{model}.onnx").resolve())
                    conn.execute(sql.replace("plpython3u AS", "plpython3u PARALLEL SAFE AS"))
                if chosen.only != "latency":
                    for workers in (0, 1):
                        lines += compare(conn, model, width, shape, rows, chosen.rounds, workers)
            if chosen.only in (None, "latency"):
                lines += latency(cluster, database.name, chosen.seconds, 3)
    finally:
        cluster.remove()
    report(lines, chosen.markdown)


if __name__ == "__main__":
    main()
