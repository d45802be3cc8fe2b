"""Batches over rows that do not lie plainly in a heap table: compressed and toasted arrays, foreign tables, other access methods."""

import tempfile
from pathlib import Path

import pytest
from generate import dense_net, dense_weights

from batch_models import NODE, assert_same, prepare
from helpers import explained

pytestmark = pytest.mark.newer

WIDTH = 700
STORAGES = ("PLAIN", "MAIN", "EXTENDED", "EXTERNAL")
# Arrays of 2,824 bytes: one value everywhere is compressed, others are not and go out of the row where the storage lets them.
ARRAYS = f"""
    CASE i % 4 WHEN 0 THEN array_fill(i::{{0}}, ARRAY[{WIDTH}])
    WHEN 1 THEN (SELECT array_agg((1000 * sin(i * k))::{{0}}) FROM generate_series(1, {WIDTH}) AS k)
    WHEN 2 THEN (SELECT array_agg((CASE WHEN k % 50 = 0 THEN sin(i * k) ELSE 1 END)::{{0}}) FROM generate_series(1, {WIDTH}) AS k) END"""


@pytest.fixture(scope="module", autouse=True)
def tables(db):
    with db.connect() as conn, tempfile.TemporaryDirectory() as folder:
        prepare(conn)
        sizes = [WIDTH, 8, 2]
        model = dense_net(Path(folder), "long", sizes, dense_weights(7, sizes, transposed=False))
        conn.execute("SELECT load_model('long', %b)", (model.SerializeToString(),))
        for storage in STORAGES:
            conn.execute(f"CREATE TABLE {storage} (id int, x real[], n int[], d float8[])")
            # Not all three fit into a page.
            for column, chosen in (("x", storage), ("n", storage), ("d", storage.replace("PLAIN", "EXTENDED"))):
                conn.execute(f"ALTER TABLE {storage} ALTER {column} SET STORAGE {chosen}")
            arrays = ", ".join(ARRAYS.format(kind) for kind in ("real", "int", "float8"))
            conn.execute(f"INSERT INTO {storage} SELECT i, {arrays} FROM generate_series(1, 80) AS i")
        conn.execute("ANALYZE")
        yield


@pytest.mark.parametrize("storage", STORAGES)
def test_storage(conn, storage):
    """Inputs are read wherever they lie; columns that are kept beside them are whole when their turn comes."""
    sizes = conn.execute(f"SELECT pg_column_size(x) FROM {storage} WHERE x IS NOT NULL").fetchall()
    outside = conn.execute("SELECT pg_relation_size(reltoastrelid) FROM pg_class WHERE oid = %s::regclass", (storage.lower(),)).fetchone()[0]
    compressed = min(sizes)[0] < 4 * WIDTH
    assert compressed == (storage in ("MAIN", "EXTENDED")) and (outside > 0 or storage == "MAIN")
    query = f"SELECT id, predict('long', x), md5(x::text), md5(d::text) FROM {storage} WHERE (predict('long', d))[1] > 0.01 ORDER BY id"
    assert NODE in explained(conn, query)
    found = assert_same(conn, f"SELECT id, predict('long', x) FROM {storage} ORDER BY id", query,
                        f"SELECT id, predict('long', n), array_length(n, 1) FROM {storage} ORDER BY id",
                        f"SELECT sum((predict('long', x))[1]), max(x), min(d) FROM {storage}",
                        f"SELECT a.id, predict('long', a.x), md5(b.x::text) FROM {storage} AS a JOIN {storage} AS b ON b.id = a.id + 1 ORDER BY 1",
                        f"WITH w AS MATERIALIZED (SELECT id, x, predict('long', x) AS p FROM {storage}) SELECT id, p, predict('long', x) = p, md5(x::text) FROM w")
    assert all(found) and len(found[1]) > 10


def test_toasted_rows_that_go_meanwhile(db, conn):
    """A cursor's batch holds references to values out of the row; they are there for as long as the cursor's snapshot is."""
    conn.execute("CREATE TABLE going AS SELECT * FROM external")
    wanted = conn.execute("SELECT id, md5(x::text), md5(d::text) FROM going").fetchall()
    with db.connect() as other:
        other.execute("BEGIN; DECLARE c CURSOR FOR SELECT id, x, predict('long', x) AS p, d FROM going")
        first = other.execute("FETCH 2 FROM c").fetchall()
        conn.execute("DELETE FROM going")
        conn.execute("VACUUM going")
        rest = other.execute("FETCH ALL FROM c").fetchall()
        other.execute("CREATE TEMP TABLE copied (id int, x real[], d float8[])")
        with other.cursor() as cursor:
            cursor.executemany("INSERT INTO copied VALUES (%s, %s, %s)", [(row[0], row[1], row[3]) for row in first + rest])
        assert other.execute("SELECT id, md5(x::text), md5(d::text) FROM copied").fetchall() == wanted
        other.execute("ROLLBACK")


@pytest.fixture(scope="module")
def foreign(db, tables):
    """Foreign tables of the database itself, `far` and `far_u`, and a partitioned table of which one half is foreign."""
    with db.connect() as conn:
        host, port = db.server.environment["PGHOST"], db.server.environment["PGPORT"]
        conn.execute("CREATE EXTENSION postgres_fdw")
        conn.execute(f"CREATE SERVER here FOREIGN DATA WRAPPER postgres_fdw OPTIONS (host '{host}', port '{port}', dbname '{db.name}', async_capable 'true', fetch_size '50')")
        conn.execute("CREATE USER MAPPING FOR CURRENT_USER SERVER here")
        columns = "id int, g int, a int, s text, x real[]"
        conn.execute(f"CREATE FOREIGN TABLE far ({columns}) SERVER here OPTIONS (table_name 't')")
        conn.execute("CREATE FOREIGN TABLE far_u (id int, k int, w real[]) SERVER here OPTIONS (table_name 'u')")
        conn.execute("CREATE TABLE behind AS SELECT * FROM t WHERE a = 0; CREATE TABLE behind_too AS SELECT * FROM t WHERE a = 2")
        conn.execute(f"CREATE TABLE halves ({columns}) PARTITION BY LIST (a)")
        conn.execute("CREATE FOREIGN TABLE half_far PARTITION OF halves FOR VALUES IN (0) SERVER here OPTIONS (table_name 'behind')")
        conn.execute("CREATE FOREIGN TABLE half_far_too PARTITION OF halves FOR VALUES IN (2) SERVER here OPTIONS (table_name 'behind_too')")
        conn.execute("CREATE TABLE half_near PARTITION OF halves FOR VALUES IN (1)")
        conn.execute("INSERT INTO half_near SELECT * FROM t WHERE a = 1; ANALYZE")
    return db


FOREIGN = {
    "target list": "SELECT id, predict('m', x) FROM far ORDER BY id",
    "condition": "SELECT id, predict('m', x) FROM far WHERE (predict('m', x))[1] > 0 AND g < 5 ORDER BY id",
    "aggregate": "SELECT g, sum((predict('m', x))[1] ORDER BY id) FROM far GROUP BY g ORDER BY g",
    "join over there": "SELECT far.id, predict('m', x), predict('m2', w) FROM far JOIN far_u ON far_u.k = far.id ORDER BY 1",
    "join here": "SELECT far.id, predict('m', far.x), predict('m2', u.w) FROM far JOIN u ON u.k = far.id ORDER BY 1",
    "partitions": "SELECT id, a, predict('m', x) FROM halves WHERE (predict('m', x))[1] > -9 ORDER BY id",
    "partitions, aggregate": "SELECT count(*), sum((predict('m', x))[1]) > 0, max((predict('m', x))[2]) FROM halves",
    "windows": "SELECT id, rank() OVER (ORDER BY (predict('m', x))[1], id) FROM far ORDER BY id",
    "lateral": "SELECT u.id, l.p FROM u, LATERAL (SELECT predict('m', x) AS p FROM far WHERE far.id = u.k) AS l ORDER BY 1",
}


@pytest.mark.parametrize("setting", ["enable_partitionwise_aggregate = off", "enable_partitionwise_aggregate = on", "enable_hashjoin = off"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_table(foreign, kind, setting):
    with foreign.connect() as conn:
        conn.execute(f"SET {setting}")
        (rows,) = assert_same(conn, FOREIGN[kind])
        assert rows


def test_changes_of_foreign_tables(foreign):
    with foreign.connect() as conn:
        rows = "SELECT * FROM far ORDER BY id"
        for change in ("UPDATE far SET x = predict('m', x) || g::real WHERE (predict('m', x))[1] > 0 RETURNING id, predict('m', x)",
                       "DELETE FROM far WHERE (predict('m', x))[1] > 0", "INSERT INTO far SELECT id + 1000, g, a, s, predict('m', x) FROM far",
                       "UPDATE far SET x = predict('m', far.x) || 1::real FROM u WHERE u.k = far.id AND (predict('m2', u.w))[1] > 0",
                       "UPDATE halves SET x = predict('m', x) || 2::real WHERE (predict('m', x))[1] > 0"):
            found = assert_same(conn, "BEGIN", change, rows, "SELECT * FROM halves ORDER BY id", "ROLLBACK")
            assert found[1]


def test_own_access_method(conn):
    """Rows of a table of tensor blocks are batched as any."""
    conn.execute("CREATE TABLE tiles (id int, x real[], b tensor_block) USING tensor_block")
    conn.execute("INSERT INTO tiles SELECT id, x, NULL FROM external")
    query = "SELECT id, predict('long', x), b IS NULL FROM tiles ORDER BY id"
    assert NODE in explained(conn, query)
    assert_same(conn, query, "SELECT id, md5(x::text), (predict('long', x))[1] FROM tiles WHERE (predict('long', x))[2] > 0.2 ORDER BY id")
    assert_same(conn, "BEGIN", "UPDATE tiles SET x = predict('long', x) WHERE (predict('long', x))[1] > 0.5 RETURNING id, x", "SELECT id, md5(x::text) FROM tiles ORDER BY id", "ROLLBACK")
