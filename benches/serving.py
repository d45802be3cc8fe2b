"""Serving many sessions: what each costs in memory, how long its first prediction takes, and how throughput grows with clients.

Memory and first calls stand beside PL/Python with ONNX Runtime, whose model is a bytea in a table and whose session is kept in
GD. One private server; the ways alternate. Every answer is compared with ONNX Runtime's.
"""

import argparse
import os
import re
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts" / "models"), str(ROOT / "pg_test")]

import numpy as np  # noqa: E402

import fleet  # noqa: E402
import plots  # noqa: E402
from bench import machine, report  # noqa: E402
from cluster import Cluster, Database  # noqa: E402
from helpers import assert_close, expected, onnx_file, to_json  # noqa: E402

MODEL = "minilm"
OURS = f"SELECT predict('{MODEL}', %s::jsonb)"
PYTHON = "SELECT python_minilm(%s::jsonb)"
PYTHON_FUNCTION = """
CREATE FUNCTION python_minilm(question jsonb) RETURNS jsonb LANGUAGE plpython3u AS $$
    import json
    if "session" not in GD:
        import numpy, onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        content = plpy.execute("SELECT content FROM python_models WHERE name = 'minilm'")[0]["content"]
        GD["session"] = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        GD["numpy"] = numpy
    inputs = {name: GD["numpy"].array(value, dtype="int64") for name, value in json.loads(question).items()}
    names = [port.name for port in GD["session"].get_outputs()]
    outputs = GD["session"].run(None, inputs)
    return json.dumps({name: value.tolist() for name, value in zip(names, outputs)})
$$"""


def check(answer: dict, batch: int = 1) -> None:
    outputs = expected(MODEL, batch)[1]
    assert set(answer) == set(outputs)
    for name, wanted in outputs.items():
        assert_close(np.array(answer[name], dtype=np.float64), wanted.astype(np.float64), name)


def prepare(conn) -> None:
    conn.execute("SELECT load_model(%s, %b)", (MODEL, onnx_file(MODEL)))
    conn.execute("CREATE EXTENSION plpython3u")
    conn.execute("CREATE TABLE python_models (name text, content bytea)")
    conn.execute("INSERT INTO python_models VALUES (%s, %b)", (MODEL, onnx_file(MODEL)))
    conn.execute(PYTHON_FUNCTION)
    conn.execute("VACUUM ANALYZE")


def warm(conn) -> None:
    """Brings every block of the model into the cache: tokens from all parts of the embedding table."""
    ids = np.resize(np.arange(1, 30522, 25), (16, 96))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    conn.execute(OURS, (to_json(inputs),))


def private_kb(pid: int) -> int:
    """kB of anonymous memory of a process; what it shares with others counts by its share."""
    return int(re.search(r"Pss_Anon:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text())[1])


def sessions(database: Database, sql: str | None, count: int) -> list[float]:
    """MB that each of `count` idle sessions has, all of which have run a statement."""
    question = to_json(expected(MODEL, 1)[0])
    opened = [database.connect() for _ in range(count)]
    try:
        for conn in opened:
            conn.execute("SELECT 1")
            if sql:
                check(conn.execute(sql, (question,)).fetchone()[0])
        time.sleep(1)
        return [private_kb(conn.info.backend_pid) / 1024 for conn in opened]
    finally:
        for conn in opened:
            conn.close()


def memory(database: Database, conn, chosen) -> list[str]:
    warm(conn)
    nothing = statistics.median(sessions(database, None, 32))
    ours = [value - nothing for value in sessions(database, OURS, 32)]
    python = [value - nothing for value in sessions(database, PYTHON, chosen.python_sessions)]
    frames, used = conn.execute("SELECT frames_used, bytes_used FROM tessera.block_cache_stats").fetchone()
    weights = conn.execute("SELECT sum(octet_length(data(data))) FROM tessera.weight").fetchone()[0]
    stored = f"{frames * 65536 / 1e6:.1f} MB of frames for {weights / 1e6:.1f} MB of weights: {frames * 65536 / weights:.3f}; content {used / 1e6:.1f} MB"
    verdicts = (max(ours) <= 8, frames * 65536 <= 1.1 * weights)
    return ["### Memory of an idle session that has predicted once", "",
            f"MB of anonymous memory above that of a session that ran `SELECT 1` ({nothing:.1f} MB), model `{MODEL}`.", "",
            "| way | sessions | median | greatest | of all |", "| --- | ---: | ---: | ---: | ---: |",
            *(f"| {name} | {len(values)} | {statistics.median(values):.1f} | {max(values):.1f} | {sum(values):,.0f} |"
              for name, values in (("pg_tessera", ours), ("PL/Python with ONNX Runtime", python))), "",
            f"- The block cache, once for the server: {stored}",
            f"- At most 8 MB a session, frames at most 1.1 times the weights: {'yes' if all(verdicts) else 'NO'}", ""]


def cpu_ms(pid: int) -> float:
    """Milliseconds that the threads of a process have run."""
    return sum(int(task.read_text().split()[0]) for task in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e6


def first_calls(database: Database, conn, chosen) -> list[str]:
    warm(conn)
    question = to_json(expected(MODEL, 1)[0])
    ways = {"pg_tessera": OURS, "PL/Python with ONNX Runtime": PYTHON}
    wall: dict[tuple[str, str], list[float]] = {(name, which): [] for name in ways for which in ("first", "second")}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(chosen.rounds):
        for name in ways if turn % 2 else reversed(ways):
            with database.connect() as fresh:
                before = cpu_ms(fresh.info.backend_pid)
                for which in ("first", "second"):
                    started = time.perf_counter()
                    answer = fresh.execute(ways[name], (question,)).fetchone()[0]
                    wall[name, which].append((time.perf_counter() - started) * 1e3)
                    check(answer)
                    if which == "first":
                        cpu[name].append(cpu_ms(fresh.info.backend_pid) - before)
    lines = ["### First prediction of a session", "",
             f"Milliseconds from question to answer of a session that is connected, {chosen.rounds} rounds; the cache is warm. CPU is that of all threads "
             "of the session's process.", "",
             "| way | first (median) | least | greatest | CPU (median) | second (median) |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for name in ways:
        first, then = wall[name, "first"], wall[name, "second"]
        lines.append(f"| {name} | {statistics.median(first):.1f} | {min(first):.1f} | {max(first):.1f} | {statistics.median(cpu[name]):.1f} | {statistics.median(then):.1f} |")
    ours, python = ways

    def ratio(figure) -> float:
        return figure(python) / figure(ours)

    return lines + ["", f"- PL/Python's first : pg_tessera's first = **{ratio(lambda name: statistics.median(wall[name, 'first'])):.1f}** (medians), "
                    f"{ratio(lambda name: min(wall[name, 'first'])):.1f} (least), {ratio(lambda name: statistics.median(cpu[name])):.1f} (CPU)", ""]


def clients(chosen) -> list[str]:
    """20 models, a cache of a third of their blocks, 1 to 64 clients."""
    members = fleet.make(count=20, width=1024, groups=5)
    distinct = 20 * (1024 * 1024 + 1024 * 16) * 4 + 5 * 1024 * 1024 * 4 + 5 * 2048 * 1024 * 4
    cache_kb = distinct // 3 // 1024
    cluster = Cluster("bench_serving", settings=("shared_buffers = '512MB'", "max_connections = 100", f"tessera.block_cache_size = '{cache_kb}kB'"))
    cluster.remove()
    cluster.start()
    lines = ["### Throughput against clients", "",
             f"20 models that share layers, {distinct / 1e6:.0f} MB of distinct weights, a block cache of {cache_kb / 1e3:.0f} MB. Each client asks a random model, "
             "one row a question, and every answer is compared with ONNX Runtime's. The clients run on the same cores.", "",
             "| clients | seconds | answers/s | to one client | hit ratio | loaded MB/s | fall-backs |", "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    try:
        with Database(cluster, "fleet") as database, database.connect() as conn:
            fleet.load_all(conn, members)
            fleet.serve(database.connect, members, 4, 5)
            base = None
            for count in (1, 2, 4, 8, 16, 32, 64):
                seconds = chosen.seconds if count == 64 else max(chosen.seconds / 10, 3)
                conn.execute("SELECT reset_cache_stats()")
                started = time.monotonic()
                rate = fleet.serve(database.connect, members, count, seconds, warm_up=min(2, seconds / 5))
                passed = time.monotonic() - started
                hits, loaded, fallbacks = conn.execute("SELECT hit_ratio, bytes_loaded, fallbacks FROM tessera.block_cache_stats").fetchone()
                base = base or rate
                lines.append(f"| {count} | {seconds:.0f} | {rate:,.0f} | {rate / base:.2f} | {float(hits):.2f} | {loaded / 1e6 / passed:,.0f} | {fallbacks} |")
                print(lines[-1], file=sys.stderr)
                wait_for_end(conn)
                problems = conn.execute("SELECT * FROM tessera.check_cache()").fetchall()
                assert not problems, problems
            pinned = conn.execute("SELECT frames_pinned FROM tessera.block_cache_stats").fetchone()[0]
            assert pinned == 0, f"{pinned} frames are pinned"
    finally:
        cluster.remove()
    return lines + ["", "- No answer was wrong, no error was raised; afterwards `tessera.check_cache()` found nothing and no frame was pinned.", ""]


def wait_for_end(conn) -> None:
    """A closed connection's process may live a moment longer."""
    others = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    deadline = time.monotonic() + 10
    while conn.execute(others).fetchone()[0]:
        assert time.monotonic() < deadline, "closed connections are still there"
        time.sleep(0.05)


def beside_python(chosen) -> list[str]:
    os.environ["PYTHONPATH"] = os.environ["SERVER_PYTHONPATH"]  # the server inherits it
    cluster = Cluster("bench_serving", settings=("shared_buffers = '512MB'", "max_parallel_workers_per_gather = 0"))
    cluster.remove()
    cluster.start()
    try:
        with Database(cluster, "serving") as database:
            with database.connect() as conn:
                prepare(conn)
                lines = [f"{machine(conn)}", ""]
                if chosen.only in (None, "memory"):
                    lines += memory(database, conn, chosen)
                if chosen.only in (None, "first"):
                    lines += first_calls(database, conn, chosen)
                return lines
    finally:
        cluster.remove()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--short", action="store_true", help="20 s of 64 clients instead of five minutes, three rounds")
    options.add_argument("--only", choices=("memory", "first", "clients"), help="one part alone")
    options.add_argument("--rounds", type=int, help="rounds of first calls (11)")
    options.add_argument("--seconds", type=int, help="seconds of 64 clients (300); the others get a tenth, at least 3")
    options.add_argument("--python-sessions", type=int, default=32, help="sessions with ONNX Runtime; each takes some hundred MB")
    options.add_argument("--markdown", type=Path, help="writes the figures to this file too")
    options.add_argument("--plots", type=Path, default=plots.FOLDER, help="folder of the plot of throughput against clients")
    chosen = options.parse_args()
    chosen.rounds = chosen.rounds or (3 if chosen.short else 11)
    chosen.seconds = chosen.seconds or (20 if chosen.short else 300)

    lines = [] if chosen.only == "clients" else beside_python(chosen)
    if chosen.only in (None, "clients"):
        lines += clients(chosen)
    text = report(lines, chosen.markdown)
    plots.draw(text, chosen.plots)


if __name__ == "__main__":
    main()
