"""`predict` equals ONNX Runtime however small the block cache is: its default, a tenth of a model, two frames, and of the
session's own memory without preload. One connection never has to leave the cache for private memory."""

import os

import numpy as np
import psycopg
import pytest

import zoo
from cluster import Cluster, Database
from helpers import assert_answers, load

FULL = bool(os.environ.get("TESSERA_FULL"))
# As test_predictions.py has them, without the second ones of equal shape; in the full run all, with all their batches. The tensors
# of `external` lie in another file, and are `fraud_fc_256`'s once they are stored.
LARGE = ["big_mlp", "big_mlp_2"] if FULL else ["big_mlp"]
TWINS = ("fraud_fc_256_tuned", "encoder_fc_tuned", "matmul_1024_edited", "ocr_detect", "ocr_turn")
SMALL = [model.name for model in zoo.ALL if not model.may_refuse and model.name not in ("external", "big_mlp", "big_mlp_2", *(() if FULL else TWINS))]
SETTINGS = {
    "the default": (),
    "a tenth of a model": ("tessera.block_cache_size = '8MB'",),
    "two frames": ("tessera.block_cache_size = '128kB'",),
    "without preload": ("shared_preload_libraries = ''",),
    "two frames without preload": ("shared_preload_libraries = ''", "tessera.block_cache_size = '128kB'"),
}


@pytest.fixture(scope="module")
def loaded():
    """A server with the models; each test starts it again with other settings."""
    cluster = Cluster("block_cache")
    cluster.remove()
    cluster.start()
    try:
        with Database(cluster, "cache") as database, database.connect() as conn:
            for name in SMALL + LARGE:
                load(conn, name)
            conn.close()
            yield database
            cluster.settings = ()
            cluster.stop()
            cluster.start()
    finally:
        cluster.remove()


def stats(conn: psycopg.Connection) -> dict:
    with conn.cursor(row_factory=psycopg.rows.dict_row) as cursor:
        return cursor.execute("SELECT * FROM tessera.block_cache_stats").fetchone()


def assert_sound(conn: psycopg.Connection) -> None:
    """Nothing is pinned between statements, and the cache's invariants hold."""
    assert stats(conn)["frames_pinned"] == 0
    assert conn.execute("SELECT * FROM tessera.check_cache()").fetchall() == []


@pytest.mark.parametrize("size", SETTINGS)
def test_predictions(loaded, size):
    server = loaded.server
    server.stop()
    server.settings = SETTINGS[size]
    server.start()
    names = SMALL + (LARGE if FULL or "tenth" in size or "default" in size else [])
    with loaded.connect() as conn:
        for name in names:
            batches = zoo.BY_NAME[name].batches
            # Large batches run on the compute thread, which holds one window of blocks while the next is made ready.
            one = batches[-1 if size in ("two frames", "a tenth of a model") else min(1, len(batches) - 1)]
            for batch in batches if FULL else (one,):
                assert_answers(conn, name, name, batch)
        after = stats(conn)
        assert after["shared"] == ("preload" not in size)
        assert after["loads"] > 0 and after["fallbacks"] == 0, after
        if "two frames" in size:
            assert after["frames"] == 2 and after["evictions"] > 500, after
        if "tenth" in size:
            assert after["frames"] == 128 and after["evictions"] > 1000, after
        if "default" in size and not FULL:
            assert after["frames"] == 4096 and after["evictions"] == 0, after
            assert_answers(conn, "minilm", "minilm", zoo.BY_NAME["minilm"].batches[1])
            assert stats(conn)["loads"] == after["loads"], "what is in the cache was loaded again"
        assert_sound(conn)


def test_what_is_inline(loaded):
    """The threshold moves tensors between plan and blocks, and changes no answer."""
    server = loaded.server
    server.stop()
    server.settings = ()
    server.start()
    with loaded.connect() as conn:
        loads = [0]
        for limit in ("2147483647", "32768", "0"):
            conn.execute(f"SET tessera.inline_tensor_bytes = {limit}")
            for name in ("minilm", "magika", "fraud_fc_256", "vad", "cnn"):
                assert_answers(conn, name, name, zoo.BY_NAME[name].batches[1])
            loads.append(stats(conn)["loads"])
        assert loads[1] == 0, "with everything inline nothing is cached"
        assert 0 < loads[2] < loads[3], loads
        assert_sound(conn)


def test_two_sessions_load_once(loaded):
    """What one session has loaded, another finds."""
    server = loaded.server
    server.stop()
    server.settings = ()
    server.start()
    with loaded.connect() as one, loaded.connect() as other:
        assert_answers(one, "encoder_fc", "encoder_fc", 7)
        first = stats(one)
        assert_answers(other, "encoder_fc", "encoder_fc", 7)
        second = stats(other)
        assert first["loads"] == second["loads"] > 0
        assert second["hits"] - first["hits"] == first["loads"]
        assert first["bytes_used"] <= 1.1 * np.float32().nbytes * (76 * 3072 + 3072 * 768)
