"""Equal blocks are stored once, whoever brings them; the views and the disk agree."""

import pytest

from helpers import Background, assert_answers, load, onnx_file, storage, store_size

pytestmark = pytest.mark.newer


@pytest.fixture
def conn(fresh):
    with fresh.connect() as connection:
        yield connection


@pytest.mark.parametrize("name", ["encoder_fc", "minilm", "ocr_read"])
def test_same_model_twice(conn, name):
    load(conn, "first", name)
    alone, size = storage(conn), store_size(conn)
    assert alone["blocks_referenced"] > 0
    load(conn, "second", name)
    both = storage(conn)
    assert both["blocks_stored"] == alone["blocks_stored"]
    assert both["blocks_referenced"] == 2 * alone["blocks_referenced"]
    assert both["deduplication_ratio"] >= 1.99 * max(1, alone["deduplication_ratio"] * 0.999)
    assert store_size(conn) <= size + 8192 * 2, "the relation grew although no block is new"
    total = conn.execute("SELECT octet_length(export_model('first'))").fetchone()[0]
    assert size < total * 1.25 + 200_000, f"{size} bytes on disk for a model of {total}"


def test_ratio_of_two(conn):
    load(conn, "first", "encoder_fc")
    load(conn, "second", "encoder_fc")
    assert storage(conn)["deduplication_ratio"] >= 1.99


def test_fine_tuned_variant(conn):
    """Only the last layer is new: 24 x 6 tiles of its weight and one of its bias."""
    load(conn, "encoder_fc")
    before = storage(conn)
    load(conn, "encoder_fc_tuned")
    after = storage(conn)
    assert after["blocks_stored"] - before["blocks_stored"] == 145
    assert after["blocks_referenced"] == 2 * before["blocks_referenced"]


def test_one_changed_weight(conn):
    load(conn, "matmul_1024")
    before, size = storage(conn), store_size(conn)
    assert before["blocks_stored"] == 64  # 8 x 8 tiles of 128 x 128
    load(conn, "matmul_1024_edited")
    assert storage(conn)["blocks_stored"] == 65
    assert store_size(conn) - size <= 65536 + 4 * 8192


def test_graph_once(conn):
    load(conn, "matmul_1024")
    load(conn, "matmul_1024_edited")
    assert conn.execute("SELECT count(*) FROM tessera.graph").fetchone()[0] == 1


def test_shared_blocks_of_a_tensor(conn):
    load(conn, "encoder_fc")
    load(conn, "encoder_fc_tuned")
    sql = "SELECT name, shared_blocks = blocks FROM tessera.tensors WHERE model = 'encoder_fc_tuned'"
    assert dict(conn.execute(sql).fetchall()) == {"w0": True, "b0": True, "w1": False, "b1": False}


BLOCK = "(SELECT array_agg(((i * 37 %% 1001) / 8.0)::real ORDER BY i) FROM generate_series(1, 16384) AS i)::tensor_block"


def test_two_sessions_one_block(fresh):
    with fresh.connect(autocommit=False) as one, fresh.connect(autocommit=False) as two:
        one.execute("CREATE TABLE w (id int, data tensor_block) USING tensor_block")
        one.commit()
        insert = f"INSERT INTO w SELECT %s, {BLOCK}"
        one.execute(insert, (1,))
        other = Background(two.execute, insert, (2,))
        other.waits(0.3)  # it may wait for the first, or not
        one.commit()
        other.result()
        two.commit()
        line = storage(one, "w")
        assert (line["blocks_referenced"], line["blocks_stored"]) == (2, 1)
        assert one.execute("SELECT count(*), count(DISTINCT data::bytea) FROM w").fetchone() == (2, 1)
        assert store_size(one, "w") < 65536 + 16 * 8192


def test_first_session_rolls_back(fresh):
    """A block whose first inserter went away is still there for the second."""
    with fresh.connect(autocommit=False) as one, fresh.connect(autocommit=False) as two:
        one.execute("CREATE TABLE w (id int, data tensor_block) USING tensor_block")
        one.commit()
        insert = f"INSERT INTO w SELECT %s, {BLOCK}"
        one.execute(insert, (1,))
        other = Background(two.execute, insert, (2,))
        other.waits(0.3)
        one.rollback()
        other.result()
        two.commit()
        assert one.execute(f"SELECT id, data = {BLOCK} FROM w", ()).fetchall() == [(2, True)]


def test_many_sessions(fresh):
    """Four sessions insert the same fifty values in different orders: fifty blocks."""
    values = "(SELECT array_agg(((i * %s) %% 997)::real ORDER BY i) FROM generate_series(1, 4096) AS i)::tensor_block"

    def insert(session: int) -> None:
        with fresh.connect() as conn:
            for k in range(50):
                conn.execute(f"INSERT INTO w SELECT %s, {values}", (session, 2 + (k * (2 * session + 1)) % 50))

    with fresh.connect() as conn:
        conn.execute("CREATE TABLE w (id int, data tensor_block) USING tensor_block")
        for work in [Background(insert, session) for session in range(4)]:
            work.result()
        distinct = conn.execute("SELECT count(DISTINCT data::bytea) FROM w").fetchone()[0]
        line = storage(conn, "w")
        assert line["blocks_referenced"] == 200
        assert line["blocks_stored"] == distinct


def test_block_size_per_load(conn):
    """Smaller blocks, more of them: 1024 x 1024 float32 in blocks of 16 kB is 256 of 64 x 64."""
    content = onnx_file("matmul_1024")
    conn.execute("SELECT load_model('small', %b, block_bytes => 16384)", (content,))
    assert conn.execute("SELECT blocks FROM tessera.tensors WHERE model = 'small'").fetchone()[0] == 256
    assert_answers(conn, "small", "matmul_1024", 7)
