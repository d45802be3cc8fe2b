"""Thousands of small nets of one architecture, made fast: for the tests and benchmarks of model sets.

The usual one is the battery-cell network of "Efficient Multi-Model Management" (EDBT 2023): one net per cell, 4-48-48-48-1
with ReLU between, 4,993 parameters. The graph is made once, as PyTorch exports it (Gemm with transB = 1); a member is that file
with other bytes where the tensors' data lie. A member's parameters are one row of float32, in the order of the initializers.
"""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import psycopg
from onnx import TensorProto, helper

BATTERY = (4, 48, 48, 48, 1)
COPY_HEAD, COPY_END = b"PGCOPY\n\xff\r\n\0" + bytes(8), b"\xff\xff"


@dataclass(frozen=True)
class Tensor:
    """An initializer: where its numbers stand in a row of parameters, and where its bytes stand in the file."""

    name: str
    shape: tuple[int, ...]
    first: int
    byte: int

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))


class Architecture:
    """A graph with places for parameters. `linear` is "gemm" (weights [out, in], as PyTorch exports) or "matmul" (MatMul and Add)."""

    def __init__(self, widths: tuple[int, ...] = BATTERY, linear: str = "gemm", activation: str = "Relu"):
        self.widths, self.linear, self.activation = widths, linear, activation
        shapes: dict[str, tuple[int, ...]] = {}
        nodes, at = [], "x"
        for layer, (k, n) in enumerate(zip(widths, widths[1:])):
            weight, bias, out = f"layers.{layer}.weight", f"layers.{layer}.bias", f"z{layer}"
            shapes[weight], shapes[bias] = ((n, k) if linear == "gemm" else (k, n)), (n,)
            out = "y" if layer + 2 == len(widths) else out
            if linear == "gemm":
                nodes.append(helper.make_node("Gemm", [at, weight, bias], [out], f"gemm{layer}", alpha=1.0, beta=1.0, transB=1))
            else:
                nodes += [helper.make_node("MatMul", [at, weight], [f"m{layer}"]), helper.make_node("Add", [f"m{layer}", bias], [out])]
            if out != "y":
                nodes.append(helper.make_node(activation, [out], [f"h{layer}"], f"activation{layer}"))
                at = f"h{layer}"
        self.file, self.tensors = self._template(nodes, shapes)
        self.parameters = sum(tensor.size for tensor in self.tensors)

    def _template(self, nodes, shapes: dict[str, tuple[int, ...]]) -> tuple[bytes, list[Tensor]]:
        """The file, and its tensors: found by filling them with bytes that occur nowhere else."""
        marks = {name: np.random.default_rng(place).bytes(4 * int(np.prod(shape))) for place, (name, shape) in enumerate(shapes.items())}
        weights = [TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, raw_data=marks[name]) for name, shape in shapes.items()]
        ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width]) for name, width in (("x", self.widths[0]), ("y", self.widths[-1]))]
        graph = helper.make_graph(nodes, "main_graph", [ports[0]], [ports[1]], weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name="pytorch", ir_version=8)
        onnx.checker.check_model(model)
        file, tensors, first = model.SerializeToString(), [], 0
        for name, shape in shapes.items():
            assert file.count(marks[name]) == 1, f"the place of {name} is not found"
            tensors.append(Tensor(name, shape, first, file.index(marks[name])))
            first += tensors[-1].size
        return file, tensors

    def random(self, count: int, seed: int = 1) -> np.ndarray:
        """Parameters of `count` nets [count, parameters], scaled as He et al. do for ReLU; a net depends on the seed and its number only."""
        scale = np.concatenate([np.full(tensor.size, np.sqrt(2 / k) if len(tensor.shape) == 2 else 0.05, dtype=np.float32)
                                for tensor, k in zip(self.tensors, np.repeat(self.widths[:-1], 2))])
        made = np.empty((count, self.parameters), dtype=np.float32)
        for number in range(count):
            np.random.default_rng([seed, number]).standard_normal(dtype=np.float32, out=made[number])
        return made * scale

    def model(self, parameters: np.ndarray) -> bytes:
        """The ONNX file with these parameters [parameters]."""
        assert parameters.shape == (self.parameters,) and parameters.dtype == np.float32
        data, parts, done = parameters.astype("<f4", copy=False).tobytes(), [], 0
        for tensor in sorted(self.tensors, key=lambda tensor: tensor.byte):
            parts += [self.file[done:tensor.byte], data[4 * tensor.first:4 * (tensor.first + tensor.size)]]
            done = tensor.byte + 4 * tensor.size
        return b"".join([*parts, self.file[done:]])

    def parameters_of(self, model: bytes) -> np.ndarray:
        """The parameters of any ONNX file with this architecture's initializers, by name."""
        found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load_from_string(model).graph.initializer}
        assert found.keys() == {tensor.name for tensor in self.tensors}, sorted(found)
        return np.concatenate([found[tensor.name].reshape(-1) for tensor in self.tensors])

    def state(self, parameters: np.ndarray) -> dict[str, np.ndarray]:
        """Tensors by name, as views of the parameters."""
        return {tensor.name: parameters[tensor.first:tensor.first + tensor.size].reshape(tensor.shape) for tensor in self.tensors}

    def run(self, parameters: np.ndarray, x: np.ndarray) -> np.ndarray:
        """The net in numpy with float64 sums, for ReLU: x [rows, inputs] -> [rows, outputs]."""
        assert self.activation == "Relu"
        tensors = list(self.state(parameters.astype(np.float64)).values())
        for weight, bias in zip(tensors[::2], tensors[1::2]):
            x = x @ (weight.T if self.linear == "gemm" else weight) + bias
            x = np.maximum(x, 0) if weight is not tensors[-2] else x
        return x

    def last_layers(self, count: int = 1) -> slice:
        """Where the parameters of the last `count` layers stand."""
        return slice(self.tensors[-2 * count].first, self.parameters)


def names(count: int) -> list[str]:
    """Members' names: '0000', '0001', ..."""
    return [f"{number:04}" for number in range(count)]


def battery_nets(count: int, seed: int = 1) -> tuple[Architecture, np.ndarray]:
    """The usual architecture and the parameters [count, 4993] of so many cells."""
    architecture = Architecture()
    return architecture, architecture.random(count, seed)


def members(architecture: Architecture, parameters: np.ndarray) -> Iterator[tuple[str, bytes]]:
    """Names and ONNX files of all rows of parameters."""
    return zip(names(len(parameters)), map(architecture.model, parameters))


def next_generation(architecture: Architecture, parameters: np.ndarray, turn: int, share: float = 0.1, layers: int = 1) -> tuple[np.ndarray, np.ndarray, int]:
    """A set that came of another by training a share of its members, the first half of them fully, the others in the last layers only.

    Returns the new parameters, the numbers of the members that were trained, and the bytes that changed.
    """
    dice = np.random.default_rng([turn, len(parameters)])
    trained = dice.choice(len(parameters), size=max(round(len(parameters) * share), 1), replace=False)
    made, last = parameters.copy(), architecture.last_layers(layers)
    fully, partly = trained[:(len(trained) + 1) // 2], trained[(len(trained) + 1) // 2:]
    made[fully] += dice.normal(scale=0.01, size=(len(fully), architecture.parameters)).astype(np.float32)
    made[partly, last] += dice.normal(scale=0.01, size=(len(partly), last.stop - last.start)).astype(np.float32)
    return made, np.sort(trained), int((made != parameters).sum()) * 4


def copy_members(conn: psycopg.Connection, table: str, rows: Iterable[tuple[str, bytes]]) -> None:
    """Makes a heap table (name text, onnx bytea) of members. STORAGE EXTERNAL, since weights do not compress."""
    conn.execute(f"CREATE TABLE {table} (name text PRIMARY KEY, onnx bytea NOT NULL) USING heap")
    conn.execute(f"ALTER TABLE {table} ALTER onnx SET STORAGE EXTERNAL")
    with conn.cursor() as cursor, cursor.copy(f"COPY {table} FROM STDIN (FORMAT binary)") as out:
        out.write(COPY_HEAD)
        for name, file in rows:
            text = name.encode()
            out.write(b"".join([struct.pack("!hi", 2, len(text)), text, struct.pack("!i", len(file)), file]))
        out.write(COPY_END)
