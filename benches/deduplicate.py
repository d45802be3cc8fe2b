"""Stored bytes and accuracy of five text classifiers before and after deduplicate_model, beside other ways to find near-duplicates.

    benches/run-deduplicate [--quick] [--drop D] [--options SQL] [--markdown FILE]

The classifiers are trained here, on real texts (text_classifiers.py): 100,000 x 500 embeddings that come of one, 200 MB each. Each one is
loaded, and deduplicated against those before it, guided by its validation texts; then comes the next. Accuracies are those of `predict` on test
texts, which neither the training nor the deduplication has seen, and the files that `export_model` gives are run in ONNX Runtime as well.
Pairwise and MISTIQUE-like detection run in numpy on the same blocks (near_blocks.py).
"""

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts" / "models"), str(ROOT / "pg_test")]

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402

import near_blocks  # noqa: E402
import text_classifiers  # noqa: E402
from bench import machine, report  # noqa: E402
from cluster import Cluster, Database  # noqa: E402
from fleet_models import COPY_END, COPY_HEAD  # noqa: E402
from helpers import store_size  # noqa: E402
from paths import TARGET  # noqa: E402
from text_classifiers import FEATURES, TASKS, Fleet, Split  # noqa: E402

WANTED_RATIO, WANTED_DROP = 3.6, 0.035
SERVER = ("shared_buffers = '1GB'", "max_wal_size = '8GB'", "max_parallel_workers_per_gather = 0", "maintenance_work_mem = '256MB'", "autovacuum = off",
          "tessera.block_cache_size = '512MB'")


@dataclass
class Result:
    """What a way comes to: bytes of the models' blocks, drops of accuracy on the test texts by task, seconds."""

    name: str
    bytes: int
    drops: list[float]
    detection: str = ""


def say(words: str) -> None:
    print(f"   {words}", file=sys.stderr, flush=True)


def copy_texts(conn, table: str, split: Split) -> None:
    """A table (ids bigint[], label integer) of texts."""
    conn.execute(f"CREATE TABLE {table} (ids bigint[], label integer)")
    rows = np.zeros(len(split.labels), dtype=np.dtype([
        ("fields", ">i2"), ("len", ">i4"), ("ndim", ">i4"), ("nulls", ">i4"), ("type", ">u4"), ("dim", ">i4"), ("lower", ">i4"),
        ("items", [("len", ">i4"), ("id", ">i8")], (FEATURES,)), ("label_len", ">i4"), ("label", ">i4")]))
    rows["fields"], rows["len"], rows["ndim"], rows["type"], rows["dim"], rows["lower"] = 2, 20 + 12 * FEATURES, 1, 20, FEATURES, 1
    rows["items"]["len"], rows["items"]["id"], rows["label_len"], rows["label"] = 8, split.ids, 4, split.labels
    with conn.cursor() as cursor, cursor.copy(f"COPY {table} FROM STDIN (FORMAT binary)") as out:
        for piece in (COPY_HEAD, rows.tobytes(), COPY_END):
            out.write(piece)
    conn.execute(f"VACUUM (ANALYZE) {table}")


def accuracy(conn, model: str, task: str) -> float:
    """Of the active version on the test texts, as queries see it."""
    sql = f"SELECT avg((((predict('{model}', ids))[1] > 0.5)::integer = label)::integer)::float8 FROM {task}_test"
    return conn.execute(sql).fetchone()[0]


def check_exported(conn, model: str, task: str, split: Split) -> float:
    """Largest difference of `predict` and ONNX Runtime with the exported file over the test texts; returns ONNX Runtime's accuracy."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    content = conn.execute("SELECT export_model(%s)", (model,)).fetchone()[0]
    wanted = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"]).run(None, {"ids": split.ids})[0][:, 0]
    got = np.array([row[0] for row in conn.execute(f"SELECT (predict('{model}', ids))[1] FROM {task}_test").fetchall()])
    assert np.abs(got - wanted).max() < 1e-5, f"{model}: predict and ONNX Runtime differ by {np.abs(got - wanted).max()}"
    return float(((wanted > 0.5) == split.labels).mean())


def stored(conn) -> tuple[int, int]:
    """Bytes of the distinct blocks, and of the block store on disk with its index."""
    for _ in range(2):  # the first condemns, the second removes
        conn.execute("VACUUM tessera.weight")
    conn.execute("VACUUM FULL tessera.weight")
    return conn.execute("SELECT bytes_stored FROM tessera.storage WHERE relation = 'tessera.weight'::regclass").fetchone()[0], store_size(conn)


def without(cluster: Cluster, models: dict[str, bytes]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The same figures of five databases with a model each, added up; and of one with all five."""
    figures = []
    for content in models.values():
        with Database(cluster, "alone") as database, database.connect() as conn:
            conn.execute("SELECT load_model('alone', %b)", (content,))
            figures.append(stored(conn))
    with Database(cluster, "exact") as database, database.connect() as conn:
        for task, content in models.items():
            conn.execute("SELECT load_model(%s, %b)", (task, content))
        return tuple(map(sum, zip(*figures))), stored(conn)


def deduplicated(conn, fleet: Fleet, models: dict[str, bytes], chosen) -> tuple[list[dict], list[float], list[float]]:
    """Loads each and runs deduplicate_model on it before the next one comes; its reports, and the accuracies before and after."""
    before, reports, after = [], [], []
    for task in TASKS:
        for part in ("validation", "test"):
            copy_texts(conn, f"{task}_{part}", fleet.texts[task][part])
        conn.execute("SELECT load_model(%s, %b)", (task, models[task]))
        before.append(accuracy(conn, task, task))
        options = f", {chosen.options}" if chosen.options else ""
        sql = (f"SELECT to_jsonb(answer) FROM deduplicate_model('{task}', validation => 'SELECT ids, label FROM {task}_validation', metric => 'accuracy',"
               f" max_drop => {chosen.drop}{options}) AS answer")
        started = time.perf_counter()
        found = conn.execute(sql).fetchone()[0]
        found["seconds_all"] = time.perf_counter() - started
        say(f"{task}: {json.dumps(found)}")
        reports.append(found)
        for (version,) in conn.execute("SELECT version FROM tessera.models WHERE name = %s AND NOT active", (task,)).fetchall():
            conn.execute("SELECT drop_model(%s, %s)", (task, version))
    for task in TASKS:
        after.append(accuracy(conn, task, task))
        assert abs(after[-1] - check_exported(conn, task, task, fleet.texts[task]["test"])) < 1e-9
    return reports, before, after


def in_numpy(fleet: Fleet, drop: float, others: int) -> list[Result]:
    """The other ways; `others` are the bytes of the tensors that are no embeddings, which no way merges."""
    weights = list(fleet.models.values())
    guides = [fleet.texts[task]["validation"] for task in TASKS]
    tests = [fleet.texts[task]["test"] for task in TASKS]
    at_first = [text_classifiers.accuracy(one, guide) for one, guide in zip(weights, guides)]
    matrices = [one["embedding"] for one in weights]

    def accept(number: int, matrix: np.ndarray) -> bool:
        return at_first[number] - text_classifiers.accuracy(weights[number] | {"embedding": matrix}, guides[number]) <= drop

    def result(name: str, found: near_blocks.Found, detection: str) -> Result:
        drops = [text_classifiers.accuracy(one, test) - text_classifiers.accuracy(one | {"embedding": matrix}, test)
                 for one, test, matrix in zip(weights, tests, found.matrices)]
        say(f"{name}: {found.bytes / 1e6:.1f} MB, merged {found.merged}, drops {np.round(drops, 4)}")
        return Result(name, found.bytes + others, drops, detection)

    results = []
    for similar in (0.8, 0.5, 0.3):
        found = near_blocks.search(matrices, near_blocks.MinHash(similar))
        results.append(result(f"MISTIQUE-like, Jaccard at least {similar}, nothing checked", found, f"{found.seconds:,.0f}"))
    way = near_blocks.Pairwise()
    found = near_blocks.search(matrices, way, accept)
    shape, places = next(iter(near_blocks.tiles(matrices[0]).items()))
    one = way.pair_seconds(near_blocks.cut(matrices[0], shape, places[:200]))
    results.append(result("pairwise, checked", found, f"{found.compared * one:,.0f} (computed: {found.compared / 1e6:.1f} million pairs of {one * 1e6:.1f} µs)"))
    return results


def detection_seconds(reports: list[dict]) -> str:
    """Seconds of the phases that look for candidates, where the reports tell, and of the whole."""
    whole = sum(found["seconds_all"] for found in reports)
    phases: dict[str, float] = {}
    for found in reports:
        for name, seconds in (found.get("seconds") or {}).items():
            phases[name] = phases.get(name, 0.0) + seconds
    parts = ", ".join(f"{name} {seconds:,.1f}" for name, seconds in phases.items())
    return f"{whole:,.0f} in all" + (f" ({parts})" if parts else "")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="embeddings of 20,000 rows instead of 100,000")
    options.add_argument("--drop", type=float, default=WANTED_DROP, help="max_drop of deduplicate_model")
    options.add_argument("--options", default="share => 0.5", help="further arguments of deduplicate_model, as SQL")
    options.add_argument("--markdown", type=Path, help="writes the figures to this file too")
    chosen = options.parse_args()

    rows = 20_000 if chosen.quick else text_classifiers.ROWS
    started = time.perf_counter()
    fleet = text_classifiers.make(TARGET / "benches", rows, say=say)
    trained = time.perf_counter() - started
    models = {task: text_classifiers.to_onnx(weights) for task, weights in fleet.models.items()}
    embeddings = sum(weights["embedding"].nbytes for weights in fleet.models.values())

    cluster = Cluster("bench_deduplicate", settings=SERVER)
    cluster.remove()
    cluster.start()
    try:
        alone, exact = without(cluster, models)
        with Database(cluster, "deduplicate") as database, database.connect() as conn:
            head = machine(conn)
            reports, before, after = deduplicated(conn, fleet, models, chosen)
            ours = stored(conn)
            problems = conn.execute("SELECT * FROM check_store('tessera.weight')").fetchall()
            assert not problems, problems
    finally:
        cluster.remove()
    for task, score in zip(TASKS, before):
        there = text_classifiers.accuracy(fleet.models[task], fleet.texts[task]["test"])
        assert abs(score - there) < 0.002, f"{task}: predict has an accuracy of {score}, the trainer {there}"

    drops = [first - then for first, then in zip(before, after)]
    results = [Result("five separate ones", alone[0], [0.0] * 5), Result("exact deduplication", exact[0], [0.0] * 5)]
    results += in_numpy(fleet, chosen.drop, alone[0] - embeddings)
    told = ", ".join(part for part in (f"max_drop => {chosen.drop}", chosen.options) if part)
    results.append(Result(f"`deduplicate_model`, {told}", ours[0], drops, detection_seconds(reports)))
    report(tables(head, fleet, results, reports, before, after, alone, ours, rows, trained), chosen.markdown)


def tables(head: str, fleet: Fleet, results: list[Result], reports: list[dict], before, after, alone, ours, rows: int, trained: float) -> list[str]:
    lines = ["### Five text classifiers", "",
             f"{head} Embeddings of {rows:,} x {text_classifiers.WIDTH}, heads 500-16-1, trained in {trained:.0f} s on the texts of {text_classifiers.TEXTS[0]} "
             f"{text_classifiers.TEXTS[1]}. A drop is that of the accuracy on test texts.", "",
             "| way | stored MB | five separate ones : it | mean drop | largest drop | seconds of detection |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for one in results:
        ratio = results[0].bytes / one.bytes
        lines.append(f"| {one.name} | {one.bytes / 1e6:,.1f} | {ratio:.2f} | {np.mean(one.drops):.4f} | {max(one.drops):.4f} | {one.detection} |")
    ratio, largest = results[0].bytes / results[-1].bytes, max(results[-1].drops)
    lines += ["", f"- Five separate ones : `deduplicate_model` = **{ratio:.2f}** in bytes of blocks (wanted: {WANTED_RATIO}), {alone[1] / ours[1]:.2f} on disk with "
              f"the index ({alone[1] / 1e6:,.0f} MB, {ours[1] / 1e6:,.0f} MB); the largest drop is **{largest:.4f}** (at most {WANTED_DROP} wanted): "
              f"{'reached' if ratio >= WANTED_RATIO and largest <= WANTED_DROP else 'NOT reached'}",
              "- `predict` of the deduplicated models gives what ONNX Runtime gives with the exported files, and `check_store` finds nothing.", "",
              "The accuracies of each, on test texts, and what deduplicate_model says of it: drops on the rows that guided it and on those it held out.", "",
              "| task | texts: train, validation, test | the base's | trained on | deduplicated | drop | merged blocks | evaluations | guide drop | held-out drop | s |",
              "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for task, found, first, then in zip(TASKS, reports, before, after):
        parts = ", ".join(f"{len(fleet.texts[task][part].labels):,}" for part in text_classifiers.PARTS)
        base = text_classifiers.accuracy(fleet.base, fleet.texts[task]["test"])
        guide, held = found["guide_before"] - found["guide_after"], found["metric_before"] - found["metric_after"]
        lines.append(f"| {task} | {parts} | {base:.3f} | {first:.3f} | {then:.3f} | {first - then:.4f} | {found['merged']:,} of {found['blocks']:,} | "
                     f"{found['evaluations']} | {guide:.4f} | {held:.4f} | {found['seconds_all']:.1f} |")
    lines += ["", *(f"- {task}: {found['note']}" for task, found in zip(TASKS, reports) if found["note"])]
    return [*lines, ""]


if __name__ == "__main__":
    # One thread, as a backend has: before numpy is loaded it would have to be in the environment.
    assert os.environ.get("OPENBLAS_NUM_THREADS") == "1", "run benches/run-deduplicate"
    main()
