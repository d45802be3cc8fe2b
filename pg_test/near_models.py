"""A classifier fitted in closed form, copies of it with noise, and validation rows: for the tests of near duplicates."""

import numpy as np
import onnx
import psycopg
from onnx import TensorProto, helper, numpy_helper

INPUTS, HIDDEN, CLASSES, ROWS = 64, 512, 4, 400
BLOCK_BYTES = 4096
TILE = 32  # edge of a block of so many bytes of float32


def classifier(first: np.ndarray, second: np.ndarray, rows: int | str = "n") -> bytes:
    """relu(x @ first) @ second."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w1"], ["h"]), helper.make_node("Relu", ["h"], ["r"]), helper.make_node("MatMul", ["r", "w2"], ["y"])],
        "classifier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, first.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, second.shape[1]])],
        [numpy_helper.from_array(first.astype(np.float32), "w1"), numpy_helper.from_array(second.astype(np.float32), "w2")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


class Task:
    """Points around four centres; a network of random features, of which the last layer is fitted by least squares."""

    def __init__(self, seed: int = 1):
        self.random = np.random.default_rng(seed)
        centres = self.random.normal(0, 1, (CLASSES, INPUTS))
        self.labels = self.random.integers(0, CLASSES, ROWS)
        self.x = (centres[self.labels] + self.random.normal(0, 1.5, (ROWS, INPUTS))).astype(np.float32)
        # Some are wrong, so that no model is always right.
        wrong = self.random.random(ROWS) < 0.1
        self.labels = np.where(wrong, self.random.integers(0, CLASSES, ROWS), self.labels)
        self.first = self.random.normal(0, 0.1, (INPUTS, HIDDEN)).astype(np.float32)

    def second(self, first: np.ndarray, units: slice = slice(None)) -> np.ndarray:
        """The last layer for this first one, of which it looks at these units."""
        hidden = np.zeros((ROWS, HIDDEN))
        hidden[:, units] = np.maximum(self.x @ first, 0)[:, units]
        wanted = np.eye(CLASSES)[self.labels]
        fitted = np.linalg.solve(hidden.T @ hidden + 100 * np.eye(HIDDEN), hidden.T @ wanted)
        return fitted.astype(np.float32)

    def noised(self, scale: float = 0.001) -> np.ndarray:
        return (self.first + self.random.normal(0, scale, self.first.shape)).astype(np.float32)

    def load(self, conn: psycopg.Connection, name: str, first: np.ndarray, second: np.ndarray | None = None) -> bytes:
        content = classifier(first, self.second(first) if second is None else second)
        conn.execute("SELECT load_model(%s, %b, %s)", (name, content, BLOCK_BYTES))
        return content

    def table(self, conn: psycopg.Connection) -> None:
        """`v (id, x, label, one_hot)`."""
        conn.execute("CREATE TABLE v (id int PRIMARY KEY, x real[], label int, one_hot real[])")
        with conn.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO v VALUES (%s, %s::real[], %s, %s::real[])",
                [(i, x.tolist(), int(label), np.eye(CLASSES)[label].tolist()) for i, (x, label) in enumerate(zip(self.x, self.labels))],
            )


def tiles(matrix: np.ndarray):
    """(block_row, block_col, tile), as the matrix is cut."""
    for row in range(0, matrix.shape[0], TILE):
        for col in range(0, matrix.shape[1], TILE):
            yield row // TILE, col // TILE, matrix[row : row + TILE, col : col + TILE]


def weights(content: bytes) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load_from_string(content).graph.initializer}


def split(count: int, holdout: float, seed: int) -> tuple[set[int], set[int]]:
    """The rows that guide and those that are held out: Fisher and Yates, with SplitMix64."""
    mask, state, rows = (1 << 64) - 1, seed & ((1 << 64) - 1), list(range(count))
    for at in range(count - 1, 0, -1):
        state = (state + 0x9E3779B97F4A7C15) & mask
        mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
        other = ((mixed ^ (mixed >> 31)) * (at + 1)) >> 64
        rows[at], rows[other] = rows[other], rows[at]
    held = min(max(round(count * holdout), 1), count - 1)
    return set(rows[held:]), set(rows[:held])
