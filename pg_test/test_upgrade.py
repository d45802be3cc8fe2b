"""pg_upgrade between the two major versions, by copies and by links; and upgrades of the extension's own SQL."""

import os
import shutil
import tempfile
import time
from pathlib import Path

import psycopg
import pytest

from cluster import Cluster
from helpers import assert_answers, expected, load, onnx_file, predict_rows
from workload import WRONG, Workload, problems

OLD, NEW = "15", "18"
MODELS = ["fraud_fc_256", "cnn", "minilm_int8", "sk_logistic"]
# Tables of other kinds than those of the workload.
KINDS = """
CREATE TABLE changed (gone tensor_block, id int, data tensor_block) USING tensor_block;
INSERT INTO changed SELECT value(i), i, value(i + 1) FROM generate_series(1, 20) AS i;
ALTER TABLE changed DROP COLUMN gone;
ALTER TABLE changed ADD COLUMN late tensor_block DEFAULT '{1,2,3}'::real[]::tensor_block;
CREATE TABLE parts (id int, data tensor_block) PARTITION BY RANGE (id);
CREATE TABLE parts_low PARTITION OF parts FOR VALUES FROM (0) TO (10) USING tensor_block;
CREATE TABLE parts_high PARTITION OF parts FOR VALUES FROM (10) TO (100) USING tensor_block;
INSERT INTO parts SELECT i, value(i) FROM generate_series(1, 30) AS i;
CREATE MATERIALIZED VIEW seen USING tensor_block AS SELECT id, data FROM parts;
CREATE UNLOGGED TABLE unlogged USING tensor_block AS SELECT id, data FROM parts;
CREATE TABLE empty (id int, data tensor_block) USING tensor_block;
CREATE TABLE condemned (id int, data tensor_block) USING tensor_block WITH (toast.autovacuum_enabled = off);
INSERT INTO condemned SELECT i, value(i) FROM generate_series(1, 30) AS i;
DELETE FROM condemned WHERE id > 10;
"""


def facts(conn: psycopg.Connection) -> dict:
    """All that an upgrade must leave as it is."""
    sql = {
        "models": "SELECT name, version, active, owner::text, bytes_stored FROM tessera.models ORDER BY 1, 2",
        "tensors": "SELECT model, version, name, dims::text, blocks, shared_blocks FROM tessera.tensors ORDER BY 1, 2, 3",
        "held": "SELECT session, id, seed, version, md5(note), md5(data::bytea), tessera.block_id(data) FROM held ORDER BY 1, 2",
        "changed": "SELECT id, md5(data::bytea), md5(late::bytea), tessera.block_id(data) FROM changed ORDER BY 1",
        "parts": "SELECT id, md5(data::bytea), tessera.block_id(data) FROM parts ORDER BY 1",
        "seen": "SELECT id, md5(data::bytea), tessera.block_id(data) FROM seen ORDER BY 1",
        "unlogged": "SELECT id, md5(data::bytea), tessera.block_id(data) FROM unlogged ORDER BY 1",
        "files": """SELECT c.oid::regclass::text, c.relfilenode, t.oid, t.relfilenode, x.relfilenode
                    FROM pg_class c JOIN pg_am a ON a.oid = c.relam AND amname = 'tensor_block' JOIN pg_class t ON t.oid = c.reltoastrelid
                    JOIN pg_index i ON i.indrelid = t.oid JOIN pg_class x ON x.oid = i.indexrelid ORDER BY 1""",
    }
    found = {name: conn.execute(statement).fetchall() for name, statement in sql.items()}
    for table in ("held", "condemned", "parts_low", "tessera.weight"):
        found[f"blocks of {table}"] = conn.execute("SELECT * FROM tessera.store_blocks(%s::regclass) ORDER BY 1", (table,)).fetchall()
    # A loaded model answers in floats that depend on nothing but its weights.
    found["answers"] = [predict_rows(conn, "fraud_fc_256", expected("fraud_fc_256", 1)[0]["x"][0]).tolist()]
    assert all(found.values()), [name for name, rows in found.items() if not rows]
    return found


@pytest.fixture(scope="module")
def old():
    cluster = Cluster("upgrade_old", OLD)
    cluster.remove()
    cluster.start()
    work = Workload(cluster, 1)
    work.prepare()
    with cluster.connect() as conn:
        for name in MODELS:
            load(conn, name)
        conn.execute(KINDS)
    work.start()
    time.sleep(1)
    work.stop()
    with cluster.connect() as conn:
        conn.execute("VACUUM condemned")
    work.check("before the upgrade")
    yield cluster, work
    cluster.remove()


@pytest.fixture
def sockets():
    """A short path that the server's user can write to."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="pgt.") as path:
        os.chmod(path, 0o777)
        yield path


def upgrade(before: Cluster, after: Cluster, sockets: str, way: str) -> None:
    try:
        after.as_server("pg_upgrade", "-b", str(before.programs()), "-B", str(after.programs()), "-d", str(before.data), "-D", str(after.data),
                        "-U", before.environment["PGUSER"], "-s", sockets, way)
    except RuntimeError as error:
        logs = after.data.glob("pg_upgrade_output.d/*/log/*.log")
        tails = [f"{log.name}:\n{log.read_text(errors='replace')[-2000:]}" for log in sorted(logs) if "rror" in log.read_text(errors="replace")]
        raise AssertionError("\n".join([str(error), *tails])) from error


# Links last: the old cluster can then not be started any more.
@pytest.mark.parametrize("way", ["--copy", "--link"])
def test_pg_upgrade(old, sockets, way, tmp_path):
    before, work = old
    before.start()
    with before.connect() as conn:
        conn.execute("INSERT INTO condemned SELECT i, value(i) FROM generate_series(6, 20) AS i")
        conn.execute("DELETE FROM condemned WHERE id > 5")
        conn.execute("VACUUM condemned")
        wanted = facts(conn)
        assert conn.execute("SELECT count(*) FROM tessera.store_blocks('condemned') WHERE condemned_by <> '0'").fetchone()[0] > 0
        # Since 15.20 every column has an option that pg_dump takes along, and an 18 older than that refuses.
        conn.execute("UPDATE pg_attribute SET attoptions = NULL WHERE attoptions[1] LIKE 'pg_attver=%' AND cardinality(attoptions) = 1")
    before.stop()
    after = Cluster("upgrade_new", NEW, bare=True)
    after.remove()
    try:
        after.run("create")
        upgrade(before, after, sockets, way)
        after.start()
        with after.connect() as conn:
            assert conn.execute("SHOW server_version_num").fetchone()[0].startswith(NEW)
            got = facts(conn)
            for name, rows in wanted.items():
                assert got[name] == rows, name
            assert problems(conn) == []
            for name in MODELS:
                assert_answers(conn, name, name, 7)
            write(conn)
        # The load goes on as if nothing had happened.
        state = [dict(session.state) for session in work.sessions]
        work.cluster = after
        work.start()
        time.sleep(1)
        work.stop()
        work.check(f"after pg_upgrade {way}")
        if way == "--link":
            update_extension(after, tmp_path)
            work.check("after an update of the extension")
        after.stop()
        after.verify_checksums()
        for session, kept in zip(work.sessions, state):
            session.state = kept
    finally:
        after.remove()


def write(conn: psycopg.Connection) -> None:
    """New rows find old blocks; blocks that were condemned before the upgrade go, and no others."""
    (stored,) = conn.execute("SELECT blocks_stored FROM tessera.storage WHERE relation = 'parts_high'::regclass").fetchone()
    conn.execute("INSERT INTO parts SELECT id + 40, data FROM parts WHERE id >= 10 AND id < 50")
    conn.execute("INSERT INTO parts SELECT i, value(i) FROM generate_series(10, 30) AS i")
    assert conn.execute("SELECT blocks_stored FROM tessera.storage WHERE relation = 'parts_high'::regclass").fetchone()[0] == stored
    conn.execute("INSERT INTO condemned SELECT 100, value(9)")  # one that was condemned is taken again
    for _ in range(2):
        conn.execute("VACUUM condemned")
    assert conn.execute("SELECT count(*) FROM tessera.store_blocks('condemned')").fetchone()[0] == 6
    assert conn.execute("SELECT count(*) FROM condemned WHERE data::bytea = value(least(id, 9))::bytea").fetchone()[0] == 6
    conn.execute("DELETE FROM parts WHERE id > 20")
    for sql in ("VACUUM parts", "VACUUM parts", "VACUUM FULL parts", "REINDEX TABLE parts", "SELECT repack('parts_high')", "REFRESH MATERIALIZED VIEW seen",
                "ALTER TABLE unlogged SET LOGGED", "VACUUM FULL changed", "VACUUM (FREEZE) held", "VACUUM FULL tessera.weight"):
        conn.execute(sql)
        assert problems(conn) == [], sql
    assert conn.execute("SELECT count(*) FROM parts WHERE data::bytea <> value(id)::bytea AND id < 40").fetchone()[0] == 0
    assert conn.execute(WRONG).fetchall() == []
    assert load(conn, "cnn") == 2
    conn.execute("SELECT drop_model('minilm_int8')")
    assert_answers(conn, "cnn", "cnn", 7)


def update_extension(cluster: Cluster, folder: Path) -> None:
    """A made-up next version of the extension, in a directory of its own (extension_control_path, PostgreSQL 18)."""
    home = Path(tempfile.mkdtemp(dir="/tmp", prefix="pgt."))
    try:
        os.chmod(home, 0o755)
        (home / "extension").mkdir()
        with cluster.connect() as conn:
            (share,) = conn.execute("SELECT setting FROM pg_config WHERE name = 'SHAREDIR'").fetchone()
            (version,) = conn.execute("SELECT extversion FROM pg_extension WHERE extname = 'pg_tessera'").fetchone()
            control = Path(share, "extension", "pg_tessera.control").read_text()
            (home / "extension" / "pg_tessera.control").write_text(control.replace(f"'{version}'", "'99.0'"))
            (home / "extension" / f"pg_tessera--{version}--99.0.sql").write_text("""
                ALTER TABLE tessera.model ADD COLUMN remark text DEFAULT 'updated';
                ALTER TABLE tessera.weight ADD COLUMN extra int;
                CREATE FUNCTION tessera.added(tensor_block) RETURNS bigint LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'tessera_block_id';""")
            conn.execute(f"SET extension_control_path = '{home}:$system'")
            conn.execute("ALTER EXTENSION pg_tessera UPDATE")
            assert conn.execute("SELECT extversion FROM pg_extension WHERE extname = 'pg_tessera'").fetchone()[0] == "99.0"
            assert conn.execute("SELECT count(*), min(tessera.added(data)) > 0 FROM held").fetchone()[1]
            assert conn.execute("SELECT DISTINCT remark FROM tessera.model").fetchall() == [("updated",)]
            assert_answers(conn, "cnn", "cnn", 7)
            load(conn, "after_update", onnx_file("fraud_fc_512"))
            assert_answers(conn, "after_update", "fraud_fc_512", 7)
            conn.execute("SELECT drop_model('after_update')")
    finally:
        shutil.rmtree(home)


def test_update_to_the_same_version(fresh):
    """There is one version so far: an update says so and changes nothing."""
    with fresh.connect() as conn:
        (default,) = conn.execute("SELECT default_version FROM pg_available_extensions WHERE name = 'pg_tessera'").fetchone()
        versions = conn.execute("SELECT source, target, path FROM pg_extension_update_paths('pg_tessera') WHERE path IS NOT NULL").fetchall()
        assert versions == [], "there is an upgrade script now: test it from the last release"
        load(conn, "cnn")
        notices = []
        conn.add_notice_handler(lambda notice: notices.append(notice.message_primary))
        conn.execute("ALTER EXTENSION pg_tessera UPDATE")
        assert notices == [f'version "{default}" of extension "pg_tessera" is already installed']
        assert conn.execute("SELECT extversion FROM pg_extension WHERE extname = 'pg_tessera'").fetchone()[0] == default
        assert_answers(conn, "cnn", "cnn", 7)
