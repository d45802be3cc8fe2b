"""Predictions by many clients over models that do not fit in the block cache.

    benches/run-cache-clients [--seconds N] [--soak N]

Twenty models of 20 blocks a layer share their first layer; the block cache has a third of their blocks. Each client takes a
model at random for each prediction, and compares every value with what the model gave before. Prints predictions per second
against clients, and what the cache counted, and draws the plot of docs/benchmarks.md; `--soak` then runs 64 clients for so many seconds.
"""

import argparse
import multiprocessing
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "pg_test"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts" / "models"))

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import psycopg  # noqa: E402

import plots  # noqa: E402
from cluster import Cluster  # noqa: E402

MODELS = 20
WIDTH = 1024
CLIENTS = (1, 2, 4, 8, 16, 32, 64)


def model(number: int) -> bytes:
    """x[1024] -> MatMul (shared by all) -> Relu -> MatMul (its own) -> y[256]."""
    shared, own = np.random.default_rng(0), np.random.default_rng(number + 1)
    weights = {
        "w0": shared.standard_normal((WIDTH, WIDTH), dtype=np.float32) / 32,
        "w1": own.standard_normal((WIDTH, 256), dtype=np.float32) / 32,
    }
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("MatMul", ["x", "w0"], ["h"]),
            onnx.helper.make_node("Relu", ["h"], ["r"]),
            onnx.helper.make_node("MatMul", ["r", "w1"], ["y"]),
        ],
        "two_layers",
        [value("x", onnx.TensorProto.FLOAT, ["n", WIDTH])],
        [value("y", onnx.TensorProto.FLOAT, ["n", 256])],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


PREDICT = "SELECT predict(%s, array_fill(0.5::real, ARRAY[1024]))"


def client(info: str, seconds: float, seed: int, wanted: dict[str, list[float]], counts) -> None:
    rng = random.Random(seed)
    done = wrong = 0
    with psycopg.connect(info, autocommit=True) as conn:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            name = f"m{rng.randrange(MODELS)}"
            wrong += conn.execute(PREDICT, (name,)).fetchone()[0] != wanted[name]
            done += 1
    counts.put((done, wrong))


def run(cluster: Cluster, clients: int, seconds: float, wanted: dict[str, list[float]]) -> str:
    """A line of the table."""
    with cluster.connect() as conn:
        conn.execute("SELECT reset_cache_stats()")
        counts = multiprocessing.Queue()
        info = cluster.conninfo() + " dbname=tessera"
        started = time.monotonic()
        workers = [
            multiprocessing.Process(target=client, args=(info, seconds, 1000 * clients + n, wanted, counts)) for n in range(clients)
        ]
        for worker in workers:
            worker.start()
        results = [counts.get(timeout=seconds + 300) for _ in workers]
        elapsed = time.monotonic() - started
        for worker in workers:
            worker.join()
        done, wrong = (sum(column) for column in zip(*results))
        hits, misses, waits, fallbacks, pinned = conn.execute(
            "SELECT hits, misses, waits, fallbacks, frames_pinned FROM tessera.block_cache_stats"
        ).fetchone()
        problems = conn.execute("SELECT * FROM tessera.check_cache()").fetchall()
        assert wrong == 0, f"{wrong} wrong predictions"
        assert problems == [] and pinned == 0, f"{pinned} pins left, {problems}"
        line = f"| {clients} | {elapsed:.0f} | {done:,} | {done / elapsed:,.0f} | {hits / (hits + misses):.3f} | {waits:,} | {fallbacks:,} |"
        print(line, flush=True)
        return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10, help="for each number of clients")
    parser.add_argument("--soak", type=float, default=0, help="then 64 clients for so many seconds")
    parser.add_argument("--plots", type=Path, default=plots.FOLDER, help="folder of the plot")
    options = parser.parse_args()
    blocks = 64 + MODELS * 16
    cluster = Cluster("cache_clients", "15", settings=(f"tessera.block_cache_size = '{blocks // 3 * 64}kB'",))
    cluster.remove()
    cluster.start()
    try:
        wanted = {}
        with cluster.connect() as conn:
            for number in range(MODELS):
                name = f"m{number}"
                conn.execute("SELECT load_model(%s, %b)", (name, model(number)))
                wanted[name] = conn.execute(PREDICT, (name,)).fetchone()[0]
            frames = conn.execute("SELECT frames FROM tessera.block_cache_stats").fetchone()[0]
        print(f"{MODELS} models of {blocks} blocks in all, {frames} frames")
        lines = ["| clients | seconds | predictions | per second | hit ratio | waits | fallbacks |", "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
        print(*lines, sep="\n")
        lines += [run(cluster, clients, options.seconds, wanted) for clients in CLIENTS]
        if options.soak:
            run(cluster, 64, options.soak, wanted)
    finally:
        cluster.remove()
    plots.draw("\n".join(["## Block cache: many clients", "", *lines]), options.plots)


if __name__ == "__main__":
    main()
