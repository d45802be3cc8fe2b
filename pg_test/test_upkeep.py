"""VACUUM, CLUSTER, check_store and repack where something has gone wrong before, or where the table is an odd one."""

import psycopg
import pytest

from helpers import Background, fails

pytestmark = pytest.mark.newer

ROWS = "INSERT INTO w SELECT i, repeat(md5(i::text), 100)::bytea, '' FROM generate_series(%s::int, %s) AS i"
WRONG = "SELECT count(*) FROM w WHERE data <> repeat(md5(id::text), 100)::bytea"


@pytest.fixture
def conn(fresh):
    with fresh.connect() as connection:
        connection.execute("CREATE TABLE w (id int PRIMARY KEY, data bytea, note text) USING tensor_block")
        connection.execute("ALTER TABLE w ALTER data SET STORAGE EXTERNAL")
        connection.execute(ROWS, (1, 100))
        yield connection


def blocks(conn: psycopg.Connection) -> int:
    return conn.execute("SELECT count(*) FROM tessera.store_blocks('w')").fetchone()[0]


def sound(conn: psycopg.Connection, rows: int) -> None:
    assert conn.execute("SELECT count(*) FROM w").fetchone()[0] == rows
    assert conn.execute(WRONG).fetchone()[0] == 0
    assert conn.execute("SELECT * FROM check_store('w')").fetchall() == []


def test_vacuum_after_a_failed_reindex_concurrently(fresh, conn):
    with fresh.connect(autocommit=False) as writer:
        writer.execute("UPDATE w SET note = 'x' WHERE id = 1")
        conn.execute("SET statement_timeout = '1s'")
        fails(conn, "REINDEX TABLE CONCURRENTLY w", sqlstate="57014", hint=False)
        conn.execute("RESET statement_timeout")
    left = """SELECT count(*) FROM pg_index i JOIN pg_class t ON i.indrelid = t.reltoastrelid
              WHERE t.relname = 'w' AND NOT indisready AND pg_relation_size(indexrelid) = 0"""
    assert conn.execute(left).fetchone()[0] == 1, "an index without a page is what this is about"
    conn.execute("DELETE FROM w WHERE id > 40")
    for _ in range(3):
        conn.execute("VACUUM w")
    assert blocks(conn) == 40
    sound(conn, 40)


@pytest.mark.parametrize("how", ["VACUUM FULL w", "CLUSTER w USING w_pkey"])
def test_rewriting_a_table_whose_columns_became_plain(conn, how):
    """The values are too wide for their rows, so the new table keeps a store for them."""
    conn.execute("ALTER TABLE w ALTER data SET STORAGE PLAIN, ALTER note SET STORAGE PLAIN")
    assert blocks(conn) == 100
    conn.execute("SET enable_indexscan = off; SET enable_seqscan = off")
    conn.execute(how)
    assert conn.execute("SELECT reltoastrelid FROM pg_class WHERE relname = 'w'").fetchone()[0] != 0
    sound(conn, 100)
    conn.execute("ALTER TABLE w ALTER data SET STORAGE EXTERNAL")
    conn.execute(ROWS, (101, 110))
    sound(conn, 110)


@pytest.mark.parametrize("call", ["SELECT * FROM check_store('w')", "SELECT repack('w')"])
def test_who_may_not_does_not_wait_for_a_lock(fresh, conn, call):
    conn.execute("DROP ROLE IF EXISTS upkeep_guest")
    conn.execute("CREATE ROLE upkeep_guest")
    try:
        with fresh.connect(autocommit=False) as writer:
            writer.execute("LOCK TABLE w")
            conn.execute("SET lock_timeout = '1s'")
            conn.execute("SET ROLE upkeep_guest")
            fails(conn, call, sqlstate="42501")
    finally:
        conn.execute("RESET ROLE; RESET lock_timeout; DROP ROLE upkeep_guest")


def test_a_version_that_is_dropped_meanwhile_is_not_copied(fresh):
    """A load takes the rows of a version with the same content: they have to be there until they are copied."""
    from helpers import load, onnx_file

    with fresh.connect() as loader, fresh.connect() as dropper, fresh.connect() as gate:
        load(loader, "gone", "fraud_fc_256")
        load(loader, "same_graph", "fraud_fc_256_tuned")
        dropper.execute("BEGIN")
        dropper.execute("SELECT drop_model('gone')")
        gate.execute("BEGIN")
        # Makes the loader wait between the look for a version and the copy, until the other one is dropped.
        closed = Background(gate.execute, "LOCK TABLE tessera.tensor IN SHARE MODE")
        assert closed.waits()
        loading = Background(load, loader, "new", "fraud_fc_256")
        assert loading.waits(2)
        dropper.execute("COMMIT")
        closed.result()
        gate.execute("COMMIT")
        assert loading.result() == 1
        tensors = "SELECT count(*) FROM tessera.tensor"
        assert loader.execute(tensors).fetchone()[0] == 8
        assert len(loader.execute("SELECT export_model('new')").fetchone()[0]) == len(onnx_file("fraud_fc_256"))


def test_rows_that_are_wide_by_a_storage_of_the_past(fresh):
    """heapam's toaster, which would write its own pages into the new store, leaves such rows alone."""
    with fresh.connect() as conn:
        conn.execute("CREATE TABLE p (k int PRIMARY KEY, a bytea, b bytea) USING tensor_block")
        conn.execute("ALTER TABLE p ALTER a SET STORAGE PLAIN")
        conn.execute(
            "INSERT INTO p SELECT i, decode(repeat(md5(i::text), 160), 'hex'), decode(string_agg(md5(i || '/' || j), ''), 'hex')"
            " FROM generate_series(1, 20) AS i, generate_series(1, 300) AS j GROUP BY i")
        conn.execute("ALTER TABLE p ALTER a SET STORAGE EXTERNAL")
        content = "SELECT md5(string_agg(md5(a) || md5(b), '' ORDER BY k)) FROM p"
        before = conn.execute(content).fetchone()
        for how in ("VACUUM FULL p", "CLUSTER p USING p_pkey"):
            conn.execute(how)
            assert conn.execute(content).fetchone() == before
            assert conn.execute("SELECT * FROM check_store('p')").fetchall() == []
