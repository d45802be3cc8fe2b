"""`predict` equals ONNX Runtime for every model of the zoo, at each batch its export allows, in every form of call."""

import json

import numpy as np
import psycopg
import pytest

import zoo
from helpers import assert_answers, assert_close, expected, load, onnx_file, predict_rows

pytestmark = pytest.mark.newer

CASES = [(model.name, batch) for model in zoo.ALL for batch in model.batches]
# One float32 input whose row has a fixed length, so that a flat array is enough.
FLAT = [(model, batch) for model, batch in CASES if model.startswith(("fraud", "encoder", "cnn", "lstm", "matmul", "big", "sk_"))]


@pytest.fixture(scope="module")
def loaded(db):
    """Loads a model at its first use. False if it may be refused, and was refused properly."""
    known: dict[str, bool] = {}

    def get(conn: psycopg.Connection, name: str) -> bool:
        if name not in known:
            refusable = zoo.BY_NAME[name].may_refuse
            try:
                if name == "external":
                    conn.execute("SELECT load_model_from_file(%s, %s)", (name, str(zoo_path(name))))
                else:
                    load(conn, name)
                known[name] = True
            except psycopg.errors.FeatureNotSupported as error:
                assert refusable, error
                assert refusable in str(error) and "ai.onnx.ml" in str(error), error
                known[name] = False
        return known[name]

    return get


def zoo_path(name: str):
    from paths import MODELS
    return (MODELS / f"{name}.onnx").resolve()


@pytest.mark.parametrize("name,batch", CASES)
def test_by_name(conn, loaded, name, batch):
    if loaded(conn, name):
        assert_answers(conn, name, name, batch)


@pytest.mark.parametrize("name,batch", FLAT)
def test_by_rows(conn, loaded, name, batch):
    if not loaded(conn, name):
        return
    inputs, outputs = expected(name, batch)
    (rows,) = inputs.values()
    wanted = next(iter(outputs.values())).astype(np.float64).reshape(batch, -1)
    got = predict_rows(conn, name, rows.reshape(batch, -1))
    assert_close(got, wanted, f"{name} at batch {batch}")
    if batch == 1:
        assert_close(predict_rows(conn, name, rows.reshape(-1)), wanted[0], f"{name}, one row")


@pytest.mark.parametrize("cast", ["real[]", "double precision[]", "numeric[]"])
def test_argument_types(conn, loaded, cast):
    loaded(conn, "fraud_fc_256")
    inputs, outputs = expected("fraud_fc_256", 1)
    answer = conn.execute(f"SELECT predict('fraud_fc_256', %s::{cast})", (inputs["x"][0].astype(float).tolist(),)).fetchone()[0]
    assert_close(np.array(answer), outputs["y"][0].astype(float), cast)


def test_integers(conn, loaded):
    loaded(conn, "magika")
    inputs, outputs = expected("magika", 7)
    sql = "SELECT predict('magika', %s::integer[])"
    answer = conn.execute(sql, (inputs["bytes"].tolist(),)).fetchone()[0]
    assert_close(np.array(answer), outputs["target_label"].astype(float), "integer[]")


def test_untyped(conn, loaded):
    """Literals and parameters without a cast, and ARRAY[...] of decimals, find the function."""
    loaded(conn, "fraud_fc_256")
    inputs, outputs = expected("fraud_fc_256", 1)
    row = inputs["x"][0].tolist()
    text = "{" + ",".join(map(repr, row)) + "}"
    decimals = "ARRAY[" + ",".join(map(repr, row)) + "]"
    wanted = outputs["y"][0].astype(float)
    for sql in (f"SELECT predict('fraud_fc_256', '{text}')", f"SELECT predict('fraud_fc_256', {decimals})"):
        assert_close(np.array(conn.execute(sql).fetchone()[0]), wanted, sql[:30])
    conn.execute("PREPARE untyped AS SELECT predict($1, $2)")
    got = conn.execute(f"EXECUTE untyped('fraud_fc_256', '{text}')").fetchone()[0]
    assert_close(np.array(got), wanted, "PREPARE")
    conn.execute("DEALLOCATE untyped")


def test_over_a_table(conn, loaded):
    loaded(conn, "fraud_fc_256")
    inputs, outputs = expected("fraud_fc_256", 64)
    conn.execute("CREATE TABLE rows (id int, x real[])")
    with conn.cursor() as cursor:
        cursor.executemany("INSERT INTO rows VALUES (%s, %s)", [(i, x.astype(float).tolist()) for i, x in enumerate(inputs["x"])])
    got = [p for (p,) in conn.execute("SELECT predict('fraud_fc_256', x) FROM rows ORDER BY id")]
    assert_close(np.array(got), outputs["y"].astype(float), "a table")
    assert conn.execute("SELECT predict('fraud_fc_256', NULL::real[])").fetchone()[0] is None


def test_in_parallel_workers(conn, loaded):
    loaded(conn, "fraud_fc_256")
    conn.execute("CREATE TABLE many AS SELECT i, array_fill((i % 10)::real, ARRAY[28]) AS x FROM generate_series(1, 20000) AS i")
    conn.execute("ANALYZE many")
    alone = conn.execute("SELECT sum((predict('fraud_fc_256', x))[2]::float8) FROM many").fetchone()[0]
    with conn.transaction():
        for setting in ("parallel_setup_cost = 0", "parallel_tuple_cost = 0", "min_parallel_table_scan_size = 0"):
            conn.execute(f"SET LOCAL {setting}")
        sql = "SELECT sum((predict('fraud_fc_256', x))[2]::float8) FROM many"
        plan = "\n".join(line for (line,) in conn.execute(f"EXPLAIN {sql}"))
        assert "Gather" in plan, plan
        together = conn.execute(sql).fetchone()[0]
    assert together == pytest.approx(alone, rel=1e-9)


def test_special_numbers(conn):
    """NaN and the infinities go both ways as strings; so do booleans and strings through their types."""
    from onnx import TensorProto, helper
    port = helper.make_tensor_value_info
    nodes = [helper.make_node("IsNaN", ["x"], ["is_nan"]), helper.make_node("Neg", ["x"], ["minus"])]
    graph = helper.make_graph(nodes, "main", [port("x", TensorProto.FLOAT, ["n"])],
                              [port("is_nan", TensorProto.BOOL, ["n"]), port("minus", TensorProto.FLOAT, ["n"])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    load(conn, "special", model.SerializeToString())
    question = json.dumps({"x": ["NaN", "Infinity", "-Infinity", 1.5]})
    answer = conn.execute("SELECT predict('special', %s::jsonb)", (question,)).fetchone()[0]
    assert answer == {"is_nan": [True, False, False, False], "minus": ["NaN", "-Infinity", "Infinity", -1.5]}


def test_volatility(conn):
    rows = conn.execute("SELECT provolatile, proparallel FROM pg_proc WHERE proname = 'predict'").fetchall()
    assert rows and set(rows) == {("s", "s")}


@pytest.mark.parametrize("name", ["minilm", "cnn", "vad", "vad_both_rates", "ocr_read", "sk_forest", "external"])
def test_export(conn, loaded, name):
    """An exported model has the same tensors, byte for byte, and gives ONNX Runtime the same answers."""
    import onnx
    import onnxruntime
    loaded(conn, name)
    exported = conn.execute("SELECT export_model(%s)", (name,), binary=True).fetchone()[0]
    before = {key: value for key, value in tensors(onnx.load(zoo_path(name)))}
    after = {key: value for key, value in tensors(onnx.load_model_from_string(exported))}
    assert before == after
    inputs, outputs = expected(name, zoo.BY_NAME[name].batches[0])
    answers = onnxruntime.InferenceSession(exported).run(list(outputs), inputs)
    for wanted, got in zip(outputs.values(), answers):
        assert_close(np.asarray(got), wanted, f"{name}, exported")


def tensors(model):
    """(where, dtype, dims, bytes) of each initializer and attribute tensor, subgraphs included."""
    from onnx import numpy_helper

    def walk(graph, place):
        for tensor in graph.initializer:
            yield f"{place}/{tensor.name}", (tensor.data_type, tuple(tensor.dims), numpy_helper.to_array(tensor).tobytes())
        for i, node in enumerate(graph.node):
            for attribute in node.attribute:
                inner = f"{place}/{i}.{attribute.name}"
                if attribute.HasField("t"):
                    yield inner, (attribute.t.data_type, tuple(attribute.t.dims), numpy_helper.to_array(attribute.t).tobytes())
                if attribute.HasField("g"):
                    yield from walk(attribute.g, inner)

    return walk(model.graph, "")


def test_large_object(conn):
    oid = conn.execute("SELECT lo_from_bytea(0, %b)", (onnx_file("fraud_fc_256"),)).fetchone()[0]
    conn.execute("SELECT load_model_from_large_object('from_lo', %s)", (oid,))
    assert_answers(conn, "from_lo", "fraud_fc_256", 7)
    back = conn.execute("SELECT export_model_to_large_object('from_lo')").fetchone()[0]
    same = "SELECT lo_get(%s) = export_model('from_lo')"
    assert conn.execute(same, (back,)).fetchone()[0]
