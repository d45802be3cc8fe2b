"""Blocks in small forms: they come back bit for bit, whoever asks, and only what shows sizes can tell them from others."""

import struct
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import psycopg
import pytest
from onnx import numpy_helper

from cluster import Cluster, Database
from helpers import assert_answers, assert_close, expected, load, onnx_file, predict_rows, storage

pytestmark = pytest.mark.newer

DATA_CORRUPTED = "XX001"
HEADER, HEAD_PAGES, PAGE_BYTES = 24, 8, 8168
LOCATOR_PAGE = 3  # the first page of locators: the head has the metapage and two maps before it

DICE = np.random.default_rng(7)
WEIGHTS = (DICE.standard_normal((128, 128)) * 0.05).astype(np.float32)


def bfloat16(values: np.ndarray) -> np.ndarray:
    return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def bits(*values: int) -> np.ndarray:
    return np.resize(np.array(values, np.uint32), 1000).view(np.float32)


# Blocks by name: elements, and the form in which each is stored without and with compression.
BLOCKS = {
    "zeros": (np.zeros((128, 128), np.float32), "constant", "constant"),
    "ones": (np.ones((3, 700), np.float64), "constant", "constant"),
    "bytes": (np.full((64, 64), 200, np.uint8), "constant", "constant"),
    "brain": (bfloat16(WEIGHTS), "bfloat16", "bfloat16+huffman"),
    "half": (WEIGHTS.astype(np.float16).astype(np.float32), "float16", "float16+huffman"),
    "double": (WEIGHTS.astype(np.float64), "float32", "float32+huffman"),
    "weights": (WEIGHTS, None, "huffman"),
    "numbers": (np.arange(5000, dtype=np.int64) % 1000, None, "huffman"),
    "noise": (DICE.integers(0, 256, 4096, np.uint8), None, None),
    # Signs of zeros, infinities, quiet NaNs with a payload, subnormal numbers of both types: float16 has them all.
    "odd half": (bits(0x80000000, 0, 0x7F800000, 0xFF800000, 0x7FC02000, 0xFFB4E000, 0x33800000, 0xB8FFC000), "float16", "huffman"),
    # A signalling NaN and subnormal float32 without a low half: bfloat16 has them.
    "odd brain": (bits(0x7F810000, 0x00010000, 0x807F0000, 0x80000000, 0x3F800000), "bfloat16", "huffman"),
    # One bit too many for any.
    "odd": (bits(0x7FC00001, 0x00000001, 0x3F801000, 0x80000000, *DICE.integers(0, 2**32, 990)), None, None),
}
COMPRESSIONS = ("none", "huffman")


def fill(conn: psycopg.Connection, table: str = "w", compression: str = "none") -> None:
    conn.execute(f"CREATE TABLE {table} (name text PRIMARY KEY, data tensor_block) USING tensor_block")
    conn.execute(f"SET tessera.block_compression = {compression}")
    for name, (values, *_) in BLOCKS.items():
        conn.execute(f"INSERT INTO {table} VALUES (%s, tensor_block(%s, %s, %b))",
                     (name, values.dtype.name, list(values.shape), values.tobytes()))
    conn.execute("RESET tessera.block_compression")


def forms(conn: psycopg.Connection, table: str = "w") -> dict[str, str | None]:
    """The form of each block; also checks its sizes."""
    rows = conn.execute(f"""SELECT w.name, b.compression, b.stored_bytes, b.raw_bytes, tessera.stored_bytes(w.data)
                            FROM {table} w LEFT JOIN tessera.store_blocks('{table}') b ON b.block_id = tessera.block_id(w.data)""")
    found = {}
    for name, form, stored, raw, shown in rows.fetchall():
        assert raw == BLOCKS[name][0].nbytes + 4 + 4 * BLOCKS[name][0].ndim and stored == shown, name
        assert (stored < raw) == (form is not None), name
        found[name] = form
    return found


def wanted(compression: str) -> dict[str, str | None]:
    return {name: block[1 + COMPRESSIONS.index(compression)] for name, block in BLOCKS.items()}


def assert_whole(conn: psycopg.Connection, table: str = "w") -> None:
    """Every block has its bytes, and the store is sound."""
    rows = dict(conn.execute(f"SELECT name, data(data) FROM {table}").fetchall())
    assert rows.keys() == BLOCKS.keys()
    for name, (values, *_) in BLOCKS.items():
        assert rows[name] == values.tobytes(), name
    assert conn.execute("SELECT * FROM check_store(%s::regclass)", (table,)).fetchall() == []


@pytest.fixture
def conn(fresh):
    with fresh.connect() as connection:
        yield connection


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_forms(conn, compression):
    fill(conn, compression=compression)
    found = forms(conn)
    odd = {name for name in BLOCKS if name.startswith("odd")}
    forms_wanted = wanted(compression)
    assert {k: v for k, v in found.items() if k not in odd} == {k: v for k, v in forms_wanted.items() if k not in odd}
    if compression == "none":
        assert found == forms_wanted
    assert_whole(conn)
    sizes = dict(conn.execute("SELECT name, tessera.stored_bytes(data) FROM w").fetchall())
    assert (sizes["zeros"], sizes["ones"], sizes["bytes"]) == (16, 20, 13)
    if compression == "none":
        assert {sizes[name] for name in ("brain", "half", "double")} == {12 + 2 * 16384, 12 + 4 * 16384}
    else:
        assert sizes["weights"] < 0.88 * 65548 and sizes["brain"] < 0.4 * 65548
    shown = storage(conn, "w")
    assert shown["bytes_stored"] == shown["bytes_referenced"] == sum(sizes.values())


def test_equal_blocks_are_one_in_whatever_form(conn):
    """The identity is of the elements: what is there already stays as it is."""
    fill(conn, compression="huffman")
    before = conn.execute("SELECT count(*), sum(stored_bytes) FROM tessera.store_blocks('w')").fetchone()
    conn.execute("INSERT INTO w SELECT name || ' again', (dtype(data) || '[' || array_to_string(shape(data), ',') || ']:' || "
                 "replace(encode(data(data), 'base64'), E'\\n', ''))::tensor_block FROM w")
    assert conn.execute("SELECT count(*), sum(stored_bytes) FROM tessera.store_blocks('w')").fetchone() == before
    same = "SELECT count(*) FROM w a JOIN w b ON b.name = a.name || ' again' AND tessera.block_id(a.data) = tessera.block_id(b.data)"
    assert conn.execute(same).fetchone()[0] == len(BLOCKS)
    # Into a table that has some of them in another form.
    fill(conn, "v")
    conn.execute("UPDATE v SET data = w.data FROM w WHERE w.name = v.name")
    assert forms(conn, "v") == wanted("none")
    assert_whole(conn, "v")


def test_copies(conn):
    """Into heap tables and back, by CREATE TABLE AS, INSERT ... SELECT, COPY and ALTER TABLE."""
    fill(conn, compression="huffman")
    conn.execute("CREATE TABLE heaps USING heap AS SELECT * FROM w")
    conn.execute("CREATE TABLE ours USING tensor_block AS SELECT * FROM w")
    assert conn.execute("SELECT count(*) FROM heaps h JOIN w USING (name) WHERE h.data::bytea = w.data::bytea").fetchone()[0] == len(BLOCKS)
    assert forms(conn, "ours") == wanted("none")
    assert_whole(conn, "ours")
    conn.execute("SET tessera.block_compression = huffman")
    conn.execute("ALTER TABLE w ADD extra int DEFAULT random(), ALTER data TYPE tensor_block USING data")
    assert_whole(conn)
    conn.execute("CREATE TABLE back (LIKE w) USING tensor_block")
    with conn.cursor().copy("COPY w TO STDOUT (FORMAT binary)") as out:
        content = b"".join(bytes(part) for part in out)
    with conn.cursor().copy("COPY back FROM STDIN (FORMAT binary)") as into:
        into.write(content)
    assert forms(conn, "back") == forms(conn)
    assert_whole(conn, "back")


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_slices(conn, compression):
    """What asks for a part of a value without reading all of it, as `substr` of a bytea does."""
    fill(conn, compression=compression)
    conn.execute("CREATE FUNCTION slice(tensor_block, int, int) RETURNS bytea LANGUAGE internal STRICT AS 'bytea_substr'")
    for name, (values, *_) in BLOCKS.items():
        whole = conn.execute("SELECT data::bytea FROM w WHERE name = %s", (name,)).fetchone()[0]
        head = len(whole) - values.nbytes
        size = len(whole)
        for start, length in [(0, 1), (0, head), (0, size), (1, size), (head, size - head), (head - 1, 3), (head + 1, 100),
                              (size // 2, 5000), (size - 1, 1), (size - 1, 50), (size, 1), (0, 2**30)]:
            part = conn.execute("SELECT slice(data, %s, %s) FROM w WHERE name = %s", (start + 1, length, name)).fetchone()[0]
            assert part == whole[start : start + length], (name, start, length)


def test_columns_with_compression_of_their_own(conn):
    """Where a column asks for PostgreSQL's compression, blocks without a small form get it."""
    conn.execute("CREATE TABLE w (name text PRIMARY KEY, data tensor_block) USING tensor_block")
    conn.execute("ALTER TABLE w ALTER data SET STORAGE EXTENDED")
    for name, (values, *_) in BLOCKS.items():
        conn.execute("INSERT INTO w VALUES (%s, tensor_block(%s, %s, %b))", (name, values.dtype.name, list(values.shape), values.tobytes()))
    found = forms(conn)
    assert found["numbers"] == "pglz" and found["weights"] is None
    assert all(found[name] == form for name, form in wanted("none").items() if form)
    assert_whole(conn)


def test_rewrites_and_moves_keep_forms_and_ids(conn):
    fill(conn, compression="huffman")
    shown = "SELECT block_id, hash, stored_bytes, raw_bytes, compression FROM tessera.store_blocks('w') ORDER BY 1"
    before = conn.execute(shown).fetchall()
    for statement in ["VACUUM FULL w", "CLUSTER w USING w_pkey", "SELECT repack('w', 'name')", "VACUUM w", "REINDEX TABLE w"]:
        conn.execute(statement)
        assert conn.execute(shown).fetchall() == before, statement
        assert_whole(conn)
    conn.execute("DELETE FROM w WHERE name < 'n'")
    for _ in range(2):
        conn.execute("VACUUM w")
    kept = [name for name in BLOCKS if name >= "n"]
    assert conn.execute("SELECT count(*) FROM tessera.store_blocks('w')").fetchone()[0] == len(kept)
    fill(conn, "v")
    conn.execute("INSERT INTO w SELECT * FROM v WHERE name < 'n'")
    assert_whole(conn)


def test_dump_and_restore(fresh, server, tmp_path):
    with fresh.connect() as conn:
        fill(conn, compression="huffman")
        load(conn, "encoder_fc")
    for form, compression in (("plain", "huffman"), ("custom", "none")):
        file = tmp_path / form
        server.program("pg_dump", f"--format={form}", "-d", fresh.name, "-f", str(file))
        with server.connect("postgres") as conn:
            conn.execute("DROP DATABASE IF EXISTS restored WITH (FORCE)")
            conn.execute("CREATE DATABASE restored TEMPLATE template0")
            conn.execute(f"ALTER DATABASE restored SET tessera.block_compression = {compression}")
        try:
            program = ("psql", "-X", "-q", "-v", "ON_ERROR_STOP=1") if form == "plain" else ("pg_restore", "--exit-on-error")
            arguments = ("-f", str(file)) if form == "plain" else (str(file),)
            server.program(*program, "-d", "restored", *arguments)
            with server.connect("restored") as conn, fresh.connect() as source:
                assert forms(conn) == (forms(source) if compression == "huffman" else wanted("none"))
                assert_whole(conn)
                assert_answers(conn, "encoder_fc", "encoder_fc", 7)
        finally:
            with server.connect("postgres") as conn:
                conn.execute("DROP DATABASE restored WITH (FORCE)")


def mlp(name: str, narrow) -> bytes:
    """The zoo's encoder with other weights of the same shapes."""
    model = onnx.load_from_string(onnx_file(name))
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(narrow(values.copy()), tensor.name))
    return model.SerializeToString()


NARROW = {
    "float32": lambda values: values,
    "bfloat16": bfloat16,
    "float16": lambda values: values.astype(np.float16).astype(np.float32),
    "constant": lambda values: np.full_like(values, 0.001),
}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kind", NARROW)
def test_predictions(conn, kind, compression):
    """Predictions from blocks of each form are those of ONNX Runtime, and the views show what is stored."""
    content = mlp("encoder_fc", NARROW[kind])
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    port = session.get_inputs()[0]
    rows = np.random.default_rng(1).standard_normal((5, port.shape[-1])).astype(np.float32)
    (answer,) = session.run(None, {port.name: rows})
    conn.execute(f"SET tessera.block_compression = {compression}")
    load(conn, "m", content)
    assert_close(predict_rows(conn, "m", rows), answer, f"{kind}, {compression}")
    parameters, stored, shown = conn.execute(
        "SELECT m.parameters, m.bytes_stored, (SELECT sum(bytes) FROM tessera.tensors) FROM tessera.models m").fetchone()
    total = conn.execute("SELECT sum(stored_bytes) FROM tessera.store_blocks('tessera.weight') WHERE state = 'live'").fetchone()[0]
    assert stored == total
    assert shown >= stored
    assert storage(conn)["bytes_stored"] == total
    bound = {"float32": (1.01, 0.88), "bfloat16": (0.51, 0.4), "float16": (0.51, 0.45), "constant": (0.01, 0.01)}
    assert stored < 4 * parameters * bound[kind][COMPRESSIONS.index(compression)]
    if kind == "float32" and compression == "huffman":
        assert_answers(conn, "m", "encoder_fc", 7)
    exported = conn.execute("SELECT export_model('m')").fetchone()[0]
    for before, after in zip(onnx.load_from_string(content).graph.initializer, onnx.load_from_string(exported).graph.initializer):
        assert numpy_helper.to_array(before).tobytes() == numpy_helper.to_array(after).tobytes()
    assert conn.execute("SELECT * FROM check_store('tessera.weight')").fetchall() == []


@pytest.mark.parametrize("name,batch", [("minilm", 1), ("ocr_read", 1), ("magika", 1), ("vad", 1)])
def test_models_of_the_zoo(conn, name, batch):
    conn.execute("SET tessera.block_compression = huffman")
    load(conn, name)
    assert_answers(conn, name, name, batch)
    raw, stored = conn.execute("SELECT sum(raw_bytes), sum(stored_bytes) FROM tessera.store_blocks('tessera.weight')").fetchone()
    assert stored < 0.9 * float(raw), f"{stored} of {raw} bytes"


class Damaged:
    """A copy of a database that nobody has opened yet, with other bytes in the block of `name`, or in its locator."""

    def __init__(self, server, source, name, part, content):
        self.server, self.source, self.name, self.part, self.content = server, source, name, part, content

    def __enter__(self):
        block, page, offset, stored, file, data = self.source.places[self.name]
        with self.server.connect("postgres") as conn:
            conn.execute("DROP DATABASE IF EXISTS damaged WITH (FORCE)")
            conn.execute(f'CREATE DATABASE damaged TEMPLATE "{self.source.name}" STRATEGY file_copy')
            oid = conn.execute("SELECT oid FROM pg_database WHERE datname = 'damaged'").fetchone()[0]
        place, at = self.part
        if place == "locator":
            position = LOCATOR_PAGE * 8192 + HEADER + 8 + 64 * block + at
        else:
            position = page * PAGE_BYTES + offset + (at if at >= 0 else stored + at)
            position = position // PAGE_BYTES * 8192 + HEADER + position % PAGE_BYTES
        with open(Path(data) / "base" / str(oid) / Path(file).name, "r+b") as relation:
            relation.seek(position)
            old = relation.read(len(self.content))
            assert old != self.content, "nothing would change"
            relation.seek(position)
            relation.write(self.content)
        self.conn = self.server.connect("damaged")
        self.conn.execute("SET ignore_checksum_failure = on")
        return self.conn, block

    def __exit__(self, *_error):
        self.conn.close()
        with self.server.connect("postgres") as conn:
            conn.execute("DROP DATABASE damaged WITH (FORCE)")


@pytest.fixture(scope="module")
def sound(server):
    with Database(server, "sound_small") as database:
        with database.connect() as conn:
            fill(conn, "v")
            fill(conn, "w", compression="huffman")
            data = conn.execute("SHOW data_directory").fetchone()[0]
            database.places = {}
            for table in ("v", "w"):
                file = conn.execute(f"SELECT pg_relation_filepath(reltoastrelid) FROM pg_class WHERE oid = '{table}'::regclass").fetchone()[0]
                for name, *place in conn.execute(f"""SELECT name, b.block_id, b.page, b.page_offset, b.stored_bytes FROM {table}
                        JOIN tessera.store_blocks('{table}') b ON b.block_id = tessera.block_id(data)""").fetchall():
                    database.places[table, name] = (*place, file, data)
            conn.execute("CHECKPOINT")
        yield database


def corrupted(conn: psycopg.Connection, sql: str, parameters) -> str:
    """The message of a statement that must fail for the damage."""
    with pytest.raises(psycopg.Error) as caught:
        conn.execute(sql, parameters)
    assert not conn.closed and caught.value.sqlstate == DATA_CORRUPTED, caught.value
    assert caught.value.diag.message_hint
    return caught.value.diag.message_primary


ENCODING, STORED = ("locator", 53), ("locator", 40)


@pytest.mark.parametrize(
    "table,name,part,content",
    [
        pytest.param("v", "zeros", ("payload", 0), b"\x07", id="another version of the head"),
        pytest.param("v", "zeros", ("payload", 4), b"\xff\xff\xff\x7f" * 2, id="a shape that is too large"),
        pytest.param("v", "zeros", ("payload", 4), b"\x7f", id="a shape that is too small"),
        pytest.param("v", "zeros", ("payload", 1), b"\x0b", id="wider elements"),
        pytest.param("v", "half", ("payload", 1), b"\x06", id="elements that have no such form"),
        pytest.param("v", "half", STORED, struct.pack("<I", 12 + 2 * 16384 - 2), id="a body that is too short"),
        pytest.param("v", "half", STORED, struct.pack("<I", 12 + 4 * 16384), id="a form that is not smaller"),
        pytest.param("v", "half", ENCODING, b"\x63", id="an unknown form"),
        pytest.param("v", "half", ENCODING, b"\x01", id="another form"),
        pytest.param("w", "weights", ENCODING, b"\x02", id="a form without planes"),
        pytest.param("w", "weights", ("payload", 12), b"\xff\xff\xff\xff", id="a plane that is too long"),
        pytest.param("w", "weights", ("payload", -9), b"\xff", id="the end of a code"),
        pytest.param("w", "brain", ("payload", -40), b"\xff" * 40, id="the end of a code of narrow elements"),
        pytest.param("w", "half", ("payload", 0), b"\x00" * 16, id="no head"),
    ],
)
def test_damage(server, sound, table, name, part, content):
    """A form that cannot be turned back is an error, for values and slices; check_store says which block it is."""
    with Damaged(server, sound, (table, name), part, content) as (conn, block):
        message = corrupted(conn, f"SELECT data(data) FROM {table} WHERE name = %s", (name,))
        assert f"block {block} " in message
        conn.execute("CREATE FUNCTION slice(tensor_block, int, int) RETURNS bytea LANGUAGE internal STRICT AS 'bytea_substr'")
        corrupted(conn, f"SELECT slice(data, 40, 100) FROM {table} WHERE name = %s", (name,))
        found = conn.execute(f"SELECT problem, block_id FROM check_store('{table}') WHERE block_id IS NOT NULL").fetchall()
        assert ("hash mismatch", block) in found, found
        others = conn.execute(f"SELECT name, data(data) FROM {table} WHERE name <> %s", (name,)).fetchall()
        assert all(content == BLOCKS[other][0].tobytes() for other, content in others)


@pytest.mark.parametrize("table,name", [("v", "zeros"), ("v", "brain"), ("v", "double"), ("w", "weights")])
def test_other_elements(server, sound, table, name):
    """Bytes that are as good as others are found by the hash alone."""
    with Damaged(server, sound, (table, name), ("payload", 14 if name != "weights" else 600), b"\x5a") as (conn, block):
        found = conn.execute(f"SELECT problem, block_id FROM check_store('{table}')").fetchall()
        assert found == [("hash mismatch", block)]


def test_predictions_from_damaged_blocks(fresh, server):
    """The hash is of the elements, and is compared before anything is computed with them."""
    with fresh.connect() as conn:
        # Weights of its own: what another test has left in the block cache would be right.
        load(conn, "m", mlp("encoder_fc", lambda values: NARROW["float16"](values * 1.25)))
        file = conn.execute("SELECT pg_relation_filepath(reltoastrelid) FROM pg_class WHERE oid = 'tessera.weight'::regclass").fetchone()[0]
        data = conn.execute("SHOW data_directory").fetchone()[0]
        rows = conn.execute("SELECT block_id, page, page_offset, stored_bytes FROM tessera.store_blocks('tessera.weight') "
                            "WHERE compression = 'float16' ORDER BY stored_bytes DESC LIMIT 1").fetchone()
        fresh.places = {"m": (*rows, file, data)}
        inputs, _ = expected("encoder_fc", 1)
        conn.execute("CHECKPOINT")
    with Damaged(server, fresh, "m", ("payload", 5000), b"\x55\x2a") as (conn, _):
        (rows,) = inputs.values()
        assert "does not have the content" in corrupted(conn, "SELECT predict('m', %s::real[])", (rows.tolist(),))


def test_crash(tmp_path):
    """What was committed before a crash is there after it, checksums included."""
    cluster = Cluster("small_blocks", settings=("wal_consistency_checking = 'all'", "full_page_writes = on"))
    cluster.remove()
    cluster.start()
    try:
        with cluster.connect() as conn:
            conn.execute("CREATE EXTENSION IF NOT EXISTS pg_tessera")
            fill(conn, "v")
            conn.execute("CHECKPOINT")
            fill(conn, "w", compression="huffman")
            conn.execute("SELECT repack('v', 'name')")
        cluster.kill(cluster.postmaster())
        cluster.start()
        with cluster.connect() as conn:
            for table, compression in (("v", "none"), ("w", "huffman")):
                found = forms(conn, table)
                assert all(found[name] == form for name, form in wanted(compression).items() if not name.startswith("odd"))
                assert_whole(conn, table)
        cluster.stop()
        cluster.verify_checksums()
    finally:
        cluster.remove()
