"""The block cache under real models: views, privileges, what is kept, and changes of the tables while blocks are loaded."""

import time

import psycopg
import pytest

from cluster import Cluster, Database
from helpers import Background, assert_answers, fails, load, unlike


@pytest.fixture(scope="module")
def small():
    """A server whose cache is far smaller than the models."""
    cluster = Cluster("cache_models", settings=("tessera.block_cache_size = '2MB'",))
    cluster.remove()
    cluster.start()
    yield cluster
    cluster.remove()


def rows(conn: psycopg.Connection, sql: str, *parameters) -> list[dict]:
    with conn.cursor(row_factory=psycopg.rows.dict_row) as cursor:
        return cursor.execute(sql, parameters).fetchall()


def test_views(fresh):
    with fresh.connect() as conn:
        load(conn, "minilm")
        load(conn, "again", "minilm")
        conn.execute("SELECT reset_cache_stats()")
        assert_answers(conn, "minilm", "minilm", 1)
        (total,) = rows(conn, "SELECT * FROM tessera.block_cache_stats")
        (model,) = rows(conn, "SELECT * FROM tessera.block_cache_models")
        frames = rows(conn, "SELECT * FROM tessera.block_cache")
        assert total["shared"] and total["stats_reset"] and total["frames_pinned"] == 0
        assert model["models"] == ["again@1", "minilm@1"] and model["runs"] >= 1
        assert model["misses"] == model["loads"] == model["frames"] == len(frames) > 100
        assert model["bytes"] == sum(frame["bytes"] for frame in frames) <= total["bytes_used"]
        assert all(frame["state"] == "valid" and frame["pins"] == 0 and frame["models"] == model["models"] for frame in frames)
        with fresh.connect() as other:  # another session finds all of it
            assert_answers(other, "again", "minilm", 1)
            (after,) = rows(other, "SELECT * FROM tessera.block_cache_models")
            assert after["loads"] == model["loads"] and after["hits"] >= model["loads"]


def test_who_sees_what(fresh):
    with fresh.connect() as conn:
        load(conn, "minilm")
        assert_answers(conn, "minilm", "minilm", 1)
        conn.execute("DROP ROLE IF EXISTS tessera_cache_reader")
        conn.execute("CREATE ROLE tessera_cache_reader")
        conn.execute("REVOKE USAGE ON DOMAIN tessera_model.minilm FROM PUBLIC")
        conn.execute("SET ROLE tessera_cache_reader")
        assert rows(conn, "SELECT * FROM tessera.block_cache") == rows(conn, "SELECT * FROM tessera.block_cache_models") == []
        assert len(rows(conn, "SELECT * FROM tessera.block_cache_stats")) == 1
        for call in ("reset_cache_stats()", "tessera.check_cache()", "keep_model('minilm')", "release_model('minilm')"):
            fails(conn, f"SELECT {call}", sqlstate="42501", hint="model" in call)
        conn.execute("RESET ROLE")
        conn.execute("GRANT USAGE ON DOMAIN tessera_model.minilm TO tessera_cache_reader")
        conn.execute("SET ROLE tessera_cache_reader")
        assert len(rows(conn, "SELECT * FROM tessera.block_cache_models")) == 1
        assert len(rows(conn, "SELECT * FROM tessera.block_cache")) > 100
        conn.execute("RESET ROLE")
        with fresh.server.connect("postgres") as elsewhere:
            elsewhere.execute("DROP DATABASE IF EXISTS cache_elsewhere")
        with Database(fresh.server, "cache_elsewhere") as database, database.connect() as elsewhere:
            assert rows(elsewhere, "SELECT * FROM tessera.block_cache") == []
        conn.execute("DROP OWNED BY tessera_cache_reader")
        conn.execute("DROP ROLE tessera_cache_reader")


def test_keep_model(fresh):
    with fresh.connect() as conn:
        load(conn, "minilm")
        conn.execute("SELECT keep_model('minilm')")
        assert rows(conn, "SELECT kept FROM tessera.block_cache_models") == [{"kept": True}]
        assert conn.execute("SELECT release_model('minilm@1'), release_model('minilm')").fetchone() == (True, False)
        fails(conn, "SELECT keep_model('nobody')", sqlstate="42704")


def test_a_model_larger_than_the_cache(small):
    with Database(small, "larger") as database, database.connect() as conn:
        load(conn, "minilm")
        for batch in (1, 7):
            assert_answers(conn, "minilm", "minilm", batch)
        (total,) = rows(conn, "SELECT * FROM tessera.block_cache_stats")
        assert total["evictions"] > 0 and total["fallbacks"] == 0
        assert conn.execute("SELECT * FROM tessera.check_cache()").fetchall() == []


def test_two_frames():
    """The smallest cache there is serves one session without private memory."""
    cluster = Cluster("cache_two", settings=("tessera.block_cache_size = '128kB'",))
    cluster.remove()
    cluster.start()
    try:
        with cluster.connect() as conn:
            for name in ("encoder_fc", "minilm", "cnn"):
                load(conn, name)
                assert_answers(conn, name, name, 7)
            (total,) = rows(conn, "SELECT * FROM tessera.block_cache_stats")
            assert total["frames"] == 2 and total["evictions"] > 500 and total["fallbacks"] == 0
    finally:
        cluster.remove()


def test_upheaval(small):
    """Models are loaded and dropped, their table is repacked, vacuumed, rewritten and truncated for a moment, others predict through a cache that holds little
    of them: no deadlock, no wrong number, no pin left."""
    with Database(small, "upheaval") as database, database.connect() as conn:
        for name in ("encoder_fc", "minilm"):
            load(conn, name)
        until = time.monotonic() + 20

        def predict(name):
            with database.connect() as mine:
                count = 0
                while time.monotonic() < until:
                    assert_answers(mine, name, name, 1)
                    count += 1
                return count

        def change():
            with database.connect() as mine:
                turn = 0
                while time.monotonic() < until:
                    turn += 1
                    load(mine, "passing", unlike("encoder_fc", turn % 250))
                    mine.execute("SELECT predict('passing', array_fill(0.1::real, ARRAY[76]))")
                    mine.execute("SELECT drop_model('passing')")
                    mine.execute("VACUUM tessera.weight")
                    mine.execute("SELECT repack('tessera.weight')")
                    with mine.transaction(force_rollback=True):
                        mine.execute("TRUNCATE tessera.weight")
                    if turn % 3 == 0:
                        mine.execute("VACUUM FULL tessera.weight")
                return turn

        work = [Background(predict, name) for name in ("encoder_fc", "encoder_fc", "minilm", "minilm")]
        changes = Background(change)
        assert min(w.result(120) for w in work) > 1
        assert changes.result(120) > 1
        assert conn.execute("SELECT * FROM tessera.check_cache()").fetchall() == []
        assert conn.execute("SELECT frames_pinned FROM tessera.block_cache_stats").fetchone() == (0,)
