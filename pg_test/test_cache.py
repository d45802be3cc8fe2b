"""The block cache between sessions: one load a block, loaders and holders that die, waiters that go on, right bytes."""

import os
import signal
import subprocess
import time

import psycopg
import pytest

from cluster import Cluster, Database
from helpers import Background
from paths import ROOT

FRAMES = 64


@pytest.fixture(scope="module")
def server():
    """A server with a small cache, for which the extension is built with its test functions."""
    subprocess.run([ROOT / "scripts" / "install-extension", "test"], check=True)
    cluster = Cluster("cache", "test", settings=(f"tessera.block_cache_size = '{FRAMES * 64}kB'",))
    cluster.remove()
    cluster.start()
    yield cluster
    cluster.remove()


@pytest.fixture
def db(server):
    with Database(server, "cache") as database:
        yield database
        with database.connect() as conn:
            assert_sound(conn)
            nothing_pinned(conn)


@pytest.fixture
def seed(request):
    """Blocks of a test of its own."""
    return abs(hash(request.node.name)) % 2**60


def assert_sound(conn: psycopg.Connection) -> None:
    assert conn.execute("SELECT * FROM tessera.check_cache()").fetchall() == []


def stats(conn: psycopg.Connection) -> dict:
    with conn.cursor(row_factory=psycopg.rows.dict_row) as cursor:
        return cursor.execute("SELECT * FROM tessera.block_cache_stats").fetchone()


def nothing_pinned(conn: psycopg.Connection) -> None:
    """Sees no pin within five seconds: a closed connection's process, which ends its pins as it exits, isn't waited for."""
    deadline = time.monotonic() + 5
    while stats(conn)["frames_pinned"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stats(conn)["frames_pinned"] == 0


def hold(conn: psycopg.Connection, seed: int, number: int = 0, load_ms: int = 0, fail: bool = False) -> bool:
    """Pins a block; True if this session loaded it."""
    return conn.execute("SELECT tests.cache_hold(%s, %s, %s, %s)", (seed, number, load_ms, fail)).fetchone()[0]


def loading(conn: psycopg.Connection, count: int = 1) -> None:
    """Waits until some session loads a block."""
    for _ in range(1000):
        found = conn.execute("SELECT count(*) FROM tessera.block_cache_stats WHERE frames_pinned >= %s", (count,)).fetchone()[0]
        if found:
            return
        time.sleep(0.005)
    raise AssertionError("nobody loads a block")


def pid(conn: psycopg.Connection) -> int:
    return conn.info.backend_pid


def test_one_load_a_block(db, seed):
    """Eight sessions want one block at once: one loads it, the others wait for it and count that."""
    connections = [db.connect() for _ in range(8)]
    before = stats(connections[0])
    work = [Background(hold, conn, seed, 0, 300) for conn in connections]
    assert sum(w.result() for w in work) == 1
    after = stats(connections[0])
    assert after["loads"] - before["loads"] == 1
    assert after["waits"] - before["waits"] == 7
    assert after["fallbacks"] == before["fallbacks"]
    assert after["frames_pinned"] == 1
    assert_sound(connections[0])
    for conn in connections:
        assert conn.execute("SELECT tests.cache_let_go()").fetchone()[0] == 1
        conn.close()


def test_a_long_load_is_not_waited_for(db, seed):
    """After a second a waiter reads the block for itself."""
    with db.connect() as slow, db.connect() as conn:
        work = Background(hold, slow, seed, 0, 3000)
        loading(conn)
        started = time.monotonic()
        assert hold(conn, seed) is True
        assert 0.9 < time.monotonic() - started < 2
        assert stats(conn)["fallbacks"] >= 1
        assert work.result() is True
        assert hold(conn, seed) is False


def statement_timeout(loader, _conn):
    loader.execute("SET statement_timeout = 300")


def cancel(loader, conn):
    conn.execute("SELECT pg_cancel_backend(%s)", (pid(loader),))


def terminate(loader, conn):
    conn.execute("SELECT pg_terminate_backend(%s)", (pid(loader),))


@pytest.mark.parametrize("way", [statement_timeout, cancel, terminate])
def test_a_loader_gives_up(db, seed, way):
    """Cancel, timeout or the end of its session: the frame is free for the waiters, of which one loads the block."""
    loader, conn, others = db.connect(), db.connect(), [db.connect() for _ in range(3)]
    if way is statement_timeout:
        way(loader, conn)
    work = Background(hold, loader, seed, 0, 60_000)
    loading(conn)
    waiters = [Background(hold, other, seed, 0, 20) for other in others]
    time.sleep(0.1)
    if way is not statement_timeout:
        way(loader, conn)
    with pytest.raises(psycopg.Error) as caught:
        work.result()
    assert caught.value.sqlstate in ("57014", "57P01")
    assert sum(w.result(10) for w in waiters) == 1
    assert max(w.seconds for w in waiters) < 1.5
    assert_sound(conn)
    for connection in [loader, conn, *others]:
        connection.close()


def test_an_error_of_the_loader_stays_its_own(db, seed):
    with db.connect() as loader, db.connect() as conn:
        work = Background(hold, loader, seed, 0, 300, True)
        loading(conn)
        assert hold(conn, seed) is True
        with pytest.raises(psycopg.Error, match="the load fails"):
            work.result()
        assert hold(loader, seed) is False


def test_errors_in_subtransactions(db, seed):
    with db.connect() as conn:
        conn.execute(
            """DO $$ BEGIN
                 FOR i IN 1..200 LOOP
                   BEGIN PERFORM tests.cache_hold(%s, i, 0, true);
                   EXCEPTION WHEN OTHERS THEN NULL; END;
                 END LOOP;
               END $$"""
            % seed
        )
        assert stats(conn)["frames_pinned"] == 0
        assert_sound(conn)


@pytest.mark.parametrize("way", [cancel, terminate])
def test_a_waiter_gives_up(db, seed, way):
    with db.connect() as loader, db.connect() as conn:
        waiter = db.connect()
        work = Background(hold, loader, seed, 0, 900)
        loading(conn)
        waiting = Background(hold, waiter, seed)
        time.sleep(0.2)
        way(waiter, conn)
        with pytest.raises(psycopg.Error):
            waiting.result(0.5)
        assert work.result() is True
        waiter.close()


@pytest.mark.parametrize("way", ["close", "terminate"])
def test_pins_end_with_their_session(db, seed, way):
    with db.connect() as conn:
        holder = db.connect()
        for number in range(20):
            hold(holder, seed, number)
        assert stats(conn)["frames_pinned"] == 20
        if way == "close":
            holder.close()
        else:
            conn.execute("SELECT pg_terminate_backend(%s, 5000)", (pid(holder),))
        nothing_pinned(conn)


def test_all_frames_pinned(db, seed):
    """Then blocks are read into private memory, which is counted, and is no error."""
    with db.connect() as conn, db.connect() as other:
        for number in range(FRAMES):
            hold(conn, seed, number)
        before = stats(conn)["fallbacks"]
        assert hold(other, seed, FRAMES) is True
        assert hold(other, seed, 3) is False
        assert stats(conn)["fallbacks"] == before + 1
        assert_sound(conn)


@pytest.mark.parametrize("at", ["loads", "holds", "waits"])
def test_kill_9(server, seed, at):
    """The postmaster restarts all, and the cache is as new."""
    with Database(server, "killed") as database:
        victim, other = database.connect(), database.connect()
        if at == "loads":
            work = [Background(hold, victim, seed, 0, 60_000)]
            loading(other)
        elif at == "holds":
            work = [hold(victim, seed) and None]
        else:
            work = [Background(hold, other, seed, 0, 800)]
            time.sleep(0.3)
            work.append(Background(hold, victim, seed))
            time.sleep(0.2)
        os.kill(pid(victim), signal.SIGKILL)
        for w in filter(None, work):
            with pytest.raises(psycopg.Error):
                w.result()
        deadline = time.monotonic() + 30
        while True:
            try:
                with database.connect() as conn:
                    assert stats(conn)["frames_used"] == 0
                    assert_sound(conn)
                    assert hold(conn, seed) is True
                    assert_sound(conn)
                break
            except psycopg.OperationalError:
                assert time.monotonic() < deadline, "the server does not come back"
                time.sleep(0.1)


@pytest.mark.parametrize("policy", ["sharing", "clock", "lru"])
def test_hammer(server, db, seed, policy):
    """Eight sessions, random windows over five times as many blocks as there are frames, every byte checked."""
    with db.connect() as conn:
        conn.execute(f"ALTER SYSTEM SET tessera.cache_policy = {policy}")
        conn.execute("SELECT pg_reload_conf()")
        time.sleep(0.2)
        connections = [db.connect() for _ in range(8)]
        assert connections[0].execute("SHOW tessera.cache_policy").fetchone() == (policy,)

        def hammer(conn, random):
            return conn.execute("SELECT tests.cache_hammer(%s, %s, 10, %s)", (seed, 5 * FRAMES, random)).fetchone()[0]

        before = stats(conn)
        work = [Background(hammer, c, 7919 * n) for n, c in enumerate(connections, 1)]
        while any(w.waits(0.5) for w in work):
            assert_sound(conn)
        checked = [w.result() for w in work]
        after = stats(conn)
        assert min(checked) > 100
        assert sum(checked) == after["hits"] + after["misses"] - before["hits"] - before["misses"]
        assert after["evictions"] > before["evictions"]
        conn.execute("ALTER SYSTEM RESET tessera.cache_policy")
        conn.execute("SELECT pg_reload_conf()")
        for connection in connections:
            connection.close()
