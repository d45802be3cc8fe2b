"""Repacking a real store with the two published sets of tensors: so many tensor pages, so many of them read for a tensor."""

import json
import os
import struct

import pytest

from paths import ROOT

DATA = ROOT / "crates" / "tensor_blocks" / "data"
# 128 x 128 float32 with dtype and shape: eight of these fill a tensor page.
BLOCK = 65548
READS = """
SELECT tensor, count(DISTINCT tensor_page) AS pages, ceil(count(DISTINCT block_id) / 8.0) AS fewest
FROM t JOIN tessera.store_blocks('t') AS b ON b.block_id = tessera.block_id(t.data) GROUP BY tensor
"""


def tensors(file: str) -> dict[str, list[int]]:
    """Block numbers by tensor; the file has them as inclusive ranges."""
    content = json.loads((DATA / file).read_text())
    return {
        tensor["name"]: [block for first, last in tensor["blocks"] for block in range(first, last + 1)]
        for tensor in content["tensors"]
    }


def fill(conn, uses: dict[str, list[int]]) -> int:
    """A table with a row for each use of a block, loaded tensor by tensor; returns how many blocks there are."""
    blocks = sorted({block for used in uses.values() for block in used})
    conn.execute("CREATE TABLE pool (block int PRIMARY KEY, data bytea) USING heap")
    conn.execute("CREATE TABLE uses (tensor text, block int)")
    conn.execute("CREATE TABLE t (tensor text, block int, data bytea, PRIMARY KEY (tensor, block)) USING tensor_block")
    for table in ("pool", "t"):
        conn.execute(f"ALTER TABLE {table} ALTER data SET STORAGE EXTERNAL")
    with conn.cursor() as cursor:
        with cursor.copy("COPY pool FROM STDIN (FORMAT binary)") as copy:
            copy.write(b"PGCOPY\n\xff\r\n\0" + struct.pack("!ii", 0, 0))
            for block in blocks:
                copy.write(struct.pack("!hiii", 2, 4, block, BLOCK) + os.urandom(BLOCK))
            copy.write(struct.pack("!h", -1))
        with cursor.copy("COPY uses FROM STDIN") as copy:
            for tensor, used in uses.items():
                for block in used:
                    copy.write_row((tensor, block))
    for tensor in uses:
        conn.execute("INSERT INTO t SELECT tensor, block, data FROM uses JOIN pool USING (block) WHERE tensor = %s ORDER BY block", (tensor,))
    return len(blocks)


def reads(conn) -> tuple[int, float]:
    """Tensor pages in use, and the read amplification over all tensors."""
    pages = conn.execute("SELECT count(DISTINCT tensor_page) FROM tessera.store_blocks('t')").fetchone()[0]
    lines = conn.execute(READS).fetchall()
    return pages, float(sum(line[1] for line in lines) / sum(line[2] for line in lines))


@pytest.mark.parametrize(("file", "blocks", "pages"), [("page_packing_text_classifiers_10000x100.json", 678, 85), ("page_packing_word2vec_10000x100.json", 750, 94)])
def test_published_tensors(fresh, file, blocks, pages):
    with fresh.connect() as conn:
        assert fill(conn, tensors(file)) == blocks
        before = reads(conn)
        assert conn.execute("SELECT repack('t')").fetchone()[0] >= blocks
        after = reads(conn)
        assert after[0] == pages
        assert after[1] <= 1.1
        assert after[1] <= before[1]
        assert conn.execute("SELECT count(*) FROM check_store('t')").fetchone()[0] == 0
        assert conn.execute("SELECT count(*) FROM t JOIN pool USING (block) WHERE t.data <> pool.data").fetchone()[0] == 0
        # So does VACUUM FULL, in a new store.
        conn.execute("VACUUM FULL t")
        assert reads(conn) == after
        assert conn.execute("SELECT count(*) FROM check_store('t')").fetchone()[0] == 0
        print(f"{file}: {before} before, {after} after")
