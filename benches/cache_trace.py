"""Hit ratios of the block cache's policies, beside the clairvoyant optimum (Belady) on the same trace.

    benches/run-cache-trace [--accesses N]

Twelve models share most of their blocks, as the word2vec models of netsDB's page packing workload (arXiv 2201.10442, section
7) do: each has 90 blocks that all have and 10 of its own. A run of a model walks over all its blocks in order. The cache is
that of a real server, its hits and misses are read from tessera.block_cache_stats; blocks are artificial.
"""

import argparse
import heapq
import os
import random
import sys
from collections import OrderedDict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "pg_test"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts" / "models"))

from cluster import Cluster  # noqa: E402

POLICIES = ("sharing", "clock", "lru")
PERCENT = (10, 20, 30, 40, 50)
MODELS = 12
BLOCKS = 100


def one_family() -> list[list[int]]:
    """All models share 90 of their 100 blocks."""
    return [[*range(90), *range(90 + 10 * m, 100 + 10 * m)] for m in range(MODELS)]


def three_families() -> list[list[int]]:
    """Four models each, which share 90 of 100 blocks; families share nothing."""
    return [[b + 1000 * (m // 4) for b in blocks] for m, blocks in enumerate(one_family())]


def runs_of(models: list[list[int]], choice: str, part: float, count: int, seed: int) -> list[tuple[int, list[int]]]:
    """Runs of models, chosen uniformly or by Zipf's law with exponent 1; one touches its first half of the blocks, and
    the `part` of the others that a run of an embedding table touches, by Zipf's law as well."""
    rng = random.Random(seed)
    weights = [1.0 if choice == "uniform" else 1 / (rank + 1) for rank in range(len(models))]
    runs = []
    for model in rng.choices(range(len(models)), weights, k=count):
        blocks = models[model]
        if part < 1:
            half = len(blocks) // 2
            tokens = rng.choices(range(half), [1 / (rank + 1) for rank in range(half)], k=int(part * half))
            blocks = sorted({blocks[2 * token + 1] for token in tokens}) + blocks[::2]
        runs.append((model, blocks))
    return runs


def belady(trace: list[int], frames: int) -> int:
    """Hits when the block goes that is used again last: the most that any policy can have."""
    never = len(trace)
    next_use, later = [0] * len(trace), {}
    for at in range(len(trace) - 1, -1, -1):
        next_use[at] = later.get(trace[at], never)
        later[trace[at]] = at
    cached, heap, hits = {}, [], 0
    for at, block in enumerate(trace):
        if block in cached:
            hits += 1
        elif len(cached) >= frames:
            while True:
                use, victim = heapq.heappop(heap)
                if cached.get(victim) == -use:
                    del cached[victim]
                    break
        cached[block] = next_use[at]
        heapq.heappush(heap, (-next_use[at], block))
    return hits


def exact_lru(trace: list[int], frames: int) -> int:
    """Hits of LRU by the book, to hold the server's against."""
    cached, hits = OrderedDict(), 0
    for block in trace:
        if block in cached:
            hits += 1
            cached.move_to_end(block)
        else:
            if len(cached) >= frames:
                cached.popitem(last=False)
            cached[block] = None
    return hits


def measure(frames: int, jobs: list[tuple[str, list[tuple[int, list[int]]]]]) -> dict[tuple[str, str], float]:
    """Hit ratio per policy and job, each on a server just started, with so many frames."""
    ratios = {}
    for policy in POLICIES:
        settings = (f"tessera.block_cache_size = '{frames * 64}kB'", f"tessera.cache_policy = {policy}")
        cluster = Cluster("cache_trace", "test", settings=settings)
        cluster.remove()
        cluster.start()
        try:
            for number, (name, runs) in enumerate(jobs):
                if number:
                    cluster.stop()
                    cluster.start()
                with cluster.connect() as conn:
                    with conn.pipeline():
                        for model, blocks in runs:
                            conn.execute("SELECT tests.cache_run(1, %s, %s, 512)", (model, blocks), prepare=True)
                    hits, misses = conn.execute("SELECT hits, misses FROM tessera.block_cache_stats").fetchone()
                    assert hits + misses == sum(len(blocks) for _, blocks in runs)
                    assert conn.execute("SELECT * FROM tessera.check_cache()").fetchall() == []
                    ratios[name, policy] = hits / (hits + misses)
        finally:
            cluster.remove()
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--accesses", type=int, default=2000, help="runs of models per trace")
    options = parser.parse_args()
    workloads = {
        "12 models share 90 %": (one_family(), 1.0),
        "three families of 4": (three_families(), 1.0),
        "three families, half a table": (three_families(), 0.2),
    }
    print("| workload | choice | cache | " + " | ".join(POLICIES) + " | optimum | sharing / lru |")
    print("| --- | --- | ---: |" + " ---: |" * (len(POLICIES) + 2))
    for name, (models, part) in workloads.items():
        distinct = len({block for blocks in models for block in blocks})
        traces = {choice: runs_of(models, choice, part, options.accesses, 1) for choice in ("uniform", "zipf")}
        for percent in PERCENT:
            frames = distinct * percent // 100
            ratios = measure(frames, list(traces.items()))
            for choice, runs in traces.items():
                trace = [block for _, blocks in runs for block in blocks]
                best = belady(trace, frames) / len(trace)
                shown = [ratios[choice, policy] for policy in POLICIES]
                gain = f"{shown[0] / shown[2]:.2f}" if shown[2] > 0.0005 else "lru has none"
                numbers = " | ".join(f"{ratio:.3f}" for ratio in [*shown, best])
                print(f"| {name} | {choice} | {percent} % ({frames}) | {numbers} | {gain} |", flush=True)
                if os.environ.get("TESSERA_EXACT"):
                    print(f"    lru by the book: {exact_lru(trace, frames) / len(trace):.3f}", flush=True)


if __name__ == "__main__":
    main()
