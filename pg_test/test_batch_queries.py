"""Generated queries give the same rows, bit for bit, with batches, in parallel, and row by row."""

import os
import random

import psycopg
import pytest

from helpers import load

pytestmark = pytest.mark.newer

FULL = bool(os.environ.get("TESSERA_FULL"))
QUERIES = 2500 if FULL else 400
SEED = int(os.environ.get("TESSERA_SEED", random.randrange(1 << 30) if FULL else 20261123))

SETTINGS = {
    "batches": [],
    "small batches": ["tessera.batch_size = 3"],
    "parallel": ["parallel_setup_cost = 0", "parallel_tuple_cost = 0", "min_parallel_table_scan_size = 0", "max_parallel_workers_per_gather = 2"],
    "sorts and merges": ["enable_hashjoin = off", "enable_hashagg = off", "enable_nestloop = off"],
    "nested loops": ["enable_hashjoin = off", "enable_mergejoin = off"],
    "indexes": ["enable_seqscan = off"],
}


class Generator:
    """Queries over tables `a`, `b` and `parts` of (id, k, n, x): every one orders its rows in full."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def some(self, *choices):
        return self.random.choice(choices)

    def call(self, table: str) -> str:
        model = self.some("fraud", "fraud", "fraud", "wide", "alone")
        kind = self.some("", "", "", "::float8[]", "::int[]")
        return f"(predict('{model}', {table}.x{kind}))"

    def number(self, table: str, deep: int = 0) -> str:
        call = f"{self.call(table)}[{self.some(1, 2)}]"
        made = [call, call, f"{call} * {table}.k", f"coalesce({call}, -1)", f"CASE WHEN {table}.n > 2 THEN {call} ELSE {table}.k END",
                f"CASE WHEN {call} > 0.5 THEN {table}.n END", f"greatest({call}, {table}.n)"]
        if deep < 1:
            made.append(f"(predict('fraud', array_fill(coalesce({self.number(table, deep + 1)}, 0)::real, ARRAY[28])))[1]")
        return self.random.choice(made)

    def condition(self, table: str) -> str:
        # Outputs are probabilities that do not come near these numbers by chance.
        plain = self.some(f"{table}.k <> 3", f"{table}.n IS NOT NULL", f"{table}.id % 3 > 0", f"{table}.x IS NOT NULL")
        predicted = f"{self.call(table)}[{self.some(1, 2)}] {self.some('>', '<', '>=')} {self.some(0.1, 0.3, 0.5, 0.7)}"
        return self.random.choice([plain, predicted, predicted, f"{plain} AND {predicted}", f"{predicted} AND {plain} AND {predicted}",
                                   f"({plain} OR {predicted})", f"NOT ({predicted})", f"{self.call(table)} IS NOT NULL"])

    def source(self) -> tuple[str, list[str]]:
        """FROM, and the tables that can be named."""
        table = self.some("a", "a", "b", "parts")
        kind = self.random.randrange(8)
        if kind == 0:
            return f"(SELECT * FROM {table} AS i WHERE {self.condition('i')} ORDER BY id LIMIT {self.some(5, 40)}) AS s", ["s"]
        if kind == 1:
            return f"(SELECT id, k, n, x FROM {table} AS i UNION ALL SELECT id + 1000, k, n, x FROM b AS i WHERE {self.condition('i')}) AS s", ["s"]
        if kind == 2:
            return f"{table} AS s {self.some('JOIN', 'LEFT JOIN', 'FULL JOIN')} b AS o ON s.id = o.id", ["s", "o"]
        if kind == 3:
            return f"{table} AS s {self.some('JOIN', 'LEFT JOIN')} b AS o ON s.id = o.id AND {self.condition('o')}", ["s", "o"]
        if kind == 4:
            return f"{table} AS s, LATERAL (SELECT id, k, n, x FROM b WHERE b.id = s.id + 1 OFFSET 0) AS o", ["s", "o"]
        return f"{table} AS s", ["s"]

    def query(self) -> str:
        source, tables = self.source()
        table, last = self.random.choice(tables), tables[-1]
        where = f" WHERE {self.condition(table)}" if self.random.random() < 0.5 else ""
        keys = ", ".join(f"{name}.id" for name in tables)
        kind = self.random.randrange(8)
        if kind == 0:
            having = f" HAVING max({self.number(last)}) > 0.3" if self.random.random() < 0.5 else ""
            return (f"SELECT {last}.k, count(*), max({self.number(table)}), min({self.number(last)}), count({self.number(table)}) FILTER (WHERE {self.condition(last)})"
                    f" FROM {source}{where} GROUP BY {self.some(f'{last}.k', f'ROLLUP ({last}.k)')}{having} ORDER BY 1 NULLS FIRST")
        if kind == 1:
            return f"SELECT {keys}, rank() OVER (PARTITION BY {last}.k ORDER BY {self.number(table)}, {keys}) FROM {source}{where} ORDER BY {keys}, 1"
        if kind == 2:
            return f"SELECT DISTINCT {self.number(table)} > 0.5, {last}.k FROM {source}{where} ORDER BY 1, 2"
        if kind == 3:
            test = self.some("EXISTS", "NOT EXISTS")
            return f"SELECT {keys} FROM {source} WHERE {test} (SELECT FROM b AS e WHERE e.id = {table}.id + 1 AND {self.condition('e')}) ORDER BY {keys}"
        if kind == 4:
            kept = self.some("", "MATERIALIZED ", "NOT MATERIALIZED ")
            return f"WITH q AS {kept}(SELECT {tables[0]}.id AS first, {self.number(last)} AS p FROM {source}{where}) SELECT q.first, p FROM q WHERE p > 0.2 ORDER BY 1, 2"
        if kind == 5:
            return f"SELECT {keys}, unnest({self.call(table)}) FROM {source}{where} ORDER BY {keys}, {keys.count(',') + 2}"
        limit = f" LIMIT {self.some(1, 7, 50)}" if self.random.random() < 0.3 else ""
        return f"SELECT {keys}, {self.number(table)}, {self.call(last)} FROM {source}{where} ORDER BY {keys}{limit}"


@pytest.fixture(scope="module")
def tables(db):
    with db.connect() as conn:
        for name, model in (("fraud", "fraud_fc_256"), ("wide", "fraud_fc_512"), ("alone", "fraud_fc_256_tuned")):
            load(conn, name, model)
        conn.execute("SELECT declare_independent_rows('alone', false)")
        row = "(SELECT array_agg((sin(id * i) * 2)::real) FROM generate_series(1, 28) AS i)"
        for table, rows in (("a", 300), ("b", 120)):
            conn.execute(f"CREATE TABLE {table} AS SELECT id, id % 7 AS k, CASE WHEN id % 13 > 0 THEN id % 5 END AS n, CASE WHEN id % 11 > 0 THEN {row} END AS x FROM generate_series(1, {rows}) AS id")
            conn.execute(f"CREATE INDEX ON {table} (id)")
        conn.execute("CREATE TABLE parts (id int, k int, n int, x real[]) PARTITION BY HASH (id)")
        for part in range(2):
            conn.execute(f"CREATE TABLE parts_{part} PARTITION OF parts FOR VALUES WITH (MODULUS 2, REMAINDER {part})")
        conn.execute("INSERT INTO parts SELECT * FROM a")
        conn.execute("ANALYZE")
    return db


def answer(conn: psycopg.Connection, query: str, settings: list[str]) -> list[tuple]:
    with conn.transaction():
        for setting in settings:
            conn.execute(f"SET LOCAL {setting}")
        return conn.execute(query).fetchall()


@pytest.mark.timeout(3600 if FULL else 300)
def test_generated_queries(tables):
    generator, batched = Generator(SEED), 0
    with tables.connect() as conn:
        conn.execute("SET max_parallel_workers_per_gather = 0")
        for number in range(QUERIES):
            query = generator.query()
            what = f"seed {SEED}, query {number}: {query}"
            wanted = answer(conn, query, ["tessera.enable_batching = off"])
            ways = SETTINGS if FULL else {"batches": [], **{name: SETTINGS[name] for name in generator.random.sample(sorted(SETTINGS), 2)}}
            for name, settings in ways.items():
                assert answer(conn, query, settings) == wanted, f"{name}: {what}"
            plan = "\n".join(line for (line,) in conn.execute(f"EXPLAIN {query}"))
            batched += "Tessera Predict" in plan
    assert batched > QUERIES / 2
