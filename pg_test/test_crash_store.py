"""Crashes under a load of everything that changes a block store: what was committed is there and right, the store is sound."""

import os
import random
import sys
import time

import psycopg
import pytest

from cluster import Cluster, alive
from helpers import Background
from workload import Workload

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
        while not alive(cluster.postmaster()):  # until then the file is the old server's
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
    crashing.stop()
    crashing.verify_checksums()
    crashing.start()
    load.check(f"seed {seed}, at the end")
    seconds = time.monotonic() - started
    print(f"{ROUNDS} rounds in {seconds:.0f} s, {[session.committed for session in load.sessions]} transactions", file=sys.stderr)
    assert load.committed() > 10 * ROUNDS, "too little was done to be interrupted"
