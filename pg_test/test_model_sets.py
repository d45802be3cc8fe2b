"""Sets of models: what is saved is recovered bit for bit, derived sets store what differs, members predict as models do."""

from contextlib import contextmanager

import numpy as np
import pytest

from fleet_models import Architecture, battery_nets, copy_members, members, names, next_generation
from helpers import fails, load, storage

pytestmark = pytest.mark.newer


@contextmanager
def settings(conn, **values):
    for name, value in values.items():
        conn.execute(f"SET {name} = '{value}'")
    yield
    for name in values:
        conn.execute(f"RESET {name}")


def save(conn, set_name, architecture, parameters, based_on=None, only=None):
    """Saves a set from a heap table of members, which is dropped again."""
    rows = [row for at, row in enumerate(members(architecture, parameters)) if only is None or at in only]
    copy_members(conn, "saved", rows)
    count = conn.execute("SELECT save_model_set(%s, 'SELECT name, onnx FROM saved', %s)", (set_name, based_on)).fetchone()[0]
    conn.execute("DROP TABLE saved")
    return count


def recovered(conn, set_name):
    return dict(conn.execute("SELECT name, model FROM recover_model_set(%s)", (set_name,)).fetchall())


def equal(conn, set_name, architecture, parameters):
    """All members are the files that were saved, to the bit."""
    assert recovered(conn, set_name) == dict(members(architecture, parameters))


def unsound(conn):
    tables = "VALUES ('tessera.set_block'), ('tessera.set_map'), ('tessera.weight')"
    return conn.execute(f"SELECT t.column1, c.* FROM ({tables}) t, LATERAL check_store(t.column1::regclass) c").fetchall()


def test_a_set_comes_back_bit_for_bit(fresh):
    with fresh.connect() as conn:
        architecture, parameters = battery_nets(700)
        assert save(conn, "battery", architecture, parameters) == 700
        equal(conn, "battery", architecture, parameters)
        one = conn.execute("SELECT recover_model('battery/0042')").fetchone()[0]
        assert one == architecture.model(parameters[42])
        row = conn.execute("SELECT storage, based_on, members, parameters, parameter_bytes, bytes_added FROM tessera.model_sets").fetchone()
        assert row[:5] == ("baseline", None, 700, 4993, 19972)
        assert 700 * 19972 <= row[5] <= 1.05 * 700 * 19972
        listed = conn.execute("SELECT member FROM tessera.model_set_members WHERE model_set = 'battery' ORDER BY member").fetchall()
        assert [name for (name,) in listed] == names(700)
        assert unsound(conn) == []


def test_special_values_and_odd_names_survive(fresh):
    with fresh.connect() as conn:
        architecture, parameters = battery_nets(4)
        bits = parameters.view(np.uint32)
        bits[0, :6] = [0x7fc00001, 0xff800000, 0x80000000, 1, 0x7f7fffff, 0xffc12345]
        odd = ["a/b", "ünï côdé", "x@1", "-"]
        copy_members(conn, "saved", zip(odd, map(architecture.model, parameters)))
        conn.execute("SELECT save_model_set('s', 'SELECT name, onnx FROM saved')")
        assert recovered(conn, "s") == dict(zip(odd, map(architecture.model, parameters)))
        for name, own in zip(odd[1:], parameters[1:]):
            y = conn.execute("SELECT predict(%s, '{1,2,3,4}'::real[])", (f"s/{name}",)).fetchone()[0]
            assert np.allclose(y, architecture.run(own, np.array([[1, 2, 3, 4]]))[0], rtol=1e-4, atol=1e-5)


def test_derived_sets_store_what_differs(fresh):
    with fresh.connect() as conn:
        architecture, parameters = battery_nets(1000)
        save(conn, "g0", architecture, parameters)
        generations = [parameters]
        for turn in range(1, 5):
            new, trained, changed = next_generation(architecture, generations[-1], turn)
            # Whole sets and changed members alone come to the same.
            only = None if turn % 2 else set(trained.tolist())
            assert save(conn, f"g{turn}", architecture, new, based_on=f"g{turn - 1}", only=only) == 1000
            added, kind = conn.execute("SELECT bytes_added, storage FROM tessera.model_sets WHERE name = %s", (f"g{turn}",)).fetchone()
            assert kind == "update" and changed <= added <= 1.25 * changed, (turn, added / changed)
            generations.append(new)
        for turn, expected in enumerate(generations):
            equal(conn, f"g{turn}", architecture, expected)
        # The children keep what they need.
        for turn in (0, 2, 1):
            conn.execute("SELECT drop_model_set(%s)", (f"g{turn}",))
            conn.execute("VACUUM tessera.set_block, tessera.set_map")
            conn.execute("VACUUM tessera.set_block, tessera.set_map")
        equal(conn, "g3", architecture, generations[3])
        equal(conn, "g4", architecture, generations[4])
        assert unsound(conn) == []
        conn.execute("SELECT drop_model_set('g3'), drop_model_set('g4')")
        left = conn.execute("SELECT (SELECT count(*) FROM tessera.set_block), (SELECT count(*) FROM tessera.set_map), (SELECT count(*) FROM tessera.architecture), (SELECT count(*) FROM tessera.graph)").fetchone()
        assert left == (0, 0, 0, 0)


def test_equal_members_and_frozen_layers_are_stored_once(fresh):
    with fresh.connect() as conn:
        architecture, parameters = battery_nets(300)
        parameters[:] = parameters[0]
        parameters[:, architecture.last_layers(1)] += np.arange(300, dtype=np.float32)[:, None]
        save(conn, "frozen", architecture, parameters)
        equal(conn, "frozen", architecture, parameters)
        added = conn.execute("SELECT bytes_added FROM tessera.model_sets").fetchone()[0]
        assert added < 19972 + 300 * 49 * 4 + 300 * 80


@pytest.mark.parametrize("linear, activation", [("gemm", "Relu"), ("gemm", "Tanh"), ("matmul", "Relu"), ("matmul", "Sigmoid")])
def test_members_predict_as_models_do(fresh, linear, activation):
    with fresh.connect() as conn:
        architecture = Architecture((7, 33, 5, 20, 3), linear, activation)
        parameters = architecture.random(60)
        save(conn, "s", architecture, parameters)
        x = np.random.default_rng(3).normal(size=(400, 7)).astype(np.float32)
        conn.execute("CREATE TABLE t (id serial, cell text, x real[])")
        dice = np.random.default_rng(4).integers(0, 60, 400)
        with conn.cursor().copy("COPY t (cell, x) FROM STDIN") as out:
            for cell, row in zip(dice, x):
                out.write_row((f"{cell:04}", row.tolist()))
        for cell in range(60):
            load(conn, f"m{cell:04}", architecture.model(parameters[cell]))
        query = "SELECT id, predict('s/' || cell, x) FROM t ORDER BY id"
        plan = "\n".join(line for (line,) in conn.execute(f"EXPLAIN {query}"))
        assert "Tessera Predict" in plan and "named by each row" in plan
        batched = conn.execute(query).fetchall()
        # Bit for bit what the models say, alone and in batches of other sizes, and row by row.
        assert batched == conn.execute("SELECT id, predict('m' || cell, x) FROM t ORDER BY id").fetchall()
        for size in (1, 7, 65_536):
            with settings(conn, **{"tessera.batch_size": size}):
                assert conn.execute(query).fetchall() == batched
        with settings(conn, **{"tessera.enable_batching": "off"}):
            assert conn.execute(query).fetchall() == batched
        assert all(len(y) == 3 for _, y in batched)
        as_json = conn.execute("SELECT predict('s/0007', '{\"x\": [[1,2,3,4,5,6,7]]}'::jsonb)").fetchone()[0]
        assert np.allclose(as_json["y"], [conn.execute("SELECT predict('s/0007', '{1,2,3,4,5,6,7}'::real[])").fetchone()[0]], rtol=1e-6)


def test_rows_name_models_sets_and_nothing(fresh):
    """Models, members of several sets, NULLs and wrong rows in one query."""
    with fresh.connect() as conn:
        small, parameters = Architecture((4, 8, 2)), None
        parameters = small.random(5)
        save(conn, "a", small, parameters)
        save(conn, "b", small, parameters[::-1].copy())
        for at in range(3):
            load(conn, f"m{at}", small.model(parameters[at]))
        conn.execute("CREATE TABLE t (id int, model text, x real[])")
        specs = [f"a/{n:04}" for n in range(5)] + [f"b/{n:04}" for n in range(5)] + [f"m{n}" for n in range(3)] + ["m1@1", None]
        dice = np.random.default_rng(1)
        for at in range(500):
            x = None if at % 17 == 0 else dice.normal(size=4).tolist()
            conn.execute("INSERT INTO t VALUES (%s, %s, %s)", (at, specs[dice.integers(len(specs))], x))
        query = "SELECT id, predict(model, x) FROM t WHERE mod(id, 3) > 0 AND coalesce((predict(model, x))[1], 1) > -100 ORDER BY id"
        got = conn.execute(query).fetchall()
        with settings(conn, **{"tessera.enable_batching": "off"}):
            assert got == conn.execute(query).fetchall()
        assert sum(y is None for _, y in got) > 10
        conn.execute("UPDATE t SET model = 'nothing/here' WHERE id = 400")
        fails(conn, query, sqlstate="42704")
        conn.execute("UPDATE t SET model = 'a/none' WHERE id = 400")
        assert "none" in str(fails(conn, query, sqlstate="42704"))
        # A row that is not asked for raises nothing.
        assert len(conn.execute("SELECT predict(model, x) FROM t WHERE model IS NOT NULL AND x IS NOT NULL ORDER BY id LIMIT 20").fetchall()) == 20
        conn.execute("UPDATE t SET model = 'a/0001', x = '{1,2}' WHERE id = 400")
        fails(conn, query, sqlstate="22023")


def test_parameters_alone(fresh):
    with fresh.connect() as conn:
        architecture, parameters = battery_nets(50)
        conn.execute("CREATE TABLE p (name text, reals real[], bytes bytea)")
        for name, row in zip(names(50), parameters):
            conn.execute("INSERT INTO p VALUES (%s, %s, %s)", (name, row.tolist(), row.tobytes()))
        for kind in ("reals", "bytes"):
            count = conn.execute("SELECT load_model_set(%s, %s, %s)", (kind, architecture.model(parameters[0]), f"SELECT name, {kind} FROM p")).fetchone()[0]
            assert count == 50
            equal(conn, kind, architecture, parameters)
        short = "SELECT name, reals[2:] FROM p"
        assert "4993" not in str(fails(conn, "SELECT load_model_set('short', %s, %s)", (architecture.model(parameters[0]), short), sqlstate="22023"))


BAD = [
    ("save_model_set('a/b', 'SELECT 1')", "42602"),
    ("save_model_set('', 'SELECT 1')", "42602"),
    ("save_model_set(NULL, 'SELECT 1')", "22004"),
    ("save_model_set('s', NULL)", "22004"),
    ("save_model_set('s', 'SELECT 1')", "42804"),
    ("save_model_set('s', 'SELECT name FROM good')", "42804"),
    ("save_model_set('s', 'SELECT onnx, name FROM good')", "42804"),
    ("save_model_set('s', 'SELECT name, onnx, 1 FROM good')", "42804"),
    ("save_model_set('s', 'SELECT name, onnx FROM good WHERE false')", "P0002"),
    ("save_model_set('s', 'SELECT name, NULL::bytea FROM good')", "22004"),
    ("save_model_set('s', 'SELECT NULL::text, onnx FROM good')", "22004"),
    ("save_model_set('s', 'SELECT ''x''::text, onnx FROM good')", "42710"),
    ("save_model_set('s', 'SELECT '''' || chr(10), onnx FROM good')", "42602"),
    ("save_model_set('s', 'SELECT name, ''\\x00''::bytea FROM good')", "22P03"),
    ("save_model_set('s', 'SELECT name, onnx FROM good UNION ALL SELECT name || ''w'', onnx FROM wide')", "22023"),
    ("save_model_set('s', 'DELETE FROM good')", "42601"),
    ("save_model_set('s', 'SELECT 1; SELECT 2')", "42601"),
    ("save_model_set('s', '')", "42601"),
    ("save_model_set('s', 'SELEC')", "42601"),
    ("save_model_set('s', 'SELECT name, onnx FROM nowhere')", "42P01"),
    ("save_model_set('s', 'SELECT name, onnx FROM good', 'nothing')", "42704"),
    ("save_model_set('kept', 'SELECT name, onnx FROM good')", "42710"),
    ("save_model_set('model', 'SELECT name, onnx FROM good')", "42710"),
    ("save_model_set('like', 'SELECT name, onnx FROM good')", "42710"),
    ("save_model_set('s', 'SELECT name, onnx FROM wide', 'kept')", "22023"),
    ("load_model('kept', (SELECT onnx FROM good LIMIT 1))", "42710"),
    ("load_model('kept/x', (SELECT onnx FROM good LIMIT 1))", "42710"),
    ("rename_model('model', 'kept/y')", "42710"),
    ("recover_model('kept')", "42602"),
    ("recover_model('kept/none')", "42704"),
    ("recover_model('none/none')", "42704"),
    ("recover_model_set('none')", "42704"),
    ("drop_model_set('none')", "42704"),
    ("predict('kept/none', '{1,2,3,4}'::real[])", "42704"),
    ("predict('kept', '{1,2,3,4}'::real[])", "42704"),
    ("predict('kept/0001', '{1,2,3}'::real[])", "22023"),
    ("predict('kept/0001', '{1,NULL,3,4}'::real[])", "22004"),
    ("predict('kept/0001', '{{{1}}}'::real[])", "2202E"),
    ("train_model_set('s', 'kept', 'nofunction', 'SELECT 1')", "42883"),
    ("train_model_set('s', 'kept', 'train_feed_forward', 'SELECT x, y FROM d WHERE cell = $2')", "42601"),
    ("train_model_set('s', 'kept', 'train_feed_forward', 'SELECT x, y FROM d WHERE false')", "P0002"),
    ("train_model_set('s', 'kept', 'train_feed_forward', 'SELECT x FROM d')", "42804"),
    ("train_model_set('s', 'kept', 'train_feed_forward', 'SELECT x, y FROM d', '{\"epoch\": 1}')", "22023"),
    ("train_model_set('s', 'kept', 'train_feed_forward', 'SELECT x, y FROM d', '{}', '{none}')", "42704"),
    ("train_model_set('s', 'none', 'train_feed_forward', 'SELECT x, y FROM d')", "42704"),
    ("train_model_set('s', NULL, 'train_feed_forward', 'SELECT x, y FROM d')", "22004"),
]


@pytest.fixture(scope="module")
def prepared(db):
    with db.connect() as conn:
        architecture, parameters = battery_nets(3)
        wide = Architecture((4, 48, 48, 47, 1))
        copy_members(conn, "good", members(architecture, parameters))
        copy_members(conn, "wide", members(wide, wide.random(1)))
        conn.execute("CREATE TABLE d AS SELECT ARRAY[1,2,3,i]::real[] AS x, i::real AS y, '0000' AS cell FROM generate_series(1, 10) i")
        conn.execute("SELECT save_model_set('kept', 'SELECT name, onnx FROM good'), load_model('model', (SELECT onnx FROM good LIMIT 1)), load_model('like/x', (SELECT onnx FROM good LIMIT 1))")
    return db


@pytest.mark.parametrize("call, state", BAD, ids=[call[:70] for call, _ in BAD])
def test_bad_input_is_a_clear_error_and_leaves_nothing(prepared, call, state):
    with prepared.connect() as conn:
        count = "SELECT (SELECT count(*) FROM tessera.model_set), (SELECT count(*) FROM tessera.set_block), (SELECT count(*) FROM tessera.set_map), (SELECT count(*) FROM pg_type WHERE typnamespace = 'tessera_model'::regnamespace)"
        before = conn.execute(count).fetchone()
        # PostgreSQL's own errors have no hints.
        fails(conn, f"SELECT {call}", sqlstate=state, hint=state != "42P01" and "SELEC'" not in call)
        assert conn.execute(count).fetchone() == before


def test_rollback_and_savepoints(fresh):
    with fresh.connect() as conn:
        architecture, parameters = battery_nets(40)
        copy_members(conn, "m", members(architecture, parameters))
        with conn.transaction(force_rollback=True):
            conn.execute("SELECT save_model_set('s', 'SELECT name, onnx FROM m')")
            assert conn.execute("SELECT predict('s/0001', '{1,2,3,4}'::real[])").fetchone()[0]
        fails(conn, "SELECT predict('s/0001', '{1,2,3,4}'::real[])", sqlstate="42704")
        with conn.transaction():
            conn.execute("SELECT save_model_set('s', 'SELECT name, onnx FROM m')")
            with conn.transaction(force_rollback=True):
                conn.execute("SELECT drop_model_set('s')")
            assert conn.execute("SELECT predict('s/0001', '{1,2,3,4}'::real[])").fetchone()[0]
        equal(conn, "s", architecture, parameters)
        # The name again, with other members: nothing of the old one is remembered.
        conn.execute("SELECT drop_model_set('s')")
        other = parameters + np.float32(1)
        save(conn, "s", architecture, other)
        y = conn.execute("SELECT predict('s/0001', '{1,2,3,4}'::real[])").fetchone()[0]
        assert np.allclose(y, architecture.run(other[1], np.array([[1, 2, 3, 4]]))[0], rtol=1e-4)


def test_other_architectures_are_sets_too(fresh):
    """Convolutions: each member has a plan of its own."""
    from helpers import onnx_file
    import onnx

    with fresh.connect() as conn:
        base = onnx.load_from_string(onnx_file("cnn"))
        conn.execute("CREATE TABLE m (name text, onnx bytea)")
        for turn in range(3):
            for tensor in base.graph.initializer:
                if tensor.data_type == onnx.TensorProto.FLOAT:
                    values = onnx.numpy_helper.to_array(tensor) * np.float32(1 + turn / 8)
                    tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), tensor.name))
            conn.execute("INSERT INTO m VALUES (%s, %s)", (f"c{turn}", base.SerializeToString()))
            load(conn, f"c{turn}", base.SerializeToString())
        conn.execute("SELECT save_model_set('cnns', 'SELECT * FROM m')")
        width = conn.execute("SELECT shape FROM tessera.model_inputs WHERE model = 'c0'").fetchone()[0]
        size = int(np.prod([int(n) for n in width[1:]]))
        conn.execute("CREATE TABLE t AS SELECT i AS id, 'c' || i %% 3 AS name, array_fill(sin(i)::real, ARRAY[%s::int]) AS x FROM generate_series(1, 30) i", (size,))
        sets = conn.execute("SELECT id, predict('cnns/' || name, x) FROM t ORDER BY id").fetchall()
        assert sets == conn.execute("SELECT id, predict(name, x) FROM t ORDER BY id").fetchall()
        back = recovered(conn, "cnns")
        assert back == dict(conn.execute("SELECT name, onnx FROM m").fetchall())


def test_storage_of_a_large_set_is_little_more_than_its_floats(fresh):
    with fresh.connect() as conn:
        tables = ("tessera.model_set", "tessera.set_map", "tessera.set_block", "tessera.architecture")
        size = lambda: conn.execute(f"SELECT {' + '.join(f'pg_total_relation_size({t!r})' for t in tables)}").fetchone()[0]
        architecture, parameters = battery_nets(5000)
        copy_members(conn, "m", members(architecture, parameters))
        before = size()
        conn.execute("SELECT save_model_set('s', 'SELECT name, onnx FROM m')")
        assert size() - before <= 1.05 * parameters.nbytes, (size() - before) / parameters.nbytes
        assert storage(conn, "tessera.set_block")["blocks_stored"] == storage(conn, "tessera.set_block")["blocks_referenced"]


def test_members_come_one_by_one(fresh):
    """In a target list nothing is collected: a LIMIT ends early, and what is left is dropped with the query."""
    with fresh.connect() as conn:
        architecture, parameters = battery_nets(600)
        save(conn, "s", architecture, parameters)
        rows = "(SELECT recover_model_set('s') AS r OFFSET 0) AS q"
        assert dict(conn.execute(f"SELECT (r).name, (r).model FROM {rows}").fetchall()) == dict(members(architecture, parameters))
        for _ in range(50):
            assert len(conn.execute(f"SELECT (r).name FROM {rows} LIMIT 3").fetchall()) == 3
        with conn.transaction():
            conn.execute(f"DECLARE c CURSOR FOR SELECT (r).name, (r).model FROM {rows}")
            first = conn.execute("FETCH 100 FROM c").fetchall()
            # The cursor's snapshot has the set, whatever becomes of it.
            conn.execute("SELECT drop_model_set('s')")
            rest = conn.execute("FETCH ALL FROM c").fetchall()
            assert dict(first + rest) == dict(members(architecture, parameters))
        fails(conn, "SELECT recover_model_set('s')", sqlstate="42704")
        fails(conn, "SELECT CASE WHEN true THEN recover_model_set('s') END", hint=True, sqlstate="0A000")
