"""A streaming replica under load, promotion, pg_rewind, base backups, and recovery to a point in time."""

import os
import random
import re
import sys
import threading
import time

import psycopg
import pytest

from cluster import Cluster
from helpers import assert_answers, fails, load as load_model
from workload import WRONG, Workload, exported, problems

SECONDS = 60 if os.environ.get("TESSERA_FULL") else 5
# Cancelled by replay that could wait no longer (40001), by a deadlock with it (40P01).
CONFLICTS = ("40001", "40P01")


@pytest.fixture(scope="module")
def primary():
    cluster = Cluster("primary")
    archive = cluster.home / "archive"
    cluster.settings = ("wal_consistency_checking = 'all'", "archive_mode = on", f"archive_command = 'mkdir -p {archive} && cp %p {archive}/%f'",
                        "max_standby_streaming_delay = '300ms'", "autovacuum_naptime = '1s'", "autovacuum_vacuum_threshold = 5",
                        "wal_keep_size = '4GB'")
    cluster.remove()
    cluster.start()
    yield cluster
    cluster.remove()


@pytest.fixture(scope="module")
def work(primary):
    """Sessions on the primary, with something in its tables already."""
    seed = int(os.environ.get("TESSERA_SEED", 0)) or random.SystemRandom().randrange(10**6)
    print(f"seed {seed}", file=sys.stderr)
    work = Workload(primary, seed)
    work.prepare()
    with primary.connect() as conn:
        load_model(conn, "fraud_fc_256")
        load_model(conn, "cnn")
    work.start()
    time.sleep(1)
    work.stop()
    work.check("before the backups")
    return work


def follower(name: str, primary: Cluster):
    cluster = Cluster(name, settings=tuple(s for s in primary.settings if not s.startswith("archive")), bare=True)
    cluster.copy_of(primary, "-R")
    cluster.start()
    return cluster


@pytest.fixture(scope="module")
def standby(primary, work):
    cluster = follower("standby", primary)
    yield cluster
    cluster.remove()


def dump(cluster: Cluster) -> list[str]:
    """pg_dump without what differs by nature: WAL has sequences 32 values ahead."""
    text = cluster.program("pg_dump", "-d", "tessera", text=True).stdout
    lines = [line for line in text.splitlines() if not line.startswith(("\\restrict", "\\unrestrict", "SELECT pg_catalog.setval"))]
    assert len(lines) > 100
    return lines


def assert_equal(one: Cluster, other: Cluster) -> None:
    """Both have the same rows and models, predict the same, and are sound."""
    assert dump(one) == dump(other)
    with one.connect() as a, other.connect() as b:
        for conn in (a, b):
            assert problems(conn) == []
            for model in ("fraud_fc_256", "cnn"):
                assert_answers(conn, model, model, 7)
        names = "SELECT name FROM tessera.models ORDER BY 1"
        assert a.execute(names).fetchall() == b.execute(names).fetchall() != []
        for (name,) in a.execute(names).fetchall():
            assert exported(a, name) == exported(b, name)


class Reader:
    """Queries on a standby while the primary sweeps and packs: right values, or cancelled; nothing else."""

    def __init__(self, cluster: Cluster, slow: bool):
        self.cluster, self.slow = cluster, slow
        self.right, self.cancelled, self.failures = 0, 0, []
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        while not self.stop.is_set():
            try:
                with self.cluster.connect() as conn:
                    self.read_slowly(conn) if self.slow else self.read(conn)
                self.right += 1
            except psycopg.Error as error:
                # An idle session is ended, and may learn of it as a lost connection only: the log says why.
                if error.sqlstate not in (*CONFLICTS, None):
                    self.failures.append(f"{error.sqlstate} {error!r}")
                self.cancelled += 1
            except AssertionError as error:
                self.failures.append(str(error))

    def read(self, conn: psycopg.Connection) -> None:
        wrong = conn.execute(WRONG).fetchall()
        assert not wrong, f"wrong rows on the standby: {wrong}"
        assert_answers(conn, "fraud_fc_256", "fraud_fc_256", 7)
        assert len(conn.execute("SELECT export_model(name) FROM tessera.models").fetchall()) >= 2

    def read_slowly(self, conn: psycopg.Connection) -> None:
        """One snapshot, and a pause between rows, so that blocks are removed and moved meanwhile."""
        conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        conn.execute("DECLARE c CURSOR FOR SELECT held.data::bytea = o.data::bytea AND held.note IS NOT DISTINCT FROM o.note FROM held JOIN original AS o USING (seed)")
        while (row := conn.execute("FETCH FROM c").fetchone()) and not self.stop.is_set():
            assert row[0], "a wrong row on the standby"
            time.sleep(0.005)
        conn.execute("COMMIT")

    def end(self) -> None:
        self.stop.set()
        self.thread.join(60)
        assert not self.thread.is_alive()
        assert not self.failures, self.failures[:5]


def test_follows(primary, work, standby):
    readers = [Reader(standby, slow) for slow in (False, True, True)]
    work.start()
    time.sleep(SECONDS)
    work.stop()
    standby.catch_up(primary)
    for reader in readers:
        reader.end()
    print(f"{work.committed()} transactions; read {[(r.right, r.cancelled) for r in readers]}", file=sys.stderr)
    bad = [line for line in standby.run("log").splitlines() if re.search("(ERROR|FATAL|PANIC|WARNING): |signal", line)]
    assert [line for line in bad if "conflict with recovery" not in line and "starting up" not in line] == []
    assert sum(reader.right for reader in readers) >= 5, "too few reads ended to say anything"
    assert sum(reader.cancelled for reader in readers) >= 1, "no read met a conflict"
    work.check("after the load")
    standby.catch_up(primary)
    assert_equal(primary, standby)


def test_refuses_changes(standby):
    with standby.connect() as conn:
        for sql in ("SELECT drop_model('cnn')", "INSERT INTO held VALUES (9, 9, 9)", "SELECT repack('held')", "VACUUM held", "DELETE FROM held"):
            fails(conn, sql, hint=False)
        assert_answers(conn, "cnn", "cnn", 7)


def test_shrinks_with_the_primary(primary, standby):
    """Blocks at the end of the file go; the standby's file ends where the primary's does."""
    size = "SELECT pg_relation_size(reltoastrelid) FROM pg_class WHERE oid = 'shrinking'::regclass"
    with primary.connect() as conn, standby.connect() as there:
        conn.execute("CREATE TABLE shrinking (id int, data tensor_block) USING tensor_block")
        # Not all elements are equal, and float16 has none of them: a block in a small form would take no space.
        values = "array_fill((id + 0.1)::real, ARRAY[127, 128]) || array_fill((id + 0.3)::real, ARRAY[128])"
        conn.execute(f"INSERT INTO shrinking SELECT id, ({values})::tensor_block FROM generate_series(1, 300) AS id")
        before = conn.execute(size).fetchone()[0]
        standby.catch_up(primary)
        there.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        assert there.execute("SELECT count(*) FROM shrinking").fetchone()[0] == 300
        conn.execute("DELETE FROM shrinking WHERE id > 10")
        for _ in range(3):
            conn.execute("VACUUM shrinking")
        after = conn.execute(size).fetchone()[0]
        assert after < before / 4, "the primary's store did not shrink"
        with pytest.raises(psycopg.Error) as caught:
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                assert there.execute(f"SELECT count(*) FROM shrinking WHERE data::real[] = {values}").fetchone()[0] == 300
        assert caught.value.sqlstate in CONFLICTS
        there.close()
        standby.catch_up(primary)
        with standby.connect() as again:
            assert again.execute(size).fetchone()[0] == after
            assert again.execute(f"SELECT count(*) FROM shrinking WHERE data::real[] = {values}").fetchone()[0] == 10
            assert problems(again) == []
        conn.execute("DROP TABLE shrinking")


def test_new_databases(primary, standby):
    """CREATE DATABASE by WAL and by files, from one with models."""
    for strategy in ("wal_log", "file_copy"):
        with primary.connect("postgres") as conn:
            conn.execute(f"CREATE DATABASE twin TEMPLATE tessera STRATEGY {strategy}")
        standby.catch_up(primary)
        for cluster in (primary, standby):
            with cluster.connect("twin") as conn:
                assert_answers(conn, "cnn", "cnn", 7)
                assert conn.execute("SELECT count(*) FROM held").fetchone()[0] > 0
                assert conn.execute(WRONG).fetchall() == []
                assert problems(conn) == []
        with primary.connect("postgres") as conn:
            conn.execute("DROP DATABASE twin")


def test_point_in_time(primary, work):
    """A base backup and the archive give the state at a named point, whatever happened to the store afterwards."""
    restored = Cluster("restored", bare=True)
    restored.copy_of(primary)
    try:
        work.start()
        time.sleep(1)
        work.stop()
        work.check("before the restore point")
        with primary.connect() as conn:
            conn.execute("CREATE TABLE kept AS SELECT session, id, seed FROM held")
            models = conn.execute("SELECT name, version FROM tessera.models ORDER BY 1, 2").fetchall()
            conn.execute("SELECT pg_create_restore_point('before the accident')")
            conn.execute("DELETE FROM held")
            conn.execute("SELECT drop_model('cnn')")
            for _ in range(2):
                conn.execute("VACUUM held")
                conn.execute("VACUUM tessera.weight")
            conn.execute("VACUUM FULL held")
            load_model(conn, "cnn")
            conn.execute("INSERT INTO held SELECT session, id, seed, 1, note, data FROM kept JOIN original USING (seed)")
            segment = conn.execute("SELECT pg_walfile_name(pg_switch_wal())").fetchone()[0]
            deadline = time.monotonic() + 30
            while (conn.execute("SELECT last_archived_wal FROM pg_stat_archiver").fetchone()[0] or "") < segment:
                assert time.monotonic() < deadline, "the archiver is late"
                time.sleep(0.05)
        (restored.data / "recovery.signal").touch()
        restored.settings = (f"restore_command = 'cp {primary.home}/archive/%f %p'", "recovery_target_name = 'before the accident'",
                             "recovery_target_action = 'promote'", "archive_mode = off")
        restored.start()
        with restored.connect() as conn:
            deadline = time.monotonic() + 30
            while conn.execute("SELECT pg_is_in_recovery()").fetchone()[0]:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert problems(conn) == []
            assert conn.execute("SELECT name, version FROM tessera.models ORDER BY 1, 2").fetchall() == models
            assert conn.execute("SELECT count(*) FROM kept").fetchone()[0] > 20
            rows = "SELECT session, id, seed FROM {} ORDER BY 1, 2, 3"
            assert conn.execute(rows.format("held")).fetchall() == conn.execute(rows.format("kept")).fetchall()
            assert conn.execute(WRONG).fetchall() == []
            assert_answers(conn, "cnn", "cnn", 7)
            write(conn)
    finally:
        restored.remove()


def write(conn: psycopg.Connection) -> None:
    """A server that was a standby takes changes of all kinds."""
    load_model(conn, "written", "fraud_fc_512")
    assert_answers(conn, "written", "fraud_fc_512", 7)
    conn.execute("INSERT INTO held SELECT 100, seed, seed, 1, note, data FROM original")
    conn.execute("DELETE FROM held WHERE session = 0")
    for sql in ("VACUUM held", "VACUUM held", "SELECT repack('held')", "VACUUM FULL held", "VACUUM tessera.weight"):
        conn.execute(sql)
        assert conn.execute(WRONG).fetchall() == []
        assert conn.execute("SELECT count(*) FROM held WHERE session = 100").fetchone()[0] == 60
        assert problems(conn) == []
    conn.execute("SELECT drop_model('written')")
    conn.execute("DELETE FROM held WHERE session = 100")


def test_promotion_and_rewind(primary, work, standby):
    """The standby takes over in the middle of the load; the old primary went on alone, is rewound, and follows."""
    work.start()
    time.sleep(1)
    with standby.connect() as conn:
        # Not one that waits: its own snapshot may be what replay waits for, until it is cancelled for that.
        assert conn.execute("SELECT pg_promote(wait => false)").fetchone()[0]
        until = time.monotonic() + 60
        while conn.execute("SELECT pg_is_in_recovery()").fetchone()[0]:
            assert time.monotonic() < until, "the standby was not promoted within a minute"
            time.sleep(0.1)
        write(conn)
        (count,) = conn.execute("SELECT count(*) FROM held").fetchone()
        conn.execute("CHECKPOINT")  # before PostgreSQL 17, pg_rewind learns of the promotion by it
    work.stop()
    work.check("the old primary by itself")
    primary.stop()
    primary.as_server("pg_rewind", "-D", str(primary.data), "--source-server", standby.conninfo() + " dbname=postgres", "-R")
    assert (primary.data / "standby.signal").exists(), "nothing was rewound"
    old = Cluster(primary.name, settings=standby.settings, bare=True)
    old.start()
    with standby.connect() as conn:
        conn.execute("INSERT INTO held SELECT 200, seed, seed, 1, note, data FROM original")
        load_model(conn, "later", "fraud_fc_512")
        conn.execute("VACUUM held")
    old.catch_up(standby)
    assert_equal(standby, old)
    with old.connect() as conn:
        assert conn.execute("SELECT count(*) FROM held").fetchone()[0] == count + 60
        assert_answers(conn, "later", "fraud_fc_512", 7)
    old.stop()
    old.verify_checksums()
