"""What the tests share: models and expected outputs, values to and from SQL, and comparisons."""

import json
import math
import threading
import time
from decimal import Decimal

import numpy as np
import psycopg
import pytest

from paths import EXPECTED, MODELS


def onnx_file(name: str) -> bytes:
    return (MODELS / f"{name}.onnx").read_bytes()


def unlike(name: str, turn: int) -> bytes:
    """A model of the zoo with a byte changed in each row of each block, so that no two turns share a block."""
    import onnx

    model = onnx.load(MODELS / f"{name}.onnx")
    for tensor in model.graph.initializer:
        raw = bytearray(tensor.raw_data)
        raw[::512] = bytes([turn]) * len(raw[::512])
        tensor.raw_data = bytes(raw)
    return model.SerializeToString()


def load(conn: psycopg.Connection, name: str, model: str | bytes | None = None) -> int:
    """Loads a model of the zoo (by default the one of that name), or given bytes; returns its version."""
    content = model if isinstance(model, bytes) else onnx_file(model or name)
    return conn.execute("SELECT load_model(%s, %b)", (name, content)).fetchone()[0]


def expected(name: str, batch: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Inputs and ONNX Runtime's outputs."""
    with np.load(EXPECTED / f"{name}-{batch}.npz") as kept:
        parts = {key: kept[key] for key in kept.files}
    inputs = {key[3:]: value for key, value in parts.items() if key.startswith("in:")}
    return inputs, {key[4:]: value for key, value in parts.items() if key.startswith("out:")}


def plain(value):
    """A nested list as the jsonb form has it: NaN and infinities as strings."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, float) and value == 0 and math.copysign(1, value) < 0:
        return "-0"  # jsonb's numbers have no negative zero
    if isinstance(value, bytes):
        return value.decode()
    return value


def to_json(arrays: dict[str, np.ndarray]) -> str:
    return json.dumps({name: plain(array.tolist()) for name, array in arrays.items()})


def array(value, dtype: np.dtype) -> np.ndarray:
    """The nested list of an answer as an array of the expected dtype."""
    if np.issubdtype(dtype, np.floating):
        return np.array(value, dtype=np.float64)  # float() reads "NaN" and "Infinity"
    return np.array(value, dtype=dtype)


def predict_json(conn: psycopg.Connection, model: str, inputs: dict[str, np.ndarray]) -> dict:
    return conn.execute("SELECT predict(%s, %s::jsonb)", (model, to_json(inputs))).fetchone()[0]


def predict_rows(conn: psycopg.Connection, model: str, rows: np.ndarray) -> np.ndarray:
    """One row [n] or several [rows, n] through real[]."""
    answer = conn.execute("SELECT predict(%s, %s::real[])", (model, rows.astype(float).tolist())).fetchone()[0]
    return np.array(answer, dtype=np.float64)


def assert_close(got: np.ndarray, wanted: np.ndarray, what: str) -> None:
    """1e-4 relative, 1e-5 absolute times the largest output; whole numbers are equal."""
    assert got.shape == wanted.shape, f"{what}: shape {got.shape} instead of {wanted.shape}"
    if not np.issubdtype(wanted.dtype, np.floating):
        assert (got == wanted).all(), f"{what}: {got} instead of {wanted}"
        return
    largest = np.abs(wanted[np.isfinite(wanted)]).max(initial=1.0)
    close = np.isclose(got, wanted, rtol=1e-4, atol=1e-5 * largest, equal_nan=True)
    worst = np.abs(got - wanted).max(initial=0)
    assert close.all(), f"{what}: {(~close).sum()} of {close.size} values differ, by up to {worst}"


def assert_answers(conn: psycopg.Connection, name: str, model: str, batch: int) -> None:
    """`predict` of `name` equals ONNX Runtime's outputs of the zoo's `model`, all of them, through jsonb."""
    inputs, outputs = expected(model, batch)
    answer = predict_json(conn, name, inputs)
    assert set(answer) == set(outputs)
    for port, wanted in outputs.items():
        assert_close(array(answer[port], wanted.dtype), wanted, f"{model} at batch {batch}, {port}")


def assert_error(error: psycopg.Error, sqlstate: str | None = None, hint: bool = True) -> None:
    """An error a person can act on: a SQLSTATE of its own, a message, a hint (PostgreSQL's own errors may have none)."""
    shown = error.diag
    assert error.sqlstate and not error.sqlstate.startswith("XX"), f"{error.sqlstate}: {shown.message_primary}"
    if sqlstate:
        assert error.sqlstate == sqlstate, f"{error.sqlstate}: {shown.message_primary}"
    assert shown.message_primary
    assert shown.message_hint or not hint, f"no hint with: {shown.message_primary}"


def fails(conn: psycopg.Connection, sql: str, parameters=(), sqlstate: str | None = None, hint: bool = True) -> psycopg.Error:
    """Runs a statement that must fail properly; the connection must survive it."""
    with pytest.raises(psycopg.Error) as caught:
        conn.execute(sql, parameters)
    assert not conn.closed, "the connection was lost"
    assert_error(caught.value, sqlstate, hint)
    return caught.value


def storage(conn: psycopg.Connection, table: str = "tessera.weight") -> dict:
    """The line of tessera.storage about a table."""
    with conn.cursor(row_factory=psycopg.rows.dict_row) as cursor:
        line = cursor.execute("SELECT * FROM tessera.storage WHERE relation = %s::regclass", (table,)).fetchone()
    assert line, f"tessera.storage has no line for {table}"
    return {key: float(value) if isinstance(value, Decimal) else value for key, value in line.items()}


def store_size(conn: psycopg.Connection, table: str = "tessera.weight") -> int:
    """Bytes on disk of a table's block store, its index included."""
    sql = "SELECT pg_total_relation_size(reltoastrelid) FROM pg_class WHERE oid = %s::regclass"
    return conn.execute(sql, (table,)).fetchone()[0]


def explained(conn: psycopg.Connection, query: str, options: str = "COSTS OFF") -> str:
    """What EXPLAIN shows, in the format of text."""
    return "\n".join(line for (line,) in conn.execute(f"EXPLAIN ({options}) {query}"))


def cancelled_after(conn: psycopg.Connection, sql: str, seconds: float) -> float:
    """Runs a statement and cancels it from another thread; returns how long it went on after that."""
    sent = []

    def cancel():
        time.sleep(seconds)
        sent.append(time.monotonic())
        conn.cancel_safe()

    thread = threading.Thread(target=cancel)
    thread.start()
    with pytest.raises(psycopg.errors.QueryCanceled):
        conn.execute(sql)
    ended = time.monotonic()
    thread.join()
    return ended - sent[0]


def timed_out_after(conn: psycopg.Connection, sql: str, seconds: float) -> float:
    """Runs a statement under statement_timeout; returns how long it went on after that."""
    conn.execute(f"SET statement_timeout = {int(seconds * 1000)}")
    started = time.monotonic()
    try:
        with pytest.raises(psycopg.errors.QueryCanceled) as caught:
            conn.execute(sql)
        ended = time.monotonic()
    finally:
        conn.execute("RESET statement_timeout")
    assert "statement timeout" in str(caught.value)
    return ended - started - seconds


class Background:
    """Runs a function in a thread; `result` waits for it and raises what it raised."""

    def __init__(self, function, *arguments):
        self.value, self.error, self.seconds = None, None, 0.0

        def work():
            started = time.monotonic()
            try:
                self.value = function(*arguments)
            except BaseException as error:  # noqa: BLE001: handed to the caller of result()
                self.error = error
            self.seconds = time.monotonic() - started

        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()

    def waits(self, seconds: float = 0.4) -> bool:
        self.thread.join(seconds)
        return self.thread.is_alive()

    def result(self, timeout: float = 60):
        self.thread.join(timeout)
        assert not self.thread.is_alive(), f"still busy after {timeout} s"
        if self.error:
            raise self.error
        return self.value
