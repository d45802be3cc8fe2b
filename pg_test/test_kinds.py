"""Kinds of tables, isolation levels, databases made as copies, and statements that look at rows in unusual ways."""

import os
import tempfile

import psycopg
import pytest

from cluster import Cluster, Database
from helpers import Background, fails, storage
from test_sweep import MAKE, blocks, insert, one, right, toast, vacuum

VERSION = os.environ.get("TESSERA_SERVER", "15")


@pytest.fixture
def conn(fresh):
    with fresh.connect() as connection:
        connection.execute(MAKE)
        yield connection


@pytest.mark.parametrize("strategy", ["wal_log", "file_copy"])
def test_create_database_from_one_with_blocks(server, fresh, conn, strategy):
    insert(conn, 1, 60)
    conn.execute("DELETE FROM w WHERE id > 50")
    vacuum(conn, 1)
    conn.close()
    with server.connect("postgres") as admin:
        admin.execute("DROP DATABASE IF EXISTS copied WITH (FORCE)")
        admin.execute(f"CREATE DATABASE copied TEMPLATE {fresh.name} STRATEGY {strategy}")
        try:
            # Once from the buffers, and once from the files alone.
            for restart in (False, True):
                if restart:
                    admin.execute("CHECKPOINT")
                for name in ("copied", fresh.name):
                    with server.connect(name) as there:
                        right(there, 50)
            with server.connect("copied") as there:
                insert(there, 61, 80)
                vacuum(there)
                right(there, 70)
                assert blocks(there) == 70
            with server.connect(fresh.name) as there:
                assert blocks(there) == 60
        finally:
            admin.execute("DROP DATABASE copied WITH (FORCE)")


def test_copied_database_after_a_crash():
    cluster = Cluster("copies" + VERSION, VERSION)
    cluster.remove()
    cluster.start()
    try:
        with Database(cluster, "origin") as database:
            with database.connect() as conn:
                conn.execute(MAKE)
                insert(conn, 1, 60)
            with cluster.connect("postgres") as admin:
                for strategy in ("wal_log", "file_copy"):
                    admin.execute(f"CREATE DATABASE {strategy} TEMPLATE origin STRATEGY {strategy}")
            cluster.stop("immediate")
            cluster.start()
            for name in ("origin", "wal_log", "file_copy"):
                with cluster.connect(name) as there:
                    right(there, 60)
                    insert(there, 61, 70)
                    right(there, 70)
    finally:
        cluster.remove()


def test_publication_for_all_tables(conn):
    """With wal_level = replica a publication changes nothing for a table; test_logical.py has the other level."""
    conn.execute("SET client_min_messages = error; CREATE PUBLICATION every FOR ALL TABLES; RESET client_min_messages")
    conn.execute("ALTER TABLE w REPLICA IDENTITY FULL")
    insert(conn, 1, 20)
    conn.execute("UPDATE w SET seed = seed + 10, data = block(seed + 10) WHERE id > 10")
    conn.execute("DELETE FROM w WHERE id > 15")
    right(conn, 15)


@pytest.mark.parametrize("columns", ["text", "bytea", "real[]", "jsonb"])
def test_wide_rows_without_blocks(conn, columns):
    """Rows above 2 kB with no tensor_block: of many short values, of one that is wide, and too wide for a page without a store."""
    conn.execute(f"CREATE TABLE wide (id int PRIMARY KEY, {', '.join(f'c{i} {columns}' for i in range(40))}) USING tensor_block")
    conn.execute("CREATE TABLE plain (LIKE wide)")
    make = {
        "text": "left(encode(value(i * 100 + #, n), 'base64'), n)", "bytea": "value(i * 100 + #, n)",
        "real[]": "(SELECT array_agg((k * 7 % 4093 + i)::real) FROM generate_series(1, n / 4) AS k)",
        "jsonb": "to_jsonb(encode(value(i * 100 + #, n), 'hex'))",
    }[columns]
    for table in ("wide", "plain"):
        values = ", ".join(make.replace("#", str(i)) for i in range(40))
        sizes = "LATERAL (SELECT (ARRAY[4, 40, 60, 130, 300, 900, 2500, 9000])[i]) AS s (n)"
        conn.execute(f"INSERT INTO {table} SELECT i, {values} FROM generate_series(1, 8) AS i, {sizes}")
        conn.execute(f"UPDATE {table} SET c0 = c1, c2 = NULL, c3 = c4 WHERE id % 2 = 0")
    differ = "SELECT count(*) FROM wide FULL JOIN plain USING (id) WHERE md5(wide::text) IS DISTINCT FROM md5(plain::text)"
    assert one(conn, differ) == 0
    vacuum(conn, 3, "wide")
    conn.execute("VACUUM FULL wide")
    assert one(conn, differ) == 0
    assert blocks(conn, "wide") >= 7
    assert conn.execute("SELECT * FROM check_store('wide')").fetchall() == []


@pytest.mark.parametrize("kind", ["PLAIN", "MAIN", "EXTERNAL", "EXTENDED"])
def test_storage_of_a_column(conn, kind):
    """PLAIN keeps values in the row, or refuses one that is wider than a page, as heap does; the others go to the store."""
    conn.execute("CREATE TABLE h (LIKE w)")
    outcomes = []
    for table in ("w", "h"):
        conn.execute(f"INSERT INTO {table} SELECT i, i, block(i) FROM generate_series(1, 5) AS i; ALTER TABLE {table} ALTER data SET STORAGE {kind}")
        conn.execute(f"INSERT INTO {table} SELECT i, i, block(i) FROM generate_series(6, 10) AS i")
        conn.execute(f"UPDATE {table} SET seed = seed WHERE id <= 5")
        try:
            conn.execute(f"INSERT INTO {table} VALUES (11, 11, block(11, 3000))")
            conn.execute(f"DELETE FROM {table} WHERE id = 11")
            outcomes.append(None)
        except psycopg.Error as error:
            outcomes.append(error.sqlstate)
    assert outcomes[0] == outcomes[1] == ("54000" if kind == "PLAIN" else None)
    right(conn, 10)
    vacuum(conn, 3)
    right(conn, 10)
    # A reference that was there keeps its block; with PLAIN no new one comes.
    assert blocks(conn) == (5 if kind == "PLAIN" else 10)
    for statement in ("VACUUM FULL w", "ALTER TABLE w ALTER id TYPE bigint", "ALTER TABLE w ALTER id TYPE int"):
        conn.execute(statement)
        right(conn, 10)


def test_system_columns(conn):
    insert(conn, 1, 10)
    conn.execute("BEGIN")
    insert(conn, 11, 12)
    conn.execute("UPDATE w SET seed = seed WHERE id = 1")
    rows = conn.execute("SELECT id, xmin::text, xmax::text, ctid::text, tableoid::regclass::text, cmin::text FROM w ORDER BY id").fetchall()
    mine = one(conn, "SELECT txid_current()::text")
    conn.execute("COMMIT")
    assert {row[4] for row in rows} == {"w"}
    assert {row[0] for row in rows if row[1] == mine} == {1, 11, 12}
    assert len({row[3] for row in rows}) == 12
    for key, _, _, ctid, _, _ in rows:
        assert conn.execute("SELECT id, data = block(seed) FROM w WHERE ctid = %s", (ctid,)).fetchone() == (key, True)
    returned = conn.execute("UPDATE w SET seed = seed WHERE id = 5 RETURNING ctid::text, xmin::text, data = block(seed)").fetchone()
    assert conn.execute("SELECT ctid::text, xmin::text, true FROM w WHERE id = 5").fetchone() == returned
    inserted = conn.execute("INSERT INTO w VALUES (20, 20, block(20)) RETURNING ctid::text, tableoid::regclass::text").fetchone()
    assert conn.execute("SELECT ctid::text, 'w' FROM w WHERE id = 20").fetchone() == inserted


def test_fetch_for_update_and_current_of(fresh, conn):
    insert(conn, 1, 20)
    with fresh.connect() as other:
        other.execute("SET lock_timeout = '100ms'")
        conn.execute("BEGIN; DECLARE c CURSOR FOR SELECT * FROM w ORDER BY id FOR UPDATE")
        for key in range(1, 11):
            row = conn.execute("FETCH c").fetchone()
            assert row[0] == key
            if key % 2:
                conn.execute(f"UPDATE w SET seed = {key + 100}, data = block({key + 100}) WHERE CURRENT OF c")
            elif key % 4 == 0:
                conn.execute("DELETE FROM w WHERE CURRENT OF c")
        fails(other, "UPDATE w SET seed = 0 WHERE id = 2", sqlstate="55P03", hint=False)
        other.execute("UPDATE w SET seed = seed WHERE id = 15")
        conn.execute("COMMIT")
    assert one(conn, "SELECT sum(seed) FROM w WHERE id <= 10") == 101 + 103 + 105 + 107 + 109 + 2 + 6 + 10
    right(conn, 18)
    conn.execute("BEGIN; DECLARE c SCROLL CURSOR FOR SELECT id, data = block(seed) FROM w ORDER BY id")
    assert conn.execute("FETCH LAST FROM c").fetchone() == (20, True)
    assert conn.execute("FETCH BACKWARD 2 FROM c").fetchall() == [(19, True), (18, True)]
    assert conn.execute("FETCH ABSOLUTE 1 FROM c").fetchone() == (1, True)
    conn.execute("COMMIT; BEGIN; DECLARE c CURSOR FOR SELECT * FROM w")
    conn.execute("FETCH 3 FROM c")
    conn.execute("UPDATE w SET id = 500 WHERE CURRENT OF c")
    conn.execute("COMMIT")
    right(conn, 18)


def test_truncate_and_reuse(fresh, conn):
    for turn in range(3):
        insert(conn, 1, 50, shift=turn * 50)
        conn.execute("BEGIN; TRUNCATE w")
        insert(conn, 1, 10, shift=1000)
        conn.execute("SAVEPOINT a; TRUNCATE w")
        insert(conn, 1, 5, shift=2000)
        conn.execute("ROLLBACK TO a")
        right(conn, 10)
        conn.execute("ROLLBACK")
        right(conn, 50)
        conn.execute("TRUNCATE w")
        right(conn, 0)
        assert blocks(conn) == 0
        vacuum(conn)


def test_unlogged_tables_and_a_crash():
    """An unlogged table is empty and usable after a crash; one that was SET LOGGED is whole."""
    cluster = Cluster("unlogged" + VERSION, VERSION)
    cluster.remove()
    cluster.start()
    try:
        with Database(cluster, "fresh") as database:
            with database.connect() as conn:
                conn.execute(MAKE.replace("CREATE TABLE", "CREATE UNLOGGED TABLE"))
                insert(conn, 1, 40)
                conn.execute("CREATE TABLE logged (LIKE w) USING tensor_block; INSERT INTO logged SELECT * FROM w")
                for kind, name in (("UNLOGGED", "became"), ("", "was")):
                    conn.execute(f"CREATE {kind} TABLE {name} (LIKE w) USING tensor_block; INSERT INTO {name} SELECT * FROM w")
                conn.execute("ALTER TABLE became SET LOGGED; ALTER TABLE was SET UNLOGGED")
                for table in ("w", "logged", "became", "was"):
                    assert one(conn, f"SELECT count(*) FROM {table} WHERE data = block(seed)") == 40
                    assert conn.execute(f"SELECT * FROM check_store('{table}')").fetchall() == []
            for _ in range(2):
                cluster.stop("immediate")
                cluster.start()
                with database.connect() as conn:
                    counts = [one(conn, f"SELECT count(*) FROM {t} WHERE data = block(seed)") for t in ("w", "was", "logged", "became")]
                    assert counts == [0, 0, 40, 40]
                    assert conn.execute("SELECT * FROM check_store('w')").fetchall() == []
                    vacuum(conn)
                    insert(conn, 1, 10)
                    vacuum(conn)
                    right(conn, 10)
            cluster.stop("fast")
            cluster.start()
            with database.connect() as conn:
                right(conn, 10)
    finally:
        cluster.remove()


@pytest.mark.parametrize("end", ["DELETE ROWS", "DROP", "PRESERVE ROWS"])
def test_temporary_tables(fresh, conn, end):
    insert(conn, 1, 30)
    conn.execute(f"BEGIN; CREATE TEMP TABLE t USING tensor_block ON COMMIT {end} AS SELECT * FROM w")
    conn.execute("UPDATE t SET seed = seed + 50, data = block(seed + 50) WHERE id > 20; DELETE FROM t WHERE id < 6")
    assert one(conn, "SELECT count(*) FROM t WHERE data = block(seed)") == 25
    conn.execute("CREATE TABLE copy AS SELECT * FROM t; COMMIT")
    if end != "DROP":
        vacuum(conn, 3, "t")
        conn.execute("INSERT INTO t SELECT i, i, block(i) FROM generate_series(100, 110) AS i")
        kept = one(conn, "SELECT count(*) FROM t WHERE data = block(seed)")
        assert kept == (25 + 11 if end == "PRESERVE ROWS" else 0)
    assert one(conn, "SELECT count(*) FROM copy WHERE data = block(seed)") == 25


def test_tablespaces(server, conn):
    home = tempfile.mkdtemp(dir="/tmp", prefix="pgt.")
    os.chmod(home, 0o777)
    where = os.path.join(home, "space")
    conn.execute("COPY (SELECT 1) TO PROGRAM 'mkdir -m 700 " + where + "'")
    conn.execute(f"CREATE TABLESPACE elsewhere LOCATION '{where}'")
    try:
        insert(conn, 1, 50)
        conn.execute("ALTER TABLE w SET TABLESPACE elsewhere")
        right(conn, 50)
        assert where == one(conn, f"SELECT pg_tablespace_location(reltablespace) FROM pg_class WHERE oid = '{toast(conn)}'::regclass")
        insert(conn, 51, 60)
        conn.execute("BEGIN; ALTER TABLE w SET TABLESPACE pg_default")
        insert(conn, 61, 70)
        conn.execute("ROLLBACK")
        conn.execute("DELETE FROM w WHERE id > 55")
        vacuum(conn)
        right(conn, 55)
        conn.execute("ALTER TABLE w SET TABLESPACE pg_default")
        insert(conn, 56, 60)
        right(conn, 60)
    finally:
        conn.execute("DROP TABLE w")
        conn.execute("DROP TABLESPACE elsewhere")
        conn.execute("COPY (SELECT 1) TO PROGRAM 'rmdir " + where + "'")
        os.rmdir(home)


@pytest.mark.parametrize("am", ["tensor_block", "heap"])
@pytest.mark.parametrize("plan", ["enable_seqscan", "enable_indexscan"])
def test_write_skew_is_detected(fresh, conn, am, plan):
    """Two doctors on call: each sees the other, both leave. One of them must fail, as on heap."""
    conn.execute(f"CREATE TABLE s (id int PRIMARY KEY, on_call bool, data tensor_block) USING {am}")
    conn.execute("INSERT INTO s SELECT i, true, block(i) FROM generate_series(1, 2) AS i")
    with fresh.connect() as one_, fresh.connect() as two:
        for session in (one_, two):
            session.execute(f"SET {plan} = off; SET enable_bitmapscan = off")
            session.execute("BEGIN ISOLATION LEVEL SERIALIZABLE")
            assert session.execute("SELECT count(*) FROM s WHERE on_call AND id IN (1, 2) AND data = block(id)").fetchone()[0] == 2
        one_.execute("UPDATE s SET on_call = false WHERE id = 1")
        with pytest.raises(psycopg.errors.SerializationFailure):
            two.execute("UPDATE s SET on_call = false WHERE id = 2")
            one_.execute("COMMIT")
            two.execute("COMMIT")
    assert one(conn, "SELECT count(*) FROM s WHERE on_call") >= 1


def test_logged_and_back(conn):
    insert(conn, 1, 30)
    for statement in ("SET UNLOGGED", "SET LOGGED", "SET ACCESS METHOD heap", "SET UNLOGGED", "SET ACCESS METHOD tensor_block", "SET LOGGED"):
        conn.execute(f"ALTER TABLE w {statement}")
        am = one(conn, "SELECT amname FROM pg_class AS c JOIN pg_am AS m ON m.oid = relam WHERE c.oid = 'w'::regclass")
        right(conn, 30, sound=am == "tensor_block")
        conn.execute("UPDATE w SET seed = seed + 1, data = block(seed + 1) WHERE id % 3 = 0")
    vacuum(conn, 3)
    right(conn, 30)
    assert storage(conn, "w")["blocks_referenced"] == 30


def test_concurrent_insertions_of_one_value(fresh, conn):
    """Equal content of sessions that have not committed yet is stored once, whichever of them ends how."""
    with fresh.connect() as first, fresh.connect() as second:
        for turn, (a, b) in enumerate([("COMMIT", "COMMIT"), ("ROLLBACK", "COMMIT"), ("COMMIT", "ROLLBACK"), ("ROLLBACK", "ROLLBACK")]):
            for number, session in enumerate((first, second)):
                session.execute("BEGIN")
                Background(session.execute, f"INSERT INTO w VALUES ({turn * 2 + number}, {turn}, block({turn}))").result(10)
            vacuum(conn)
            first.execute(a)
            vacuum(conn)
            second.execute(b)
    vacuum(conn)
    right(conn, 4)
    assert blocks(conn) == 3
