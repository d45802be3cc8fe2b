"""A fleet of models for tests and benchmarks of serving: nets that share some layers and have others of their own.

Every model comes with questions and ONNX Runtime's answers to them, so that whoever asks can check what comes back. A
quarter of the models look rows up in an embedding table, the others are plain nets.
"""

import threading
import time
from dataclasses import dataclass, field

import numpy as np
import onnx
import psycopg
from onnx import TensorProto, helper, numpy_helper

from helpers import assert_close

FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64


@dataclass
class Member:
    """One model: its file, and for each question the SQL argument and the answer [outputs]."""

    name: str
    content: bytes
    questions: list[list] = field(default_factory=list)
    answers: list[np.ndarray] = field(default_factory=list)

    @property
    def cast(self) -> str:
        return "bigint[]" if isinstance(self.questions[0][0], int) else "real[]"


def make(count: int, width: int, groups: int, questions: int = 4, seed: int = 1) -> list[Member]:
    """`count` models of two `width` x `width` layers each; the first of them is one for all models of a group."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, cols: int) -> np.ndarray:
        return (rng.normal(size=(rows, cols)) * np.sqrt(2 / rows)).astype(np.float32)

    trunks = [matrix(width, width) for _ in range(groups)]
    fleet = []
    for number in range(count):
        weights = {"trunk": trunks[number % groups], "own": matrix(width, width), "head": matrix(width, 16),
                   "bias": rng.normal(size=16).astype(np.float32)}
        looks_up = number % 4 == 3
        first, nodes = "x", []
        if looks_up:
            weights["table"] = matrix(2048, width)
            nodes += [helper.make_node("Gather", ["table", "x"], ["rows"]), helper.make_node("ReduceMean", ["rows"], ["mean"], axes=[1], keepdims=0)]
            first = "mean"
        nodes += [helper.make_node("MatMul", [first, "trunk"], ["a"]), helper.make_node("Relu", ["a"], ["b"]),
                  helper.make_node("MatMul", ["b", "own"], ["c"]), helper.make_node("Tanh", ["c"], ["d"]),
                  helper.make_node("Gemm", ["d", "head", "bias"], ["y"])]
        port = helper.make_tensor_value_info
        inputs = [port("x", INT, ["n", 12])] if looks_up else [port("x", FLOAT, ["n", width])]
        graph = helper.make_graph(nodes, "main", inputs, [port("y", FLOAT, ["n", 16])],
                                  [numpy_helper.from_array(value, key) for key, value in weights.items()])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model)
        member = Member(f"member_{number:02}", model.SerializeToString())
        ask(member, rng, width, looks_up, questions)
        fleet.append(member)
    return fleet


def ask(member: Member, rng: np.random.Generator, width: int, looks_up: bool, questions: int) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(member.content, providers=["CPUExecutionProvider"])
    for _ in range(questions):
        x = rng.integers(0, 2048, size=(1, 12)) if looks_up else np.round(rng.normal(size=(1, width)) * 256).astype(np.float32) / 256
        member.questions.append(x[0].tolist())
        member.answers.append(session.run(None, {"x": x})[0][0].astype(np.float64))


def load_all(conn: psycopg.Connection, fleet: list[Member]) -> int:
    """Loads the models; returns the bytes of the blocks that are stored for them."""
    for member in fleet:
        conn.execute("SELECT load_model(%s, %b)", (member.name, member.content))
    return conn.execute("SELECT sum(octet_length(data::bytea)) FROM tessera.weight WHERE ctid IN"
                        " (SELECT min(ctid) FROM tessera.weight GROUP BY data)").fetchone()[0]


class Client:
    """A connection in a thread of its own, which asks random models until it is told to end, and checks each answer."""

    def __init__(self, connect, fleet: list[Member], seed: int):
        self.fleet, self.dice, self.answered, self.error = fleet, np.random.default_rng(seed), 0, None
        self.connection = connect()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.work, daemon=True)

    def work(self) -> None:
        try:
            while not self.over.is_set():
                self.ask()
        except BaseException as error:  # noqa: BLE001: handed to the caller of end()
            self.error = error

    def ask(self) -> None:
        member = self.fleet[self.dice.integers(len(self.fleet))]
        number = int(self.dice.integers(len(member.questions)))
        sql = f"SELECT predict(%s, %s::{member.cast})"
        got = self.connection.execute(sql, (member.name, member.questions[number])).fetchone()[0]
        assert_close(np.array(got, dtype=np.float64), member.answers[number], f"{member.name}, question {number}")
        self.answered += 1

    def end(self) -> int:
        self.over.set()
        self.thread.join(60)
        assert not self.thread.is_alive(), "a client hangs"
        self.connection.close()
        if self.error:
            raise self.error
        return self.answered


def serve(connect, fleet: list[Member], clients: int, seconds: float, warm_up: float = 0.0) -> float:
    """Answers per second of so many clients, all of them checked; what is answered in the first moments is not counted."""
    crowd = [Client(connect, fleet, seed) for seed in range(clients)]
    for client in crowd:
        client.thread.start()
    time.sleep(warm_up)
    started, before = time.monotonic(), sum(client.answered for client in crowd)
    deadline = started + seconds
    while time.monotonic() < deadline and not any(client.error for client in crowd):
        time.sleep(0.05)
    passed, answered = time.monotonic() - started, sum(client.answered for client in crowd) - before
    for client in crowd:
        client.end()
    assert answered > 0, "nothing was answered"
    return answered / passed
