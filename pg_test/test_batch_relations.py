"""Random queries of relations within relations give the same rows with batches and without, whatever the batch size and the plan.

The kernels give a row the same bits in batches of any size, so rows are compared bit by bit. `TESSERA_SEED` repeats a run."""

import os
import random
import time

import pytest

from batch_models import NODE, outcome, prepare
from helpers import explained

pytestmark = pytest.mark.newer

FULL = bool(os.environ.get("TESSERA_FULL"))
QUERIES = 2500 if FULL else 200
SETTINGS = [
    [], ["tessera.batch_size = 3"], ["tessera.batch_size = 1"], ["tessera.batch_memory = '64kB'", "work_mem = '64kB'"],
    ["enable_hashjoin = off", "enable_nestloop = off", "enable_material = off"], ["enable_hashjoin = off", "enable_mergejoin = off"],
    ["enable_hashagg = off", "tessera.batch_size = 65536"], ["enable_sort = off", "enable_partitionwise_aggregate = on", "enable_partitionwise_join = on"],
    ["enable_seqscan = off", "enable_memoize = off"], ["jit = on", "jit_above_cost = 0"],
    ["parallel_setup_cost = 0", "parallel_tuple_cost = 0", "min_parallel_table_scan_size = 0", "min_parallel_index_scan_size = 0", "{force} = on"],
]


class Queries:
    """A generator of queries. A relation is a query with the columns id, g, a, s and x (three numbers, or NULL)."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def one(self, *choices):
        return self.random.choice(choices)

    def call(self, row: str) -> str:
        """An array that a model gives for the row."""
        return self.one(f"predict('m', {row}x)", f"predict('m', {row}x)", f"predict('m2', {row}x[1:2])", f"predict('m2', predict('m', {row}x))",
                        f"predict('m', ARRAY[coalesce({row}g, 9), coalesce({row}a, 9), coalesce({row}id % 5, 9)]::real[])", f"predict('m', {row}x::float8[])",
                        f"predict('m2', ARRAY[coalesce({row}g, 9), coalesce({row}a, 9)])", f"predict('m'::text || left({row}s, 0), {row}x)")

    def score(self, row: str = "") -> str:
        return f"({self.call(row)})[{self.one(1, 2)}]"

    def limit(self) -> float:
        """No score is equal to it: it has more digits than a float4."""
        return self.random.uniform(-1.5, 1.5)

    def condition(self, row: str = "", depth: int = 0) -> str:
        score = self.score(row)
        kinds = [f"{score} > {self.limit()}", f"{score} < {self.limit()}", f"{score} BETWEEN {self.limit() - 1} AND {self.limit() + 1}",
                 f"{score} IS NOT NULL", f"{row}g < {self.one(3, 5)}", f"coalesce({score}, 0) > {self.limit()}",
                 f"CASE WHEN {row}a = 1 THEN {score} > 0.05 WHEN {score} < 0.1001 THEN {row}g > 1 ELSE {score} > -0.3003 END",
                 f"{score} = ANY (SELECT (predict('m2', w))[1] FROM u) IS NOT TRUE"]
        if depth < 2:
            kinds += [f"({self.condition(row, depth + 1)} {self.one('AND', 'OR')} {self.condition(row, depth + 1)})",
                      f"NOT {self.condition(row, depth + 1)}",
                      f"{self.one('', 'NOT')} EXISTS (SELECT 1 FROM u WHERE u.k = {row}id AND (predict('m2', u.w))[1] > {self.limit()})"]
        return self.random.choice(kinds)

    def relation(self, depth: int) -> str:
        if depth == 0:
            return self.one("SELECT * FROM t", "SELECT * FROM parted", "SELECT * FROM t WHERE id < 90", "SELECT id, k % 7 AS g, id % 3 AS a, '' AS s, w || 1::real AS x FROM u",
                            f"SELECT * FROM t WHERE {self.condition()}", f"SELECT * FROM parted WHERE {self.condition()} AND {self.condition()}")
        inner, other = self.relation(depth - 1), self.relation(self.random.randrange(depth))
        one = f"({inner}) AS q{depth}"
        row, two = f"q{depth}.", f"({other}) AS p{depth}"
        kind = self.one("JOIN", "LEFT JOIN", "RIGHT JOIN", "FULL JOIN")
        extra = f" AND {self.condition(row)}" if kind == "JOIN" else ""
        return self.one(
            f"SELECT id, g, a, s, {row}x FROM {one} WHERE {self.condition(row)}",
            f"SELECT id, g, a, s, ({self.call(row)} || ARRAY[1]::real[])[1:3] AS x FROM {one}",
            f"SELECT q{depth}.id, q{depth}.g, p{depth}.a, q{depth}.s, p{depth}.x FROM {one} {kind} {two} ON q{depth}.id = p{depth}.id{extra}",
            f"SELECT q{depth}.* FROM {one} JOIN {two} ON {self.score(row)} = {self.score(f'p{depth}.')}",
            f"SELECT q{depth}.* FROM {one} WHERE {row}id {self.one('IN', 'NOT IN')} (SELECT id FROM ({other}) AS p WHERE {self.condition('p.')} AND id IS NOT NULL)",
            f"{inner} UNION ALL {other}", f"({inner}) {self.one('UNION', 'INTERSECT', 'EXCEPT')} ({other})",
            f"SELECT max(id) AS id, g, a, min(s) AS s, min({row}x) AS x FROM {one} GROUP BY g, a HAVING max({self.score(row)}) > {self.limit()}",
            f"SELECT l.id, q{depth}.g, q{depth}.a, q{depth}.s, l.x FROM {one} CROSS JOIN LATERAL (SELECT id, x FROM t WHERE t.id = {row}id AND {self.condition('t.')}) AS l",
            f"SELECT id, g, a, s, x FROM (SELECT *, row_number() OVER (PARTITION BY g ORDER BY {self.score(row)}, id, a, s, x) AS n FROM {one}) AS w WHERE n <= 4",
            f"(SELECT * FROM {one} ORDER BY {self.score(row)}, id, a, s, x, g LIMIT {self.one(5, 40)})",
            f"SELECT * FROM (WITH c AS {self.one('', 'MATERIALIZED')} ({inner}) SELECT * FROM c WHERE {self.condition('c.')}) AS d")

    def query(self) -> str:
        source = f"({self.relation(self.random.randrange(3))}) AS r"
        call, score = self.call("r."), self.score("r.")
        filtered = self.one("", f" FILTER (WHERE {self.condition('r.')})")
        groups = self.one("g", "ROLLUP (g, a)", "GROUPING SETS ((g), (a), ())", "CUBE (a, g)")
        return self.one(
            f"SELECT id, {call}, {score} FROM {source} WHERE {self.condition('r.')}",
            f"SELECT id, {call}, {self.condition('r.')} FROM {source}",
            f"SELECT g, {'a, ' if '(' in groups else ''}count({score}), max({score}){filtered}, min({self.score('r.')}), count(DISTINCT {score}) FROM {source} GROUP BY {groups}",
            f"SELECT id, max({score}){filtered} OVER (PARTITION BY g), rank() OVER (ORDER BY {score}), lag({self.score('r.')}) OVER (ORDER BY id, a, s, x, g) FROM {source}",
            f"SELECT id, unnest({call}), generate_series(1, 2) FROM {source}",
            f"SELECT DISTINCT g, round({score}::numeric, 3) FROM {source}",
            f"SELECT g, percentile_disc(0.5) WITHIN GROUP (ORDER BY {score}) FROM {source} GROUP BY g",
            f"SELECT id, (SELECT max({self.score('b.')}) FROM t AS b WHERE b.g = r.g AND b.id < 40 AND {self.condition('b.')}) FROM {source} WHERE r.id < 60")


@pytest.fixture(scope="module", autouse=True)
def tables(db):
    with db.connect() as conn:
        prepare(conn)


def test_random_queries(server, conn):
    first = int(os.environ.get("TESSERA_SEED", 20_000 if not FULL else time.time_ns() % 10**9))
    force = "force_parallel_mode" if server.version == "15" else "debug_parallel_query"
    rows = failed = batched = 0
    for seed in range(first, first + QUERIES):
        sql = Queries(seed).query()
        conn.execute("RESET ALL; SET statement_timeout = '20s'; SET tessera.enable_batching = off; SET jit = off")
        (wanted,) = outcome(conn, sql)
        settings = [setting.format(force=force) for setting in random.Random(seed).choice(SETTINGS)]
        conn.execute("RESET tessera.enable_batching; " + "; ".join(f"SET {setting}" for setting in settings))
        (got,) = outcome(conn, sql)
        what = f"seed {seed}, {settings}:\n{sql}"
        if isinstance(wanted, tuple):
            assert not wanted[0].startswith("57"), f"it takes too long: {what}"
            assert got == wanted, what
            failed += 1
        else:
            assert isinstance(got, list) and sorted(got) == sorted(wanted), f"{what}\n{str(wanted)[:600]}\n{str(got)[:600]}"
            rows, batched = rows + len(wanted), batched + (NODE in explained(conn, sql))
    print(f"{QUERIES} queries from seed {first}: {batched} batched, {failed} failed alike, {rows} rows")
    assert batched > QUERIES / 2 and failed < QUERIES / 10 and rows > QUERIES
