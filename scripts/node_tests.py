"""Runs the ONNX backend tests through SQL: load_model, predict, and a comparison with the data ONNX itself makes.

    node_tests.py [--only WORD] [--no-tract]

Prints how many pass, are refused for an unsupported operator, opset or type, are refused otherwise, and give wrong
numbers; then the same of tract alone. It fails if a number is wrong, if an error is an internal one, or if fewer pass
than with tract alone. The outcomes, a line a test, stay in target/node/.
"""

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import psycopg
from onnx import numpy_helper

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "models"), str(HERE.parent / "pg_test")]

from cluster import Cluster, Database  # noqa: E402
from helpers import plain  # noqa: E402
from paths import NODE_TESTS, ROOT, TARGET  # noqa: E402

# Relative, and absolute times the largest output: single precision as in onnx's own runner, but for sums that cancel out.
TOLERANCE = {2: (5e-3, 1e-3), 4: (1e-3, 1e-6), 8: (1e-3, 1e-6)}
# Their outputs are drawn at random: only the shape can be compared.
RANDOM = ("test_bernoulli", "test_training_dropout", "test_dropout_random", "test_randomuniform", "test_multinomial")


def folders() -> list[Path]:
    """The tests' folders, made at the first call: node tests, and the small converted models of the package."""
    made = NODE_TESTS / f"onnx-{onnx.__version__}"
    done = made / ".done"
    if not done.exists():
        from onnx.backend.test import cmd_tools
        from onnx.backend.test.case import model, node
        made.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for collect in (model.collect_testcases, node.collect_testcases):
                cases = [case for case in collect() if case.kind != "real"]
                cmd_tools.model_test = SimpleNamespace(collect_testcases=lambda cases=cases: cases)
                cmd_tools.generate_data(SimpleNamespace(output=str(made)))
        done.touch()
    data = Path(onnx.__file__).parent / "backend" / "test" / "data"
    return [made / "node", made / "simple", data / "pytorch-converted", data / "pytorch-operator"]


def tensors(folder: Path, stem: str) -> list[np.ndarray] | None:
    """The tensors stem_0.pb, stem_1.pb, ...; None if one is no tensor (a sequence, a map, an optional)."""
    found = []
    for i in range(len(list(folder.glob(f"{stem}_*.pb")))):
        tensor = onnx.TensorProto()
        try:
            tensor.ParseFromString((folder / f"{stem}_{i}.pb").read_bytes())
            found.append(numpy_helper.to_array(tensor))
        except Exception:
            return None
    return found


def listed(array: np.ndarray):
    """A tensor as a nested list of JSON's own values."""
    if array.dtype.kind in "biu":
        return array.tolist()
    if array.dtype.kind in "OSU":
        return plain(array.tolist())
    return plain(array.astype(np.float64).tolist())


def same(got, wanted: np.ndarray, only_shape: bool) -> str:
    """What differs between a JSON answer and a tensor; nothing: an empty string."""
    if wanted.dtype.kind in "OSU":
        return "" if listed(wanted) == got else f"{got} instead of {listed(wanted)}"
    exact = wanted.dtype.kind in "biu"
    kind = wanted.dtype if exact else np.float64
    try:
        got = np.array(got, dtype=kind)
    except (TypeError, ValueError, OverflowError) as error:
        return f"no {wanted.dtype}: {error}"
    if wanted.size == 0 and got.size == 0:
        return ""  # nested lists do not tell [0, 3] from [0]
    if got.shape != wanted.shape:
        return f"shape {list(got.shape)} instead of {list(wanted.shape)}"
    wide = wanted.astype(kind)
    relative, absolute = (0, 0) if exact else TOLERANCE.get(wanted.dtype.itemsize, TOLERANCE[2])
    largest = 1 if exact else np.abs(wide[np.isfinite(wide)]).max(initial=1)
    if only_shape or np.isclose(got, wide, rtol=relative, atol=absolute * largest, equal_nan=True).all():
        return ""
    return f"{got.ravel()[:4]} instead of {wide.ravel()[:4]}"


def run(conn: psycopg.Connection, test: Path) -> tuple[str, str]:
    """Outcome and reason of one test: pass, unsupported, refused, wrong, internal, no-tensor."""
    content = (test / "model.onnx").read_bytes()
    model = onnx.load_model_from_string(content)
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [port.name for port in model.graph.input if port.name not in stored]
    outputs = [port.name for port in model.graph.output]
    try:
        with conn.transaction(force_rollback=True):
            conn.execute("SELECT load_model('node_test', %b)", (content,))
            for data in sorted(test.glob("test_data_set_*")):
                values, answers = tensors(data, "input"), tensors(data, "output")
                if values is None or answers is None:
                    return "no-tensor", "a sequence, map or optional was loaded"
                question = json.dumps({name: listed(value) for name, value in zip(inputs, values)})
                got = conn.execute("SELECT predict('node_test', %s::jsonb)", (question,)).fetchone()[0]
                for name, wanted in zip(outputs, answers):
                    reason = same(got[name], wanted, test.name.startswith(RANDOM))
                    if reason:
                        return "wrong", f"{name}: {reason}"
    except psycopg.errors.FeatureNotSupported as error:
        return "unsupported", str(error.diag.message_primary)
    except psycopg.Error as error:
        internal = error.sqlstate is None or error.sqlstate.startswith("XX")
        return ("internal" if internal else "refused"), f"{error.sqlstate} {error.diag.message_primary or error}"
    return "pass", ""


def through_sql(tests: list[Path]) -> dict[str, tuple[str, str]]:
    cluster = Cluster("nodes")
    cluster.remove()
    cluster.start()
    outcomes = {}
    try:
        with Database(cluster, "nodes") as database:
            conn = database.connect()
            for test in tests:
                if conn.closed:
                    conn = database.connect()
                outcomes[test.name] = run(conn, test)
            conn.close()
    finally:
        cluster.remove()
    return outcomes


def with_tract(places: list[Path], only: str) -> dict[str, tuple[str, str]]:
    # Built with the whole workspace, so that tract is not compiled again with other features.
    build = ["cargo", "build", "-q", "--workspace", "--features", "pg_test", "--example", "node_tests"]
    subprocess.run(build, cwd=ROOT, check=True)
    command = [str(TARGET / "debug" / "examples" / "node_tests"), *(["--only", only] if only else [])]
    lines = subprocess.run([*command, *map(str, places)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    parted = [line.split(" ", 2) for line in lines.splitlines()]
    return {name: (word, "".join(reason)) for word, name, *reason in parted if word != "total"}


def report(title: str, outcomes: dict[str, tuple[str, str]], seconds: float) -> Counter:
    counts = Counter(word for word, _ in outcomes.values())
    words = ", ".join(f"{count} {word}" for word, count in counts.most_common())
    print(f"{title:12} {len(outcomes)} tests: {words} ({seconds:.0f} s)")
    lines = "".join(f"{word} {name} {reason}\n" for name, (word, reason) in sorted(outcomes.items()))
    (NODE_TESTS / f"{title.replace(' ', '_')}.txt").write_text(lines)
    return counts


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", default="", help="tests whose name contains this")
    options.add_argument("--no-tract", action="store_true", help="without the comparison")
    chosen = options.parse_args()

    places = folders()
    tests = sorted(model.parent for place in places for model in place.glob("*/model.onnx") if chosen.only in model.parent.name)
    started = time.monotonic()
    ours = through_sql(tests)
    counts = report("through SQL", ours, time.monotonic() - started)
    failed = counts["wrong"] + counts["internal"]
    for name, (word, reason) in ours.items():
        if word in ("wrong", "internal"):
            print(f"  {word} {name}: {reason}")
    if not chosen.no_tract:
        started = time.monotonic()
        alone = with_tract(places, chosen.only)
        theirs = report("tract alone", alone, time.monotonic() - started)
        lost = [name for name, (word, _) in alone.items() if word == "pass" and ours.get(name, ("", ""))[0] != "pass"]
        for name in lost:
            print(f"  tract passes, SQL does not: {name}: {' '.join(ours.get(name, ('missing', '')))}")
        if counts["pass"] < theirs["pass"]:
            print(f"fewer pass than with tract alone: {counts['pass']} instead of {theirs['pass']}")
            failed += theirs["pass"] - counts["pass"]
    print(f"{counts['pass']} passed, {failed} failed, {len(tests) - counts['pass'] - counts['wrong'] - counts['internal']} skipped")
    return 1 if failed or not tests else 0


if __name__ == "__main__":
    sys.exit(main())
