"""Rows that come together: their blocks are stored in runs, each content once, whoever stores it at the same time."""

import threading

import numpy as np
import psycopg
import pytest

from helpers import storage

pytestmark = pytest.mark.newer
COLUMNS = "CREATE TABLE {} (k int, small tensor_block, data tensor_block, other tensor_block, words text) USING tensor_block"


@pytest.fixture
def conn(fresh):
    with fresh.connect() as connection:
        yield connection


def block(seed: int, floats: int) -> bytes:
    """The binary form of a float32 block of one dimension."""
    values = np.random.default_rng(seed).standard_normal(floats, dtype=np.float32)
    return bytes([1, 1, 1, 0]) + np.uint32(floats).tobytes() + values.tobytes()


def rows(count: int, distinct: int) -> list[tuple]:
    """Blocks of 100 bytes to 900 kB, which is above a tensor page; each content several times, in both columns; NULLs; long texts."""
    dice = np.random.default_rng(5)
    sizes = [25 + int(900_000 ** (dice.random() ** 0.15) / 4) if turn % 50 else 225_000 for turn in range(distinct)]
    made = []
    for k in range(count):
        first, second = dice.integers(0, distinct, 2)
        data = None if k % 17 == 3 else block(int(first), sizes[first])
        other = None if k % 11 == 5 else block(int(second), sizes[second])
        made.append((k, block(k % 5, 2), data, other, f"{k} " * (3000 if k % 7 == 0 else 3)))
    return made


def copy(conn: psycopg.Connection, table: str, lines: list[tuple]) -> None:
    with conn.cursor() as cursor, cursor.copy(f"COPY {table} FROM STDIN (FORMAT binary)") as out:
        out.set_types(["int4", "bytea", "bytea", "bytea", "text"])
        for line in lines:
            out.write_row(line)


def read(conn: psycopg.Connection, table: str) -> list[tuple]:
    with conn.cursor() as cursor, cursor.copy(f"COPY (SELECT * FROM {table} ORDER BY k) TO STDOUT (FORMAT binary)") as lines:
        lines.set_types(["int4", "bytea", "bytea", "bytea", "text"])
        return list(lines.rows())


def assert_whole(conn: psycopg.Connection, table: str, lines: list[tuple], distinct: int) -> None:
    assert read(conn, table) == sorted(lines, key=lambda line: line[0])
    assert conn.execute("SELECT * FROM check_store(%s)", (table,)).fetchall() == []
    used = conn.execute(f"""SELECT count(DISTINCT id) FROM (SELECT tessera.block_id(data) AS id FROM {table}
                            UNION ALL SELECT tessera.block_id(other) FROM {table}) AS ids""").fetchone()[0]
    assert used == distinct, "a content has two blocks, or two contents have one"


def contents(lines: list[tuple]) -> int:
    return len({value for line in lines for value in line[2:4] if value is not None})


def test_equal_blocks_among_the_rows_of_one_batch(conn):
    conn.execute(COLUMNS.format("t"))
    lines = rows(400, 120)
    copy(conn, "t", lines)
    assert_whole(conn, "t", lines, contents(lines))
    stored = storage(conn, "t")["blocks_stored"]
    again = [(k + 1000, *line) for k, *line in lines]
    copy(conn, "t", again)
    assert storage(conn, "t")["blocks_stored"] == stored, "nothing was new"
    assert_whole(conn, "t", lines + again, contents(lines))


def test_a_batch_that_is_undone_leaves_blocks_for_the_next(conn):
    conn.execute(COLUMNS.format("t"))
    lines = rows(150, 90)
    with pytest.raises(ZeroDivisionError), conn.transaction():
        copy(conn, "t", lines)
        raise ZeroDivisionError
    stored = conn.execute("SELECT blocks_stored FROM tessera.store_totals('t')").fetchone()[0]
    copy(conn, "t", lines)
    assert conn.execute("SELECT blocks_stored FROM tessera.store_totals('t')").fetchone()[0] == stored
    assert_whole(conn, "t", lines, contents(lines))
    conn.execute("DELETE FROM t WHERE k % 2 = 0")
    conn.execute("VACUUM t")
    assert_whole(conn, "t", [line for line in lines if line[0] % 2], contents([line for line in lines if line[0] % 2]))


def test_sessions_that_store_the_same_blocks_in_other_orders(fresh):
    """They take the locks of their hashes in one order: no deadlock, and one block a content."""
    lines = rows(300, 150)
    with fresh.connect() as conn:
        conn.execute(COLUMNS.format("t"))
        conn.execute("SELECT pg_stat_reset()")
    failures: list[BaseException] = []
    start = threading.Barrier(4)

    def store(turn: int) -> None:
        try:
            order = list(np.random.default_rng(turn).permutation(len(lines)))
            mine = [(turn * 1000 + lines[at][0], *lines[at][1:]) for at in order]
            with fresh.connect() as conn:
                conn.execute("SET deadlock_timeout = '50ms'")
                start.wait()
                copy(conn, "t", mine)
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=store, args=(turn,)) for turn in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert failures == []
    with fresh.connect() as conn:
        assert conn.execute("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()").fetchone()[0] == 0
        assert_whole(conn, "t", [(turn * 1000 + k, *line) for turn in range(4) for k, *line in lines], contents(lines))


def test_a_run_is_whole_after_a_crash(server, fresh):
    """Blocks that came together are replayed together: all rows that were committed are there, and nothing else is in the way."""
    lines = rows(200, 100)
    conn, other = fresh.connect(), fresh.connect()
    conn.execute(COLUMNS.format("t"))
    copy(conn, "t", lines[:100])
    conn.execute("CHECKPOINT")
    copy(conn, "t", lines[100:150])
    other.execute("BEGIN")
    copy(other, "t", lines[150:])
    conn.execute("SELECT pg_switch_wal()")  # what is not committed is in the log as well
    server.stop("immediate")
    conn.close()
    other.close()
    server.start()
    with fresh.connect() as conn:
        assert_whole(conn, "t", lines[:150], contents(lines[:150]))
        copy(conn, "t", lines[150:])
        assert_whole(conn, "t", lines, contents(lines))
