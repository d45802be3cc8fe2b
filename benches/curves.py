"""Curves of rows/s of predictions in queries, each beside its bound: against rows of a batch, workers, rows of the table, width.

    benches/run-curves [--quick] [--rounds N] [--rows N] [--most N] [--only WORD]... [--markdown FILE] [--plots FOLDER]

Each point is `SELECT sum((predict('model', x))[1]) FROM t` and, right after it in each round, `SELECT sum(x[1]) FROM t` with as many
processes. The bound is 1 / (1/scan + 1/network), where network is the bare network in ONNX Runtime at its best number of rows, one
thread, for each process that has a core. Medians of the rounds. Sums are compared with ONNX Runtime's, plans with what is meant.
"""

import argparse
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts" / "models"), str(ROOT / "pg_test")]

import numpy as np  # noqa: E402
from generate import dense_net, dense_weights  # noqa: E402

import plots  # noqa: E402
from bench import machine, report  # noqa: E402
from cluster import Cluster, Database  # noqa: E402
from paths import TARGET  # noqa: E402
from queries import SERVER, fill, network, session, timed  # noqa: E402

INPUTS = 28
USUAL = 256
SIZES = (1, 4, 16, 64, 256, 1024, 4096, 16_384, 65_536)
WORKERS = (0, 1, 2, 3, 4)
WIDTHS = (16, 64, 256, 1024, 4096)
ROWS = (10_000, 100_000, 1_000_000, 10_000_000)


@dataclass
class Point:
    """One place of a curve: what is set, the table and the model; by round the seconds of query and scan, and the network's rows/s
    at its best number of rows and at `size`."""

    x: int
    table: str
    model: str
    settings: tuple[str, ...] = ()
    workers: int = 0
    size: int | None = None
    ours: list[float] = field(default_factory=list)
    scan: list[float] = field(default_factory=list)
    net: list[float] = field(default_factory=list)
    net_at_size: list[float] = field(default_factory=list)


class Curves:
    """The tables and models that the curves are over, in one database."""

    def __init__(self, conn, folder: Path, rounds: int):
        self.conn, self.folder, self.rounds = conn, folder, rounds
        self.rows: dict[str, int] = {}
        self.files: dict[str, Path] = {}

    def table(self, rows: int) -> str:
        name = f"rows_{rows}"
        if name not in self.rows:
            fill(self.conn, name, INPUTS, rows)
            self.rows[name] = self.conn.execute(f"SELECT count(*) FROM {name}").fetchone()[0]
        return name

    def model(self, width: int) -> str:
        name = f"fc_{INPUTS}_{width}_2"
        if name not in self.files:
            sizes = [INPUTS, width, 2]
            made = dense_net(self.folder, name, sizes, dense_weights(width, sizes, transposed=False))
            self.conn.execute("SELECT load_model(%s, %b)", (name, made.SerializeToString()))
            self.files[name] = self.folder / f"{name}.onnx"
        return name

    def expected(self, point: Point) -> float:
        """The sum by ONNX Runtime: a table repeats its first rows."""
        few = np.array([x for (x,) in self.conn.execute(f"SELECT x FROM {point.table} WHERE id < 5000 ORDER BY id")], dtype=np.float32)
        answers = session(self.files[point.model]).run(None, {"x": few})[0]
        return float(answers[:, 0].sum(dtype=np.float64)) * self.rows[point.table] / len(few)

    def prepare(self, point: Point) -> None:
        self.conn.execute("RESET ALL")
        # As many workers as are asked for, also where the planner finds them too dear.
        asked = (f"max_parallel_workers_per_gather = {point.workers}", "parallel_setup_cost = 0", "parallel_tuple_cost = 0", "min_parallel_table_scan_size = 0")
        for setting in (*asked, *point.settings):
            self.conn.execute(f"SET {setting}")
        self.conn.execute(f"ALTER TABLE {point.table} SET (parallel_workers = {point.workers})")

    def check(self, point: Point, query: str) -> None:
        self.prepare(point)
        plan = "\n".join(line for (line,) in self.conn.execute(f"EXPLAIN {query}"))
        workers = f"Workers Planned: {point.workers}\n"
        if "Tessera Predict" not in plan or (workers not in plan if point.workers else "Gather" in plan):
            sys.exit(f"another plan than was to be measured:\n{plan}")
        got, wanted = self.conn.execute(query).fetchone()[0], self.expected(point)
        if abs(got - wanted) > 1e-4 * max(1.0, abs(wanted)):
            sys.exit(f"{query} gives {got}, ONNX Runtime {wanted}")

    def measure(self, points: list[Point]) -> None:
        queries = [(f"SELECT sum((predict('{point.model}', x))[1]::float8) FROM {point.table}", f"SELECT sum(x[1]::float8) FROM {point.table}") for point in points]
        for point, (query, _) in zip(points, queries):
            self.check(point, query)
        for turn in range(self.rounds):
            for point, (query, scan) in zip(points, queries):
                self.prepare(point)
                point.ours.append(timed(lambda: self.conn.execute(query).fetchone())[0])
                point.scan.append(timed(lambda: self.conn.execute(scan).fetchone())[0])
                point.net.append(network(self.files[point.model], (INPUTS,))[0])
                if point.size:
                    point.net_at_size.append(network(self.files[point.model], (INPUTS,), (point.size,))[0])
            print(f"round {turn + 1} of {self.rounds}", file=sys.stderr)

    def lines(self, head: str, points: list[Point]) -> list[str]:
        """A table in rows/s: the query, the scan, the network, the bound of both, and what is reached of it."""
        second = any(point.net_at_size for point in points)
        lines = [f"| {head} | pg_tessera | scan | network | bound | pg_tessera : bound |" + " bound at this size |" * second, "| ---: | ---: | ---: | ---: | ---: | ---: |" + " ---: |" * second]
        for point in points:
            rows = self.rows[point.table]
            ours, scan = rows / statistics.median(point.ours), rows / statistics.median(point.scan)
            net = statistics.median(point.net) * min(1 + point.workers, os.cpu_count() or 1)
            bound = 1 / (1 / scan + 1 / net)
            last = f" {1 / (1 / scan + 1 / statistics.median(point.net_at_size)):,.0f} |" if second else ""
            lines.append(f"| {point.x:,} | {ours:,.0f} | {scan:,.0f} | {net:,.0f} | {bound:,.0f} | {ours / bound:.2f} |{last}")
        return [*lines, ""]

    def batch_size(self, rows: int) -> list[str]:
        table, model = self.table(rows), self.model(USUAL)
        # Memory for any number of rows, so that the other setting alone decides.
        points = [Point(size, table, model, (f"tessera.batch_size = {size}", "tessera.batch_memory = '1GB'"), size=size) for size in SIZES]
        self.measure(points)
        return ["### Rows of a batch", "", f"28-{USUAL}-2, {rows:,} rows, one process, `tessera.batch_memory` 1 GB. *Bound at this size* is with the network in runs of so many rows.", "",
                *self.lines("batch_size", points)]

    def workers(self, rows: int) -> list[str]:
        table, model = self.table(rows), self.model(USUAL)
        points = [Point(workers, table, model, workers=workers) for workers in WORKERS]
        self.measure(points)
        return ["### Parallel workers", "", f"28-{USUAL}-2, {rows:,} rows, on {os.cpu_count()} cores.", "", *self.lines("workers", points)]

    def table_size(self, most: int) -> list[str]:
        model = self.model(USUAL)
        points = [Point(rows, self.table(rows), model) for rows in ROWS if rows <= most]
        self.measure(points)
        return ["### Rows of the table", "", f"28-{USUAL}-2, one process.", "", *self.lines("rows", points)]

    def width(self, rows: int) -> list[str]:
        points = [Point(width, self.table(rows), self.model(width)) for width in WIDTHS]
        self.measure(points)
        return ["### Width of the model", "", f"28-W-2, {rows:,} rows, one process.", "", *self.lines("W", points)]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="a try: one round over small tables, plots under target/")
    options.add_argument("--rounds", type=int, help="rounds; medians are shown (5)")
    options.add_argument("--rows", type=int, help="rows of the tables for batch sizes and workers (1000000); widths take a fifth")
    options.add_argument("--most", type=int, help="rows of the largest table (10000000, 2 GB of disk)")
    options.add_argument("--only", action="append", choices=("batch_size", "workers", "table_size", "width"))
    options.add_argument("--markdown", type=Path, help="writes the tables to this file too")
    options.add_argument("--plots", type=Path, help="folder of the plots (docs/plots)")
    chosen = options.parse_args()
    rounds = chosen.rounds or (1 if chosen.quick else 5)
    rows = chosen.rows or (100_000 if chosen.quick else 1_000_000)
    most = chosen.most or (100_000 if chosen.quick else 10_000_000)

    cluster = Cluster("curves", settings=SERVER)
    cluster.remove()
    cluster.start()
    try:
        with Database(cluster, "curves") as database, database.connect() as conn, tempfile.TemporaryDirectory() as folder:
            curves = Curves(conn, Path(folder), rounds)
            lines = [f"{machine(conn)} {'One round' if rounds == 1 else f'{rounds} rounds'}, the points of a curve in turn.", ""]
            for name, size in (("batch_size", rows), ("workers", rows), ("table_size", most), ("width", rows // 5)):
                if chosen.only is None or name in chosen.only:
                    lines += getattr(curves, name)(size)
    finally:
        cluster.remove()
    text = report(lines, chosen.markdown)
    for path in plots.draw(text, chosen.plots or (TARGET / "plots" if chosen.quick else plots.FOLDER)):
        print(f"drawn: {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
