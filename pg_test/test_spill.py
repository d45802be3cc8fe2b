"""Values above tessera.operator_memory go to temporary files, and the numbers stay what they are."""

import os
from pathlib import Path

import numpy as np
import onnx
import psycopg
import pytest
from onnx import TensorProto, helper

SIZE = 256


@pytest.fixture(scope="module")
def pictures(db):
    """A pointwise convolution to 24 channels, a function, another one to 5, and the mean of each: the first value has 6 MB."""
    dice = np.random.default_rng(11)
    shapes = {"w": (24, 3, 1, 1), "b": (24,), "v": (5, 24, 1, 1)}
    weights = {name: dice.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    port = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w", "b"], ["c"]),
            helper.make_node("Tanh", ["c"], ["t"]),
            helper.make_node("Conv", ["t", "v"], ["d"]),
            helper.make_node("GlobalAveragePool", ["d"], ["y"]),
        ],
        "pictures",
        [port("x", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
        [port("y", TensorProto.FLOAT, ["batch", 5, 1, 1])],
        [helper.make_tensor(name, TensorProto.FLOAT, v.shape, v.tobytes(), raw=True) for name, v in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    with db.connect() as conn:
        conn.execute("SELECT load_model('pictures', %b)", (model.SerializeToString(),))
        conn.execute("CREATE TABLE picture AS SELECT array_agg((i %% 997)::real / 997::real ORDER BY i) x FROM generate_series(0, %s) i", (3 * SIZE * SIZE - 1,))
    x = (np.arange(3 * SIZE * SIZE) % 997 / 997).reshape(3, -1)
    flat = {name: value.astype(np.float64).reshape(value.shape[0], -1) for name, value in weights.items()}
    return flat["v"] @ np.tanh(flat["w"] @ x + flat["b"]).mean(axis=1)


def predicted(conn) -> np.ndarray:
    return np.array(conn.execute("SELECT predict('pictures', x) FROM picture").fetchone()[0])


def temporary(conn) -> int:
    conn.execute("SELECT pg_stat_force_next_flush()")
    return conn.execute("SELECT temp_bytes FROM pg_stat_database WHERE datname = current_database()").fetchone()[0]


def test_large_values_go_to_files_and_stay_right(db, pictures):
    with db.connect() as conn:
        before = temporary(conn)
        np.testing.assert_allclose(predicted(conn), pictures, rtol=1e-4, atol=1e-5)
        assert temporary(conn) == before, "64 MB are enough for all of it"
        for memory in ("1MB", "100kB", "3MB"):
            conn.execute("SELECT set_config('tessera.operator_memory', %s, false)", (memory,))
            np.testing.assert_allclose(predicted(conn), pictures, rtol=1e-4, atol=1e-5)
        written = temporary(conn) - before
        # The function is a part of the first convolution, so a run has one such value; the second one's is smaller.
        assert written >= 3 * 24 * SIZE * SIZE * 4


def test_a_limit_of_temporary_files_is_an_error_and_leaves_nothing(db, pictures):
    with db.connect() as conn:
        conn.execute("SET tessera.operator_memory = '1MB'")
        conn.execute("SET temp_file_limit = '2MB'")
        for _ in range(3):
            with pytest.raises(psycopg.errors.ConfigurationLimitExceeded):
                predicted(conn)
        assert conn.execute("SELECT count(*) FROM pg_ls_tmpdir()").fetchone()[0] == 0
        conn.execute("RESET temp_file_limit")
        np.testing.assert_allclose(predicted(conn), pictures, rtol=1e-4, atol=1e-5)


def test_less_memory_than_a_value_suffices(db, pictures):
    with db.connect() as conn:
        conn.execute("SET tessera.max_prediction_memory = '5MB'")
        with pytest.raises(psycopg.errors.ProgramLimitExceeded):
            predicted(conn)
        conn.execute("SET tessera.operator_memory = '512kB'")
        np.testing.assert_allclose(predicted(conn), pictures, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not os.environ.get("TESSERA_FULL"), reason="takes half a minute and 2 GB of disk: make test-full")
def test_an_output_of_a_gigabyte(fresh):
    """A pointwise convolution to 64 channels over 2,048 x 2,048 pixels, a Sigmoid, another one to 10, and the mean of each."""
    side, dice, port = 2048, np.random.default_rng(1), helper.make_tensor_value_info
    w, v = (dice.standard_normal(shape).astype(np.float32) for shape in ((64, 3, 1, 1), (10, 64, 1, 1)))
    nodes = [("Conv", ["x", "w"], "c"), ("Sigmoid", ["c"], "t"), ("Conv", ["t", "v"], "e"), ("GlobalAveragePool", ["e"], "y")]
    graph = helper.make_graph(
        [helper.make_node(kind, inputs, [output]) for kind, inputs, output in nodes],
        "gigabyte",
        [port("x", TensorProto.FLOAT, ["batch", 3, side, side])],
        [port("y", TensorProto.FLOAT, ["batch", 10, 1, 1])],
        [helper.make_tensor(name, TensorProto.FLOAT, a.shape, a.tobytes(), raw=True) for name, a in (("w", w), ("v", v))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    with fresh.connect() as conn:
        conn.execute("SELECT load_model('gigabyte', %b)", (model.SerializeToString(),))
        conn.execute(f"CREATE TABLE picture AS SELECT array_agg((i % 997)::real / 997::real ORDER BY i) x FROM generate_series(0, {3 * side * side - 1}) i")
    with fresh.connect() as conn:
        before = temporary(conn)
        pid = conn.execute("SELECT pg_backend_pid()").fetchone()[0]
        got = np.array(conn.execute("SELECT predict('gigabyte', x) FROM picture").fetchone()[0])
        peak = next(int(line.split()[1]) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
        spilled = temporary(conn) - before
    x, sums = (np.arange(3 * side * side) % 997 / 997).reshape(3, -1), np.zeros(64)
    for piece in np.array_split(x, 16, axis=1):
        sums += (1 / (1 + np.exp(-(w.reshape(64, 3).astype(np.float64) @ piece)))).sum(axis=1)
    wanted = v.reshape(10, 64).astype(np.float64) @ (sums / side**2)
    print(f"{spilled / 1e9:.2f} GB spilled, at most {peak / 1024:.0f} MB resident")
    assert np.abs(got - wanted).max() < 1e-4
    assert spilled > 1 << 30 and peak < 600 * 1024
