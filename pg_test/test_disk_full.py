"""No space, files that may not grow, and unreadable pages: a clear error, nothing lost, and work goes on when the cause is gone."""

import contextlib
import os
import re
import subprocess
import tempfile
from pathlib import Path

import psycopg
import pytest

from cluster import Cluster
from helpers import fails
from workload import problems

FULL = bool(os.environ.get("TESSERA_FULL"))
MAKE = """
CREATE FUNCTION value(seed bigint, length int DEFAULT 16384) RETURNS tensor_block LANGUAGE sql IMMUTABLE AS
    -- Not all elements are equal, and float16 has none of them: what has a small form fills no disk.
    'SELECT (array_fill((seed + 0.1)::real, ARRAY[length - 1]) || (seed + 0.3)::real)::tensor_block';
CREATE TABLE t (id int PRIMARY KEY, data tensor_block) USING tensor_block;
"""
INSERT = "INSERT INTO t SELECT i, value(i) FROM generate_series(%s::int, %s::int) AS i"


def check(conn: psycopg.Connection, ids, length: int = 16384) -> None:
    """Exactly these rows, all with their values, in a sound store."""
    assert [row[0] for row in conn.execute("SELECT id FROM t ORDER BY 1")] == sorted(ids)
    assert conn.execute("SELECT id FROM t WHERE data::bytea <> value(id, %s)::bytea", (length,)).fetchall() == []
    assert problems(conn) == []


def store_file(conn: psycopg.Connection) -> Path:
    sql = "SELECT current_setting('data_directory') || '/' || pg_relation_filepath(reltoastrelid) FROM pg_class WHERE oid = 't'::regclass"
    return Path(conn.execute(sql).fetchone()[0])


@pytest.fixture
def small(server, fresh):
    """A database whose table `t` lies in a tablespace of 24 MB; yields also what changes the size."""
    place = tempfile.mkdtemp(dir="/tmp", prefix="pgt.")
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m,mode=0755", "tmpfs", place]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        os.rmdir(place)
        pytest.skip("a small file system cannot be mounted here; test_file_limit stands in for it")
    try:
        inside = Path(place, "space")
        inside.mkdir(mode=0o700)
        owner = os.stat(server.data)
        os.chown(inside, owner.st_uid, owner.st_gid)
        with fresh.connect() as conn:
            conn.execute(MAKE)
            conn.execute(f"CREATE TABLESPACE small LOCATION '{inside}'")
            try:
                conn.execute("ALTER TABLE t SET TABLESPACE small")
                conn.execute("ALTER INDEX t_pkey SET TABLESPACE small")
                yield conn, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", place], check=True)
            finally:
                conn.execute("DROP TABLE IF EXISTS t")
                # Files of a dropped table lie there, empty, until the next checkpoint.
                conn.execute("CHECKPOINT")
                conn.execute("DROP TABLESPACE small")
    finally:
        subprocess.run(["umount", place], check=True)
        os.rmdir(place)


def fill(conn: psycopg.Connection, start: int = 1) -> int:
    """Inserts row by row until the disk is full; the id of the last row that was committed."""
    for i in range(start, 1000):
        try:
            conn.execute(INSERT, (i, i))
        except psycopg.Error as error:
            assert error.sqlstate == "53100", error
            assert "No space left on device" in str(error)
            return i - 1
    raise AssertionError("the disk did not fill up")


def test_disk_full(small):
    conn, resize = small
    conn.execute(INSERT, (0, 0))
    conn.execute("VACUUM t")  # heap's own maps of the table are made here
    conn.execute("DELETE FROM t")
    last = fill(conn)
    assert 200 < last < 380, "24 MB hold some 350 blocks of 64 kB"
    check(conn, range(1, last + 1))
    # What is there already needs no space: the same content once more.
    conn.execute("BEGIN")
    conn.execute("INSERT INTO t SELECT id + 10000, data FROM t WHERE id <= 5")
    conn.execute("ROLLBACK")

    # A whole statement fails and leaves nothing behind.
    fails(conn, INSERT, (last + 1, last + 50), "53100", hint=False)
    check(conn, range(1, last + 1))

    # Nothing can be copied, but readers and the old files are unharmed.
    for sql in ("VACUUM FULL t", "CLUSTER t USING t_pkey", "ALTER TABLE t ALTER id TYPE bigint"):
        fails(conn, sql, sqlstate="53100", hint=False)
        check(conn, range(1, last + 1))
    with contextlib.suppress(psycopg.errors.DiskFull):
        conn.execute("SELECT repack('t')")
    check(conn, range(1, last + 1))

    # Sweeps work on a full disk, and give back what others need.
    rest = [i for i in range(1, last + 1) if i % 3]
    conn.execute("DELETE FROM t WHERE id % 3 = 0")
    for _ in range(3):
        conn.execute("VACUUM t")
        check(conn, rest)
    before = store_file(conn).stat().st_size
    conn.execute(INSERT, (last + 1, last + 30))
    assert store_file(conn).stat().st_size <= before, "the space of removed blocks was not used again"
    rest += range(last + 1, last + 31)
    check(conn, rest)
    with contextlib.suppress(psycopg.errors.DiskFull):
        conn.execute("SELECT repack('t')")
    check(conn, rest)

    # There is room again.
    resize("64m")
    conn.execute("VACUUM FULL t")
    check(conn, rest)
    conn.execute("SELECT repack('t')")
    conn.execute(INSERT, (last + 31, last + 60))
    rest += range(last + 31, last + 61)
    check(conn, rest)
    conn.execute("CHECKPOINT")


class Limited:
    """Runs statements while the server process of this connection may not let a file grow above some bytes."""

    def __init__(self, server: Cluster, conn: psycopg.Connection):
        self.server, self.conn = server, conn

    def limit(self, size: int | str) -> None:
        self.server.as_server("prlimit", f"--pid={self.conn.info.backend_pid}", f"--fsize={size}:")

    def __call__(self, size: int, sql: str, parameters=()) -> bool:
        """True if the statement failed, which must be by the limit."""
        self.limit(size)
        try:
            self.conn.execute(sql, parameters)
            return False
        except psycopg.Error as error:
            assert re.search("could not (extend|write)", str(error)) and not self.conn.closed, error
            return True
        finally:
            self.limit("unlimited")


# WAL goes on in files that are there already, of 16 MB: the limits must lie above.
BASE = 17 << 20


@pytest.fixture
def conn(fresh):
    with fresh.connect() as connection:
        connection.execute(MAKE)
        connection.execute(INSERT, (1, 300))  # 19.7 MB
        yield connection


@pytest.fixture
def limited(server, conn):
    return Limited(server, conn)


def test_file_limit(conn, limited):
    """The file may not grow at each of many places within the pages of the next blocks."""
    size = store_file(conn).stat().st_size
    assert size > BASE
    failed = 0
    for more in range(0, 60, 1 if FULL else 6):
        failed += limited(size + more * 8192 + more * 100, INSERT, (1001 + 10 * more, 1010 + 10 * more))
        assert problems(conn) == []
    assert failed >= 3
    for more in (0, 1, 7):
        ids = [row[0] for row in conn.execute("SELECT id FROM t")]
        size = store_file(conn).stat().st_size
        assert limited(size + more * 8192, INSERT, (9001, 9040))
        check(conn, ids)
    conn.execute(INSERT, (9001, 9010))
    check(conn, [*ids, *range(9001, 9011)])


REWRITES = ["VACUUM FULL t", "CREATE TABLE copy USING tensor_block AS SELECT * FROM t"]
if FULL:
    REWRITES += ["CLUSTER t USING t_pkey", "ALTER TABLE t ALTER id TYPE bigint", "ALTER TABLE t SET ACCESS METHOD heap"]


@pytest.mark.parametrize("sql", REWRITES)
def test_file_limit_in_a_rewrite(conn, limited, sql):
    path = store_file(conn)
    for size in (BASE, BASE + 8192 * 3 + 77, BASE + (1 << 20)):
        assert limited(size, sql), "the limit lies above what the copy needs"
        check(conn, range(1, 301))
        assert store_file(conn) == path
    conn.execute(sql)
    if "heap" not in sql:
        check(conn, range(1, 301))


def test_file_limit_in_a_repack(conn, limited):
    """Packing needs space behind the file's end first; where it stops, each block lies at one place or the other."""
    conn.execute("ALTER TABLE t ADD tensor int")
    conn.execute("UPDATE t SET tensor = id % 7")
    conn.execute("VACUUM t")
    size = store_file(conn).stat().st_size
    failed = 0
    for more in (0, 1, 66, 500):
        failed += limited(size + more * 8192, "SELECT repack('t', 'tensor')")
        check(conn, range(1, 301))
    assert failed >= 3
    conn.execute("VACUUM t")
    conn.execute("SELECT repack('t', 'tensor')")
    check(conn, range(1, 301))
    # What the attempts took is free again.
    conn.execute("VACUUM t")
    assert store_file(conn).stat().st_size <= size * 1.1


@pytest.mark.parametrize("rows", [7000, 8800])
def test_file_limit_in_a_sweep(conn, limited, rows):
    """Free space is listed in pages among the locators'. With 7,000 blocks the file has such pages. With 8,800 these are
    just used up, so it has to grow for them, and may not: then the sweep says so, and the next one finds what it removed."""
    conn.execute("TRUNCATE t")
    conn.execute("INSERT INTO t SELECT i, value(i, 700) FROM generate_series(1, %s::int) AS i", (rows,))
    conn.execute("VACUUM t")  # heap's own maps are made here
    size = store_file(conn).stat().st_size
    assert size > BASE
    conn.execute("DELETE FROM t WHERE id % 3 = 0")
    failures = [limited(size, "VACUUM t") for _ in range(3)]
    assert any(failures) == (rows == 8800), failures
    rest = [i for i in range(1, rows + 1) if i % 3]
    check(conn, rest, 700)
    if any(failures):
        conn.execute("VACUUM t")
    assert conn.execute("SELECT blocks FROM tessera.store_meta('t')").fetchone()[0] == len(rest)
    size = store_file(conn).stat().st_size  # 10 pages more for locators
    assert not limited(size + 10 * 8192, "INSERT INTO t SELECT i, value(i, 700) FROM generate_series(10001, 11000) AS i"), "free space was not found"
    check(conn, [*rest, *range(10001, 11001)], 700)


def test_unreadable_page(server, fresh):
    """A damaged page is an error for the rows that need it, and for no others; nothing wrong is shown."""
    with fresh.connect() as conn:
        conn.execute(MAKE)
        conn.execute(INSERT, (1, 40))
        page, offset = conn.execute("SELECT page, page_offset FROM tessera.store_blocks('t') WHERE block_id = 20").fetchone()
        path = store_file(conn)
    server.stop()
    with open(path, "r+b") as file:
        file.seek((page + 3) * 8192 + 4000)
        old = file.read(16)
        file.seek(-16, os.SEEK_CUR)
        file.write(bytes(byte ^ 255 for byte in old))
    server.start()
    with fresh.connect() as conn:
        wanted = conn.execute("SELECT id FROM t WHERE tessera.block_id(data) = 20").fetchone()[0]
        error = pytest.raises(psycopg.Error, conn.execute, "SELECT md5(data::bytea) FROM t WHERE id = %s", (wanted,)).value
        assert error.sqlstate == "XX001" and "invalid page" in str(error)
        assert conn.execute("SELECT count(*) FROM t WHERE id <> %s AND data::bytea = value(id)::bytea", (wanted,)).fetchone()[0] == 39
        # Without the row the page is not read any more, and vacuum gives it back.
        conn.execute("DELETE FROM t WHERE id = %s", (wanted,))
        conn.execute("VACUUM t")
        conn.execute("VACUUM t")
        check(conn, [i for i in range(1, 41) if i != wanted])


def test_missing_pages(server, fresh):
    """A store whose file was cut from outside: an error that says so, and check_store tells which blocks are gone."""
    with fresh.connect() as conn:
        conn.execute(MAKE)
        conn.execute(INSERT, (1, 40))
        path = store_file(conn)
    server.stop()
    os.truncate(path, path.stat().st_size // 2)
    server.start()
    with fresh.connect() as conn:
        error = pytest.raises(psycopg.Error, conn.execute, "SELECT sum(length(data::bytea::text)) FROM t").value
        assert error.sqlstate == "XX001", error
        found = {problem for _, problem, _, _ in problems(conn)}
        assert found == {"payload outside the file"} or "dangling reference" in found, found
