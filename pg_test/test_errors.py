"""Bad input gets an error a person can act on: a SQLSTATE, what was wrong, a hint. The connection and its memory survive."""

import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import psycopg
import pytest
from onnx import TensorProto, helper, numpy_helper

from helpers import fails, load, onnx_file
from paths import MODELS

PREDICT = "SELECT predict(%s, %s::real[])"
PREDICT_JSON = "SELECT predict(%s, %s::jsonb)"
LOAD = "SELECT load_model('bad', %b)"
ROW = [0.5] * 28


@pytest.fixture(scope="module", autouse=True)
def models(db):
    with db.connect() as conn:
        for name in ("fraud_fc_256", "fraud_fixed", "magika", "minilm"):
            load(conn, name)


def model(nodes, weights=(), opsets=(("", 17),), width=4) -> bytes:
    """A model of one input x [n, width] and one output y."""
    port = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "main", [port("x", TensorProto.FLOAT, ["n", width])],
                              [port("y", TensorProto.FLOAT, None)], list(weights))
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid(*opset) for opset in opsets], ir_version=8)
    return made.SerializeToString()


def overflowing() -> bytes:
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2**40, 2**40], raw_data=b"\0" * 16)
    return model([helper.make_node("MatMul", ["x", "w"], ["y"])], [weight])


def lying_shape() -> bytes:
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4], raw_data=b"\0" * 12)
    return model([helper.make_node("MatMul", ["x", "w"], ["y"])], [weight])


def negative_shape() -> bytes:
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[-4, 4], raw_data=b"\0" * 64)
    return model([helper.make_node("MatMul", ["x", "w"], ["y"])], [weight])


def cyclic() -> bytes:
    return model([helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Add", ["a", "x"], ["b"]),
                  helper.make_node("Relu", ["b"], ["y"])])


BAD_MODELS = {
    "empty": lambda: b"",
    "random": lambda: random.Random(1).randbytes(5000),
    "text": lambda: b"this is no model, it is a sentence\n" * 100,
    "truncated in the weights": lambda: onnx_file("fraud_fc_256")[:20000],
    "truncated in the head": lambda: onnx_file("fraud_fc_256")[:37],
    "truncated by one byte": lambda: onnx_file("fraud_fc_256")[:-1],
    "a valid protobuf that is no model": lambda: helper.make_tensor("t", TensorProto.FLOAT, [2], [1, 2]).SerializeToString(),
    "a model without a graph": lambda: onnx.ModelProto(ir_version=8, opset_import=[helper.make_opsetid("", 17)]).SerializeToString(),
    "an unknown input": lambda: model([helper.make_node("Add", ["x", "nowhere"], ["y"])]),
    "a cycle": cyclic,
    "a shape whose product overflows": overflowing,
    "fewer bytes than its shape says": lying_shape,
    "a negative dimension": negative_shape,
    "shapes that do not fit": lambda: model([helper.make_node("MatMul", ["x", "w"], ["y"])],
                                            [numpy_helper.from_array(np.ones((5, 3), np.float32), "w")]),
}


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_bad_models(conn, kind):
    try:
        fails(conn, LOAD, (BAD_MODELS[kind](),))
        assert conn.execute("SELECT count(*) FROM tessera.models WHERE name = 'bad'").fetchone()[0] == 0
    finally:
        conn.execute("SELECT drop_model(name) FROM (SELECT DISTINCT name FROM tessera.models WHERE name = 'bad') AS loaded")


def test_unsupported_operator(conn):
    content = model([helper.make_node("Frobnicate", ["x"], ["y"], domain="com.example")], opsets=(("", 17), ("com.example", 3)))
    error = fails(conn, LOAD, (content,), "0A000")
    said = f"{error.diag.message_primary} {error.diag.message_detail}"
    assert "Frobnicate" in said and "com.example" in said and re.search(r"\b3\b", said), said


def test_unsupported_operator_of_onnx(conn):
    content = model([helper.make_node("Unheardof", ["x"], ["y"])])
    error = fails(conn, LOAD, (content,), "0A000")
    said = f"{error.diag.message_primary} {error.diag.message_detail}"
    assert "Unheardof" in said and "17" in said, said


@pytest.mark.parametrize("opset", [99, 1_000_000])
def test_unsupported_opset(conn, opset):
    error = fails(conn, LOAD, (model([helper.make_node("Relu", ["x"], ["y"])], opsets=(("", opset),)),), "0A000")
    assert str(opset) in f"{error.diag.message_primary} {error.diag.message_detail}"


def test_every_truncation_is_clean(conn):
    """200 cuts of a real model: an error each time, never a crash or an internal one."""
    content = onnx_file("vad")
    dice = random.Random(2)
    for _ in range(200):
        fails(conn, LOAD, (content[: dice.randrange(len(content))],))


def test_every_flipped_byte_is_clean(conn):
    """300 models with a damaged byte: each loads, or fails properly."""
    content = onnx_file("fraud_fc_256")
    dice = random.Random(3)
    places = [*range(0, 80), *range(len(content) - 400, len(content))]
    for _ in range(300):
        damaged = bytearray(content)
        damaged[dice.choice(places)] ^= 1 << dice.randrange(8)
        try:
            conn.execute("BEGIN")
            conn.execute(LOAD, (bytes(damaged),))
        except psycopg.Error as error:
            assert error.sqlstate and not error.sqlstate.startswith("XX"), error
            assert error.diag.message_hint, error
        finally:
            conn.execute("ROLLBACK")


@pytest.mark.parametrize("name", ["", "a@b", "x" * 300, "a\nb"])
def test_bad_names(conn, name):
    fails(conn, "SELECT load_model(%s, %b)", (name, onnx_file("fraud_fc_256")))


UNKNOWN = ["nobody", "nobody@1", "fraud_fc_256@99", "fraud_fc_256@0", "fraud_fc_256@-1", "fraud_fc_256@x", "fraud_fc_256@",
           "fraud_fc_256@99999999999999999999", "", "@", "@1"]


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("call", ["predict(%s, '{1,2}'::real[])", "predict(%s, '{}'::jsonb)", "export_model(%s)"])
def test_unknown_models(conn, name, call):
    fails(conn, f"SELECT {call}", (name,))


@pytest.mark.parametrize("call", ["drop_model('nobody')", "drop_model('fraud_fc_256', 9)", "activate_model('nobody', 1)",
                                  "activate_model('fraud_fc_256', 9)", "rename_model('nobody', 'somebody')",
                                  "rename_model('fraud_fc_256', 'magika')", "rename_model('fraud_fc_256', 'a@b')"])
def test_unknown_models_of_the_life_cycle(conn, call):
    fails(conn, f"SELECT {call}")


ROWS = {
    "too short": ROW[:-1],
    "too long": [*ROW, 1.0],
    "empty": [],
    "a null": [None, *ROW[1:]],
    "rows too short": [ROW[:-1], ROW[:-1]],
    "a third dimension": [[ROW]],
    "a null among rows": [ROW, [None, *ROW[1:]]],
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("cast", ["real[]", "double precision[]", "numeric[]", "integer[]"])
def test_bad_rows(conn, kind, cast):
    value = str(ROWS[kind]).replace("[", "{").replace("]", "}").replace("None", "NULL")
    value = value.replace(".5", "").replace(".0", "") if cast == "integer[]" else value
    fails(conn, f"SELECT predict('fraud_fc_256', %s::{cast})", (value,))


QUESTIONS = {
    "not an object": ("fraud_fc_256", "[1, 2]"),
    "null": ("fraud_fc_256", "null"),
    "no input": ("fraud_fc_256", "{}"),
    "a wrong name": ("fraud_fc_256", '{"y": [[1]]}'),
    "a surplus name": ("fraud_fc_256", f'{{"x": [{ROW}], "z": [1]}}'),
    "a wrong rank": ("fraud_fc_256", f'{{"x": {ROW}}}'),
    "a wrong length": ("fraud_fc_256", '{"x": [[1, 2, 3]]}'),
    "a wrong batch": ("fraud_fixed", f'{{"x": [{ROW}]}}'),
    "ragged": ("fraud_fc_256", f'{{"x": [{ROW}, {ROW[:-1]}]}}'),
    "a string": ("fraud_fc_256", f'{{"x": [["one", {str(ROW[1:])[1:-1]}]]}}'),
    "a boolean": ("fraud_fc_256", f'{{"x": [[true, {str(ROW[1:])[1:-1]}]]}}'),
    "a null element": ("fraud_fc_256", f'{{"x": [[null, {str(ROW[1:])[1:-1]}]]}}'),
    "an object inside": ("fraud_fc_256", f'{{"x": [[{{}}, {str(ROW[1:])[1:-1]}]]}}'),
    "too large a number": ("fraud_fc_256", f'{{"x": [[1e400, {str(ROW[1:])[1:-1]}]]}}'),
    "a fraction for an integer": ("magika", f'{{"bytes": [{[0.5] * 2048}]}}'),
    "NaN for an integer": ("magika", '{"bytes": [["NaN"' + ", 1" * 2047 + "]]}"),
    "out of the integer's range": ("magika", '{"bytes": [[4294967296' + ", 1" * 2047 + "]]}"),
    "one of two inputs": ("minilm", '{"input_ids": [[101, 102]]}'),
    "inputs that do not fit": ("minilm", '{"input_ids": [[101, 102]], "attention_mask": [[1, 1, 1]]}'),
    "an index out of range": ("minilm", '{"input_ids": [[101, 99999999]], "attention_mask": [[1, 1]]}'),
}


@pytest.mark.parametrize("kind", QUESTIONS)
def test_bad_questions(conn, kind):
    fails(conn, PREDICT_JSON, QUESTIONS[kind])


@pytest.mark.parametrize("value", ["NaN", "Infinity", "0.5", "1e30"])
def test_no_integer(conn, value):
    fails(conn, "SELECT predict('magika', array_fill(%s::real, ARRAY[2048]))", (value,))


def test_two_inputs_need_names(conn):
    fails(conn, PREDICT, ("minilm", [101.0, 102.0]))


def test_external_data_without_a_folder(conn):
    fails(conn, LOAD, ((MODELS / "external.onnx").read_bytes(),))


def point_elsewhere(source: Path, target: Path, location: str, offset: int | None = None) -> None:
    made = onnx.load(source, load_external_data=False)
    for tensor in made.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
            if entry.key == "offset" and offset is not None:
                entry.value = str(offset)
    target.write_bytes(made.SerializeToString())


@pytest.mark.parametrize("location", ["missing.bin", "../secret.bin", "/etc/passwd", "link.bin", "inner/../../secret.bin",
                                      "linked/secret.bin", ".", "pipe"])
def test_external_data_elsewhere(conn, folder, location):
    """Data that is missing, or that a path or a link would take from outside the model's folder."""
    inside = folder / "models"
    inside.mkdir()
    (folder / "secret.bin").write_bytes((MODELS / "external.bin").read_bytes())
    (inside / "link.bin").symlink_to(folder / "secret.bin")
    (inside / "linked").symlink_to(folder)
    (inside / "inner").mkdir()
    os.mkfifo(inside / "pipe")
    point_elsewhere(MODELS / "external.onnx", inside / "model.onnx", location)
    fails(conn, "SELECT load_model_from_file('bad', %s)", (str(inside / "model.onnx"),))


@pytest.mark.parametrize("offset", [10**6, 2**63 - 1, -5])
def test_external_data_out_of_range(conn, folder, offset):
    shutil.copy(MODELS / "external.bin", folder / "external.bin")
    point_elsewhere(MODELS / "external.onnx", folder / "model.onnx", "external.bin", offset)
    fails(conn, "SELECT load_model_from_file('bad', %s)", (str(folder / "model.onnx"),))


@pytest.mark.parametrize("path", ["", "/nowhere/model.onnx", "/", "/dev/zero", "relative.onnx", "/etc/shadow"])
def test_bad_files(conn, path):
    fails(conn, "SELECT load_model_from_file('bad', %s)", (path,))


def test_file_without_the_privilege(conn):
    conn.execute("CREATE ROLE no_reader")
    try:
        conn.execute("SET ROLE no_reader")
        fails(conn, "SELECT load_model_from_file('bad', '/etc/passwd')", (), "42501")
        fails(conn, "SELECT load_model_from_file('bad', '/nowhere')", (), "42501")
    finally:
        conn.execute("RESET ROLE")
        conn.execute("DROP ROLE no_reader")


def test_missing_large_object(conn):
    fails(conn, "SELECT load_model_from_large_object('bad', 4000000000)", hint=False)


@pytest.mark.parametrize("text", ["", "x", "float32", "float32{2}", "float32{2}:00", "nothing{1}:00000000", "float32{-1}:", "\\x", "\\x00"])
def test_bad_block_text(conn, text):
    with pytest.raises(psycopg.Error) as caught:
        conn.execute("SELECT %s::tensor_block", (text,))
    assert caught.value.sqlstate and not caught.value.sqlstate.startswith("XX")


def test_bad_block_binary(conn):
    dice = random.Random(4)
    for size in [0, 1, 3, 4, 8, 12, 100, 1000]:
        with pytest.raises(psycopg.Error) as caught:
            conn.execute("SELECT %b::bytea::tensor_block", (b"\xff" + dice.randbytes(size),))
        assert not caught.value.sqlstate.startswith("XX"), caught.value


def resident(pid: int) -> int:
    """kB of memory that a process has of its own; shared buffers that it touched do not count."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1])


def test_memory_over_failing_calls(db):
    """10,000 failing calls of ten kinds; the first 1,500 warm the caches."""
    truncated = onnx_file("fraud_fc_256")[:-1]
    calls = [
        (PREDICT, ("fraud_fc_256", ROW[:-1])), (PREDICT, ("nobody", ROW)), (PREDICT_JSON, ("fraud_fc_256", '{"x": [[1]]}')),
        (PREDICT_JSON, ("minilm", '{"input_ids": [[101, 99999999]], "attention_mask": [[1, 1]]}')),
        (PREDICT_JSON, ("fraud_fc_256", "{}")), (LOAD, (b"",)), (LOAD, (truncated,)), (LOAD, (overflowing(),)),
        ("SELECT load_model_from_file('bad', '/nowhere')", ()),
        (LOAD, (model([helper.make_node("Frobnicate", ["x"], ["y"], domain="com.example")], opsets=(("", 17), ("com.example", 3))),)),
    ]
    with db.connect() as conn:
        before = 0
        for i in range(10_000):
            if i == 1500:
                before = resident(conn.info.backend_pid)
            with pytest.raises(psycopg.Error):
                conn.execute(*calls[i % len(calls)])
        grown = resident(conn.info.backend_pid) - before
        assert grown < 6 * 1024, f"the backend grew by {grown} kB"
        assert conn.execute("SELECT 1").fetchone() == (1,)
