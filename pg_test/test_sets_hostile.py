"""Sets of models under users' code that changes them meanwhile, roles that want more rights, old snapshots, and damaged tables."""

import numpy as np
import onnx
import psycopg
import pytest

from fleet_models import Architecture, battery_nets, copy_members, members
from helpers import fails
from test_model_sets import equal, recovered, save, unsound
from test_model_training import DATA, PARAMS, prepare, train

pytestmark = pytest.mark.newer

SMALL = Architecture((4, 8, 2))


def meddle(conn, body, name="meddle"):
    """A function that does something when it comes to a member's row, and gives the member's model back."""
    conn.execute(f"CREATE FUNCTION {name}(member text, model bytea) RETURNS bytea LANGUAGE plpgsql AS $$ BEGIN {body} RETURN model; END $$")


def test_sets_that_are_dropped_by_the_query_that_is_saved(fresh):
    """A drop of the same architecture removes no block of the set that is being made."""
    with fresh.connect() as conn:
        architecture, parameters = battery_nets(500)
        save(conn, "parent", architecture, parameters)
        save(conn, "aside", architecture, parameters[:3] + np.float32(1))
        new = parameters.copy()
        new[::2] += np.float32(0.5)
        copy_members(conn, "m", members(architecture, new))
        meddle(conn, "IF member = '0400' THEN PERFORM drop_model_set('aside'); PERFORM drop_model_set('parent'); END IF;")
        conn.execute("SELECT save_model_set('child', 'SELECT name, meddle(name, onnx) FROM m ORDER BY name', 'parent')")
        equal(conn, "child", architecture, new)
        assert conn.execute("SELECT count(*) FROM tessera.model_sets").fetchone()[0] == 1
        for _ in range(2):
            conn.execute("VACUUM tessera.set_block, tessera.set_map")
        equal(conn, "child", architecture, new)
        assert unsound(conn) == []
        conn.execute("SELECT drop_model_set('child')")
        assert conn.execute("SELECT (SELECT count(*) FROM tessera.set_block) + (SELECT count(*) FROM tessera.set_map)").fetchone()[0] == 0


@pytest.mark.parametrize("early", [True, False])
def test_a_set_that_is_dropped_while_it_is_saved(fresh, early):
    with fresh.connect() as conn:
        architecture, parameters = battery_nets(400)
        copy_members(conn, "m", members(architecture, parameters))
        meddle(conn, f"IF member = '{'0001' if early else '0399'}' THEN PERFORM drop_model_set('s'); END IF;")
        fails(conn, "SELECT save_model_set('s', 'SELECT name, meddle(name, onnx) FROM m ORDER BY name')", sqlstate="42704")
        for table in ("set_block", "set_map", "model_set", "architecture", "graph"):
            assert conn.execute(f"SELECT count(*) FROM tessera.{table}").fetchone()[0] == 0, table


def test_a_set_that_is_saved_while_it_is_saved(fresh):
    with fresh.connect() as conn:
        architecture, parameters = battery_nets(5)
        copy_members(conn, "m", members(architecture, parameters))
        for member in ("0000", "0003"):
            conn.execute("DROP FUNCTION IF EXISTS meddle")
            meddle(conn, f"IF member = '{member}' THEN PERFORM save_model_set('s', 'SELECT name, onnx FROM m'); END IF;")
            fails(conn, "SELECT save_model_set('s', 'SELECT name, meddle(name, onnx) FROM m ORDER BY name')", sqlstate="42710")
            assert conn.execute("SELECT count(*) FROM tessera.model_set").fetchone()[0] == 0
        conn.execute("DROP FUNCTION IF EXISTS meddle")
        meddle(conn, "PERFORM save_model_set('inner' || member, 'SELECT name, onnx FROM m');")
        conn.execute("SELECT save_model_set('s', 'SELECT name, meddle(name, onnx) FROM m ORDER BY name')")
        for name in ["s", *(f"inner{n:04}" for n in range(5))]:
            equal(conn, name, architecture, parameters)
        # What an inner block undid is gone, and the rest is whole.
        conn.execute("DROP FUNCTION meddle")
        meddle(conn, """BEGIN PERFORM save_model_set('undone', 'SELECT name, onnx FROM m'); PERFORM drop_model_set('s'); RAISE 'no';
                        EXCEPTION WHEN raise_exception THEN NULL; END;""")
        conn.execute("SELECT save_model_set('t', 'SELECT name, meddle(name, onnx) FROM m ORDER BY name', 's')")
        equal(conn, "t", architecture, parameters)
        equal(conn, "s", architecture, parameters)
        fails(conn, "SELECT recover_model_set('undone')", sqlstate="42704")


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_old_snapshots_drop_no_set_that_another_is_trained_from(fresh, level):
    with fresh.connect() as conn, fresh.connect() as other:
        prepare(conn, 2)
        other.execute(f"BEGIN ISOLATION LEVEL {level}")
        other.execute("SELECT count(*) FROM tessera.model_sets")
        train(conn, "next")
        with pytest.raises(psycopg.Error) as caught:
            other.execute("SELECT drop_model_set('base')")
        assert caught.value.sqlstate in ("2BP01", "40001")
        other.execute("ROLLBACK")
        assert len(recovered(conn, "next")) == 2


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_old_snapshots_see_the_sets_of_their_time(fresh, level):
    with fresh.connect() as conn, fresh.connect() as other:
        architecture, parameters = battery_nets(100)
        save(conn, "a", architecture, parameters)
        copy_members(conn, "m", members(architecture, parameters + np.float32(1)))
        other.execute(f"BEGIN ISOLATION LEVEL {level}")
        other.execute("SELECT count(*) FROM m")
        conn.execute("SELECT drop_model_set('a')")
        for _ in range(2):
            conn.execute("VACUUM tessera.set_block, tessera.set_map")
        if level == "READ COMMITTED":
            fails(other, "SELECT recover_model('a/0001')", sqlstate="42704")
        else:
            assert recovered(other, "a") == dict(members(architecture, parameters))
            with pytest.raises(psycopg.Error) as caught:
                other.execute("SELECT save_model_set('b', 'SELECT name, onnx FROM m LIMIT 3', 'a')")
            assert caught.value.sqlstate in ("42704", "40001")
        other.execute("ROLLBACK")
        save(conn, "a", architecture, parameters)
        equal(conn, "a", architecture, parameters)


EVIL = """CREATE FUNCTION public.evil() RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN
              RAISE WARNING 'rights of %', current_user; INSERT INTO public.seen VALUES (current_user); RETURN true; END $$"""


@pytest.fixture
def rights(fresh):
    """A set of one role that another may use, trained on the first one's table; the second one has a function that notes whose rights it gets."""
    with fresh.connect() as conn:
        for role in ("set_owner", "set_user"):
            conn.execute(f"DROP ROLE IF EXISTS {role}")
            conn.execute(f"CREATE ROLE {role}")
        conn.execute("GRANT CREATE, USAGE ON SCHEMA public TO set_owner, set_user")
        conn.execute(f"GRANT TEMPORARY ON DATABASE \"{conn.info.dbname}\" TO set_owner, set_user")
        conn.execute("SET ROLE set_owner")
        prepare(conn, 2)
        conn.execute("RESET ROLE")
        conn.execute("CREATE TABLE seen (who text)")
        conn.execute("GRANT ALL ON seen TO PUBLIC")
        conn.execute("SET ROLE set_user")
        conn.execute(EVIL)
        conn.execute("RESET ROLE")
        conn.autocommit = True
        yield conn, fresh
        conn.execute("RESET ROLE")
        conn.execute("DROP OWNED BY set_owner, set_user CASCADE")
        conn.execute("DROP ROLE set_owner, set_user")


TRAP = """CREATE TEMP VIEW samples AS SELECT 1 AS id, '0000'::text AS cell, '{1,2,3,4}'::real[] AS x, '{1}'::real[] AS y WHERE public.evil();
          GRANT SELECT ON samples TO PUBLIC"""


def test_temporary_tables_do_not_stand_in_for_training_data(rights):
    conn, fresh = rights
    conn.execute("SET ROLE set_owner")
    train(conn, "next")
    good = recovered(conn, "next")
    with fresh.connect() as other:
        other.execute("SET ROLE set_user")
        assert recovered(other, "next") == good
        other.execute(TRAP)
        assert "TEMP" in fails(other, "SELECT recover_model_set('next')", sqlstate="55000").diag.message_hint
        # Where the owner's table is gone, a temporary one does not take its place either.
        conn.execute("ALTER TABLE samples RENAME TO elsewhere")
        fails(other, "SELECT recover_model('next/0001')", sqlstate="55000")
        conn.execute("ALTER TABLE elsewhere RENAME TO samples")
        assert other.execute("SELECT count(*) FROM seen").fetchone()[0] == 0
        other.execute("DISCARD TEMP")
        assert recovered(other, "next") == good
        # The role's own function that lends its rights is no way around.
        conn.execute("RESET ROLE")
        conn.execute("""CREATE FUNCTION lend() RETURNS bytea LANGUAGE sql SECURITY DEFINER SET search_path = public, pg_temp AS $$ SELECT recover_model('next/0001') $$;
                        ALTER FUNCTION lend() OWNER TO set_owner""")
        other.execute(TRAP)
        fails(other, "SELECT lend()", sqlstate="55000")
        assert other.execute("SELECT count(*) FROM seen").fetchone()[0] == 0
    # The owner's own temporary tables are nobody else's.
    conn.execute("SET ROLE set_owner")
    conn.execute("CREATE TEMP TABLE samples (id int, cell text, x real[], y real[])")
    assert recovered(conn, "next") == good
    conn.execute("RESET ROLE")
    conn.execute("SELECT drop_model_set('next')")


def test_operators_of_the_caller_lend_no_rights(rights):
    """An operator ahead of pg_catalog's does not choose whose rights training gets."""
    conn, fresh = rights
    conn.execute("""CREATE SCHEMA trap AUTHORIZATION set_user; SET ROLE set_user;
        CREATE FUNCTION trap.always(oid, oid) RETURNS boolean LANGUAGE sql AS 'SELECT true';
        CREATE OPERATOR trap.= (LEFTARG = oid, RIGHTARG = oid, FUNCTION = trap.always);
        CREATE FUNCTION trap.f(onnx bytea, data text, params jsonb) RETURNS bytea LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO public.seen VALUES (current_user); RETURN onnx; END $$;
        SELECT train_model_set('mine', 'base', 'trap.f', 'SELECT 1');
        SET search_path = trap, pg_catalog, public""")
    recovered(conn, "mine")
    conn.execute("RESET ROLE; RESET search_path")
    assert {who for (who,) in conn.execute("SELECT who FROM seen")} == {"set_user"}
    conn.execute("SELECT drop_model_set('mine')")


def test_lexical_rules_of_the_caller_open_no_string(rights):
    """With standard_conforming_strings off, a backslash before a quote would make SQL of the member's name."""
    conn, fresh = rights
    conn.execute("SET ROLE set_user")
    model = conn.execute("SELECT recover_model('base/0000')").fetchone()[0]
    copy_members(conn, "m", [(" OR public.evil() --", model)])
    conn.execute("SELECT save_model_set('bait', 'SELECT name, onnx FROM m')")
    conn.execute("RESET ROLE; SET ROLE set_owner")
    train(conn, "next", based_on="bait", data="SELECT x, y FROM samples WHERE cell <> '\\' AND cell <> $1 AND id < 20 ORDER BY id")
    conn.execute("RESET ROLE")
    with fresh.connect() as other:
        other.execute("SET ROLE set_user; SET standard_conforming_strings = off; SET backslash_quote = on; SET escape_string_warning = off")
        assert len(recovered(other, "next")) == 1
        assert other.execute("SELECT count(*) FROM seen").fetchone()[0] == 0
    conn.execute("SELECT drop_model_set('next'), drop_model_set('bait')")


def test_any_search_path_is_kept(rights):
    conn, _ = rights
    data = "SELECT x, y FROM public.samples WHERE cell = $1 ORDER BY id"
    for turn, path in enumerate(("''", "pg_catalog", '"$user", public', '"a,b", public', "pg_temp, public", "public, pg_temp", "nowhere")):
        conn.execute(f"SET search_path = {path}")
        conn.execute("SELECT public.train_model_set(%s, 'base', 'public.train_feed_forward', %s, %s)", (f"n{turn}", data, PARAMS))
        good = conn.execute("SELECT public.recover_model(%s)", (f"n{turn}/0001",)).fetchone()[0]
        conn.execute("RESET search_path")
        assert good == conn.execute("SELECT public.recover_model(%s)", (f"n{turn}/0001",)).fetchone()[0]
        assert conn.execute("SELECT training ->> 'search_path' FROM tessera.model_sets WHERE name = %s", (f"n{turn}",)).fetchone()[0].replace('""', "''").startswith(path[:4])
    for turn in range(7):
        conn.execute("SELECT drop_model_set(%s)", (f"n{turn}",))


def test_temporary_functions_train_no_set(rights):
    conn, fresh = rights
    conn.execute("CREATE FUNCTION pg_temp.f(onnx bytea, data text, params jsonb) RETURNS bytea LANGUAGE sql AS 'SELECT train_feed_forward(onnx, data, params)'")
    fails(conn, "SELECT train_model_set('next', 'base', 'pg_temp.f', %s, %s)", (DATA, PARAMS), sqlstate="42P17")


def test_what_others_have_is_not_to_be_seen(rights):
    conn, fresh = rights
    conn.execute("REVOKE USAGE ON DOMAIN tessera_model.base FROM PUBLIC")
    with fresh.connect() as other:
        other.execute("SET ROLE set_user")
        for call in ("recover_model('base/0000')", "recover_model_set('base')", "predict('base/0000', '{1,2,3,4}'::real[])",
                     "recommend_storage('base')", "train_model_set('n', 'base', 'train_feed_forward', 'SELECT 1')", "drop_model_set('base')",
                     "save_model_set('n', 'SELECT ''x''::text, NULL::bytea WHERE false', 'base')"):
            fails(other, f"SELECT {call}", sqlstate="42501")
        assert other.execute("SELECT count(*) FROM tessera.model_sets").fetchone()[0] == 0
        assert other.execute("SELECT count(*) FROM tessera.model_set_members").fetchone()[0] == 0
        id_ = conn.execute("SELECT id FROM tessera.model_set").fetchone()[0]
        assert other.execute("SELECT count(*) FROM tessera.set_member_names(%s)", (id_,)).fetchone()[0] == 0
        conn.execute("GRANT USAGE ON DOMAIN tessera_model.base TO set_user")
        assert other.execute("SELECT predict('base/0000', '{1,2,3,4}'::real[])").fetchone()[0]
        fails(other, "SELECT drop_model_set('base')", sqlstate="42501")
        conn.execute("REVOKE USAGE ON DOMAIN tessera_model.base FROM set_user")
        fails(other, "SELECT predict('base/0000', '{1,2,3,4}'::real[])", sqlstate="42501")
        fails(other, "SELECT predict('base/' || n, '{1,2,3,4}'::real[]) FROM (VALUES ('0000')) v (n)", sqlstate="42501")


def test_privileges_that_go_while_a_query_runs(rights):
    """They are looked up anew for each batch, as a call does for each row under a snapshot of its own; a cursor keeps its snapshot."""
    conn, fresh = rights
    query = "SELECT predict('base/000' || i % 2, '{1,2,3,4}'::real[]) FROM generate_series(1, 1000) i"
    outcomes = []
    for batching in ("on", "off"):
        conn.execute("REVOKE USAGE ON DOMAIN tessera_model.base FROM PUBLIC; GRANT USAGE ON DOMAIN tessera_model.base TO set_user")
        with fresh.connect() as other:
            other.execute(f"SET ROLE set_user; SET tessera.enable_batching = {batching}; SET tessera.batch_size = 1; BEGIN; DECLARE c CURSOR FOR {query}")
            assert len(other.execute("FETCH 10 FROM c").fetchall()) == 10
            conn.execute("REVOKE USAGE ON DOMAIN tessera_model.base FROM set_user")
            try:
                outcomes.append(len(other.execute("FETCH 900 FROM c").fetchall()))
            except psycopg.Error as error:
                outcomes.append(error.sqlstate)
            other.rollback() if not other.closed else None
    assert outcomes[0] == outcomes[1], outcomes


def test_owners_go_and_change(rights):
    conn, fresh = rights
    conn.execute("SET ROLE set_owner")
    train(conn, "next")
    conn.execute("RESET ROLE")
    good = recovered(conn, "base")
    conn.execute("ALTER DOMAIN tessera_model.base RENAME TO renamed")
    assert recovered(conn, "base") == good
    # A name that is taken by a renamed domain.
    copy_members(conn, "m", list(good.items()))
    fails(conn, "SELECT save_model_set('renamed', 'SELECT name, onnx FROM m')", sqlstate="42710")
    fails(conn, "SELECT save_model_set('base', 'SELECT name, onnx FROM m')", sqlstate="42710")
    conn.execute("REASSIGN OWNED BY set_owner TO set_user")
    assert {owner for (owner,) in conn.execute("SELECT owner FROM tessera.model_sets")} == {"set_user"}
    conn.execute("DROP OWNED BY set_user CASCADE")
    left = conn.execute("SELECT (SELECT count(*) FROM tessera.set_block), (SELECT count(*) FROM tessera.set_map), (SELECT count(*) FROM tessera.model_set)").fetchone()
    assert left == (0, 0, 0)


def test_a_parent_alone_is_not_dropped_with_its_owner(rights):
    conn, fresh = rights
    conn.execute("GRANT ALL ON samples TO PUBLIC")
    conn.execute("SET ROLE set_user")
    train(conn, "next")
    conn.execute("RESET ROLE")
    fails(conn, "DROP OWNED BY set_owner", sqlstate="2BP01")
    fails(conn, "DROP DOMAIN tessera_model.base CASCADE", sqlstate="2BP01")
    assert len(recovered(conn, "next")) == 2
    # Both at once may go.
    conn.execute("DROP OWNED BY set_owner, set_user CASCADE")
    assert conn.execute("SELECT count(*) FROM tessera.model_set").fetchone()[0] == 0


def test_extension_dropped_and_made_again(fresh):
    with fresh.connect() as conn:
        architecture, parameters = battery_nets(5)
        y = []
        for turn in range(3):
            save(conn, "s", architecture, parameters + np.float32(turn))
            y.append(conn.execute("SELECT predict('s/0001', '{1,2,3,4}'::real[])").fetchone()[0])
            conn.execute("CREATE TABLE IF NOT EXISTS t AS SELECT to_char(i % 5, 'FM0000') AS n, '{1,2,3,4}'::real[] AS x FROM generate_series(1, 50) i")
            got = conn.execute("SELECT DISTINCT predict('s/' || n, x) FROM t WHERE n = '0001'").fetchall()
            assert got == [(y[-1],)]
            conn.execute("DROP EXTENSION pg_tessera CASCADE")
            conn.execute("CREATE EXTENSION pg_tessera")
        assert len({tuple(one) for one in y}) == 3


@pytest.mark.parametrize("batch", ["n", 1, 2])
def test_nets_of_a_fixed_number_of_rows(fresh, batch):
    """Members do what models do with any number of rows."""
    dice = np.random.default_rng(2)
    files = []
    for name in ("a", "b"):
        weights = [onnx.numpy_helper.from_array(dice.normal(size=shape).astype(np.float32), at) for at, shape in (("w", (4, 3)), ("b", (3,)))]
        ports = [onnx.helper.make_tensor_value_info(at, onnx.TensorProto.FLOAT, [batch, width]) for at, width in (("x", 4), ("y", 3))]
        graph = onnx.helper.make_graph([onnx.helper.make_node("Gemm", ["x", "w", "b"], ["y"])], "g", ports[:1], ports[1:], weights)
        files.append((name, onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8).SerializeToString()))
    with fresh.connect() as conn:
        copy_members(conn, "m", files)
        conn.execute("SELECT save_model_set('s', 'SELECT name, onnx FROM m')")
        for name, file in files:
            conn.execute("SELECT load_model(%s, %s)", (f"m{name}", file))
        for rows in ("{1,2,3,4}", "{{1,2,3,4}}", "{{1,2,3,4},{5,6,7,8}}", "{{1,2,3,4},{5,6,7,8},{9,10,11,12}}", "{{1,2,3}}", "{}"):
            outcomes = []
            for query in ("SELECT predict('s/b', %s::real[])", "SELECT predict('mb', %s::real[])", "SELECT predict('s/' || n, %s::real[]) FROM (VALUES ('b')) v (n)"):
                try:
                    outcomes.append(conn.execute(query, (rows,)).fetchone()[0])
                except psycopg.Error as error:
                    outcomes.append(error.sqlstate)
            assert outcomes[0] == outcomes[1] == outcomes[2], (rows, outcomes)


CHANGES = {
    "dropped": "PERFORM drop_model_set('s');",
    "saved again": "PERFORM drop_model_set('s'); PERFORM save_model_set('s', 'SELECT name, onnx FROM m2');",
    "owner of nothing": "ALTER DOMAIN tessera_model.s RENAME TO t;",
    "undone": "BEGIN PERFORM drop_model_set('s'); RAISE 'no'; EXCEPTION WHEN raise_exception THEN NULL; END;",
    "saved more": "PERFORM save_model_set('s' || id, 'SELECT name, onnx FROM m2', 's');",
}
QUERIES = [
    "SELECT id, predict(spec(id), x) FROM t ORDER BY id",
    "SELECT id, predict(spec(id), x) FROM t",
    "SELECT id, predict('s/' || n, x) FROM t WHERE spec(id) <> ''",
    "SELECT id, CASE WHEN id % 2 = 0 THEN predict('s/' || n, x) ELSE predict(spec(id), x) END FROM t",
    "SELECT id, coalesce(predict(spec(id), x), '{0}'), predict('s/' || n, x) FROM t",
    "SELECT id, predict('s/' || n, x) FROM t LIMIT 40",
    "SELECT a.id, predict('s/' || b.n, a.x) FROM t a JOIN t b ON a.id = b.id + 1 ORDER BY 1",
]


@pytest.fixture(scope="module")
def changing(db):
    with db.connect() as conn:
        parameters = SMALL.random(6)
        copy_members(conn, "m", members(SMALL, parameters))
        copy_members(conn, "m2", members(SMALL, parameters * np.float32(2)))
        conn.execute("CREATE TABLE t AS SELECT i AS id, '000' || i % 6 AS n, ARRAY[i, 2, 3, 4]::real[] AS x FROM generate_series(1, 60) i")
        yield conn


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("volatility", ["STABLE", "VOLATILE"])
def test_names_that_change_while_a_query_runs(changing, change, volatility):
    """A function that the query calls changes what the names mean: rows, or the error, are those of a call for each row."""
    conn = changing
    for query in QUERIES:
        outcomes = []
        for batching, size in (("off", 1), ("on", 1), ("on", 7), ("on", 1000)):
            conn.execute(f"BEGIN; SET LOCAL tessera.enable_batching = {batching}; SET LOCAL tessera.batch_size = {size}; SELECT save_model_set('s', 'SELECT name, onnx FROM m')")
            conn.execute(f"""CREATE FUNCTION spec(id int) RETURNS text LANGUAGE plpgsql {volatility} AS $$ BEGIN
                IF id = 30 THEN {CHANGES[change]} END IF; RETURN 's/000' || id % 6; END $$""")
            try:
                outcomes.append(conn.execute(query).fetchall())
            except psycopg.Error as error:
                assert not error.sqlstate.startswith("XX"), str(error)
                outcomes.append(error.sqlstate)
            conn.execute("ROLLBACK")
        assert all(one == outcomes[0] for one in outcomes), (query, [str(one)[-200:] for one in outcomes])


@pytest.mark.parametrize("batching", ["on", "off"])
def test_a_cursor_outlives_the_set_of_its_snapshot(changing, batching):
    conn = changing
    conn.execute("SELECT save_model_set('s', 'SELECT name, onnx FROM m')")
    query = "SELECT id, predict('s/' || n, x) FROM t ORDER BY id"
    whole = conn.execute(query).fetchall()
    conn.execute(f"BEGIN; SET LOCAL tessera.enable_batching = {batching}; SET LOCAL tessera.batch_size = 1; DECLARE c CURSOR FOR {query}; DECLARE h CURSOR WITH HOLD FOR {query}")
    got = conn.execute("FETCH 5 FROM c").fetchall()
    conn.execute("SELECT drop_model_set('s'), save_model_set('s', 'SELECT name, onnx FROM m2')")
    got += conn.execute("FETCH 5 FROM c").fetchall()
    conn.execute("ALTER DOMAIN tessera_model.s RENAME TO other")
    got += conn.execute("FETCH ALL FROM c").fetchall()
    assert got == whole
    assert conn.execute(query).fetchall() != whole
    conn.execute("COMMIT")
    assert conn.execute("FETCH ALL FROM h").fetchall() == whole
    conn.execute("CLOSE h; SELECT drop_model_set('s')")


def test_plans_that_are_kept_find_what_names_mean_now(changing):
    conn = changing
    conn.execute("SET plan_cache_mode = force_generic_plan; PREPARE p(text) AS SELECT id, predict($1 || n, x) FROM t ORDER BY id; PREPARE u AS SELECT predict('s/' || n, x) FROM t")
    fails(conn, "EXECUTE u", sqlstate="42704")
    results = []
    for table in ("m", "m2", "m"):
        conn.execute(f"SELECT save_model_set('s', 'SELECT name, onnx FROM {table}')")
        results.append(conn.execute("EXECUTE p('s/')").fetchall())
        assert [(y,) for _, y in results[-1]] == conn.execute("EXECUTE u").fetchall()
        conn.execute("SELECT drop_model_set('s')")
    assert results[0] == results[2] != results[1]
    assert conn.execute("EXECUTE p(NULL)").fetchall() == [(i, None) for i in range(1, 61)]
    conn.execute("DEALLOCATE ALL; RESET plan_cache_mode")


DAMAGE = [
    ("places cut off", "UPDATE tessera.set_map SET places = substr(places, 1, 5)"),
    ("places empty", "UPDATE tessera.set_map SET places = ''"),
    ("offsets beyond the block", "UPDATE tessera.set_map SET places = (SELECT string_agg(substr(places, i * 6 + 1, 4) || '\\xffff'::bytea, '' ORDER BY i) FROM generate_series(0, length(places) / 6 - 1) i)"),
    ("blocks that there are not", "UPDATE tessera.set_map SET places = (SELECT string_agg('\\xfeffff7f'::bytea || substr(places, i * 6 + 5, 2), '' ORDER BY i) FROM generate_series(0, length(places) / 6 - 1) i)"),
    ("the place of another member", "UPDATE tessera.set_map SET places = substr(places, 25, 24 * 4) || substr(places, 1, 24) || substr(places, 24 * 5 + 1)"),
    ("one bit", "UPDATE tessera.set_map SET places = set_bit(places, 3 * 24 * 8, 1 - get_bit(places, 3 * 24 * 8)) WHERE chunk = 0"),
    ("names cut off", "UPDATE tessera.set_map SET names = substr(names, 1, 7)"),
    ("names that are no text", "UPDATE tessera.set_map SET names = set_byte(names, 4, 255)"),
    ("more names", "UPDATE tessera.set_map SET names = set_byte(names, 1, 255)"),
    ("no map", "DELETE FROM tessera.set_map WHERE chunk = 0"),
    ("recipes cut off", "UPDATE tessera.set_map SET recipes = '\\x00'"),
    ("no blocks", "DELETE FROM tessera.set_block"),
    ("shorter blocks", "UPDATE tessera.set_block SET data = (SELECT b.data FROM tessera.set_block b WHERE b.number = (SELECT max(number) FROM tessera.set_block))"),
    ("no architecture", "DELETE FROM tessera.architecture"),
    ("no graph", "DELETE FROM tessera.graph"),
    ("a graph that is none", "UPDATE tessera.graph SET graph = '\\x0102'"),
    ("no signature", "UPDATE tessera.architecture SET signature = '{}'"),
    ("a short hash", "UPDATE tessera.architecture SET graph_hash = '\\x00'"),
    ("another number of a chunk", "UPDATE tessera.set_map SET chunk = chunk + 7"),
]


@pytest.mark.parametrize("what, damage", DAMAGE, ids=[what for what, _ in DAMAGE])
def test_damaged_tables_are_errors(fresh, what, damage):
    with fresh.connect() as conn:
        architecture, parameters = battery_nets(1025)
        save(conn, "s", architecture, parameters)
        last = architecture.model(parameters[1024])
        conn.execute(damage)
    with fresh.connect() as conn:
        outcomes = []
        for query in ("SELECT recover_model('s/0003')", "SELECT predict('s/0003', '{1,2,3,4}'::real[])", "SELECT predict('s/' || n, '{1,2,3,4}'::real[]) FROM (VALUES ('0003')) v (n)",
                      "SELECT count(*) FROM recover_model_set('s')", "SELECT save_model_set('t', 'SELECT ''n''::text, NULL::bytea WHERE false', 's')", "SELECT count(*) FROM tessera.model_set_members"):
            try:
                conn.execute(query)
                outcomes.append("00000")
            except psycopg.Error as error:
                assert not conn.closed, query
                outcomes.append(error.sqlstate)
        # Taking over a map, and listing names, need not look at blocks.
        assert outcomes[:4] == ["XX001"] * 4 and set(outcomes[4:]) <= {"00000", "XX001"}, outcomes


def test_a_member_of_a_set_that_is_not_there(fresh):
    with fresh.connect() as conn:
        error = fails(conn, "SELECT predict('nothing/0001', ARRAY[1, 2, 3, 4]::real[])", sqlstate="42704")
        assert "tessera.model_sets" in error.diag.message_hint
        assert "load_model" in fails(conn, "SELECT predict('nothing', ARRAY[1]::real[])", sqlstate="42704").diag.message_hint
