"""kill -9 of the server at a random moment of a load: after recovery each model is wholly there and right, or not there."""

import math
import os
import random
import sys
import time

import numpy as np
import onnxruntime
import psycopg
import pytest

import generate
from cluster import Cluster
from helpers import Background, assert_close, predict_rows, storage

ROUNDS = 100 if os.environ.get("TESSERA_FULL") else 20
SIZES = [1024, 1024, 1024, 1024, 1024, 256]


@pytest.fixture
def crashing(request):
    cluster = Cluster("crash", settings=("wal_level = replica", "checkpoint_timeout = '30s'"))
    cluster.remove()
    cluster.start()
    yield cluster
    cluster.remove()


def make_model(folder, seed: int) -> bytes:
    """17 MB of weights that no other seed has."""
    generate.dense_net(folder, "round", SIZES, generate.dense_weights(1000 + seed, SIZES, transposed=False))
    return (folder / "round.onnx").read_bytes()


def work(cluster: Cluster, name: str, content: bytes) -> bool:
    """Loads a model, and inserts into a table of blocks before and after; True if it was told that all committed."""
    try:
        with cluster.connect() as conn:
            conn.execute("INSERT INTO own SELECT %s, predict_input(%s)::tensor_block", (name + " before", name))
            conn.execute("SELECT load_model(%s, %b)", (name, content))
            conn.execute("INSERT INTO own SELECT %s, predict_input(%s)::tensor_block", (name + " after", name))
        return True
    except psycopg.OperationalError:
        return False


PREDICT_INPUT = """CREATE FUNCTION predict_input(seed text) RETURNS real[] LANGUAGE sql IMMUTABLE AS
    'SELECT array_agg((((hashtext(seed) %% 1000 + i) %% 256) / 256.0)::real ORDER BY i) FROM generate_series(1, 1024) AS i'"""


def test_kill_during_loads(crashing, tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}", file=sys.stderr)
    dice = random.Random(seed)
    with crashing.connect() as conn:
        conn.execute(PREDICT_INPUT.replace("%%", "%"))
        conn.execute("CREATE TABLE own (note text PRIMARY KEY, data tensor_block) USING tensor_block")

    contents = {name: make_model(tmp_path, 100 + i) for i, name in enumerate(("first", "second"))}
    shortest = math.inf
    for name, content in contents.items():
        started = time.monotonic()
        assert work(crashing, name, content)
        shortest = min(shortest, time.monotonic() - started)
    promised, seen_whole, seen_none = set(contents), 0, 0

    for turn in range(1, ROUNDS + 1):
        name = f"m{turn}"
        contents[name] = make_model(tmp_path, turn)
        postmaster = crashing.postmaster()
        loading = Background(work, crashing, name, contents[name])
        wait = dice.uniform(0, shortest)
        time.sleep(wait)
        crashing.kill(postmaster)
        if loading.result():
            promised.add(name)
            shortest = min(shortest, loading.seconds)
        crashing.start()
        with crashing.connect() as conn:
            where = f"seed {seed}, round {turn}, killed after {wait:.3f} s"
            there = {row[0] for row in conn.execute("SELECT name FROM tessera.models")}
            assert promised <= there, f"{where}: {promised - there} had been committed and are gone"
            if name in there:
                seen_whole += 1
                promised.add(name)
                check_answer(conn, name, contents[name], where)
            else:
                seen_none += 1
                with pytest.raises(psycopg.Error) as caught:
                    conn.execute("SELECT predict(%s, '{1}'::real[])", (name,))
                assert not caught.value.sqlstate.startswith("XX"), where
            rows = conn.execute("SELECT count(*), count(*) FILTER (WHERE data::real[] = predict_input(split_part(note, ' ', 1))) FROM own")
            whole, right = rows.fetchone()
            assert whole == right, f"{where}: {whole - right} rows of the own table are wrong"

    with crashing.connect() as conn:
        for name in sorted(promised):
            check_answer(conn, name, contents[name], f"seed {seed}, at the end")
        conn.execute("VACUUM")
        conn.execute("VACUUM")
        assert storage(conn)["blocks_referenced"] > 0
        check_answer(conn, "first", contents["first"], f"seed {seed}, after vacuum")
    print(f"{seen_whole} loads were whole, {seen_none} left nothing", file=sys.stderr)
    assert seen_none >= 5, "too few kills hit a load: the waits are too long"


def check_answer(conn: psycopg.Connection, name: str, content: bytes, where: str) -> None:
    row = np.array(conn.execute("SELECT predict_input(%s)", (name,)).fetchone()[0], dtype=np.float32)
    (wanted,) = onnxruntime.InferenceSession(content).run(None, {"x": row[None]})
    assert_close(predict_rows(conn, name, row), wanted[0].astype(float), f"{where}: {name}")
