"""Crashes under a load of everything that changes a block store: what was committed is there and right, the store is sound."""

import os
import random
import sys
import time

import pytest

from cluster import Cluster, alive
from helpers import Background
from workload import Workload, problems

ROUNDS = int(os.environ.get("TESSERA_ROUNDS", 0)) or (200 if os.environ.get("TESSERA_FULL") else 8)
SETTINGS = ("wal_level = replica", "wal_consistency_checking = 'all'", "full_page_writes = on", "checkpoint_timeout = '30s'",
            "max_prepared_transactions = 10", "autovacuum_naptime = '1s'", "autovacuum_vacuum_threshold = 5", "autovacuum_vacuum_insert_threshold = 20",
            "shared_buffers = '32MB'")


@pytest.fixture(scope="module")
def crashing():
    cluster = Cluster("crash_store", settings=SETTINGS)
    cluster.remove()
    cluster.start()
    yield cluster
    cluster.remove()


def started(cluster: Cluster) -> bool:
    """True once the new server has written its number over the old one's."""
    try:
        return alive(cluster.postmaster())
    except (FileNotFoundError, IndexError):
        return False


def crash(cluster: Cluster, dice: random.Random) -> str:
    """Takes the server away in one of several ways; returns which."""
    how = dice.choice(["kill", "kill", "checkpoint", "recovery"])
    if how == "checkpoint":
        # An immediate stop in the middle of a checkpoint.
        with cluster.connect() as conn:
            checkpoint = Background(conn.execute, "CHECKPOINT")
            time.sleep(dice.uniform(0, 0.05))
            cluster.stop("immediate")
            checkpoint.thread.join()
        return how
    cluster.kill(cluster.postmaster())
    if how == "recovery":
        # Once more while it recovers.
        cluster.as_server("pg_ctl", "-D", str(cluster.data), "-W", "-l", str(cluster.home / "run.log"), "start")
        deadline = time.monotonic() + 20
        while not started(cluster):
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.005)
        time.sleep(dice.uniform(0, 0.4))
        cluster.kill(cluster.postmaster())
    return how


@pytest.mark.timeout(60 + 30 * ROUNDS)
def test_rounds(crashing):
    seed = int(os.environ.get("TESSERA_SEED", 0)) or random.SystemRandom().randrange(10**6)
    print(f"seed {seed}", file=sys.stderr)
    dice = random.Random(seed)
    load = Workload(crashing, seed, prepares=True)
    load.prepare()
    started = time.monotonic()
    for turn in range(1, ROUNDS + 1):
        load.start()
        wait = dice.uniform(0.1, 2)
        time.sleep(wait)
        how = crash(crashing, dice)
        load.wait()
        crashing.start()
        load.check(f"seed {seed}, round {turn}, {how} after {wait:.3f} s")
        if turn % 10 == 0:
            print(f"round {turn} after {time.monotonic() - started:.0f} s", file=sys.stderr)
    crashing.stop()
    crashing.verify_checksums()
    crashing.start()
    load.check(f"seed {seed}, at the end")
    seconds = time.monotonic() - started
    print(f"{ROUNDS} rounds in {seconds:.0f} s, {[session.committed for session in load.sessions]} transactions", file=sys.stderr)
    assert load.committed() > 10 * ROUNDS, "too little was done to be interrupted"


def values(number: str) -> str:
    """Elements of which not all are equal, and none fits float16: a block in a small form would take no space."""
    return f"array_fill(({number} + 0.1)::real, ARRAY[127, 128]) || array_fill(({number} + 0.3)::real, ARRAY[128])"


BLOCK = f"({values('i + %s')})::tensor_block"
RIGHT = f"SELECT count(*), count(*) FILTER (WHERE data::real[] = {values('id + seed')}) FROM shrinking"


def test_after_truncation(crashing):
    """The server goes away right after a sweep, or a repack, has cut the store's file; what follows uses those pages anew."""
    size = "SELECT pg_relation_size(reltoastrelid) FROM pg_class WHERE oid = 'shrinking'::regclass"
    with crashing.connect() as conn:
        conn.execute("DROP TABLE IF EXISTS shrinking")
        conn.execute("CREATE TABLE shrinking (id int, seed int, data tensor_block) USING tensor_block WITH (autovacuum_enabled = off, toast.autovacuum_enabled = off)")
    shrunk = 0
    for turn, last in enumerate(["VACUUM shrinking", "SELECT repack('shrinking')", "VACUUM FULL shrinking", "TRUNCATE shrinking"]):
        with crashing.connect() as conn:
            conn.execute(f"INSERT INTO shrinking SELECT i, %s, {BLOCK} FROM generate_series(1, 200) AS i", (1000 * turn,) * 3)
            conn.execute("CHECKPOINT")
            before = conn.execute(size).fetchone()[0]
            # Rows in the middle stay, so that a repack has something to move.
            conn.execute("DELETE FROM shrinking WHERE id NOT BETWEEN 90 AND 99")
            conn.execute("VACUUM (TRUNCATE off) shrinking")
            conn.execute("VACUUM (TRUNCATE off) shrinking")
            conn.execute(last)
            after, rows = conn.execute(size).fetchone()[0], conn.execute("SELECT count(*) FROM shrinking").fetchone()[0]
            shrunk += after < before
        crashing.kill(crashing.postmaster())
        crashing.start()
        with crashing.connect() as conn:
            assert conn.execute(RIGHT).fetchone() == (rows, rows)
            assert conn.execute(size).fetchone()[0] >= after
            assert problems(conn) == []
            conn.execute(f"INSERT INTO shrinking SELECT i, %s, {BLOCK} FROM generate_series(1, 50) AS i", (1000 * turn + 300,) * 3)
            assert conn.execute(RIGHT).fetchone() == (rows + 50, rows + 50)
            assert problems(conn) == []
    assert shrunk >= 3


def test_unlogged_store(crashing):
    """An unlogged table is empty after a crash, and its store too; both are used again, and survive a clean stop."""
    insert = f"INSERT INTO unlogged SELECT i, {BLOCK % (7, 7)} FROM generate_series(1, 30) AS i"
    with crashing.connect() as conn:
        conn.execute("DROP TABLE IF EXISTS unlogged")
        conn.execute("CREATE UNLOGGED TABLE unlogged (id int PRIMARY KEY, data tensor_block) USING tensor_block")
        conn.execute(insert)
        conn.execute("CHECKPOINT")
    crashing.kill(crashing.postmaster())
    crashing.start()
    for how in ("crash", "stop"):
        with crashing.connect() as conn:
            if how == "crash":
                assert conn.execute("SELECT count(*) FROM unlogged").fetchone()[0] == 0
                assert problems(conn) == []
                conn.execute("VACUUM unlogged")
                conn.execute(insert)
                conn.execute("VACUUM unlogged")
            assert conn.execute("SELECT count(DISTINCT data::bytea) FROM unlogged").fetchone()[0] == 30
            assert problems(conn) == []
        crashing.stop()
        crashing.start()


def test_minimal_wal(crashing):
    """With wal_level = minimal, a store that its own transaction made is not logged but flushed at COMMIT."""
    minimal = Cluster("crash_store", settings=(*SETTINGS, "wal_level = minimal", "max_wal_senders = 0", "archive_mode = off"))
    crashing.stop()
    for threshold in ("0", "64MB"):  # flushed as a file, or as pages of WAL
        minimal.start()
        with minimal.connect() as conn:
            conn.execute(f"SET wal_skip_threshold = '{threshold}'")
            conn.execute("BEGIN")
            conn.execute("DROP TABLE IF EXISTS made")
            conn.execute("CREATE TABLE made (id int, data tensor_block) USING tensor_block")
            conn.execute(f"INSERT INTO made SELECT i, {BLOCK % (0, 0)} FROM generate_series(1, 60) AS i")
            conn.execute("SAVEPOINT a")
            conn.execute("TRUNCATE made")
            conn.execute("ROLLBACK TO a")
            conn.execute("COMMIT")
            conn.execute("BEGIN")
            conn.execute("CREATE TABLE IF NOT EXISTS other (id int, data tensor_block) USING tensor_block")
            conn.execute("TRUNCATE other")
            conn.execute("INSERT INTO other SELECT * FROM made")
            conn.execute("COMMIT")
            conn.execute("DELETE FROM other WHERE id > 30")
            conn.execute("VACUUM FULL other")
            conn.execute(f"INSERT INTO made SELECT i, {BLOCK % (0, 0)} FROM generate_series(61, 70) AS i")
        minimal.kill(minimal.postmaster())
        minimal.start()
        with minimal.connect() as conn:
            for table, rows in (("made", 70), ("other", 30)):
                right = f"SELECT count(*) FROM {table} AS t (i, data) WHERE data::real[] = {values('i')}"
                assert conn.execute(right).fetchone()[0] == rows
            assert problems(conn) == []
    minimal.stop()
    crashing.start()
