"""Loading is DDL-like: seen at COMMIT, gone after ROLLBACK, and never answered from a stale plan."""

import numpy as np
import psycopg
import pytest

from helpers import Background, assert_answers, expected, fails, load, onnx_file, predict_rows

pytestmark = pytest.mark.newer

INPUTS, OLD = expected("fraud_fc_256", 1)
ROW = INPUTS["x"][0]


@pytest.fixture
def db(fresh):
    return fresh


def answer(conn: psycopg.Connection, name: str = "m") -> tuple[float, ...]:
    return tuple(np.round(predict_rows(conn, name, ROW), 5))


@pytest.fixture(scope="module")
def outputs(server):
    """What the old and the new model answer."""
    import onnxruntime
    run = lambda name: onnxruntime.InferenceSession(onnx_file(name)).run(None, {"x": INPUTS["x"]})[0][0]  # noqa: E731
    old, new = (tuple(np.round(run(name).astype(float), 5)) for name in ("fraud_fc_256", "fraud_fc_256_tuned"))
    assert old != new
    return old, new


def close(got, wanted) -> bool:
    return bool(np.allclose(got, wanted, rtol=1e-4, atol=2e-5))


def test_seen_at_commit(db, outputs):
    with db.connect(autocommit=False) as one, db.connect() as two:
        load(one, "m", "fraud_fc_256")
        assert close(answer(one), outputs[0])
        fails(two, "SELECT predict('m', '{1}'::real[])")
        assert two.execute("SELECT count(*) FROM tessera.models").fetchone()[0] == 0
        one.commit()
        assert close(answer(two), outputs[0])


def test_gone_after_rollback(db, outputs):
    with db.connect(autocommit=False) as one:
        load(one, "m", "fraud_fc_256")
        assert close(answer(one), outputs[0])
        one.rollback()
        fails(one, "SELECT predict('m', '{1}'::real[])")
        one.rollback()
        assert load(one, "m", "fraud_fc_256_tuned") == 1
        assert close(answer(one), outputs[1]), "the plan of the model that was rolled back answered"
        one.commit()


def test_rolled_back_version(db, outputs):
    with db.connect(autocommit=False) as one:
        assert load(one, "m", "fraud_fc_256") == 1
        one.commit()
        assert load(one, "m", "fraud_fc_256_tuned") == 2
        assert close(answer(one), outputs[1])
        one.rollback()
        assert close(answer(one), outputs[0])


def test_savepoints(db, outputs):
    with db.connect() as one:
        one.execute("BEGIN")
        load(one, "m", "fraud_fc_256")
        one.execute("SAVEPOINT a")
        load(one, "m", "fraud_fc_256_tuned")
        load(one, "other", "fraud_fc_256")
        assert close(answer(one), outputs[1])
        one.execute("ROLLBACK TO a")
        assert close(answer(one), outputs[0])
        one.execute("SAVEPOINT b")
        one.execute("SELECT drop_model('m')")
        one.execute("ROLLBACK TO b")
        assert close(answer(one), outputs[0])
        one.execute("COMMIT")
        assert one.execute("SELECT name, version FROM tessera.models").fetchall() == [("m", 1)]


def test_loads_of_one_name_take_turns(db, outputs):
    with db.connect(autocommit=False) as one, db.connect(autocommit=False) as two:
        load(one, "m", "fraud_fc_256")
        other = Background(load, two, "m", "fraud_fc_256_tuned")
        assert other.waits(), "the second load of one name did not wait for the first"
        one.commit()
        assert other.result() == 2
        two.commit()
        assert close(answer(one), outputs[1])


def test_first_of_two_loads_rolls_back(db, outputs):
    with db.connect(autocommit=False) as one, db.connect(autocommit=False) as two:
        load(one, "m", "fraud_fc_256")
        other = Background(load, two, "m", "fraud_fc_256_tuned")
        assert other.waits()
        one.rollback()
        assert other.result() == 1
        two.commit()
        assert close(answer(one), outputs[1])


def test_loads_of_two_models_do_not_wait(db):
    with db.connect(autocommit=False) as one, db.connect(autocommit=False) as two:
        load(one, "a", "fraud_fc_256")
        other = Background(load, two, "b", "cnn")
        waited = other.waits(10)
        one.commit()
        other.result()
        two.commit()
        assert not waited
        assert_answers(one, "a", "fraud_fc_256", 7)
        assert_answers(two, "b", "cnn", 7)


def test_loads_of_one_model_under_two_names(db):
    """They share a graph and blocks: the second may wait for the first, and is whole whether that commits or not."""
    for end in ("commit", "rollback"):
        with db.connect(autocommit=False) as one, db.connect(autocommit=False) as two:
            load(one, f"a_{end}", "encoder_fc")
            other = Background(load, two, f"b_{end}", "encoder_fc")
            other.waits()
            getattr(one, end)()
            other.result()
            two.commit()
            assert_answers(two, f"b_{end}", "encoder_fc", 7)


def test_predictions_do_not_wait_for_a_load(db, outputs):
    with db.connect() as one, db.connect(autocommit=False) as two:
        load(one, "m", "fraud_fc_256")
        load(two, "m", "fraud_fc_256_tuned")
        assert close(Background(answer, one).result(timeout=10), outputs[0])
        two.commit()
        assert close(answer(one), outputs[1])


def test_replaced_model_in_another_session(db, outputs):
    """A session that has the old plan answers with the new model right after the other's COMMIT, prepared or not."""
    with db.connect() as one, db.connect() as two:
        load(two, "m", "fraud_fc_256")
        row = "{" + ",".join(map(repr, ROW.tolist())) + "}"
        one.execute("PREPARE ask AS SELECT predict('m', $1::real[])")
        for _ in range(8):
            assert close(one.execute(f"EXECUTE ask('{row}')").fetchone()[0], outputs[0])
        load(two, "m", "fraud_fc_256_tuned")
        assert close(one.execute(f"EXECUTE ask('{row}')").fetchone()[0], outputs[1])
        two.execute("SELECT activate_model('m', 1)")
        assert close(one.execute(f"EXECUTE ask('{row}')").fetchone()[0], outputs[0])
        two.execute("SELECT drop_model('m')")
        fails(one, f"EXECUTE ask('{row}')")
        load(two, "m", "fraud_fc_256_tuned")
        assert close(one.execute(f"EXECUTE ask('{row}')").fetchone()[0], outputs[1])


def test_dropped_version(db, outputs):
    with db.connect() as conn:
        load(conn, "m", "fraud_fc_256")
        load(conn, "m", "fraud_fc_256_tuned")
        assert close(answer(conn, "m@1"), outputs[0])
        assert close(answer(conn, "m@2"), outputs[1])
        conn.execute("SELECT drop_model('m', 1)")
        fails(conn, "SELECT predict('m@1', '{1}'::real[])")
        assert close(answer(conn), outputs[1])
        assert load(conn, "m", "fraud_fc_256") == 3, "a version's number was used again"


def test_renamed_model(db, outputs):
    with db.connect() as conn:
        load(conn, "m", "fraud_fc_256")
        answer(conn)
        conn.execute("SELECT rename_model('m', 'n')")
        assert close(answer(conn, "n"), outputs[0])
        fails(conn, "SELECT predict('m', '{1}'::real[])")
        load(conn, "m", "fraud_fc_256_tuned")
        assert close(answer(conn), outputs[1])
        assert close(answer(conn, "n"), outputs[0])


def test_repeatable_read_keeps_its_version(db, outputs):
    with db.connect() as one, db.connect() as two:
        load(two, "m", "fraud_fc_256")
        one.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        assert close(answer(one), outputs[0])
        load(two, "m", "fraud_fc_256_tuned")
        assert close(answer(two), outputs[1])
        assert close(answer(one), outputs[0])
        two.execute("SELECT drop_model('m')")
        two.execute("VACUUM")
        assert close(answer(one), outputs[0]), "the snapshot's version is gone while the snapshot lives"
        one.execute("COMMIT")
        fails(one, "SELECT predict('m', '{1}'::real[])")


def test_cursor_keeps_its_version(db, outputs):
    with db.connect() as one, db.connect() as two:
        load(two, "m", "fraud_fc_256")
        row = "{" + ",".join(map(repr, ROW.tolist())) + "}"
        one.execute("BEGIN")
        one.execute(f"DECLARE c CURSOR FOR SELECT predict('m', '{row}'::real[]) FROM generate_series(1, 20)")
        assert close(one.execute("FETCH 1 FROM c").fetchone()[0], outputs[0])
        load(two, "m", "fraud_fc_256_tuned")
        assert close(one.execute("FETCH 1 FROM c").fetchone()[0], outputs[0])
        assert close(answer(one), outputs[1]), "a new statement has a new snapshot"
        assert close(one.execute("FETCH 1 FROM c").fetchone()[0], outputs[0])
        one.execute("COMMIT")


def test_own_change_within_a_transaction(db, outputs):
    with db.connect() as conn:
        conn.execute("BEGIN")
        load(conn, "m", "fraud_fc_256")
        assert close(answer(conn), outputs[0])
        load(conn, "m", "fraud_fc_256_tuned")
        assert close(answer(conn), outputs[1])
        conn.execute("SELECT activate_model('m', 1)")
        assert close(answer(conn), outputs[0])
        conn.execute("COMMIT")
        assert close(answer(conn), outputs[0])


def test_vacuum_after_drop(db):
    """Dropping one of two models that share blocks, and vacuuming twice, leaves the other whole."""
    with db.connect() as conn:
        load(conn, "a", "encoder_fc")
        load(conn, "b", "encoder_fc_tuned")
        assert_answers(conn, "a", "encoder_fc", 7)
        conn.execute("SELECT drop_model('a')")
        for _ in range(3):
            conn.execute("VACUUM")
        assert_answers(conn, "b", "encoder_fc_tuned", 7)
        with db.connect() as other:  # a backend that has no plan yet
            assert_answers(other, "b", "encoder_fc_tuned", 7)
        load(conn, "a", "encoder_fc")
        assert_answers(conn, "a", "encoder_fc", 7)


def test_drop_of_a_models_role_is_a_drop_of_the_model(db):
    with db.connect() as conn:
        conn.execute("CREATE ROLE passing")
        try:
            conn.execute("SET ROLE passing")
            load(conn, "m", "fraud_fc_256")
            conn.execute("RESET ROLE")
            conn.execute("DROP OWNED BY passing")
            fails(conn, "SELECT predict('m', '{1}'::real[])")
            assert conn.execute("SELECT count(*) FROM tessera.models").fetchone()[0] == 0
        finally:
            conn.execute("RESET ROLE")
            conn.execute("DROP OWNED BY passing")
            conn.execute("DROP ROLE passing")


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ"])
def test_graph_shared_with_a_dropped_model(fresh, level):
    """A load that is not committed yet uses the graph of a model that another session drops."""
    with fresh.connect() as one, fresh.connect() as two:
        load(one, "first", "fraud_fc_256")
        two.execute(f"BEGIN ISOLATION LEVEL {level}")
        load(two, "second", "fraud_fc_256_tuned")
        one.execute(f"BEGIN ISOLATION LEVEL {level}")
        one.execute("SELECT drop_model('first')")
        one.execute("COMMIT")
        two.execute("COMMIT")
        assert_answers(one, "second", "fraud_fc_256_tuned", 7)
        one.execute("SELECT drop_model('second')")
        assert one.execute("SELECT count(*) FROM tessera.graph").fetchone()[0] == 0, "the graph stays without a use"


def test_graph_after_a_snapshot(fresh):
    """A drop under a snapshot that does not see the other model yet."""
    with fresh.connect() as one, fresh.connect() as two:
        load(one, "first", "fraud_fc_256")
        one.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        one.execute("SELECT count(*) FROM tessera.models")
        load(two, "second", "fraud_fc_256_tuned")
        one.execute("SELECT drop_model('first')")
        one.execute("COMMIT")
        assert_answers(two, "second", "fraud_fc_256_tuned", 7)


def test_load_during_a_drop_of_its_twin(fresh):
    """The dropped model has the same graph and the same tensors."""
    with fresh.connect() as one, fresh.connect() as two:
        load(one, "first", "fraud_fc_256")
        one.execute("BEGIN")
        one.execute("SELECT drop_model('first')")
        loading = Background(load, two, "second", "fraud_fc_256")
        loading.waits(0.3)  # it may wait, or not
        one.execute("COMMIT")
        loading.result()
        assert_answers(one, "second", "fraud_fc_256", 7)


def test_drop_of_a_twin_during_a_load(fresh):
    with fresh.connect() as one, fresh.connect() as two:
        load(one, "first", "fraud_fc_256")
        two.execute("BEGIN")
        load(two, "second", "fraud_fc_256")
        dropping = Background(one.execute, "SELECT drop_model('first')")
        dropping.waits(0.3)  # it may wait, or not
        two.execute("COMMIT")
        dropping.result()
        assert_answers(two, "second", "fraud_fc_256", 7)


def test_loads_and_drops_of_equal_models(fresh):
    """Four sessions load and drop the same two contents under names of their own: what is loaded is whole."""

    def work(session: int) -> None:
        with fresh.connect() as conn:
            for turn in range(25):
                model = ("fraud_fc_256", "fraud_fc_256_tuned")[(turn + session) % 2]
                load(conn, f"m{session}", model)
                assert_answers(conn, f"m{session}", model, 1)
                assert conn.execute("SELECT octet_length(export_model(%s))", (f"m{session}",)).fetchone()[0] > 30_000
                conn.execute("SELECT drop_model(%s)", (f"m{session}",))

    for session in [Background(work, session) for session in range(4)]:
        session.result()
