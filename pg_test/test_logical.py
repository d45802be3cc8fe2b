"""Logical decoding: rows of tensor_block tables stay out of it whole, and publishing such a table is refused. They may be
what is subscribed to."""

import time

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
        with conn.cursor() as cursor, cursor.copy("COPY t FROM STDIN") as rows:
            for i in range(20):
                rows.write_row((i, (b"%d" % i) * 9000))
        conn.execute("UPDATE t SET k = k + 100 WHERE k < 10")
        conn.execute("DELETE FROM t WHERE k = 1")
        conn.execute("INSERT INTO h VALUES (42)")
        changes = [line for (line,) in conn.execute("SELECT data FROM pg_logical_slot_get_changes('plain', NULL, NULL)")]
        assert any("public.h: INSERT: k[integer]:42" in line for line in changes), changes[-5:]
        ours = [line for line in changes if "public.t:" in line or "tessera.weight:" in line]
        assert all(line.endswith("(no-tuple-data)") and "INSERT" not in line for line in ours), ours
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


# How the row to change is found: by an index, by its whole content, by an index that is not the primary key.
@pytest.mark.parametrize("identity", ["PRIMARY KEY (k)", "", "UNIQUE (k)"])
def test_a_table_that_subscribes_follows_all_changes(logical, identity):
    full = "" if identity.startswith("PRIMARY") else "ALTER TABLE t REPLICA IDENTITY FULL"
    if identity.startswith("UNIQUE"):
        full = "ALTER TABLE t REPLICA IDENTITY USING INDEX t_k_key"
    table = "CREATE TABLE t (k int NOT NULL, n int, data bytea{})".format(f", {identity}" if identity else "")
    rows = "SELECT i, 0, decode(repeat(md5((i % 7)::text), 500), 'hex') FROM generate_series({}, {}) i"
    everything = "SELECT k, n, md5(data) FROM t ORDER BY k"
    with (
        Database(logical, "publishing") as source,
        Database(logical, "subscribing") as target,
        source.connect() as here,
        target.connect() as there,
    ):
        here.execute(f"{table}; {full}; CREATE PUBLICATION p FOR TABLE t".strip())
        there.execute(f"{table} USING tensor_block; {full}")
        here.execute("INSERT INTO t " + rows.format(1, 50))
        here.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
        at = f"host={logical.environment['PGHOST']} port={logical.environment['PGPORT']} user={logical.environment['PGUSER']}"
        there.execute(
            f"CREATE SUBSCRIPTION s CONNECTION '{at} dbname={source.name}' PUBLICATION p WITH (create_slot = false, slot_name = 's')"
        )
        try:
            deadline = time.monotonic() + 60
            while there.execute("SELECT count(*) FROM t").fetchone()[0] < 50:
                assert time.monotonic() < deadline, "the first copy did not arrive"
                time.sleep(0.1)
            here.execute("INSERT INTO t " + rows.format(51, 60))
            here.execute("UPDATE t SET n = k WHERE k % 3 = 0")
            here.execute("UPDATE t SET data = data || 'x', k = k + 1000 WHERE k % 5 = 0")
            here.execute("DELETE FROM t WHERE k % 7 = 0")
            here.execute("UPDATE t SET n = n + 1")
            wanted = here.execute(everything).fetchall()
            while there.execute(everything).fetchall() != wanted:
                assert time.monotonic() < deadline, "the changes did not arrive"
                time.sleep(0.1)
            assert there.execute("SELECT count(*) FROM check_store('t')").fetchone()[0] == 0
        finally:
            there.execute("DROP SUBSCRIPTION s")
