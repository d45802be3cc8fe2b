"""Small models and tables for the tests of batches, and queries run with both settings."""

import tempfile
from pathlib import Path

import psycopg
from generate import dense_net, dense_weights

NODE = "Custom Scan (Tessera Predict)"
SCORE = "(predict('m', x))[1]"

TABLES = """
CREATE TABLE t (id int PRIMARY KEY, g int, a int, s text, x real[]);
INSERT INTO t SELECT i, i % 7, i % 3, repeat('z', i % 5),
    CASE WHEN i % 11 = 0 THEN NULL ELSE ARRAY[sin(i), cos(i * 3), sin(i * i)]::real[] END FROM generate_series(1, 300) AS i;
CREATE TABLE u (id int PRIMARY KEY, k int, w real[]);
INSERT INTO u SELECT i, i * 3, ARRAY[cos(i), sin(i * 2)]::real[] FROM generate_series(1, 150) AS i;
CREATE INDEX ON u (k);
CREATE TABLE parted (LIKE t) PARTITION BY LIST (a);
CREATE TABLE parted0 PARTITION OF parted FOR VALUES IN (0);
CREATE TABLE parted1 PARTITION OF parted FOR VALUES IN (1, 2);
INSERT INTO parted SELECT * FROM t;
ANALYZE;
"""


def prepare(conn: psycopg.Connection) -> None:
    """Model `m` takes three numbers and gives two, `m2` takes two and gives three."""
    with tempfile.TemporaryDirectory() as folder:
        for name, sizes in (("m", [3, 8, 2]), ("m2", [2, 8, 3])):
            model = dense_net(Path(folder), name, sizes, dense_weights(len(name), sizes, transposed=False), softmax=False)
            conn.execute("SELECT load_model(%s, %b)", (name, model.SerializeToString()))
    conn.execute(TABLES)


def outcome(conn: psycopg.Connection, *statements: str) -> list:
    """Rows of each statement, or the SQLSTATE and message of its error; floats by their text, which tells their bits apart."""
    found = []
    for sql in statements:
        try:
            cursor = conn.execute(sql)
            found.append([repr(row) for row in cursor.fetchall()] if cursor.description else cursor.rowcount)
        except psycopg.Error as error:
            assert not conn.closed, f"the connection was lost: {sql}"
            found.append((error.sqlstate, error.diag.message_primary))
    return found


def assert_same(conn: psycopg.Connection, *statements: str, errors: bool = False) -> list:
    """The statements give the same with batching and without, also in small batches; returns what they give."""
    conn.execute("SET tessera.enable_batching = off")
    wanted = outcome(conn, *statements)
    conn.execute("RESET tessera.enable_batching")
    assert errors or not any(isinstance(one, tuple) for one in wanted), wanted
    for size in (1024, 3):
        conn.execute(f"SET tessera.batch_size = {size}")
        assert outcome(conn, *statements) == wanted, f"in batches of {size}: {statements}"
    conn.execute("RESET tessera.batch_size")
    return wanted
