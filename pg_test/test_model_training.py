"""Sets that keep how their members are trained: what is trained again is the same to the bit, or an error says what has changed."""

import sysconfig

import numpy as np
import pytest

from fleet_models import battery_nets, copy_members, members, names
from helpers import cancelled_after, fails
from test_model_sets import recovered, save, unsound

DATA = "SELECT x, y FROM samples WHERE cell = $1 ORDER BY id"
PARAMS = '{"epochs": 3, "learning_rate": 0.01, "seed": 7}'


def prepare(conn, count=6):
    """A set "base", and samples of each of its members."""
    architecture, parameters = battery_nets(count)
    save(conn, "base", architecture, parameters)
    conn.execute("CREATE TABLE samples (id serial PRIMARY KEY, cell text, x real[], y real[])")
    dice = np.random.default_rng(5)
    for name in names(count):
        for x in dice.normal(size=(40, 4)):
            conn.execute("INSERT INTO samples (cell, x, y) VALUES (%s, %s, %s)", (name, x.tolist(), [float(np.sin(x.sum()))]))
    return architecture, parameters


def train(conn, set_name, based_on="base", function="train_feed_forward", data=DATA, params=PARAMS, only=None, verify=True):
    query = "SELECT train_model_set(%s, %s, %s, %s, %s::jsonb, %s, %s)"
    return conn.execute(query, (set_name, based_on, function, data, params, only, verify)).fetchone()[0]


def test_trained_members_come_back_and_cost_next_to_nothing(fresh):
    with fresh.connect() as conn:
        architecture, parameters = prepare(conn)
        assert train(conn, "next", only=["0001", "0004"]) == 2
        row = conn.execute("SELECT storage, based_on, members, bytes_added, training FROM tessera.model_sets WHERE name = 'next'").fetchone()
        assert row[:3] == ("provenance", "base", 6) and row[3] < 1000
        assert row[4]["function"] == "public.train_feed_forward" and row[4]["params"]["epochs"] == 3
        first = recovered(conn, "next")
        assert recovered(conn, "next") == first
        before = dict(members(architecture, parameters))
        assert {name for name in first if first[name] != before[name]} == {"0001", "0004"}
        # What is recovered is what the training function gives for the member's samples.
        again = conn.execute("SELECT train_feed_forward(recover_model('base/0004'), %s, %s::jsonb)", (DATA.replace("$1", "'0004'"), PARAMS)).fetchone()[0]
        assert again == first["0004"] == conn.execute("SELECT recover_model('next/0004')").fetchone()[0]
        # It learns.
        x, y = (np.array(column) for column in zip(*conn.execute("SELECT x, y FROM samples WHERE cell = '0004'").fetchall()))
        loss = lambda model: ((architecture.run(architecture.parameters_of(model), x) - y) ** 2).mean()
        assert loss(first["0004"]) < 0.7 * loss(before["0004"])
        # Members that are stored predict; those that are not say what to do.
        assert conn.execute("SELECT predict('next/0000', '{1,2,3,4}'::real[]) = predict('base/0000', '{1,2,3,4}'::real[])").fetchone()[0]
        assert "save_model_set" in fails(conn, "SELECT predict('next/0001', '{1,2,3,4}'::real[])", sqlstate="55000").diag.message_hint
        fails(conn, "SELECT predict('next/' || cell, x) FROM samples", sqlstate="55000")
        conn.execute("SELECT save_model_set('whole', 'SELECT * FROM recover_model_set(''next'')', 'base')")
        assert recovered(conn, "whole") == first
        assert unsound(conn) == []


def test_generations_are_trained_from_each_other(fresh):
    with fresh.connect() as conn:
        prepare(conn, 3)
        train(conn, "g1")
        train(conn, "g2", based_on="g1", only=["0002"], params='{"epochs": 1, "layers": 1}')
        first, second = recovered(conn, "g1"), recovered(conn, "g2")
        assert {name for name in first if first[name] != second[name]} == {"0002"}
        train(conn, "g3", based_on="g2", only=["0000"])
        assert recovered(conn, "g3")["0001"] == first["0001"] and recovered(conn, "g3")["0002"] == second["0002"]
        # A set that stores its members cannot take over what is not stored.
        fails(conn, "SELECT save_model_set('stored', 'SELECT name, model FROM recover_model_set(''g2'') LIMIT 1', 'g2')", sqlstate="55000")
        conn.execute("SELECT save_model_set('stored', 'SELECT * FROM recover_model_set(''g2'')', 'g2')")
        assert recovered(conn, "stored") == second
        conn.execute("SELECT drop_model_set('g3')")
        fails(conn, "SELECT drop_model_set('base')", sqlstate="2BP01")
        fails(conn, "SELECT drop_model_set('g1')", sqlstate="2BP01")
        fails(conn, 'DROP DOMAIN tessera_model."base"', sqlstate="2BP01")
        conn.execute("SELECT drop_model_set('g2')")
        conn.execute("SELECT drop_model_set('g1')")
        conn.execute("SELECT drop_model_set('base')")


def test_changes_are_noticed(fresh):
    with fresh.connect() as conn:
        prepare(conn, 3)
        conn.execute("CREATE TABLE factor AS SELECT 1.0::real AS f")
        conn.execute("""CREATE FUNCTION mine(onnx bytea, data text, params jsonb) RETURNS bytea LANGUAGE plpgsql AS $$
            BEGIN RETURN train_feed_forward(onnx, data, params || jsonb_build_object('learning_rate', 0.01 * (SELECT f FROM factor))); END $$""")
        train(conn, "next", function="mine")
        good = recovered(conn, "next")
        conn.execute("UPDATE samples SET y = '{3}' WHERE id = (SELECT max(id) FROM samples WHERE cell = '0001')")
        error = fails(conn, "SELECT recover_model('next/0001')", sqlstate="55000")
        assert "rows" in error.diag.message_detail
        assert conn.execute("SELECT recover_model('next/0002')").fetchone()[0] == good["0002"]
        conn.execute("UPDATE factor SET f = 2")
        error = fails(conn, "SELECT recover_model('next/0002')", sqlstate="55000")
        assert "another model" in error.diag.message_detail
        conn.execute("DROP FUNCTION mine")
        fails(conn, "SELECT recover_model('next/0002')", sqlstate="42883", hint=False)


FUNCTIONS = {
    "random": ("RETURN (SELECT train_feed_forward(onnx, data, params || jsonb_build_object('seed', (random() * 1e9)::bigint)));", "39000"),
    "nothing": ("RETURN NULL;", "22004"),
    "noise": ("RETURN '\\x1234'::bytea;", "22P03"),
    "raises": ("RAISE EXCEPTION 'out of luck' USING ERRCODE = 'TT001', HINT = 'wait';", "TT001"),
    "other": ("RETURN (SELECT o.onnx FROM other o);", "22023"),
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_bad_training_functions_store_nothing(fresh, kind):
    from fleet_models import Architecture

    body, state = FUNCTIONS[kind]
    with fresh.connect() as conn:
        prepare(conn, 2)
        wide = Architecture((4, 48, 48, 47, 1))
        copy_members(conn, "other", members(wide, wide.random(1)))
        conn.execute(f"CREATE FUNCTION f(onnx bytea, data text, params jsonb) RETURNS bytea LANGUAGE plpgsql AS $$ BEGIN {body} END $$")
        fails(conn, f"SELECT train_model_set('next', 'base', 'f', '{DATA}', '{PARAMS}')", sqlstate=state)
        assert conn.execute("SELECT name FROM tessera.model_sets").fetchall() == [("base",)]
        # Without the second training what is not deterministic is noticed when it is recovered.
        if kind == "random":
            train(conn, "next", function="f", verify=False)
            fails(conn, "SELECT recover_model('next/0001')", sqlstate="55000")


def test_other_users_recover_with_the_owners_rights(fresh):
    with fresh.connect() as conn:
        prepare(conn, 2)
        for role in ("trainer", "reader"):
            conn.execute(f"DROP ROLE IF EXISTS {role}")
            conn.execute(f"CREATE ROLE {role}")
        try:
            conn.execute("GRANT SELECT ON samples TO trainer")
            conn.execute("SET ROLE trainer")
            train(conn, "next")
            conn.execute("RESET ROLE")
            expected = recovered(conn, "next")
            conn.execute("SET ROLE reader")
            fails(conn, "SELECT * FROM samples", sqlstate="42501", hint=False)
            assert recovered(conn, "next") == expected
            fails(conn, "SELECT drop_model_set('next')", sqlstate="42501")
            conn.execute("RESET ROLE")
            conn.execute('REVOKE USAGE ON DOMAIN tessera_model."next" FROM PUBLIC')
            conn.execute("SET ROLE reader")
            fails(conn, "SELECT recover_model('next/0001')", sqlstate="42501")
            fails(conn, "SELECT * FROM recover_model_set('next')", sqlstate="42501")
            fails(conn, "SELECT predict('next/0001', '{1,2,3,4}'::real[])", sqlstate="42501")
            fails(conn, "SELECT save_model_set('mine', 'SELECT NULL::text, NULL::bytea WHERE false', 'next')", sqlstate="42501")
            assert conn.execute("SELECT count(*) FROM tessera.model_sets WHERE name = 'next'").fetchone()[0] == 0
            assert conn.execute("SELECT count(*) FROM tessera.model_set_members WHERE model_set = 'next'").fetchone()[0] == 0
            for table in ("model_set", "set_map", "set_block", "architecture"):
                fails(conn, f"SELECT * FROM tessera.{table}", sqlstate="42501", hint=False)
            # A set's owner can make nobody run something with rights of their own.
            conn.execute("RESET ROLE")
            conn.execute("CREATE TABLE seen (who text); GRANT INSERT, SELECT ON seen TO PUBLIC; GRANT CREATE ON SCHEMA public TO trainer")
            conn.execute("SET ROLE trainer")
            conn.execute("CREATE FUNCTION spy() RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN INSERT INTO seen VALUES (current_user); RETURN true; END $$")
            train(conn, "spied", data="SELECT x, y FROM samples WHERE cell = $1 AND spy() ORDER BY id", verify=False)
            conn.execute("RESET ROLE")
            recovered(conn, "spied")
            assert conn.execute("SELECT DISTINCT who FROM seen").fetchall() == [("trainer",)]
        finally:
            conn.execute("RESET ROLE")
            conn.execute("DROP OWNED BY trainer, reader")
            conn.execute("DROP ROLE trainer, reader")
        assert [name for (name,) in conn.execute("SELECT name FROM tessera.model_sets")] == ["base"]


def test_training_can_be_cancelled(fresh):
    with fresh.connect() as conn:
        prepare(conn, 2)
        long = '{"epochs": 1000000}'
        assert cancelled_after(conn, f"SELECT train_model_set('next', 'base', 'train_feed_forward', '{DATA}', '{long}')", 0.7) < 0.5
        assert conn.execute("SELECT name FROM tessera.model_sets").fetchall() == [("base",)]


def test_recommendations(fresh):
    with fresh.connect() as conn:
        architecture, parameters = prepare(conn, 40)
        changed = parameters.copy()
        changed[3:7] += np.float32(0.1)
        save(conn, "updated", architecture, changed, based_on="base")
        train(conn, "trained", only=["0003", "0004"])
        costs = {}
        for name in ("base", "updated", "trained"):
            rows = conn.execute("SELECT storage, bytes, save_ms, recover_ms, recommended FROM recommend_storage(%s)", (name,)).fetchall()
            costs[name] = {row[0]: row[1:] for row in rows}
            assert list(costs[name]) == ["baseline", "update", "provenance"]
            assert sum(row[4] for row in rows) == 1
        assert costs["base"]["update"][0] is None and costs["base"]["baseline"][3]
        assert parameters.nbytes < costs["base"]["baseline"][0] < 1.05 * parameters.nbytes
        assert 4 * 19972 < costs["updated"]["update"][0] < 5 * 19972 and costs["updated"]["update"][3]
        assert costs["trained"]["provenance"][0] < 1000 and costs["trained"]["provenance"][2] > 0


def test_a_training_function_in_python(fresh, server):
    """Least squares for the last layer, in PL/Python with NumPy."""
    with fresh.connect() as conn:
        if not conn.execute("SELECT count(*) FROM pg_available_extensions WHERE name = 'plpython3u'").fetchone()[0]:
            pytest.skip("PL/Python is not installed; scripts/setup-plpython says how")
        architecture, parameters = prepare(conn, 4)
        conn.execute("CREATE EXTENSION plpython3u")
        packages = sysconfig.get_path("purelib")
        conn.execute(f"""CREATE FUNCTION least_squares(onnx_model bytea, data text, params jsonb) RETURNS bytea LANGUAGE plpython3u AS $$
import sys
sys.path.insert(0, {packages!r})
import json
import numpy as np
import onnx
from onnx import numpy_helper
model = onnx.load_from_string(onnx_model)
tensors = {{tensor.name: tensor for tensor in model.graph.initializer}}
rows = plpy.execute(data)
h, y = (np.array([row[key] for row in rows]) for key in ("x", "y"))
count = len(tensors) // 2
for layer in range(count - 1):
    w, b = (numpy_helper.to_array(tensors[f"layers.{{layer}}.{{part}}"]).astype(float) for part in ("weight", "bias"))
    h = np.maximum(h @ w.T + b, 0)
h = np.hstack([h, np.ones((len(h), 1))])
solved = np.linalg.solve(h.T @ h + json.loads(params)["ridge"] * np.eye(h.shape[1]), h.T @ y).T.astype(np.float32)
for part, values in (("weight", solved[:, :-1]), ("bias", solved[:, -1])):
    tensors[f"layers.{{count - 1}}.{{part}}"].raw_data = np.ascontiguousarray(values).tobytes()
return model.SerializeToString()
$$""")
        train(conn, "python", function="least_squares", params='{"ridge": 0.1}')
        made = recovered(conn, "python")
        assert len(made) == 4 and all(made[name] != model for name, model in members(architecture, parameters))
        own = architecture.parameters_of(made["0002"])
        last = architecture.last_layers(1)
        assert (own[:last.start] == parameters[2, :last.start]).all() and (own[last] != parameters[2, last]).any()
