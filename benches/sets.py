"""Sets of thousands of models: what they take, how fast they are saved, recovered and predicted with, beside what one would do otherwise.

    benches/run-sets [--quick] [--only baseline|generations|predictions] [--rounds N] [--markdown FILE] [--plots FOLDER]

5,000 battery-cell nets 4-48-48-48-1 of 4,993 parameters (pg_test/fleet_models.py), 99.86 MB of floats, as ONNX files in a heap table.

baseline: the whole set saved and recovered, beside a file a model by torch.save and torch.load, and beside load_model and export_model.
generations: ten sets, each made from the last by training a tenth of the members, half of these fully and half in the last layer; kept whole,
by their differences, and by how they were trained; bytes of each, and seconds to recover a set or a member of any generation.
predictions: a million rows in random order over all members, beside PL/Python with an ONNX Runtime session for each member.

All ways run one after the other in each round; medians are compared. Whatever is recovered is compared bit for bit.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts" / "models"), str(ROOT / "pg_test")]

import numpy as np  # noqa: E402

import fleet_models  # noqa: E402
import plots  # noqa: E402
from bench import machine, report  # noqa: E402
from cluster import Cluster, Database  # noqa: E402
from fleet_models import Architecture  # noqa: E402

SERVER = ("shared_buffers = '1GB'", "max_wal_size = '8GB'", "checkpoint_timeout = '1h'", "max_parallel_workers_per_gather = 0", "autovacuum = off",
          "work_mem = '64MB'")
SAMPLE = 200  # members for load_model and export_model
RECORDS = 60  # of training, a cell
TRAINING_DATA = "SELECT x, y FROM records WHERE cell = $1 ORDER BY turn"
PARAMS = {"epochs": 2, "learning_rate": 0.01, "batch": 16, "seed": 7, "loss": "mse"}
BYTES_WANTED, CHANGED_WANTED, PROVENANCE_WANTED, FASTER_WANTED, PREDICTIONS_WANTED = 1.05, 1.25, 1e6, 10, 5

PYTHON = """CREATE FUNCTION python_cell(cell text, x real[]) RETURNS real[] LANGUAGE plpython3u AS $$
    sessions = SD.get("sessions")
    if sessions is None:
        import numpy, onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.enable_cpu_mem_arena = False
        sessions = SD["sessions"] = {}
        SD["array"] = lambda x: numpy.array([x], dtype="float32")
        SD["session"] = lambda file: onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        SD["file"] = plpy.prepare("SELECT onnx FROM cells WHERE name = $1", ["text"])
    session = sessions.get(cell)
    if session is None:
        session = sessions[cell] = SD["session"](plpy.execute(SD["file"], [cell])[0]["onnx"])
    return session.run(None, {"x": SD["array"](x)})[0][0].tolist()
$$"""


def say(words: str) -> None:
    print(f"   {words}", file=sys.stderr, flush=True)


class Times:
    """Seconds by way, round after round."""

    def __init__(self):
        self.seconds: dict[str, list[float]] = {}

    def add(self, way: str, seconds: float) -> None:
        self.seconds.setdefault(way, []).append(seconds)

    def run(self, way: str, work):
        started = time.perf_counter()
        answer = work()
        self.add(way, time.perf_counter() - started)
        return answer

    def median(self, way: str) -> float:
        return statistics.median(self.seconds[way])

    def spread(self, way: str) -> str:
        return f"{min(self.seconds[way]):,.2f} - {max(self.seconds[way]):,.2f}"


def value(conn, sql: str, parameters=()):
    return conn.execute(sql, parameters).fetchone()[0]


def vacuum(conn) -> None:
    for (table,) in conn.execute("SELECT format('tessera.%I', relname) FROM pg_class WHERE relnamespace = 'tessera'::regnamespace AND relkind = 'r'").fetchall():
        conn.execute(f"VACUUM {table}")


def settle(conn) -> None:
    """Has all that was written before on the disk, so that nobody pays for the one before."""
    conn.execute("CHECKPOINT")
    os.sync()


def size(conn) -> int:
    """Bytes on disk of all tables of the extension, with their indexes and block stores."""
    vacuum(conn)
    return int(value(conn, "SELECT sum(pg_total_relation_size(oid)) FROM pg_class WHERE relnamespace = 'tessera'::regnamespace AND relkind = 'r'"))


def rows_of(model_set: str) -> str:
    """All members, one by one: in FROM itself PostgreSQL would collect the function's rows in a temporary file first."""
    return f"(SELECT recover_model_set('{model_set}') AS r OFFSET 0) AS members"


def recovered(conn, architecture: Architecture, model_set: str, likely: np.ndarray) -> np.ndarray:
    """The parameters of all members, read by a client; `likely` are what they probably are, which saves parsing."""
    with conn.cursor(binary=True) as cursor:
        rows = dict(cursor.execute(f"SELECT (r).name, (r).model FROM {rows_of(model_set)}").fetchall())
    names = fleet_models.names(len(likely))
    assert rows.keys() == set(names), f"{model_set} has other members"
    found = np.empty_like(likely)
    for at, (file, wanted) in enumerate(zip(map(rows.get, names), likely)):
        found[at] = wanted if file == architecture.model(wanted) else architecture.parameters_of(file)
    return found


def assert_bits(got: np.ndarray, wanted: np.ndarray, what: str) -> None:
    assert got.tobytes() == wanted.tobytes(), f"{what} was not recovered bit for bit"


def with_torch(folder: Path, parameters: np.ndarray, architecture: Architecture) -> dict:
    """Seconds of a file a model, in a process of its own."""
    command = shlex.split(os.environ["TORCH_PYTHON"]) or [sys.executable]
    with tempfile.TemporaryDirectory(dir=folder) as home:
        Path(home, "parameters.f32").write_bytes(parameters.tobytes())
        Path(home, "layout.json").write_text(json.dumps([(tensor.name, tensor.shape) for tensor in architecture.tensors]))
        arguments = [str(ROOT / "benches" / "torch_files.py"), f"{home}/parameters.f32", f"{home}/layout.json", f"{home}/models"]
        done = subprocess.run([*command, *arguments], check=True, capture_output=True, text=True, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    return json.loads(done.stdout)


def baseline(cluster: Cluster, chosen) -> list[str]:
    architecture, parameters = fleet_models.battery_nets(chosen.members)
    times, floats, sample = Times(), parameters.nbytes, min(SAMPLE, chosen.members)
    folder = cluster.home.parent / "torch_files"  # on the disk of the server
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    stored = by_torch = {}
    try:
        for turn in range(chosen.rounds):
            say(f"baseline, round {turn + 1} of {chosen.rounds}")
            with Database(cluster, "sets") as database, database.connect() as conn:
                fleet_models.copy_members(conn, "cells", fleet_models.members(architecture, parameters))
                conn.execute("VACUUM (ANALYZE) cells")
                before = size(conn)
                settle(conn)
                count = times.run("save", lambda: value(conn, "SELECT save_model_set('battery', 'SELECT name, onnx FROM cells')"))
                assert count == chosen.members
                stored = {"disk": size(conn) - before, "said": value(conn, "SELECT bytes_added FROM tessera.model_sets WHERE name = 'battery'")}
                settle(conn)
                by_torch = with_torch(folder, parameters, architecture)
                for name in ("save", "save_fsync", "load"):
                    times.add(f"torch {name}", by_torch[name])
                total = times.run("recover", lambda: value(conn, f"SELECT sum(length((r).model)) FROM {rows_of('battery')}"))
                assert total == sum(len(file) for _name, file in fleet_models.members(architecture, parameters))
                started = time.perf_counter()
                with conn.cursor() as cursor:  # row by row: what is read in one piece is sent first, and then parsed
                    rows = list(cursor.stream(f"SELECT (r).name, (r).model FROM {rows_of('battery')}", binary=True))
                times.add("recover to a client", time.perf_counter() - started)
                del rows
                assert_bits(recovered(conn, architecture, "battery", parameters), parameters, "the set")
                settle(conn)
                started = time.perf_counter()
                for name in fleet_models.names(sample):
                    conn.execute("SELECT load_model('one_' || name, onnx) FROM cells WHERE name = %s", (name,))
                times.add("load_model", (time.perf_counter() - started) * chosen.members / sample)
                started = time.perf_counter()
                for name in fleet_models.names(sample):
                    conn.execute("SELECT length(export_model(%s))", (f"one_{name}",))
                times.add("export_model", (time.perf_counter() - started) * chosen.members / sample)
                head = machine(conn)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    file, scaled = by_torch["by"], f"a transaction a model; {sample} models, scaled"
    lines = ["### Model sets: the whole set", "", f"{head} {chosen.members:,} members of {architecture.parameters:,} parameters, {floats / 1e6:.2f} MB of floats; "
             f"{chosen.rounds} rounds, interleaved, a CHECKPOINT and a sync before each.", "",
             "| way | save, s | least - greatest | recover, s | least - greatest | MB stored |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    ways = [("`save_model_set`, `recover_model_set` in the server", "save", "recover", stored["disk"]),
            ("the same, recovered to a client", "save", "recover to a client", stored["disk"]),
            (f"{file}, a file a model, with fsync", "torch save_fsync", "torch load", by_torch["disk"]),
            (f"{file}, a file a model, without fsync", "torch save", "torch load", by_torch["disk"]),
            (f"`load_model`, `export_model`: {scaled}", "load_model", "export_model", 0)]
    for name, save, recover, disk in ways:
        kept = f"{disk / 1e6:.1f}" if disk else ""
        lines.append(f"| {name} | {times.median(save):,.2f} | {times.spread(save)} | {times.median(recover):,.2f} | {times.spread(recover)} | {kept} |")
    ratio = stored["disk"] / floats
    lines += ["", f"- Bytes on disk, with indexes : bytes of floats = **{ratio:.3f}** (at most {BYTES_WANTED} wanted); bytes_added says {stored['said'] / floats:.3f}; "
              f"files take {by_torch['disk'] / floats:.3f}"]
    for name, save, recover, _disk in ways[2:]:
        faster = [f"**{times.median(way) / times.median(ours):.1f}** ({min(times.seconds[way]) / min(times.seconds[ours]):.1f} of the least times)"
                  for way, ours in ((save, "save"), (recover, "recover"), (recover, "recover to a client"))]
        lines.append(f"- {name.split(':')[0]} : a set = {faster[0]} to save, {faster[1]} to recover in the server, {faster[2]} to a client; {FASTER_WANTED} wanted")
    return [*lines, "- Every member was recovered bit for bit in every round.", ""]


def fill_records(conn, architecture: Architecture, members: int) -> None:
    """Measurements of each cell to train on: x real[4], and a voltage that depends on the cell."""
    conn.execute(f"""CREATE TABLE records AS SELECT to_char(cell, 'FM0000') AS cell, turn, x, ARRAY[(3.7 + 0.1 * sin(cell) + 0.3 * x[1] - 0.2 * x[2] * x[3])::real] AS y
        FROM generate_series(0, {members - 1}) AS cell, generate_series(1, {RECORDS}) AS turn,
             LATERAL (SELECT ARRAY[sin(cell * 7 + turn), cos(cell + turn * 3), sin(turn * turn), cos(cell * turn)]::real[] AS x) AS made""")
    conn.execute("CREATE INDEX ON records (cell, turn)")
    conn.execute("VACUUM (ANALYZE) records")
    assert architecture.widths[0] == 4 and architecture.widths[-1] == 1


def generations(cluster: Cluster, chosen) -> list[str]:
    """The generations in three ways; what is recovered of each is compared with what it was made of."""
    architecture, parameters = fleet_models.battery_nets(chosen.members)
    count, dice = chosen.generations, np.random.default_rng(3)
    sizes: dict[str, list[int]] = {"whole": [], "update": [], "provenance": []}
    saves, changes = Times(), []
    with Database(cluster, "generations") as database, database.connect() as conn:
        fill_records(conn, architecture, chosen.members)
        head, states = machine(conn), [parameters]
        fleet_models.copy_members(conn, "cells", fleet_models.members(architecture, parameters))
        before = size(conn)
        value(conn, "SELECT save_model_set('update_0', 'SELECT name, onnx FROM cells')")
        first = size(conn) - before
        value(conn, "SELECT save_model_set('provenance_0', 'SELECT name, onnx FROM cells')")
        last = size(conn)

        def grown(way: str) -> None:
            nonlocal last
            now = size(conn)
            sizes[way].append(now - last)
            last = now

        for turn in range(1, count + 1):
            made, trained, changed = fleet_models.next_generation(architecture, states[-1], turn)
            states.append(made)
            changes.append(changed)
            conn.execute("DROP TABLE cells")
            fleet_models.copy_members(conn, "cells", fleet_models.members(architecture, made))
            saves.run("update", lambda: value(conn, f"SELECT save_model_set('update_{turn}', 'SELECT name, onnx FROM cells', based_on => 'update_{turn - 1}')"))
            grown("update")
            names = [fleet_models.names(chosen.members)[number] for number in trained]
            training = (f"provenance_{turn}", f"provenance_{turn - 1}", "train_feed_forward", TRAINING_DATA, json.dumps(PARAMS), names)
            saves.run("provenance", lambda: value(conn, "SELECT train_model_set(%s, %s, %s, %s, %s, %s)", training))
            grown("provenance")
            say(f"generation {turn}: {changed / 1e6:.2f} MB changed, update {sizes['update'][-1] / 1e6:.2f} MB, provenance {sizes['provenance'][-1] / 1e6:.3f} MB")
        whole, whole_bytes = whole_sets(cluster, architecture, states)
        lines = ["### Model sets: generations", "", f"{head} Each generation trains a tenth of {chosen.members:,} members, half of these fully, half in the last layer. Bytes are "
                 "those by which the tables grow on disk, with indexes, after VACUUM.", "",
                 "| generation | MB changed | MB, kept whole | MB, update | update : changed | MB, provenance | s to save: update | s to train: provenance |",
                 "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
        for turn in range(count):
            update, provenance = sizes["update"][turn], sizes["provenance"][turn]
            lines.append(f"| {turn + 1} | {changes[turn] / 1e6:.2f} | {whole_bytes[turn + 1] / 1e6:.1f} | {update / 1e6:.2f} | {update / changes[turn]:.3f} | {provenance / 1e6:.3f} | "
                         f"{saves.seconds['update'][turn]:.2f} | {saves.seconds['provenance'][turn]:.2f} |")
        worst = max(update / changed for update, changed in zip(sizes["update"], changes))
        overall, most = sum(sizes["update"]) / sum(changes), max(sizes["provenance"])
        lines += ["", f"- All updates : all that changed = **{overall:.3f}**, the worst generation {worst:.3f} (at most {CHANGED_WANTED} wanted); the first set takes {first / 1e6:.1f} MB.",
                  f"- The largest set kept by provenance: **{most / 1e6:.3f} MB** (at most {PROVENANCE_WANTED / 1e6:.0f} wanted).", ""]
        return lines + recoveries(conn, whole, architecture, states, dice)


def whole_sets(cluster: Cluster, architecture: Architecture, states: list[np.ndarray]) -> tuple[list[Database], list[int]]:
    """Each generation saved whole, in a database of its own, since equal parts of two sets would be stored once otherwise; and its bytes."""
    databases, figures = [], []
    for turn, state in enumerate(states):
        databases.append(Database(cluster, f"whole_{turn}"))
        databases[-1].__enter__()
        with databases[-1].connect() as conn:
            fleet_models.copy_members(conn, "cells", fleet_models.members(architecture, state))
            before = size(conn)
            value(conn, f"SELECT save_model_set('whole_{turn}', 'SELECT name, onnx FROM cells')")
            figures.append(size(conn) - before)
            conn.execute("DROP TABLE cells")
    return databases, figures


def recoveries(conn, whole: list[Database], architecture: Architecture, states: list[np.ndarray], dice: np.random.Generator) -> list[str]:
    """Seconds to recover the set of a generation, milliseconds for a member of it."""
    names = [str(name) for name in dice.choice(fleet_models.names(len(states[0])), 20, replace=False)]
    figures: dict[tuple[str, int], tuple[float, float]] = {}
    for turn, database in enumerate(whole):
        with database.connect() as beside:
            for way, where in (("whole", beside), ("update", conn), ("provenance", conn)):
                sql, times = f"SELECT sum(length((r).model)) FROM {rows_of(f'{way}_{turn}')}", Times()
                for _ in range(1 if way == "provenance" and turn else 3):
                    times.run("set", lambda: value(where, sql))
                for name in names:
                    times.run("member", lambda: value(where, "SELECT length(recover_model(%s))", (f"{way}_{turn}/{name}",)))
                figures[way, turn] = times.median("set"), statistics.mean(times.seconds["member"])
                check(where, architecture, way, turn, states, names)
        database.__exit__()
        say(f"generation {turn}: " + ", ".join(f"{way} {figures[way, turn][0]:.2f} s" for way in ("whole", "update", "provenance")))
    lines = []
    for title, place, told, scale in (("Recovering a set against generations", 0, "Seconds in the server, the median of three runs; a set that is trained is recovered once.", 1),
                                      ("Recovering a member against generations", 1, "Milliseconds in the server, the mean of 20 members, the first of which begins with a set that the session has not seen.", 1e3)):
        lines += [f"### {title}", "", told, "", "| generation | kept whole | update | provenance |", "| ---: | ---: | ---: | ---: |"]
        lines += [f"| {turn} | " + " | ".join(f"{figures[way, turn][place] * scale:.3f}" for way in ("whole", "update", "provenance")) + " |" for turn in range(len(states))]
        lines.append("")
    return [*lines, "- Every set was recovered bit for bit; of those kept by provenance 20 members were recovered twice, with the same bits, and were changed if they were trained.", ""]


def check(conn, architecture: Architecture, way: str, turn: int, states: list[np.ndarray], names: list[str]) -> None:
    if way != "provenance":
        assert_bits(recovered(conn, architecture, f"{way}_{turn}", states[turn]), states[turn], f"{way}_{turn}")
        return
    touched = {number for at in range(turn) for number in np.flatnonzero((states[at] != states[at + 1]).any(axis=1))}
    for name in names:
        files = [value(conn, "SELECT recover_model(%s)", (f"provenance_{turn}/{name}",)) for _ in range(2)]
        assert files[0] == files[1], f"provenance_{turn}/{name} is trained differently each time"
        same = architecture.parameters_of(files[0]).tobytes() == states[0][int(name)].tobytes()
        assert same == (int(name) not in touched), f"provenance_{turn}/{name} {'was not trained' if same else 'was changed'}"


def predictions(cluster: Cluster, chosen) -> list[str]:
    architecture, parameters = fleet_models.battery_nets(chosen.members)
    times = Times()
    with Database(cluster, "predictions") as database, database.connect() as conn:
        conn.execute("CREATE EXTENSION plpython3u")
        fleet_models.copy_members(conn, "cells", fleet_models.members(architecture, parameters))
        value(conn, "SELECT save_model_set('battery', 'SELECT name, onnx FROM cells')")
        conn.execute("SELECT setseed(0.5)")
        conn.execute(f"""CREATE TABLE t AS SELECT to_char(floor(random() * {chosen.members}), 'FM0000') AS cell, ARRAY[random(), random(), random(), random()]::real[] AS x
            FROM generate_series(1, {chosen.rows})""")
        conn.execute("VACUUM (ANALYZE) t")
        conn.execute(PYTHON)
        ways = {"pg_tessera": "SELECT sum((predict('battery/' || cell, x))[1]::float8) FROM t", "PL/Python": "SELECT sum((python_cell(cell, x))[1]::float8) FROM t",
                "scan": "SELECT sum(x[1]::float8) FROM t"}
        sums, pid = {}, conn.info.backend_pid
        say("predictions: each way once, so that plans, sessions and cache are warm")
        first = {}
        for name, sql in ways.items():
            memory = resident(pid)
            started = time.perf_counter()
            sums[name] = value(conn, sql)
            first[name] = (time.perf_counter() - started, resident(pid) - memory)
        oracle = 0.0
        rows = conn.execute("SELECT cell::integer, x FROM t LIMIT 2000").fetchall()
        got = [row[0] for row in conn.execute("SELECT (predict('battery/' || cell, x))[1] FROM t LIMIT 2000").fetchall()]
        for (cell, x), answer in zip(rows, got):
            oracle = max(oracle, abs(float(architecture.run(parameters[cell], np.array([x]))[0, 0]) - answer))
        assert oracle < 1e-4, f"predictions are off by {oracle}"
        assert abs(sums["pg_tessera"] - sums["PL/Python"]) < 1e-6 * chosen.rows, sums
        for turn in range(chosen.rounds):
            for name, sql in ways.items() if turn % 2 else reversed(ways.items()):
                assert times.run(name, lambda: value(conn, sql)) == sums[name]
            say(f"predictions, round {turn + 1} of {chosen.rounds}: " + ", ".join(f"{name} {times.seconds[name][-1]:.2f} s" for name in ways))
        lines = ["### Model sets: predictions", "", f"{machine(conn)} `SELECT sum((predict('battery/' || cell, x))[1]) FROM t`, {chosen.rows:,} rows in random order over {chosen.members:,} "
                 f"members, one process; {chosen.rounds} rounds, interleaved.", "",
                 "| way | rows/s (median) | least | greatest | first query, s | memory that it added, MB |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
        shown = {"pg_tessera": "pg_tessera", "PL/Python": "PL/Python, an ONNX Runtime session a member", "scan": "`SELECT sum(x[1])`: the scan alone"}
    for name in ways:
        seconds = times.seconds[name]
        lines.append(f"| {shown[name]} | {chosen.rows / times.median(name):,.0f} | {chosen.rows / max(seconds):,.0f} | {chosen.rows / min(seconds):,.0f} | {first[name][0]:.1f} | "
                     f"{first[name][1] / 1e6:,.0f} |")
    ratio = times.median("PL/Python") / times.median("pg_tessera")
    return [*lines, "", f"- pg_tessera : PL/Python = **{ratio:.1f}** (at least {PREDICTIONS_WANTED} wanted); the sums differ by {abs(sums['pg_tessera'] - sums['PL/Python']):.2g} of "
            f"{sums['PL/Python']:,.0f}, 2,000 rows by at most {oracle:.2g} from float64.", ""]


def resident(pid: int) -> int:
    """Bytes of a process that are its own."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="500 members, 3 generations, 50,000 rows: two minutes")
    options.add_argument("--only", choices=("baseline", "generations", "predictions"), action="append", help="this part alone; may be given several times")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--members", type=int, help="5,000")
    options.add_argument("--generations", type=int, help="10")
    options.add_argument("--rows", type=int, help="of predictions: 1,000,000")
    options.add_argument("--markdown", type=Path, help="writes the figures to this file too")
    options.add_argument("--plots", type=Path, default=plots.FOLDER, help="folder of the plots against generations")
    chosen = options.parse_args()
    for name, full, quick in (("members", 5000, 500), ("generations", 10, 3), ("rows", 1_000_000, 50_000)):
        setattr(chosen, name, getattr(chosen, name) or (quick if chosen.quick else full))
    chosen.rounds = min(chosen.rounds, 2) if chosen.quick else chosen.rounds

    os.environ["PYTHONPATH"] = os.environ["SERVER_PYTHONPATH"]  # the server inherits it
    cluster = Cluster("bench_sets", settings=SERVER)
    cluster.remove()
    cluster.start()
    lines: list[str] = []
    try:
        for name, part in (("baseline", baseline), ("generations", generations), ("predictions", predictions)):
            if not chosen.only or name in chosen.only:
                lines += part(cluster, chosen)
    finally:
        cluster.remove()
    text = report(lines, chosen.markdown)
    if not chosen.quick:
        plots.draw(text, chosen.plots)


if __name__ == "__main__":
    main()
