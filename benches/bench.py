"""Rows per second of predictions and MB/s of loads, each beside what one would do without this extension.

All ways run in one server, one after the other in each round, and the rounds are repeated: the medians are compared.
Every way's sum of outputs must agree before anything is timed.
"""

import argparse
import functools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts" / "models"), str(ROOT / "pg_test")]

from cluster import Cluster, Database  # noqa: E402
from helpers import onnx_file, unlike  # noqa: E402
from paths import MODELS  # noqa: E402

# One session a backend and model, one thread, as one PostgreSQL backend has.
PYTHON_SESSION = """
    if "session" not in SD:
        import numpy, onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        SD["session"] = onnxruntime.InferenceSession("{path}", options, providers=["CPUExecutionProvider"])
        SD["numpy"] = numpy
    rows = SD["numpy"].array(x, dtype="float32")
"""
PYTHON_ROW = "CREATE FUNCTION python_{model}(x real[]) RETURNS real[] LANGUAGE plpython3u AS $$" + PYTHON_SESSION + """
    return SD["session"].run(None, {{"x": rows[None]}})[0][0].tolist()
$$"""
PYTHON_ROWS = "CREATE FUNCTION python_{model}_rows(x real[]) RETURNS real[] LANGUAGE plpython3u AS $$" + PYTHON_SESSION + """
    return SD["session"].run(None, {{"x": rows}})[0].tolist()
$$"""

ROW = "SELECT sum(p[1]::float8) FROM (SELECT {call} AS p FROM {table} OFFSET 0) AS answers"
ROWS = ("SELECT sum(p::float8) FROM (SELECT {call} AS answers FROM (SELECT array_agg(x) AS x FROM {table} GROUP BY id / 1024) AS groups OFFSET 0)"
        " AS batches, LATERAL (SELECT sum(answers[i][1]) FROM generate_subscripts(answers, 1) AS i) AS s (p)")


@dataclass
class Way:
    """One way of doing a thing: its name, the statement, what it gets in a round, what follows, and its seconds so far."""

    name: str
    sql: str
    parameters: Callable[[int], tuple] = lambda turn: ()
    after: str = ""

    def __post_init__(self):
        self.seconds: list[float] = []

    def run(self, conn, turn: int = 0):
        parameters = self.parameters(turn)
        started = time.perf_counter()
        answer = conn.execute(self.sql, parameters).fetchone()
        self.seconds.append(time.perf_counter() - started)
        if self.after:
            conn.execute(self.after)
        return answer[0] if answer else None


def predictions(conn, model: str, width: int, rows: int) -> list[Way]:
    table = f"rows_{model}"
    conn.execute(f"CREATE TABLE {table} AS SELECT id, (SELECT array_agg((((id * 31 + k * 17) % 256) / 256.0 - 0.5)::real ORDER BY k)"
                 f" FROM generate_series(1, {width}) AS k WHERE id >= 0) AS x FROM generate_series(0, {rows - 1}) AS id")
    conn.execute(f"VACUUM (ANALYZE) {table}")
    conn.execute("SELECT load_model(%s, %b)", (model, onnx_file(model)))
    path = (MODELS / f"{model}.onnx").resolve()
    for function in (PYTHON_ROW, PYTHON_ROWS):
        conn.execute(function.format(model=model, path=path))
    ways = [Way("pg_tessera, a row a call", ROW.format(call=f"predict('{model}', x)", table=table)),
            Way("PL/Python, a row a call", ROW.format(call=f"python_{model}(x)", table=table)),
            Way("pg_tessera, arrays of 1,024 rows", ROWS.format(call=f"predict('{model}', x)", table=table)),
            Way("PL/Python, arrays of 1,024 rows", ROWS.format(call=f"python_{model}_rows(x)", table=table))]
    sums = [way.run(conn) for way in ways]
    if max(sums) - min(sums) > 1e-4 * max(1.0, abs(sums[0])):
        sys.exit(f"the ways do not agree on {model}: {sums}")
    for way in ways:
        way.seconds.clear()
    return ways


def loads(conn, model: str) -> list[Way]:
    """Each round brings weights that no earlier one had: a dropped model's blocks stay until VACUUM sweeps them."""

    @functools.lru_cache(maxsize=1)
    def content(turn: int) -> tuple[bytes]:
        return (unlike(model, turn),)

    conn.execute("CREATE TABLE files (content bytea)")
    conn.execute("CREATE TABLE files_external (content bytea)")
    conn.execute("ALTER TABLE files_external ALTER content SET STORAGE EXTERNAL")
    return [Way("load_model", "SELECT load_model('loaded', %b)", content, "SELECT drop_model('loaded')"),
            Way("INSERT of the same bytea", "INSERT INTO files VALUES (%b) RETURNING 1", content, "TRUNCATE files"),
            Way("the same, STORAGE EXTERNAL", "INSERT INTO files_external VALUES (%b) RETURNING 1", content, "TRUNCATE files_external")]


def rounds(conn, ways: list[Way], count: int) -> None:
    for turn in range(count):
        for way in ways:
            conn.execute("CHECKPOINT")
            way.run(conn, turn + 1)


def table(title: str, ways: list[Way], amount: float, unit: str, pairs: list[tuple[int, int]]) -> list[str]:
    """Markdown: each way's median, least and greatest rate; then the ratios of the pairs."""
    rate = [amount / statistics.median(way.seconds) for way in ways]
    lines = [f"### {title}", "", f"| way | {unit} (median) | least | greatest |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {way.name} | {rate[i]:,.0f} | {amount / max(way.seconds):,.0f} | {amount / min(way.seconds):,.0f} |" for i, way in enumerate(ways)]
    lines += ["", *(f"- {ways[a].name} : {ways[b].name} = **{rate[a] / rate[b]:.2f}**" for a, b in pairs), ""]
    return lines


def machine(conn) -> str:
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.machine())
    version = conn.execute("SHOW server_version").fetchone()[0]
    import onnxruntime

    return f"{os.cpu_count()} cores of {cpu}; PostgreSQL {version.split()[0]}; ONNX Runtime {onnxruntime.__version__}, one thread; checksums and fsync on."


def report(lines: list[str], file: Path | None) -> str:
    """Prints the figures, and writes them to a file if there is one."""
    text = "\n".join(lines)
    print(text)
    if file:
        file.write_text(text)
    return text


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--rows", type=int, default=50_000, help="rows of the table for fraud_fc_256")
    options.add_argument("--markdown", type=Path, help="writes the figures to this file too")
    chosen = options.parse_args()

    os.environ["PYTHONPATH"] = os.environ["SERVER_PYTHONPATH"]  # the server inherits it
    cluster = Cluster("bench", settings=("shared_buffers = '512MB'", "max_parallel_workers_per_gather = 0"))
    cluster.remove()
    cluster.start()
    try:
        with Database(cluster, "bench") as database, database.connect() as conn:
            conn.execute("CREATE EXTENSION plpython3u")
            lines = [f"{machine(conn)} {chosen.rounds} rounds, interleaved.", ""]
            for model, width, rows in (("fraud_fc_256", 28, chosen.rows), ("encoder_fc", 76, max(chosen.rows // 25, 1024))):
                ways = predictions(conn, model, width, rows)
                rounds(conn, ways, chosen.rounds)
                lines += table(f"`SELECT predict('{model}', x) FROM t`, {rows:,} rows", ways, rows, "rows/s", [(0, 1), (2, 3), (0, 3)])
            for model in ("big_mlp", "minilm"):
                conn.execute("DROP TABLE IF EXISTS files, files_external")
                ways = loads(conn, model)
                rounds(conn, ways, chosen.rounds)
                size = len(onnx_file(model)) / 1e6
                lines += table(f"Loading {model}, {size:.0f} MB, as a parameter", ways, size, "MB/s", [(0, 1), (0, 2)])
    finally:
        cluster.remove()
    report(lines, chosen.markdown)


if __name__ == "__main__":
    main()
