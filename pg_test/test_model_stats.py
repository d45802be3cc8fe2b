"""What is known of models: verdicts on rows, declarations, statistics, costs."""

import pytest
from psycopg import errors
from helpers import explained, load

QUERY = "SELECT sum((predict('fraud_fc_256', x))[1]) FROM rows"


@pytest.fixture
def rows(fresh):
    with fresh.connect() as conn:
        load(conn, "fraud_fc_256")
        conn.execute("CREATE TABLE rows AS SELECT id, array_fill((id / 300.0)::real, ARRAY[28]) AS x FROM generate_series(1, 300) AS id")
        conn.execute("ANALYZE rows")
        conn.execute("SELECT reset_model_stats()")
        yield conn


def statistics(conn) -> tuple:
    return conn.execute("SELECT calls, rows, batches, errors FROM tessera.model_stats WHERE model = 'fraud_fc_256' AND version = 1").fetchone()


def plan(conn) -> str:
    return explained(conn, QUERY, "ANALYZE, TIMING OFF")


def test_predictions_are_counted(rows):
    rows.execute(QUERY)
    calls, counted, batches, failed = statistics(rows)
    assert (calls, counted, failed) == (300, 300, 0)
    assert 1 < batches < 20
    rows.execute("SET tessera.enable_batching = off")
    rows.execute(QUERY)
    assert statistics(rows) == (600, 600, batches + 300, 0)
    rows.execute("SELECT predict('fraud_fc_256', array_agg(x)) FROM rows")
    assert statistics(rows) == (601, 900, batches + 301, 0)
    time, = rows.execute("SELECT time_ms FROM tessera.model_stats").fetchone()
    assert time > 0
    rows.execute("SELECT reset_model_stats()")
    assert statistics(rows) is None


def test_failed_predictions_are_counted(fresh):
    with fresh.connect() as conn:
        load(conn, "minilm")
        conn.execute("SELECT reset_model_stats()")
        with pytest.raises(errors.InvalidParameterValue):
            conn.execute("""SELECT predict('minilm', '{"input_ids": [[99999999]], "attention_mask": [[1]]}'::jsonb)""")
        assert conn.execute("SELECT batches, errors FROM tessera.model_stats").fetchone() == (1, 1)


def test_statistics_are_for_those_who_may_predict(rows):
    rows.execute(QUERY)
    rows.execute("CREATE ROLE nobody_in_particular")
    try:
        rows.execute('REVOKE USAGE ON DOMAIN tessera_model."fraud_fc_256" FROM PUBLIC')
        rows.execute("SET ROLE nobody_in_particular")
        assert rows.execute("SELECT count(*) FROM tessera.model_stats").fetchone() == (0,)
        with pytest.raises(errors.InsufficientPrivilege):
            rows.execute("SELECT reset_model_stats()")
    finally:
        rows.execute("RESET ROLE")
        rows.execute("DROP ROLE nobody_in_particular")


def test_verdicts(rows):
    load(rows, "minilm_int8")
    load(rows, "fraud_fixed")
    found = {name: rest for name, *rest in rows.execute("SELECT name, rows_independent, rows_reason, row_axis FROM tessera.models")}
    assert found["fraud_fc_256"] == [True, "proven", 0]
    assert found["minilm_int8"][0] is False and "node_arange" in found["minilm_int8"][1]
    assert found["fraud_fixed"][0] is False and "always 4" in found["fraud_fixed"][1]
    flops, = rows.execute("SELECT flops_per_row FROM tessera.models WHERE name = 'fraud_fc_256'").fetchone()
    assert 2 * (28 * 256 + 256 * 2) <= flops < 3 * (28 * 256 + 256 * 2)


def test_declarations(rows):
    whole = rows.execute(QUERY).fetchone()
    assert "Largest Batch: 128" in plan(rows)
    rows.execute("SELECT declare_independent_rows('fraud_fc_256', false)")
    alone = plan(rows)
    assert "row by row" in alone and "Largest Batch: 1\n" in alone
    assert rows.execute("SELECT rows_independent, rows_reason FROM tessera.models").fetchone() == (False, "declared")
    assert rows.execute(QUERY).fetchone()[0] == pytest.approx(whole[0])
    rows.execute("SELECT declare_independent_rows('fraud_fc_256', NULL)")
    assert "Largest Batch: 128" in plan(rows)
    with pytest.raises(errors.UndefinedObject):
        rows.execute("SELECT declare_independent_rows('fraud_fc_256@7', true)")


def test_costs_follow_the_arithmetic(rows):
    load(rows, "encoder_fc")
    cost = "EXPLAIN (FORMAT json) SELECT predict('{}', x) FROM rows"
    small, large = (rows.execute(cost.format(name)).fetchone()[0][0]["Plan"]["Total Cost"] for name in ("fraud_fc_256", "encoder_fc"))
    assert large > 20 * small
    unknown = rows.execute(cost.format("no such model")).fetchone()[0][0]["Plan"]["Total Cost"]
    assert unknown > small
