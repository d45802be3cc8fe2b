"""Without shared_preload_libraries everything of this release works."""

import pytest

from cluster import Cluster, Database
from helpers import assert_answers, load, onnx_file, storage


@pytest.fixture(scope="module")
def plain_server():
    cluster = Cluster("plain", settings=("shared_preload_libraries = ''",))
    cluster.remove()
    cluster.start()
    yield cluster
    cluster.remove()


def test_load_predict_drop(plain_server):
    with Database(plain_server, "plain") as database:
        with database.connect() as conn:
            assert conn.execute("SHOW shared_preload_libraries").fetchone() == ("",)
            load(conn, "minilm")
            load(conn, "again", "minilm")
            assert storage(conn)["deduplication_ratio"] >= 1.99
            assert_answers(conn, "minilm", "minilm", 7)
        with database.connect() as conn:  # the first statement of a session is the one that loads the library
            assert_answers(conn, "again", "minilm", 7)
            conn.execute("SELECT load_model('minilm', %b)", (onnx_file("cnn"),))
            assert_answers(conn, "minilm", "cnn", 7)
            conn.execute("SELECT drop_model('minilm')")
            conn.execute("VACUUM")
            assert_answers(conn, "again", "minilm", 1)
        with database.connect() as conn:
            conn.execute("CREATE TABLE own (data tensor_block) USING tensor_block")
            conn.execute("INSERT INTO own SELECT array_fill(1::real, ARRAY[100, 100])::tensor_block FROM generate_series(1, 9)")
        with database.connect() as conn:
            assert conn.execute("SELECT count(DISTINCT data::bytea) FROM own").fetchone() == (1,)
            assert storage(conn, "own")["blocks_stored"] == 1


def test_the_block_cache_is_the_sessions(plain_server):
    """It is told so once, with the way out; its size can be set by the session before it is used."""
    with Database(plain_server, "plain_cache") as database:
        with database.connect() as conn:
            load(conn, "minilm")
        for size, frames in (("128kB", 2), ("256MB", 4096)):
            with database.connect() as conn:
                told = []
                conn.add_notice_handler(lambda notice, told=told: told.append((notice.message_primary, notice.message_hint)))
                conn.execute("SELECT * FROM tessera.models")
                conn.execute(f"SET tessera.block_cache_size = '{size}'")
                for batch in (1, 7):
                    assert_answers(conn, "minilm", "minilm", batch)
                cache = conn.execute("SELECT shared, frames, hits, fallbacks FROM tessera.block_cache_stats").fetchone()
                assert cache[:2] == (False, frames) and cache[3] == 0
                assert [message for message, _ in told] == ["the block cache is of this session alone"]
                assert "shared_preload_libraries" in told[0][1]
                assert conn.execute("SELECT * FROM tessera.check_cache()").fetchall() == []
