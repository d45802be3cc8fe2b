"""The sweep: races that the design names, space that comes back, wraparound, cancellation."""

import os
import threading
import time

import psycopg
import pytest

from cluster import Cluster, Database
from helpers import Background, fails, store_size

FULL = bool(os.environ.get("TESSERA_FULL"))
MAKE = """
CREATE FUNCTION value(i int, n int DEFAULT 1000) RETURNS bytea LANGUAGE sql IMMUTABLE PARALLEL SAFE AS
    $$SELECT substr(string_agg(sha512((i * 1000 + k)::text::bytea), ''::bytea ORDER BY k), 1, n) FROM generate_series(0, n / 64) AS k$$;
CREATE FUNCTION block(i int, n int DEFAULT 500) RETURNS tensor_block LANGUAGE sql IMMUTABLE PARALLEL SAFE AS
    $$SELECT array_agg(((i * 7919 + k) % 65521)::real ORDER BY k)::tensor_block FROM generate_series(1, n) AS k$$;
CREATE TABLE w (id int PRIMARY KEY, seed int, data tensor_block) USING tensor_block WITH (autovacuum_enabled = off, toast.autovacuum_enabled = off);
"""
WRONG = "SELECT count(*) FROM w WHERE data::bytea IS DISTINCT FROM block(seed)::bytea"


@pytest.fixture
def conn(fresh):
    with fresh.connect() as connection:
        connection.execute(MAKE)
        yield connection


def one(conn: psycopg.Connection, sql: str, *parameters):
    return conn.execute(sql, parameters or None).fetchone()[0]


def right(conn: psycopg.Connection, rows: int, sound: bool = True) -> None:
    assert one(conn, "SELECT count(*) FROM w") == rows
    assert one(conn, WRONG) == 0
    if sound:
        assert conn.execute("SELECT * FROM check_store('w')").fetchall() == []


def blocks(conn: psycopg.Connection, table: str = "w") -> int:
    """Locators in the store, those on their way out included."""
    return one(conn, f"SELECT count(*) FROM tessera.store_blocks('{table}')")


def vacuum(conn: psycopg.Connection, times: int = 2, table: str = "w") -> None:
    for _ in range(times):
        conn.execute(f"VACUUM {table}")


def insert(conn: psycopg.Connection, first: int, last: int, shift: int = 0) -> None:
    conn.execute(f"INSERT INTO w SELECT i, i + {shift}, block(i + {shift}) FROM generate_series({first}, {last}) AS i")


def toast(conn: psycopg.Connection, table: str = "w") -> str:
    return one(conn, f"SELECT reltoastrelid::regclass::text FROM pg_class WHERE oid = '{table}'::regclass")


def test_two_vacuums_give_back_what_nobody_references(conn):
    insert(conn, 1, 40)
    conn.execute("DELETE FROM w WHERE id > 10")
    vacuum(conn, 1)
    assert blocks(conn) == 40
    vacuum(conn, 1)
    assert blocks(conn) == 10
    right(conn, 10)


def test_update_carries_a_condemned_reference(fresh, conn):
    """The reference goes to a page that the marking scan has passed, and its old version is pruned before the next one."""
    insert(conn, 1, 200)
    for turn in range(3):
        conn.execute("DELETE FROM w WHERE id % 2 = 0")
        conn.execute("INSERT INTO w SELECT i, i, block(i) FROM generate_series(2, 200, 2) AS i")
        with fresh.connect() as writer:
            writer.execute("BEGIN")
            # Another column's change: the reference is carried from the old version, which may be pruned afterwards.
            writer.execute("UPDATE w SET id = id + 1000 WHERE id % 3 = 0")
            vacuum(conn, 2)
            writer.execute("UPDATE w SET id = id - 1000 WHERE id > 1000")
            vacuum(conn, 1)
            writer.execute("COMMIT")
        vacuum(conn, 3)
        right(conn, 200)


def test_references_move_while_a_sweep_marks(fresh, conn):
    """Slow sweeps, and rows that move from pages ahead of the marking scan to pages behind it; old versions are pruned at once."""
    conn.execute("ALTER TABLE w ADD pad char(300) DEFAULT 'x'; ALTER TABLE w ALTER pad SET STORAGE PLAIN")
    insert(conn, 1, 1000)
    conn.execute("DELETE FROM w WHERE id <= 300 OR id % 4 = 0")
    conn.execute("VACUUM (PROCESS_TOAST off) w")
    rows, store = one(conn, "SELECT count(*) FROM w"), toast(conn)
    stop = threading.Event()

    def sweep() -> int:
        sweeps = 0
        with fresh.connect() as mine:
            mine.execute("SET vacuum_cost_delay = '4ms'; SET vacuum_cost_limit = 1; SET vacuum_cost_page_hit = 1")
            while not stop.is_set():
                mine.execute(f"VACUUM {store}")
                sweeps += 1
        return sweeps

    def forward(plus: int) -> str:
        return f"ctid >= '({plus},0)' AND ctid < '({plus + 12},0)'"

    sweeping, moved = Background(sweep), 0
    deadline = time.monotonic() + (5 if not FULL else 60)
    while time.monotonic() < deadline:
        for page in (30, 20, 10, 0):
            before = dict(conn.execute(f"SELECT id, ctid::text FROM w WHERE {forward(page)}").fetchall())
            conn.execute(f"UPDATE w SET seed = seed WHERE {forward(page)}")
            conn.execute("VACUUM (PROCESS_TOAST off) w")
            after = dict(conn.execute("SELECT id, ctid::text FROM w").fetchall())
            moved += sum(after[key].split(",")[0] != tid.split(",")[0] for key, tid in before.items())
    stop.set()
    assert sweeping.result() >= 4
    assert moved > 500, f"only {moved} rows changed their page"
    vacuum(conn)
    right(conn, rows)
    assert blocks(conn) == rows


def test_a_hit_takes_back_a_condemnation(fresh, conn):
    insert(conn, 1, 20)
    conn.execute("DELETE FROM w")
    vacuum(conn, 1)
    condemned = one(conn, "SELECT count(*) FROM tessera.store_blocks('w') WHERE condemned_by IS NOT NULL")
    assert condemned == 20
    with fresh.connect() as writer:
        writer.execute("BEGIN")
        insert(writer, 1, 10)
        vacuum(conn, 3)
        right(writer, 10, sound=False)
        writer.execute("COMMIT")
    vacuum(conn, 3)
    right(conn, 10)
    assert blocks(conn) == 10
    insert(conn, 11, 20)
    right(conn, 20)


@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
@pytest.mark.parametrize("carried", ["update", "insert"])
def test_transaction_across_vacuums(fresh, conn, end, carried):
    """Blocks that only an open transaction references stay; after ROLLBACK they go."""
    insert(conn, 1, 30)
    with fresh.connect() as writer:
        writer.execute("BEGIN")
        if carried == "insert":
            insert(writer, 101, 130)
        else:
            writer.execute("UPDATE w SET seed = seed + 100, data = block(seed + 100)")
        vacuum(conn, 3)
        right(writer, 60 if carried == "insert" else 30, sound=False)
        right(conn, 30, sound=False)
        assert blocks(conn) == 60
        writer.execute(end)
    vacuum(conn, 3)
    right(conn, 60 if carried == "insert" and end == "COMMIT" else 30)
    assert blocks(conn) == (60 if carried == "insert" and end == "COMMIT" else 30)


def test_rolled_back_savepoint_is_swept(conn):
    conn.execute("BEGIN")
    insert(conn, 1, 10)
    conn.execute("SAVEPOINT a")
    insert(conn, 11, 20)
    conn.execute("ROLLBACK TO a")
    conn.execute("COMMIT")
    assert blocks(conn) == 20
    vacuum(conn)
    right(conn, 10)
    assert blocks(conn) == 10


def test_snapshot_across_sweeps(fresh, conn):
    insert(conn, 1, 50)
    with fresh.connect() as old:
        old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        right(old, 50, sound=False)
        for turn in range(1, 4):
            conn.execute(f"UPDATE w SET seed = seed + {turn * 1000}, data = block(seed + {turn * 1000})")
            vacuum(conn)
            right(old, 50, sound=False)
            assert one(old, "SELECT max(seed) FROM w") == 50
        old.execute("COMMIT")
    vacuum(conn)
    right(conn, 50)
    assert blocks(conn) == 50


def test_space_is_reused_and_the_file_shrinks(conn):
    """Twenty rounds of 100 new blocks, with new ids: neither payloads nor pages of locators make the file grow."""
    sizes = []
    for turn in range(20 if not FULL else 80):
        insert(conn, 1, 100, shift=turn * 100)
        right(conn, 100, sound=False)
        sizes.append(one(conn, f"SELECT pg_relation_size('{toast(conn)}')"))
        conn.execute("DELETE FROM w")
        vacuum(conn, 3)
    assert max(sizes[2:]) <= sizes[2] + 4 * 8192, sizes
    assert blocks(conn) == 0
    insert(conn, 1, 2000, shift=100_000)
    large = one(conn, f"SELECT pg_relation_size('{toast(conn)}')")
    conn.execute("DELETE FROM w WHERE id > 10")
    vacuum(conn, 3)
    small = one(conn, f"SELECT pg_relation_size('{toast(conn)}')")
    assert small < large / 2, f"{large} bytes before, {small} after"
    right(conn, 10)
    insert(conn, 11, 100, shift=200_000)
    right(conn, 100)


def test_limits_go_ahead(fresh, conn):
    """relfrozenxid and relminmxid of the store move with every vacuum, also one that could not sweep."""
    insert(conn, 1, 20)
    store = toast(conn)
    age = f"SELECT age(relfrozenxid), mxid_age(relminmxid) FROM pg_class WHERE oid = '{store}'::regclass"

    def grow_old():
        for _ in range(30):
            conn.execute("SELECT txid_current()")
        before = conn.execute(age).fetchone()
        assert before[0] >= 30
        return before[0]

    grow_old()
    conn.execute("VACUUM FREEZE w")
    assert one(conn, age) < 10
    grow_old()
    conn.execute("SET vacuum_freeze_table_age = 0; SET vacuum_multixact_freeze_table_age = 0")
    conn.execute("VACUUM w")
    assert one(conn, age) < 10
    grow_old()
    with fresh.connect() as other:
        other.execute("BEGIN; LOCK TABLE w IN ACCESS EXCLUSIVE MODE")
        Background(conn.execute, f"VACUUM {store}").result(20)
        assert one(conn, age) < 40, "a store whose owner is locked keeps wraparound vacuums coming"
        other.execute("ROLLBACK")
    right(conn, 20)


def test_full_vacuum_of_the_store_is_refused(conn):
    insert(conn, 1, 20)
    store = toast(conn)
    fails(conn, f"VACUUM FULL {store}", sqlstate="0A000")
    fails(conn, f"CLUSTER {store} USING {store.split('.')[1]}_index", sqlstate="0A000")
    conn.execute(f"VACUUM {store}")
    conn.execute("VACUUM FULL w")
    right(conn, 20)


@pytest.mark.parametrize("how", ["REINDEX TABLE {}", "REINDEX TABLE CONCURRENTLY {}", "REINDEX INDEX {}_index", "REINDEX INDEX CONCURRENTLY {}_index"])
def test_directory_is_rebuilt(conn, how):
    insert(conn, 1, 60)
    conn.execute("DELETE FROM w WHERE id > 40")
    vacuum(conn, 1)
    conn.execute(how.format(toast(conn)))
    insert(conn, 41, 50)
    conn.execute("INSERT INTO w SELECT i + 1000, i, block(i) FROM generate_series(1, 40) AS i")
    vacuum(conn)
    right(conn, 90)
    assert blocks(conn) == 50, "the rebuilt directory does not find what is stored"


def test_failed_rebuild_of_the_directory(fresh, conn):
    """REINDEX CONCURRENTLY is cancelled while it waits: an invalid index stays, and takes part until it is dropped."""
    insert(conn, 1, 60)
    store = toast(conn)
    with fresh.connect() as old, fresh.connect() as worker:
        old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        right(old, 60, sound=False)
        task = Background(worker.execute, f"REINDEX TABLE CONCURRENTLY {store}")
        assert task.waits(1.0), "there was nothing to wait for"
        worker.cancel()
        with pytest.raises(psycopg.errors.QueryCanceled):
            task.result()
        old.execute("COMMIT")
    invalid = f"SELECT indexrelid::regclass::text FROM pg_index WHERE indrelid = '{store}'::regclass AND NOT indisvalid"
    names = [row[0] for row in conn.execute(invalid)]
    assert len(names) == 1
    insert(conn, 61, 80)
    conn.execute("INSERT INTO w SELECT i + 1000, i, block(i) FROM generate_series(1, 80) AS i")
    assert blocks(conn) == 80
    conn.execute("DELETE FROM w WHERE seed > 50")
    vacuum(conn)
    assert blocks(conn) == 50
    right(conn, 100)
    conn.execute(f"DROP INDEX {names[0]}")
    conn.execute(f"REINDEX TABLE CONCURRENTLY {store}")
    assert conn.execute(invalid).fetchall() == []
    insert(conn, 2001, 2010, shift=-2000)
    assert blocks(conn) == 50
    right(conn, 110)


def cancel_after(conn: psycopg.Connection, sql: str, seconds: float) -> bool:
    """Runs a statement and cancels it after some time; true if it was still running."""
    timer = threading.Timer(seconds, conn.cancel)
    timer.start()
    try:
        conn.execute(sql)
    except psycopg.errors.QueryCanceled:
        return True
    finally:
        timer.cancel()
        timer.join()
        # A request that came too late ends this in place of the statement.
        try:
            conn.execute("SELECT pg_sleep(0.02)")
        except psycopg.errors.QueryCanceled:
            pass
    return False


@pytest.mark.parametrize("what", ["VACUUM w", "VACUUM FULL w", "CLUSTER w USING w_pkey", "SELECT repack('w')",
                                  "INSERT INTO w SELECT i + 5000, i + 5000, block(i + 5000) FROM generate_series(1, 1500) AS i"])
def test_cancelled_anywhere(conn, what):
    """Cancelled at many moments: nothing is lost, and the same statement works afterwards."""
    insert(conn, 1, 600)
    conn.execute("DELETE FROM w WHERE id > 400")
    vacuum(conn, 1)
    if what == "VACUUM w":
        conn.execute("SET vacuum_cost_delay = '1ms'; SET vacuum_cost_limit = 20")
    started = time.monotonic()
    if what.startswith("INSERT"):
        conn.execute("BEGIN")
    conn.execute(what)
    whole = time.monotonic() - started
    if what.startswith("INSERT"):
        conn.execute("ROLLBACK")
    cancelled = 0
    for turn in range(12 if not FULL else 60):
        conn.execute(f"UPDATE w SET seed = seed + 600, data = block(seed + 600) WHERE id % 12 = {turn % 12}")
        cancelled += cancel_after(conn, what, whole * (turn % 12 + 0.5) / 12)
        conn.execute("DELETE FROM w WHERE id > 5000")
        right(conn, 400)
    conn.execute(what)
    conn.execute("DELETE FROM w WHERE id > 5000")
    vacuum(conn, 3)
    right(conn, 400)
    assert blocks(conn) == 400
    assert cancelled > 0, f"{what} took {whole:.3f} s and was never cancelled"


def test_writers_during_sweeps(fresh, conn):
    """Sessions delete and insert values out of a small pool, and carry references, while another vacuums all the time."""
    insert(conn, 1, 200)
    stop, errors = threading.Event(), []

    def work(number: int):
        with fresh.connect() as mine:
            turn = 0
            while not stop.is_set():
                turn += 1
                low = 1000 * number + turn % 40
                for sql in (
                    f"DELETE FROM w WHERE id = {low}",
                    f"INSERT INTO w VALUES ({low}, {turn * number % 50}, block({turn * number % 50})) ON CONFLICT DO NOTHING",
                    f"UPDATE w SET id = id WHERE id = {turn % 200 + 1}",
                    f"UPDATE w SET seed = {turn % 60}, data = block({turn % 60}) WHERE id = {turn * 7 % 200 + 1}",
                ):
                    try:
                        mine.execute(sql)
                    except psycopg.Error as error:
                        errors.append(f"{sql}: {error}")
                        return

    tasks = [Background(work, number) for number in (1, 2, 3)]
    deadline = time.monotonic() + (8 if not FULL else 120)
    sweeps = 0
    while time.monotonic() < deadline:
        conn.execute("VACUUM w")
        sweeps += 1
        if sweeps % 20 == 0:
            conn.execute("SELECT repack('w')")
        assert one(conn, WRONG) == 0
    stop.set()
    for task in tasks:
        task.result()
    assert not errors, errors[:3]
    assert sweeps >= 5
    vacuum(conn)
    right(conn, one(conn, "SELECT count(*) FROM w"))
    assert blocks(conn) == one(conn, "SELECT count(DISTINCT seed) FROM w")


def test_prepared_transaction_between_vacuums():
    """Neither what a prepared transaction stored nor what it deleted is swept; the end may come after a restart."""
    cluster = Cluster("prepared" + os.environ.get("TESSERA_SERVER", "15"), os.environ.get("TESSERA_SERVER", "15"),
                      ("max_prepared_transactions = 10", "autovacuum = off"))
    cluster.remove()
    cluster.start()
    try:
        with Database(cluster, "fresh") as database:
            for restart in (False, True):
                with database.connect() as conn:
                    conn.execute("DROP TABLE IF EXISTS w; DROP FUNCTION IF EXISTS value, block" if restart else "SELECT")
                    conn.execute(MAKE)
                    insert(conn, 1, 20)
                    for name, sql in (
                        ("inserted", "INSERT INTO w SELECT i, i, block(i) FROM generate_series(21, 40) AS i"),
                        ("given up", "INSERT INTO w SELECT i, i, block(i) FROM generate_series(41, 60) AS i"),
                        ("deleted", "DELETE FROM w WHERE id <= 10"),
                        ("kept", "UPDATE w SET seed = seed + 300, data = block(seed + 300) WHERE id > 10 AND id <= 20"),
                    ):
                        conn.execute(f"BEGIN; {sql}; PREPARE TRANSACTION '{name}'")
                    vacuum(conn, 3)
                    assert blocks(conn) == 70
                if restart:
                    cluster.stop("immediate")
                    cluster.start()
                with database.connect() as conn:
                    vacuum(conn, 2)
                    right(conn, 20, sound=False)
                    conn.execute("COMMIT PREPARED 'inserted'")
                    conn.execute("ROLLBACK PREPARED 'given up'")
                    conn.execute("ROLLBACK PREPARED 'deleted'")
                    conn.execute("COMMIT PREPARED 'kept'")
                    right(conn, 40)
                    vacuum(conn, 3)
                    right(conn, 40)
                    assert blocks(conn) == 40
    finally:
        cluster.remove()


def test_autovacuum_sweeps_by_itself():
    """Both phases under the default settings, except for how often autovacuum looks."""
    version = os.environ.get("TESSERA_SERVER", "15")
    cluster = Cluster("autovacuum" + version, version, ("autovacuum_naptime = 1s",))
    cluster.remove()
    cluster.start()
    try:
        with Database(cluster, "fresh") as database, database.connect() as conn:
            conn.execute(MAKE)
            conn.execute("ALTER TABLE w RESET (autovacuum_enabled, toast.autovacuum_enabled)")
            insert(conn, 1, 600)
            conn.execute("DELETE FROM w WHERE id > 100")
            insert(conn, 601, 700)
            wait_until(conn, lambda: blocks(conn) <= 250, "deleted rows")
            conn.execute("BEGIN")
            insert(conn, 1001, 1500)
            conn.execute("ROLLBACK")
            wait_until(conn, lambda: blocks(conn) <= 250, "a load that was rolled back")
            right(conn, 200)
    finally:
        cluster.remove()


def wait_until(conn: psycopg.Connection, done, what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"autovacuum did not sweep {what}: {blocks(conn)} blocks are left"
        time.sleep(0.2)
