"""Models, their owners and their version numbers survive pg_dump and pg_restore; so do a user's own tables of blocks."""

import numpy as np
import pytest

import fleet_models
from cluster import Database
from helpers import assert_answers, load, storage
from workload import problems

pytestmark = pytest.mark.newer

MODELS = ["fraud_fc_256", "cnn", "minilm", "ocr_turn", "sk_logistic"]


@pytest.fixture(scope="module")
def source(db, server):
    """A database with models of two owners, several versions, and a table of blocks."""
    with db.connect() as conn:
        conn.execute("DROP ROLE IF EXISTS analyst")
        conn.execute("DROP ROLE IF EXISTS reader")
        conn.execute("CREATE ROLE analyst")
        conn.execute("CREATE ROLE reader")
        for name in MODELS:
            load(conn, name)
        conn.execute("SET ROLE analyst")
        load(conn, "analysts", "fraud_fc_512")
        load(conn, "analysts", "fraud_fc_256")
        load(conn, "analysts", "fraud_fc_256_tuned")
        conn.execute("SELECT activate_model('analysts', 2)")
        conn.execute("RESET ROLE")
        architecture, parameters = fleet_models.battery_nets(600)
        fleet_models.copy_members(conn, "members", fleet_models.members(architecture, parameters))
        conn.execute("SELECT save_model_set('cells', 'SELECT name, onnx FROM members')")
        conn.execute("CREATE TABLE samples AS SELECT i AS id, ARRAY[i, 1, 2, 3]::real[] AS x, 0.5::real AS y FROM generate_series(1, 20) i")
        conn.execute("SELECT train_model_set('trained', 'cells', 'train_feed_forward', 'SELECT x, y FROM samples ORDER BY id', '{}', '{0007}')")
        parameters[3] += np.float32(1)
        conn.execute("UPDATE members SET onnx = %s WHERE name = '0003'", (architecture.model(parameters[3]),))
        conn.execute("SELECT save_model_set('updated', 'SELECT name, onnx FROM members', 'cells')")
        conn.execute("ALTER DOMAIN tessera_model.updated OWNER TO analyst")
        conn.execute("CREATE TABLE own (id int, data tensor_block) USING tensor_block")
        conn.execute("INSERT INTO own SELECT i, array_fill((i % 3)::real, ARRAY[64, 64])::tensor_block FROM generate_series(1, 30) AS i")
        conn.execute("INSERT INTO own VALUES (0, '{NaN,Infinity,-0,1.1754944e-38,1e-45}'::real[]::tensor_block)")
    yield db
    with server.connect("postgres") as conn:
        conn.execute(f'DROP DATABASE IF EXISTS "{db.name}" WITH (FORCE)')
        conn.execute("DROP ROLE IF EXISTS analyst")
        conn.execute("DROP ROLE IF EXISTS reader")
        conn.execute(f'CREATE DATABASE "{db.name}"')  # the fixture drops it


def facts(conn) -> list:
    """All that must be the same on both sides."""
    sql = ["SELECT name, version, active, owner::text, loaded_at FROM tessera.models ORDER BY 1, 2",
           "SELECT model, version, name, dtype, shape::text FROM tessera.model_inputs ORDER BY 1, 2, 3",
           "SELECT model, version, name, dtype, dims, blocks FROM tessera.tensors ORDER BY 1, 2, 3",
           "SELECT name, owner::text, storage, based_on, members, bytes_added, training::text, created_at FROM tessera.model_sets ORDER BY 1",
           "SELECT s, name, md5(model) FROM unnest(ARRAY['cells', 'updated', 'trained']) AS s, recover_model_set(s) ORDER BY 1, 2",
           "SELECT id, md5(data::bytea) FROM own ORDER BY 1"]
    return [conn.execute(statement).fetchall() for statement in sql]


@pytest.mark.parametrize("form", ["plain", "custom", "directory"])
def test_round_trip(source, server, tmp_path, form):
    file = tmp_path / "dump"
    server.program("pg_dump", f"--format={form}", "-d", source.name, "-f", str(file))
    target = Database(server, f"restored_{form}")
    with server.connect("postgres") as conn:
        conn.execute(f'DROP DATABASE IF EXISTS "{target.name}" WITH (FORCE)')
        conn.execute(f'CREATE DATABASE "{target.name}" TEMPLATE template0')
    try:
        if form == "plain":
            server.program("psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", target.name, "-f", str(file))
        else:
            server.program("pg_restore", "--exit-on-error", "-d", target.name, *(["-j", "2"] if form == "directory" else []), str(file))
        with source.connect() as before, target.connect() as after:
            assert facts(after) == facts(before)
            for name in MODELS:
                assert_answers(after, name, name, 7)
            assert_answers(after, "analysts", "fraud_fc_256", 7)
            assert_answers(after, "analysts@3", "fraud_fc_256_tuned", 7)
            assert storage(after)["blocks_stored"] == storage(before)["blocks_stored"]
            assert problems(after) == []
            assert load(after, "analysts", "fraud_fc_512") == 4, "version numbers do not go on"
            assert load(after, "new", "fraud_fc_512") == 1
            assert_answers(after, "new", "fraud_fc_512", 7)
            for name in MODELS:
                assert_answers(after, name, name, 1)
            assert after.execute("SELECT predict('updated/0003', '{1,2,3,4}'::real[])").fetchone()[0]
            after.execute("SELECT save_model_set('again', 'SELECT * FROM recover_model_set(''updated'') LIMIT 5', 'cells')")
            after.execute("SELECT drop_model_set(s) FROM unnest(ARRAY['trained', 'cells', 'updated', 'again']) AS s")
            assert after.execute("SELECT count(*) FROM tessera.set_block").fetchone()[0] == 0
            after.execute("SELECT drop_model('analysts')")
            after.execute("DROP TABLE own")
            after.execute("SELECT drop_model(name) FROM (SELECT DISTINCT name FROM tessera.models) AS m")
            after.execute("DROP EXTENSION pg_tessera")
    finally:
        with server.connect("postgres") as conn:
            conn.execute(f'DROP DATABASE "{target.name}" WITH (FORCE)')


KINDS = """
CREATE TABLE parts (id int GENERATED ALWAYS AS IDENTITY, data tensor_block, size int GENERATED ALWAYS AS (octet_length(data::bytea)) STORED) PARTITION BY RANGE (id);
CREATE TABLE parts_low PARTITION OF parts FOR VALUES FROM (0) TO (10) USING tensor_block;
CREATE TABLE parts_high PARTITION OF parts FOR VALUES FROM (10) TO (1000) USING tensor_block WITH (fillfactor = 70);
INSERT INTO parts (data) SELECT array_fill((i % 12)::real, ARRAY[64, 64])::tensor_block FROM generate_series(1, 40) AS i;
CREATE TABLE wide (id int PRIMARY KEY, note text, raw bytea, words text[], data tensor_block) USING tensor_block;
ALTER TABLE wide ALTER note SET STORAGE external;
INSERT INTO wide SELECT i, repeat(md5(i::text), 200), decode(repeat(md5(i::text), 300), 'hex'), ARRAY[repeat('x', 3000), i::text],
    array_fill(i::real, ARRAY[9])::tensor_block FROM generate_series(1, 20) AS i;
CREATE UNIQUE INDEX ON wide (md5(data::bytea)) WHERE id > 5;
CREATE MATERIALIZED VIEW seen USING tensor_block AS SELECT id, data FROM parts;
CREATE UNLOGGED TABLE unlogged USING tensor_block AS SELECT id, data FROM parts;
"""
KIND_FACTS = ["SELECT id, size, md5(data::bytea) FROM parts ORDER BY 1", "SELECT id, note, raw, words, md5(data::bytea) FROM wide ORDER BY 1",
              "SELECT id, md5(data::bytea) FROM seen ORDER BY 1", "SELECT id, md5(data::bytea) FROM unlogged ORDER BY 1"]


@pytest.mark.parametrize("heap", [False, True], ids=["as it was", "into heap"])
def test_tables_of_every_kind(fresh, server, tmp_path, heap):
    """Partitions, generated columns, wide values, indexes, materialized views; restored by two jobs, also without the access method."""
    with fresh.connect() as before:
        before.execute(KINDS)
        server.program("pg_dump", "--format=directory", "-j", "2", "-d", fresh.name, "-f", str(tmp_path / "dump"))
        with Database(server, "restored_kinds") as target:
            options = ["--no-table-access-method"] if heap else []
            server.program("pg_restore", "--exit-on-error", "-j", "2", *options, "-d", target.name, str(tmp_path / "dump"))
            with target.connect() as after:
                for statement in KIND_FACTS:
                    assert after.execute(statement).fetchall() == before.execute(statement).fetchall() != []
                access = "SELECT relname, amname FROM pg_class c JOIN pg_am a ON a.oid = relam WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'm') ORDER BY 1"
                assert {name for _, name in after.execute(access).fetchall()} == ({"heap"} if heap else {"tensor_block"})
                assert problems(after) == []
                after.execute("REFRESH MATERIALIZED VIEW seen")
                after.execute("INSERT INTO parts (data) SELECT data FROM parts")
                assert after.execute("SELECT count(*) FROM parts").fetchone()[0] == 80


def test_dump_of_a_dump(source, server, tmp_path):
    """Dumping what was restored gives the same text."""
    texts = []
    name = source.name
    target = "restored_twice"
    with server.connect("postgres") as conn:
        conn.execute(f'DROP DATABASE IF EXISTS "{target}" WITH (FORCE)')
        conn.execute(f'CREATE DATABASE "{target}" TEMPLATE template0')
    try:
        for database in (name, target):
            text = server.program("pg_dump", "-d", database, text=True).stdout
            texts.append(sorted(line for line in text.splitlines() if not line.startswith(("--", "\\"))))
            if database == name:
                server.program("psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", target, text=True, input=text)
        assert texts[0] == texts[1]
    finally:
        with server.connect("postgres") as conn:
            conn.execute(f'DROP DATABASE "{target}" WITH (FORCE)')


def test_size(source, server):
    """The text form is compact: a dump has at most two and a quarter bytes for each byte of blocks."""
    with source.connect() as conn:
        blocks = conn.execute("SELECT sum(octet_length(data::bytea)) FROM (SELECT data FROM tessera.weight UNION ALL SELECT data FROM own) AS d").fetchone()[0]
    text = server.program("pg_dump", "-d", source.name).stdout
    assert len(text) < 2.25 * blocks + 1_000_000
