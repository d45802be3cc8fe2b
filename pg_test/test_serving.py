"""Many clients, more models than the block cache has room for: every answer is right, and nothing stays pinned."""

import re
import threading
import time
from pathlib import Path

import numpy as np
import psycopg
import pytest

import fleet
from cluster import Cluster, Database
from helpers import assert_answers, load

pytestmark = pytest.mark.newer

SECONDS = 10


@pytest.fixture(scope="module")
def busy():
    """A server whose cache has room for a third of six models."""
    import conftest

    cluster = Cluster("serving", conftest.VERSION, ("tessera.block_cache_size = '4MB'", "max_connections = 50"))
    cluster.remove()
    cluster.start()
    try:
        with Database(cluster, "serving") as database:
            members = fleet.make(count=6, width=512, groups=2)
            with database.connect() as conn:
                stored = fleet.load_all(conn, members)
                assert stored > 3 * 4e6, f"{stored} bytes of blocks are too few for a cache of 4 MB"
            yield database, members
    finally:
        cluster.remove()


def stats(conn: psycopg.Connection) -> dict:
    with conn.cursor(row_factory=psycopg.rows.dict_row) as cursor:
        return cursor.execute("SELECT * FROM tessera.block_cache_stats").fetchone()


def others_are_gone(conn: psycopg.Connection) -> None:
    sql = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    deadline = time.monotonic() + 10
    while conn.execute(sql).fetchone()[0]:
        assert time.monotonic() < deadline, "ended sessions are still there"
        time.sleep(0.02)


def assert_sound(conn: psycopg.Connection) -> dict:
    others_are_gone(conn)
    assert conn.execute("SELECT * FROM tessera.check_cache()").fetchall() == []
    now = stats(conn)
    assert now["frames_pinned"] == 0, now
    return now


def test_clients(busy):
    database, members = busy
    with database.connect() as conn:
        conn.execute("SELECT reset_cache_stats()")
        rate = fleet.serve(database.connect, members, clients=16, seconds=SECONDS)
        now = assert_sound(conn)
        assert rate > 1 and now["evictions"] > now["frames"], (rate, now)
        assert now["frames"] * 65536 <= 4 * 2**20 and now["bytes_used"] <= now["bytes"]


def test_clients_that_are_disturbed(busy):
    """Time-outs, cancelled statements and ended sessions among the clients leave the others' answers right."""
    database, members = busy
    over, counts, errors = threading.Event(), {"timed out": 0, "cancelled": 0, "ended": 0}, []
    wanted = (psycopg.errors.QueryCanceled, psycopg.errors.AdminShutdown)

    def ask(conn: psycopg.Connection, member: fleet.Member, how: str) -> None:
        sql = f"SELECT count(predict(%s, %s::{member.cast})) FROM generate_series(1, 10000000)"
        try:
            conn.execute(sql, (member.name, member.questions[0]))
        except wanted:
            counts[how] += 1

    def disturb(how: str, seed: int) -> None:
        dice = np.random.default_rng(seed)
        try:
            while not over.is_set():
                conn, member, pause = database.connect(), members[dice.integers(len(members))], float(dice.uniform(0.001, 0.1))
                if how == "timed out":
                    conn.execute(f"SET statement_timeout = '{int(pause * 1e6)}us'")
                thread = threading.Thread(target=ask, args=(conn, member, how))
                thread.start()
                time.sleep(pause)
                for _ in range(300):  # again, should the statement not have begun yet
                    if how == "cancelled":
                        conn.cancel_safe()
                    elif how == "ended":
                        with database.connect() as other:
                            other.execute("SELECT pg_terminate_backend(%s)", (conn.info.backend_pid,))
                    thread.join(0.1)
                    if not thread.is_alive():
                        break
                assert not thread.is_alive(), f"a session that was {how} hangs"
                conn.close()
        except BaseException as error:  # noqa: BLE001: raised below
            errors.append(error)

    threads = [threading.Thread(target=disturb, args=(how, n)) for n, how in enumerate(counts)]
    for thread in threads:
        thread.start()
    try:
        fleet.serve(database.connect, members, clients=8, seconds=SECONDS / 2)
    finally:
        over.set()
        for thread in threads:
            thread.join(60)
    assert not errors, errors
    assert all(counts.values()), counts
    with database.connect() as conn:
        assert_sound(conn)
        member = members[0]
        client = fleet.Client(database.connect, [member], 0)
        client.ask()
        client.connection.close()
        assert client.answered == 1


def own_kb(conn: psycopg.Connection) -> int:
    """kB of anonymous memory of a connection's process."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{conn.info.backend_pid}/status").read_text())[1])


def test_memory_of_idle_sessions(busy):
    """A session that has predicted keeps the plan, and neither weights nor what its runs needed."""
    database, _ = busy
    with database.connect() as conn:
        load(conn, "minilm")  # 69 MB
    for batches in ([1], [64, 7], [64]):
        with database.connect() as idle, database.connect() as conn:
            idle.execute("SELECT 1")
            for batch in batches:
                assert_answers(conn, "minilm", "minilm", batch)
            kept = own_kb(conn) - own_kb(idle)
            assert 0 < kept < 8 * 1024, f"{kept} kB after batches of {batches}"
