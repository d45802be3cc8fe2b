"""statement_timeout and Ctrl-C end a load and a prediction within half a second, and leave the session whole."""

import threading
import time

import psycopg
import pytest

from helpers import assert_answers, cancelled_after, load, timed_out_after, unlike

LIMIT = 0.5
PREDICTIONS = {
    "one long operator": "SELECT predict('slow_operator', '{1}'::real[])",
    "many operators": "SELECT predict('slow_chain', '{1}'::real[])",
    "a large batch": "SELECT predict('big_mlp', array_fill(0.5::real, ARRAY[6000, 2048]))",
    "many rows": "SELECT sum((predict('fraud_fc_256', array_fill(i::real, ARRAY[28])))[1]) FROM generate_series(1, 100000000) AS i",
}


@pytest.fixture(scope="module", autouse=True)
def models(db):
    with db.connect() as conn:
        for name in ("slow_operator", "slow_chain", "big_mlp", "fraud_fc_256"):
            load(conn, name)


@pytest.mark.parametrize("way", [cancelled_after, timed_out_after])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_prediction(conn, kind, way):
    for wait in (0.1, 0.7):
        late = way(conn, PREDICTIONS[kind], wait)
        assert late < LIMIT, f"{kind}: it went on for {late:.2f} s"
    assert_answers(conn, "fraud_fc_256", "fraud_fc_256", 7)


@pytest.mark.parametrize("way", [cancelled_after, timed_out_after])
def test_load(conn, folder, way):
    """At several moments of a load of 100 MB of new weights; nothing of the model is left."""
    path = folder / "model.onnx"
    load_big = f"SELECT load_model_from_file('loading', '{path}')"
    first = 1 if way is cancelled_after else 101
    path.write_bytes(unlike("big_mlp", first))
    conn.execute("BEGIN")
    started = time.monotonic()
    conn.execute(load_big)
    whole = time.monotonic() - started
    conn.execute("ROLLBACK")
    for turn, part in enumerate((0.05, 0.25, 0.5), start=first + 1):
        path.write_bytes(unlike("big_mlp", turn))
        late = way(conn, load_big, whole * part)
        assert late < LIMIT, f"after {part:.0%} of the load: it went on for {late:.2f} s"
        assert conn.execute("SELECT count(*) FROM tessera.models WHERE name = 'loading'").fetchone()[0] == 0


def test_first_prediction(db):
    """The first call of a session compiles the plan; that ends too."""
    with db.connect() as conn:
        late = timed_out_after(conn, "SELECT predict('big_mlp', array_fill(0.5::real, ARRAY[3000, 2048]))", 0.05)
        assert late < LIMIT, f"it went on for {late:.2f} s"


def test_terminated_session(db):
    """pg_terminate_backend ends a prediction as well, and the server goes on."""
    with db.connect() as busy, db.connect() as other:
        def end():
            time.sleep(0.5)
            other.execute("SELECT pg_terminate_backend(%s)", (busy.info.backend_pid,))

        thread = threading.Thread(target=end)
        started = time.monotonic()
        thread.start()
        with pytest.raises(psycopg.errors.AdminShutdown):
            busy.execute(PREDICTIONS["one long operator"])
        assert time.monotonic() - started < 0.5 + LIMIT
        thread.join()
        assert_answers(other, "fraud_fc_256", "fraud_fc_256", 1)
