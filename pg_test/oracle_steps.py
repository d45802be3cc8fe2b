"""Random steps for test_oracle.py: SQL in which {t} stands for the table, and {am} and {other_am} for its access methods."""

import random

TABLE = """
CREATE TABLE {t} (k int PRIMARY KEY, g int, n text, blk tensor_block, b bytea, t text, j jsonb, a real[]) USING {am}
    WITH (autovacuum_enabled = off, toast.autovacuum_enabled = off, fillfactor = 70)
"""
WIDE = ("blk", "b", "t", "j", "a")
KEYS = 120
POOL = 64

# Where something changes: short headers, what may stay in a row, heap's threshold, a page, a full tile, a tensor page.
SIZES = [0, 1, 7, 12, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 100, 126, 127, 128, 700, 1900, 1996, 2000, 2004, 2032, 2040]
SIZES += [4000, 8100, 8160, 8168, 8176, 8192, 9000, 16400, 65524, 65536, 65548, 66000]
LARGE = [530_900, 530_920, 530_921, 600_000]

# What a heap table has not is true there.
ONLY_OURS = (
    "SELECT CASE amname WHEN 'tensor_block' THEN # ELSE true END FROM pg_class AS c JOIN pg_am AS m ON m.oid = relam "
    "WHERE c.oid = '{t}'::regclass"
)

INDEXES = {
    "group": "(g)",
    "partial": "(k) WHERE g > 4",
    "expression": "(md5(b), g)",
    "part_of_text": "(left(t, 20))",
    "several": "(g, k) INCLUDE (n)",
    "hash": "USING hash (n)",
    "brin": "USING brin (k)",
    "gin": "USING gin (j jsonb_path_ops)",
    "unique_pair": "(k, g)",
}


def pool_rows(dice: random.Random):
    """Rows for the table `pool`: values of one size each, compressible or not, in every type."""
    for number in range(POOL):
        size = LARGE[number // 16] if number % 16 == 15 else dice.choice(SIZES[: len(SIZES) - number % 2 * 6])
        noise = dice.randbytes(size)
        dull = (bytes([65 + number % 26]) * 61 + b"-%d " % number) * (size // 60 + 1)
        raw = noise if number % 2 else dull[:size]
        text = noise.hex()[:size] if number % 2 else raw.decode()
        floats = [((number * 7919 + i * (1 + number % 2 * 104729)) % 4093) / 8 for i in range(max(size // 4, 1))]
        yield number, floats, raw, text, text[: min(1 + size // 2, 20_000)], floats[:5_000]


class Steps:
    """Gives statements that suit a session's state. All randomness is of `dice`, so a seed gives the same steps."""

    def __init__(self, dice: random.Random):
        self.dice = dice

    def key(self) -> int:
        return self.dice.randrange(KEYS)

    def value(self, column: str) -> str:
        """An expression: out of the pool, out of another row of the table, short, or null."""
        kind = self.dice.random()
        if kind < 0.7:
            return f"(SELECT {column} FROM pool WHERE id = {self.dice.randrange(POOL)})"
        if kind < 0.9:
            return f"(SELECT {column} FROM {{t}} WHERE k = {self.key()})"
        if kind < 0.95 or column == "blk":
            return "NULL"
        return {"b": "'\\xabcd'", "t": "'short'", "j": "'{\"x\": 1}'", "a": "'{1,2}'"}[column]

    def row(self, key: int | None = None) -> str:
        key = self.key() if key is None else key
        values = ", ".join(self.value(column) for column in WIDE)
        return f"({key}, {self.dice.randrange(10)}, 'n{self.dice.randrange(5)}', {values})"

    def rows(self) -> str:
        keys = self.dice.sample(range(KEYS), self.dice.randint(1, 5))
        return ", ".join(self.row(key) for key in keys)

    def changes(self) -> str:
        """An assignment list: a key column, wide columns, both, or nothing that is indexed."""
        kind = self.dice.randrange(5)
        sets = []
        if kind in (0, 1):
            sets.append(f"g = {self.dice.randrange(10)}")
        if kind in (1, 2, 3):
            sets += [f"{c} = {self.value(c)}" for c in self.dice.sample(WIDE, 1 + (kind == 3))]
        return ", ".join(sets) or "n = 'n" + str(self.dice.randrange(5)) + "'"

    def where(self) -> str:
        key, group = self.key(), self.dice.randrange(10)
        return self.dice.choice([
            f"k = {key}", f"k BETWEEN {key} AND {key + 6}", f"g = {group}", f"g = {group} AND k < {key}",
            f"g > 4 AND k > {key}", f"n = 'n{group % 5}' AND k > {key}",
            f"ctid = ANY (ARRAY(SELECT ctid FROM {{t}} WHERE k BETWEEN {key} AND {key + 3}))",
            f"ctid = (SELECT ctid FROM {{t}} WHERE k = {key})",
            f"ctid >= '(0,0)' AND ctid < '(100000,1)' AND k % 7 = {group % 7}",
            f"md5(b) = (SELECT md5(b) FROM pool WHERE id = {self.dice.randrange(POOL)})",
            f"left(t, 20) = (SELECT left(t, 20) FROM pool WHERE id = {self.dice.randrange(POOL)})",
            f"j @> (SELECT j FROM pool WHERE id = {self.dice.randrange(1, POOL)})",
        ])

    RETURNING = " RETURNING k, g, n, md5(blk::bytea), md5(b), md5(t), md5(j::text), md5(a::text)"
    COLUMNS = "(k, g, n, blk, b, t, j, a)"

    def change(self) -> str:
        """A statement that changes rows."""
        dice, returning = self.dice, self.RETURNING if self.dice.random() < 0.5 else ""
        kind = dice.randrange(17)
        if kind < 4:
            return f"INSERT INTO {{t}} {self.COLUMNS} VALUES {self.rows()}" + returning
        if kind < 8:
            return f"UPDATE {{t}} SET {self.changes()} WHERE {self.where()}" + returning
        if kind == 8:
            # Ascending order would meet the neighbour: one row at a time.
            return f"UPDATE {{t}} SET k = {self.key()}, {self.changes()} WHERE k = {self.key()}" + returning
        if kind < 11:
            return f"DELETE FROM {{t}} WHERE {self.where()}" + returning
        conflict = f"INSERT INTO {{t}} {self.COLUMNS} VALUES {self.rows()} ON CONFLICT "
        if kind == 11:
            return conflict + "DO NOTHING" + returning
        if kind == 12:
            return conflict + "(k) DO UPDATE SET b = excluded.b, blk = excluded.blk, t = {t}.t || 'more'" + returning
        if kind == 13:
            return conflict + "(k) DO UPDATE SET g = {t}.g + 1, a = {t}.a WHERE {t}.g < 8" + returning
        if kind == 14:
            return (
                f"MERGE INTO {{t}} USING (VALUES ({self.key()}), ({KEYS + 1})) AS v (k) ON {{t}}.k = v.k "
                f"WHEN MATCHED AND g > 6 THEN DELETE WHEN MATCHED THEN UPDATE SET {self.changes()} "
                f"WHEN NOT MATCHED THEN INSERT (k, g, b) VALUES (v.k, 3, {self.value('b')})"
            )
        if kind == 15:
            low = self.key()
            return (
                f"WITH gone AS (DELETE FROM {{t}} WHERE k BETWEEN {low} AND {low + 4} RETURNING *) "
                f"INSERT INTO {{t}} {self.COLUMNS} SELECT k + {KEYS}, g, n, blk, b, t, j, a FROM gone ON CONFLICT DO NOTHING"
                + returning
            )
        return f"DELETE FROM {{t}} WHERE k >= {KEYS}" + returning

    def copied(self) -> tuple[str, list[tuple]]:
        """COPY with its rows; a key that is there already is an error on both sides."""
        rows = []
        for key in self.dice.sample(range(KEYS), self.dice.randint(1, 4)):
            size = self.dice.choice(SIZES)
            blob = None if self.dice.random() < 0.2 else bytes([key % 5]) * size
            rows.append((key, key % 10, f"n{key % 5}", blob, "x" * (size // 2), [key / 2] * (size // 8)))
        return "COPY {t} (k, g, n, b, t, a) FROM STDIN", rows

    def look(self) -> str:
        """A query, also with row locks."""
        columns = self.RETURNING.removeprefix(" RETURNING")
        base = f"SELECT{columns} FROM {{t}} WHERE {self.where()}"
        kind = self.dice.randrange(10)
        if kind < 4:
            return base
        if kind == 4:
            return base + " ORDER BY k FOR " + self.dice.choice(["UPDATE", "NO KEY UPDATE", "SHARE", "KEY SHARE"])
        if kind == 5:
            return base + " ORDER BY k FOR UPDATE SKIP LOCKED"
        if kind == 6:
            return base + " ORDER BY k FOR NO KEY UPDATE NOWAIT"
        if kind == 7:
            return f"SELECT count(*), max(k), sum(length(b)), sum(length(t)) FROM {{t}} WHERE {self.where()}"
        if kind == 8:
            return "SELECT x.k, y.k, md5(x.b) FROM {t} AS x JOIN {t} AS y ON x.b = y.b AND x.k < y.k"
        return "SELECT g, count(DISTINCT b), md5(string_agg(t, ',' ORDER BY k)), count(DISTINCT md5(blk::bytea)) FROM {t} GROUP BY g"

    def definition(self) -> str:
        """DDL that is allowed in a transaction."""
        name, body = self.dice.choice(list(INDEXES.items()))
        where = "ON {t} " + body
        return self.dice.choice([
            f"CREATE INDEX IF NOT EXISTS {{t}}_{name} {where}", f"CREATE INDEX IF NOT EXISTS {{t}}_{name} {where}",
            f"CREATE INDEX IF NOT EXISTS {{t}}_{name} {where}", f"DROP INDEX IF EXISTS {{t}}_{name}",
            f"ALTER TABLE {{t}} ADD COLUMN IF NOT EXISTS x1 text DEFAULT repeat('added', {self.dice.choice([1, 600, 30000])})",
            "ALTER TABLE {t} ADD COLUMN IF NOT EXISTS x2 tensor_block",
            "ALTER TABLE {t} ADD COLUMN IF NOT EXISTS x2 bytea DEFAULT sha512(random()::text::bytea) || NULL",
            "ALTER TABLE {t} DROP COLUMN IF EXISTS x1", "ALTER TABLE {t} DROP COLUMN IF EXISTS x2",
            "ALTER TABLE {t} ALTER x1 TYPE bytea USING x1::bytea", "ALTER TABLE {t} ALTER x1 TYPE text USING encode(x1::bytea, 'hex')",
            "UPDATE {t} SET x1 = t WHERE k < 60", "UPDATE {t} SET x2 = blk WHERE k > 30",
            "ALTER TABLE {t} ALTER g TYPE bigint", "ALTER TABLE {t} ALTER g TYPE int",
            "ALTER TABLE {t} ALTER t SET STORAGE " + self.dice.choice(["EXTERNAL", "EXTENDED", "MAIN"]),
            "ALTER TABLE {t} ALTER blk SET STORAGE " + self.dice.choice(["EXTERNAL", "EXTENDED"]),
            "ALTER TABLE {t} SET ACCESS METHOD {other_am}", "ALTER TABLE {t} SET ACCESS METHOD {am}",
            "ALTER TABLE {t} SET ACCESS METHOD {am}", "CLUSTER {t} USING {t}_pkey", "CLUSTER {t} USING {t}_group",
            f"SET tessera.block_compression = {self.dice.choice(['huffman', 'none'])}",
            "REINDEX TABLE {t}", "ANALYZE {t}", *(["TRUNCATE {t}"] if self.dice.random() < 0.2 else []),
        ])

    def maintenance(self, alone: bool) -> str:
        """What cannot be in a transaction. Nobody else is in one if `alone`: then the file may shrink without waiting."""
        name, body = self.dice.choice(list(INDEXES.items()))
        calm = ["VACUUM (TRUNCATE off) {t}"] * 5 + ["VACUUM (TRUNCATE off, ANALYZE) {t}", "VACUUM FULL {t}"]
        if alone:
            calm += [ONLY_OURS.replace("#", check) for check in ("repack(c.oid) >= 0", "NOT EXISTS (SELECT FROM check_store(c.oid))")]
        calm += ["CHECKPOINT"] if self.dice.random() < 0.1 else []
        if not alone:
            return self.dice.choice(calm)
        return self.dice.choice([
            # A vacuum that freezes would wait for the page that an open cursor stands on.
            *calm, "VACUUM {t}", "VACUUM {t}", "VACUUM (FREEZE) {t}", "VACUUM (DISABLE_PAGE_SKIPPING) {t}",
            "REINDEX TABLE CONCURRENTLY {t}", f"DROP INDEX CONCURRENTLY IF EXISTS {{t}}_{name}",
            f"CREATE INDEX CONCURRENTLY IF NOT EXISTS {{t}}_{name} ON {{t}} {body}",
        ])
