"""Damaged pages of a block store: errors are errors, and damage to the list of free space mends itself.

Bytes are changed in the files of a database that was copied and not opened yet, so that no buffer knows better.
"""

import struct
from pathlib import Path

import psycopg
import pytest

from cluster import Database

HEADER = 24
META, GAP = 0, "gap"
LOCATOR = 3  # the first page of locators: the head has the metapage and two maps before it
INSERT = "INSERT INTO w SELECT i, repeat(md5(i::text), 100)::bytea FROM generate_series(1001, 1100) AS i"
WRONG = "SELECT count(*) FROM w WHERE data <> repeat(md5(id::text), 100)::bytea"
DATA_CORRUPTED = "XX001"

pytestmark = pytest.mark.newer


@pytest.fixture(scope="module")
def sound(server):
    """A database with a table whose store has gaps; where its files are."""
    with Database(server, "sound") as database:
        with database.connect() as conn:
            conn.execute("CREATE TABLE w (id int PRIMARY KEY, data bytea) USING tensor_block")
            conn.execute("ALTER TABLE w ALTER data SET STORAGE EXTERNAL")
            conn.execute("INSERT INTO w SELECT i, repeat(md5(i::text), 100)::bytea FROM generate_series(1, 500) AS i")
            conn.execute("DELETE FROM w WHERE id % 3 = 0")
            for _ in range(3):
                conn.execute("VACUUM w")
            database.gap = conn.execute("SELECT gap_page FROM tessera.store_meta('w')").fetchone()[0]
            assert database.gap > 0
            path = "SELECT pg_relation_filepath(reltoastrelid) FROM pg_class WHERE relname = 'w'"
            database.file = Path(conn.execute(path).fetchone()[0])
            database.data = Path(conn.execute("SHOW data_directory").fetchone()[0])
        yield database


class Damaged:
    """A copy of the sound database, with other bytes at some places: (page, offset behind the header, bytes)."""

    def __init__(self, server, sound, places):
        self.server, self.places, self.sound = server, places, sound

    def __enter__(self):
        with self.server.connect("postgres") as conn:
            conn.execute("DROP DATABASE IF EXISTS damaged WITH (FORCE)")
            conn.execute("CREATE DATABASE damaged TEMPLATE sound STRATEGY file_copy")
            oid = conn.execute("SELECT oid FROM pg_database WHERE datname = 'damaged'").fetchone()[0]
        self.path = self.sound.data / "base" / str(oid) / self.sound.file.name
        with open(self.path, "r+b") as file:
            for page, offset, content in self.places:
                file.seek((self.sound.gap if page == GAP else page) * 8192 + HEADER + offset)
                file.write(content)
        self.size = self.path.stat().st_size
        self.conn = self.server.connect("damaged")
        self.conn.execute("SET ignore_checksum_failure = on; SET statement_timeout = '20s'")
        return self

    def __exit__(self, *_error):
        self.conn.close()
        with self.server.connect("postgres") as conn:
            conn.execute("DROP DATABASE damaged WITH (FORCE)")

    def corrupted(self, sql: str) -> None:
        """The statement fails for the damage, and has not made the file longer."""
        with pytest.raises(psycopg.Error) as caught:
            self.conn.execute(sql)
        assert caught.value.sqlstate == DATA_CORRUPTED, caught.value
        assert self.path.stat().st_size == self.size

    def problems(self) -> set[str]:
        return {row[0] for row in self.conn.execute("SELECT problem FROM check_store('w')").fetchall()}


def word(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


@pytest.mark.parametrize(
    "places",
    [
        pytest.param([(GAP, 0, bytes(8168))], id="zeros in place of the list"),
        pytest.param([(GAP, 24, struct.pack("<Q", 1 << 45))], id="a gap that ends far behind the file"),
        pytest.param([(GAP, 16, struct.pack("<QQ", 2**64 - 1, 2**64 - 1))], id="a gap at the last position"),
        pytest.param([(GAP, 8, b"SELF")], id="a list that is its own next page"),
        pytest.param([(GAP, 8, word(0xFFFFFFFF))], id="a next page that cannot be"),
        pytest.param([(META, 152, word(0xFFFFFFF0, 0xFFFFFFF0))], id="a list behind the file"),
        pytest.param([(META, 152, word(LOCATOR, LOCATOR))], id="a page of locators as the list"),
    ],
)
def test_list_of_free_space(server, sound, places):
    places = [(page, at, word(sound.gap) if content == b"SELF" else content) for page, at, content in places]
    with Damaged(server, sound, places) as damaged:
        damaged.conn.execute(INSERT)
        assert damaged.path.stat().st_size < damaged.size + 3 * 65 * 8192
        for _ in range(2):
            damaged.conn.execute("VACUUM w")
        damaged.conn.execute(INSERT.replace("1001, 1100", "2001, 2100"))
        damaged.conn.execute("SELECT repack('w')")
        assert damaged.conn.execute(WRONG).fetchone()[0] == 0
        assert damaged.problems() == set()


@pytest.mark.parametrize("page", [0, 1, 0x00FFFFFF, 0xFFFFFFFE, 0xFFFFFFFF])
def test_locator_that_points_outside(server, sound, page):
    with Damaged(server, sound, [(LOCATOR, 8 + 64 + 32, word(page))]) as damaged:
        damaged.corrupted("SELECT repack('w')")
        assert "payload outside the file" in damaged.problems()
        if page > 1:
            with pytest.raises(psycopg.Error):
                damaged.conn.execute(WRONG)
        assert damaged.path.stat().st_size == damaged.size


@pytest.mark.parametrize(
    "places",
    [
        pytest.param([(META, 48, word(0))], id="the next map page is the metapage"),
        pytest.param([(META, 48, word(0xFFFFFF))], id="the next map page lies behind their end"),
        pytest.param([(META, 44, word(0xFFFFFFFF))], id="more extents than a file can have"),
        pytest.param([(META, 56, struct.pack("<QQ", 0, 1 << 60))], id="a free run behind the extents"),
        pytest.param([(META, 56, struct.pack("<QQ", 1 << 20, 8))], id="a free run that ends before it begins"),
    ],
)
def test_metapage_that_contradicts_itself(server, sound, places):
    with Damaged(server, sound, places) as damaged:
        for statement in (INSERT, "SELECT repack('w')", "VACUUM w", "SELECT count(data::text) FROM w"):
            damaged.corrupted(statement)


@pytest.mark.parametrize("level", [1, 2], ids=["upper map", "lower map"])
def test_map_entry_that_is_no_page(server, sound, level):
    with Damaged(server, sound, [(level, 8, word(0xFFFFFFFF))]) as damaged:
        for statement in ("SELECT repack('w')", "VACUUM w", "SELECT count(data::text) FROM w"):
            damaged.corrupted(statement)
