"""Who may load, predict, replace, read weights and files; what DROP ROLE and DROP EXTENSION refuse."""

import psycopg
import pytest

from helpers import assert_answers, fails, load, onnx_file
from paths import MODELS

ROLES = ("owner", "other", "file_reader")
ASK = "SELECT predict('m', array_fill(0.5::real, ARRAY[28]))"


@pytest.fixture
def conn(fresh):
    with fresh.connect() as connection:
        for role in ROLES:
            connection.execute(f"DROP ROLE IF EXISTS {role}")
            connection.execute(f"CREATE ROLE {role} LOGIN")
        connection.execute("GRANT pg_read_server_files TO file_reader")
        connection.execute("SET ROLE owner")
        load(connection, "m", "fraud_fc_256")
        connection.execute("RESET ROLE")
        yield connection
        connection.execute("RESET ROLE")
        for role in ROLES:
            connection.execute(f"DROP OWNED BY {role}")
            connection.execute(f"DROP ROLE {role}")


CHANGES = ["SELECT drop_model('m')", "SELECT drop_model('m', 1)", "SELECT rename_model('m', 'mine')", "SELECT activate_model('m', 1)"]


@pytest.mark.parametrize("sql", CHANGES)
def test_only_the_owner_changes_a_model(conn, sql):
    conn.execute("SET ROLE other")
    fails(conn, sql, (), "42501")
    conn.execute("SET ROLE owner")
    conn.execute(sql)


def test_only_the_owner_replaces_a_model(conn):
    conn.execute("SET ROLE other")
    fails(conn, "SELECT load_model('m', %b)", (onnx_file("fraud_fc_256"),), "42501")
    conn.execute("SET ROLE owner")
    assert load(conn, "m", "fraud_fc_256_tuned") == 2


def test_superuser_changes_any_model(conn):
    assert load(conn, "m", "fraud_fc_256_tuned") == 2
    assert conn.execute("SELECT DISTINCT owner::text FROM tessera.models").fetchall() == [("owner",)]
    conn.execute("SELECT drop_model('m')")


def test_members_of_the_owner_change_a_model(conn):
    conn.execute("GRANT owner TO other")
    conn.execute("SET ROLE other")
    assert load(conn, "m", "fraud_fc_256_tuned") == 2


@pytest.mark.parametrize("table", ["model", "model_version", "graph", "tensor", "weight"])
@pytest.mark.parametrize("role", ["owner", "other"])
def test_tables_are_closed(conn, table, role):
    """Neither reading nor writing, for the owner of a model as for others; views show what may be seen."""
    conn.execute(f"SET ROLE {role}")
    for sql in (f"SELECT * FROM tessera.{table}", f"DELETE FROM tessera.{table}", f"TRUNCATE tessera.{table}",
                f"INSERT INTO tessera.{table} DEFAULT VALUES", f"COPY tessera.{table} TO STDOUT"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            conn.execute(sql)


def test_owner_predicts_and_exports(conn):
    conn.execute("SET ROLE owner")
    assert_answers(conn, "m", "fraud_fc_256", 7)
    assert conn.execute("SELECT octet_length(export_model('m'))").fetchone()[0] > 30000
    assert conn.execute("SELECT count(*) FROM tessera.tensors WHERE model = 'm'").fetchone()[0] == 4


def test_files_need_the_privilege(conn):
    path = str((MODELS / "fraud_fc_256.onnx").resolve())
    sql = "SELECT load_model_from_file('from_file', %s)"
    conn.execute("SET ROLE other")
    fails(conn, sql, (path,), "42501")
    conn.execute("SET ROLE file_reader")
    conn.execute(sql, (path,))
    assert_answers(conn, "from_file", "fraud_fc_256", 7)


def test_large_objects_need_the_privilege(conn):
    oid = conn.execute("SELECT lo_from_bytea(0, %b)", (onnx_file("fraud_fc_256"),)).fetchone()[0]
    conn.execute("SET ROLE other")
    fails(conn, "SELECT load_model_from_large_object('lo', %s)", (oid,), "42501", hint=False)
    conn.execute("RESET ROLE")
    conn.execute(f"GRANT SELECT ON LARGE OBJECT {oid} TO other")
    conn.execute("SET ROLE other")
    conn.execute("SELECT load_model_from_large_object('lo', %s)", (oid,))
    assert_answers(conn, "lo", "fraud_fc_256", 7)
    conn.execute("RESET ROLE")
    conn.execute("SELECT lo_unlink(%s)", (oid,))


def test_a_models_owner_cannot_be_dropped(conn):
    with pytest.raises(psycopg.errors.DependentObjectsStillExist):
        conn.execute("DROP ROLE owner")
    assert_answers(conn, "m", "fraud_fc_256", 1)


def test_reassign_owned(conn):
    conn.execute("REASSIGN OWNED BY owner TO other")
    assert conn.execute("SELECT owner::text FROM tessera.models").fetchall() == [("other",)]
    conn.execute("SET ROLE other")
    assert load(conn, "m", "fraud_fc_256_tuned") == 2


def test_drop_extension_with_a_users_table(conn):
    conn.execute("SELECT drop_model('m')")
    conn.execute("CREATE TABLE own (data tensor_block) USING tensor_block")
    with pytest.raises(psycopg.errors.DependentObjectsStillExist):
        conn.execute("DROP EXTENSION pg_tessera")
    conn.execute("INSERT INTO own VALUES ('{1,2}'::real[]::tensor_block)")
    conn.execute("DROP TABLE own")
    conn.execute("DROP EXTENSION pg_tessera")
    assert conn.execute("SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'tessera%'").fetchone()[0] == 0
    conn.execute("CREATE EXTENSION pg_tessera")


def test_drop_extension_cascade(conn):
    conn.execute("CREATE TABLE own (data tensor_block) USING tensor_block")
    conn.execute("DROP EXTENSION pg_tessera CASCADE")
    assert conn.execute("SELECT to_regclass('own')").fetchone()[0] is None
    conn.execute("CREATE EXTENSION pg_tessera")
    load(conn, "m", "fraud_fc_256")
    assert_answers(conn, "m", "fraud_fc_256", 1)


def test_every_object_has_a_comment(conn):
    sql = """
        SELECT pg_describe_object(classid, objid, objsubid)
        FROM pg_depend
        WHERE refclassid = 'pg_extension'::regclass AND deptype = 'e'
          AND refobjid = (SELECT oid FROM pg_extension WHERE extname = 'pg_tessera')
          AND obj_description(objid, classid::regclass::name) IS NULL
          AND pg_describe_object(classid, objid, objsubid) !~ '^(type tensor_block\\[\\]|sequence|index|operator family)'
          AND NOT (classid = 'pg_type'::regclass AND EXISTS (SELECT FROM pg_type t WHERE t.oid = objid AND (t.typrelid <> 0 OR t.typelem <> 0)))
    """
    assert conn.execute(sql).fetchall() == []


def test_extension_in_a_schema(fresh):
    """Functions go to the schema of CREATE EXTENSION; they work without it in the search path, and with a hostile one."""
    with fresh.connect() as conn:
        conn.execute("DROP EXTENSION pg_tessera CASCADE")
        conn.execute("CREATE SCHEMA models")
        conn.execute("CREATE EXTENSION pg_tessera SCHEMA models")
        conn.execute("SET search_path = ''")
        conn.execute("SELECT models.load_model('m', %b)", (onnx_file("fraud_fc_256"),))
        got = conn.execute("SELECT models.predict('m', array_fill(0.5::real, ARRAY[28]))").fetchone()[0]
        assert len(got) == 2 and sum(got) == pytest.approx(1, abs=1e-4)
        conn.execute("CREATE SCHEMA hostile")
        conn.execute("CREATE FUNCTION hostile.hit(int, int) RETURNS bool LANGUAGE plpgsql AS $$ BEGIN RAISE 'fooled'; END $$")
        conn.execute("CREATE OPERATOR hostile.= (FUNCTION = hostile.hit, LEFTARG = int, RIGHTARG = int)")
        conn.execute("SET search_path = hostile, pg_catalog")
        conn.execute("SELECT models.load_model('m', %b)", (onnx_file("fraud_fc_256_tuned"),))
        conn.execute("SELECT models.predict('m', array_fill(0.5::real, ARRAY[28]))")
        conn.execute("SELECT models.drop_model('m')")


def test_a_domain_that_took_a_free_name(conn):
    """Who renames a model's domain by hand stands in the way of another model, and is told from it."""
    load(conn, "renamed", "fraud_fc_256")
    conn.execute("ALTER DOMAIN tessera_model.renamed RENAME TO free")
    fails(conn, "SELECT load_model('free', %b)", (onnx_file("fraud_fc_256"),), "42710")
    conn.execute("SELECT drop_model('renamed')")
    load(conn, "free", "fraud_fc_256")


def test_maintenance_is_for_owners(fresh):
    with fresh.connect() as conn:
        conn.execute("DROP ROLE IF EXISTS stranger")
        conn.execute("CREATE ROLE stranger LOGIN")
        conn.execute("CREATE TABLE t (k int PRIMARY KEY, data bytea) USING tensor_block")
        conn.execute("GRANT SELECT ON t TO stranger")
        with fresh.connect(user="stranger") as stranger:
            for call in ("check_store('t')", "repack('t')", "tessera.store_meta('t')", "tessera.store_blocks('t')", "tessera.store_page('t', 0)"):
                fails(stranger, f"SELECT {call}", (), "42501", hint=False)
            fails(stranger, "SELECT check_store('tessera.weight')", (), "42501")
        for call in ("check_store('pg_class')", "repack('pg_class')", "tessera.store_meta('pg_class')"):
            fails(conn, f"SELECT {call}", (), "42809")
        fails(conn, "SELECT repack('t', 'nothing')", (), "42703")
        fails(conn, "SELECT tessera.store_page('t', -1)", (), "22023")
        conn.execute("ALTER TABLE t OWNER TO stranger")
        with fresh.connect(user="stranger") as owner:
            assert owner.execute("SELECT repack('t')").fetchone()[0] == 0
            assert owner.execute("SELECT count(*) FROM check_store('t')").fetchone()[0] == 0
        conn.execute("DROP OWNED BY stranger")
        conn.execute("DROP ROLE stranger")
