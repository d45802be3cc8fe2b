"""Logical decoding: rows of tensor_block tables stay out of it whole, and publishing such a table is refused."""

import pytest

from cluster import Cluster, Database
from helpers import assert_answers, fails, load


@pytest.fixture(scope="module")
def logical():
    cluster = Cluster("logical", settings=("wal_level = logical",))
    cluster.remove()
    cluster.start()
    yield cluster
    cluster.remove()


def test_a_slot_goes_on_over_models_and_blocks(logical):
    with Database(logical, "decoded") as database, database.connect() as conn:
        conn.execute("SELECT pg_create_logical_replication_slot('plain', 'test_decoding')")
        load(conn, "fraud", "fraud_fc_256")
        conn.execute("CREATE TABLE t (k int, data bytea) USING tensor_block")
        conn.execute("CREATE TABLE h (k int)")
        conn.execute("INSERT INTO t SELECT i, decode(repeat(md5(i::text), 1000), 'hex') FROM generate_series(1, 5) i")
        conn.execute("DELETE FROM t WHERE k = 1")
        conn.execute("INSERT INTO h VALUES (42)")
        changes = [line for (line,) in conn.execute("SELECT data FROM pg_logical_slot_get_changes('plain', NULL, NULL)")]
        assert any("public.h: INSERT: k[integer]:42" in line for line in changes), changes[-5:]
        assert not any("public.t: INSERT" in line or "tessera.weight: INSERT" in line for line in changes)
        conn.execute("SELECT pg_drop_replication_slot('plain')")
        assert_answers(conn, "fraud", "fraud_fc_256", 1)


def test_a_published_table_refuses_rows_and_models_load_all_the_same(logical):
    with Database(logical, "published") as database, database.connect() as conn:
        conn.execute("CREATE TABLE t (k int, data bytea) USING tensor_block")
        conn.execute("CREATE PUBLICATION mine FOR TABLE t")
        fails(conn, "INSERT INTO t VALUES (1, 'x')", (), "0A000")
        conn.execute("DROP PUBLICATION mine")
        conn.execute("INSERT INTO t VALUES (1, 'x')")
        conn.execute("CREATE PUBLICATION everything FOR ALL TABLES")
        fails(conn, "INSERT INTO t VALUES (2, 'x')", (), "0A000")
        load(conn, "fraud", "fraud_fc_256")
        assert_answers(conn, "fraud", "fraud_fc_256", 1)
