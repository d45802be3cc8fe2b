"""With `tessera.share_transposed`, a matrix whose transpose is stored is not stored again, and predictions have the same bits."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from helpers import assert_close, load, predict_json, storage

pytestmark = pytest.mark.newer

DICE = np.random.default_rng(3)
WEIGHTS = DICE.standard_normal((384, 512)).astype(np.float32)
BLOCKS = 3 * 4


def model(nodes, weights: dict[str, np.ndarray], width: int | None, out: int) -> bytes:
    """A model of one input x, of rows of floats or, without a width, of whole numbers."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", width]) if width else helper.make_tensor_value_info("x", TensorProto.INT64, ["n"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", out])
    tensors = [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in weights.items()]
    graph = helper.make_graph([helper.make_node(op, inputs, outputs, **attributes) for op, inputs, outputs, attributes in nodes], "g", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


PLAIN = model([("MatMul", ["x", "w"], ["y"], {})], {"w": WEIGHTS}, 384, 512)
TURNED = model([("MatMul", ["x", "v"], ["y"], {})], {"v": WEIGHTS.T}, 512, 384)
TIED = model([("MatMul", ["x", "w"], ["h"], {}), ("MatMul", ["h", "v"], ["y"], {})], {"w": WEIGHTS, "v": WEIGHTS.T}, 384, 384)
# Both have the same numbers in the same order: the second operator sees them the other way round.
GEMM = model([("Gather", ["w", "x"], ["h"], {}), ("Gemm", ["h", "v"], ["y"], {"transB": 1})], {"w": WEIGHTS, "v": WEIGHTS}, None, 384)
EMBED = model([("Gather", ["w", "x"], ["h"], {}), ("MatMul", ["h", "v"], ["y"], {})], {"w": WEIGHTS, "v": WEIGHTS.T}, None, 384)
# The product comes first.
LAST = model([("MatMul", ["x", "v"], ["h"], {}), ("ArgMax", ["h"], ["i"], {"axis": 1, "keepdims": 0}), ("Gather", ["w", "i"], ["y"], {})],
             {"v": WEIGHTS.T, "w": WEIGHTS}, 512, 512)


@pytest.fixture
def conn(fresh):
    with fresh.connect() as connection:
        connection.execute("SET tessera.share_transposed = on")
        yield connection


def inputs(content: bytes) -> dict[str, np.ndarray]:
    (port,) = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).get_inputs()
    if port.type == "tensor(int64)":
        return {"x": DICE.integers(0, 384, 9)}
    return {"x": DICE.standard_normal((9, port.shape[1])).astype(np.float32)}


def answer(conn, name: str, given) -> list:
    return predict_json(conn, name, given)["y"]


def assert_right(conn, name: str, content: bytes) -> None:
    given = inputs(content)
    (wanted,) = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, given)
    assert_close(np.array(answer(conn, name, given)), wanted, name)


def views(conn, name: str) -> dict[str, str]:
    return dict(conn.execute("SELECT name, view FROM tessera.tensors WHERE model = %s", (name,)).fetchall())


@pytest.mark.parametrize("content,turned", [(TIED, "v"), (GEMM, "v"), (EMBED, "v")], ids=["tied", "gemm", "embed"])
def test_in_one_model(conn, content, turned):
    load(conn, "m", content)
    natural = "transposed" if content is GEMM else "rows_by_last"
    assert views(conn, "m") == {"w": "rows_by_last", turned: "rows_by_last" if natural == "transposed" else "transposed"}
    counts = storage(conn)
    assert (counts["blocks_referenced"], counts["blocks_stored"]) == (2 * BLOCKS, BLOCKS)
    assert_right(conn, "m", content)
    exported = onnx.load_from_string(conn.execute("SELECT export_model('m')").fetchone()[0])
    for before, after in zip(onnx.load_from_string(content).graph.initializer, exported.graph.initializer):
        assert (numpy_helper.to_array(before) == numpy_helper.to_array(after)).all()


def test_a_table_of_rows_is_not_turned(conn):
    """A look-up needs whole rows: the table is stored as it is, though its transpose is there."""
    load(conn, "m", LAST)
    assert views(conn, "m") == {"v": "rows_by_last", "w": "rows_by_last"}
    assert storage(conn)["blocks_stored"] == 2 * BLOCKS
    assert_right(conn, "m", LAST)


def test_of_another_model(conn):
    """The same bits before and after, also in a session that has the plan of before; the blocks stay with whoever is left."""
    given = {"x": DICE.standard_normal((70, 512)).astype(np.float32)}
    one = {"x": given["x"][:1]}
    load(conn, "m", TURNED)
    assert views(conn, "m") == {"v": "rows_by_last"}
    before = [answer(conn, "m", given), answer(conn, "m", one)]
    conn.execute("SELECT drop_model('m')")
    for _ in range(2):
        conn.execute("VACUUM tessera.weight")
    assert storage(conn)["blocks_stored"] == 0
    load(conn, "other", PLAIN)
    load(conn, "m", TURNED)
    assert views(conn, "m") == {"v": "transposed"}
    assert storage(conn)["blocks_stored"] == BLOCKS
    assert [answer(conn, "m", given), answer(conn, "m", one)] == before
    load(conn, "again", TURNED)
    load(conn, "as it is", PLAIN)
    assert (views(conn, "again"), views(conn, "as it is")) == ({"v": "transposed"}, {"w": "rows_by_last"})
    conn.execute("SELECT drop_model('other'), drop_model('as it is')")
    for _ in range(2):
        conn.execute("VACUUM tessera.weight")
    assert storage(conn)["blocks_stored"] == BLOCKS
    assert answer(conn, "m", given) == before[0]
    assert conn.execute("SELECT * FROM check_store('tessera.weight')").fetchall() == []


def test_blocks_of_another_size(conn):
    load(conn, "other", PLAIN)
    conn.execute("SELECT load_model('m', %b, block_bytes => 16384)", (TURNED,))
    assert views(conn, "m") == {"v": "rows_by_last"}
    assert_right(conn, "m", TURNED)


def test_one_element_differs(conn):
    other = WEIGHTS.T.copy()
    other[-1, -1] += 1
    load(conn, "other", PLAIN)
    content = model([("MatMul", ["x", "v"], ["y"], {})], {"v": other}, 512, 384)
    load(conn, "m", content)
    assert views(conn, "m") == {"v": "rows_by_last"}
    assert_right(conn, "m", content)


def test_only_if_it_is_asked_for(conn):
    """A product of one row takes longer with the transpose."""
    conn.execute("RESET tessera.share_transposed")
    load(conn, "m", TIED)
    assert views(conn, "m") == {"w": "rows_by_last", "v": "rows_by_last"}
    assert storage(conn)["blocks_stored"] == 2 * BLOCKS
    assert_right(conn, "m", TIED)
