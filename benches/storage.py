"""What the block store costs beside heap: bulk loads, loads of what is stored, WAL, sequential reads.

One private server, all ways one after the other in each round; medians are compared, as ratios.
"""

import argparse
import os
import platform
import statistics
import struct
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts" / "models"), str(ROOT / "pg_test")]

from cluster import Cluster, Database  # noqa: E402
from helpers import onnx_file, unlike  # noqa: E402

BLOCK = 65536
TABLES = ("heap", "blocks")


class Figures:
    """Seconds (or bytes) by what they are of, round after round."""

    def __init__(self):
        self.values: dict[str, list[float]] = {}

    def add(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(value)

    def median(self, name: str) -> float:
        return statistics.median(self.values[name])


def write_copy_file(path: Path, blocks: int) -> None:
    """A binary COPY file of rows (id integer, data bytea) with distinct random blocks."""
    with path.open("wb") as out:
        out.write(b"PGCOPY\n\xff\r\n\0" + struct.pack("!ii", 0, 0))
        for number in range(blocks):
            out.write(struct.pack("!hiii", 2, 4, number, BLOCK) + os.urandom(BLOCK))
        out.write(struct.pack("!h", -1))
    path.chmod(0o644)


def timed(conn, sql: str, parameters=()) -> float:
    started = time.perf_counter()
    conn.execute(sql, parameters)
    return time.perf_counter() - started


def wal(conn) -> int:
    return int(conn.execute("SELECT pg_current_wal_insert_lsn() - '0/0'").fetchone()[0])


def bulk(conn, figures: Figures, turn: int, file: Path, blocks: int) -> None:
    """COPY of distinct blocks into either table, then of the same blocks again into the one that has them."""
    write_copy_file(file, blocks)
    for table in TABLES if turn % 2 else reversed(TABLES):
        conn.execute(f"TRUNCATE {table}")
        conn.execute("CHECKPOINT")
        before = wal(conn)
        figures.add(f"copy {table}", timed(conn, f"COPY {table} FROM '{file}' (FORMAT binary)"))
        figures.add(f"wal {table}", wal(conn) - before)
    before = wal(conn)
    figures.add("copy again", timed(conn, f"COPY blocks FROM '{file}' (FORMAT binary)"))
    figures.add("wal again", wal(conn) - before)
    stored = conn.execute("SELECT blocks_stored FROM tessera.store_totals('blocks')").fetchone()[0]
    assert stored == blocks, f"{stored} blocks stored of {blocks}"
    conn.execute("DELETE FROM blocks WHERE ctid > (SELECT max(ctid) FROM (SELECT ctid FROM blocks LIMIT %s) AS first)", (blocks,))


def reads(conn, figures: Figures, turn: int) -> None:
    """Both tables read whole, by COPY to nowhere; each once before it is timed."""
    for table in TABLES if turn % 2 else reversed(TABLES):
        sql = f"COPY (SELECT data FROM {table}) TO '/dev/null' (FORMAT binary)"
        conn.execute(sql)
        figures.add(f"read {table}", min(timed(conn, sql) for _ in range(3)))


def models(conn, figures: Figures, turn: int, file: Path) -> None:
    """A model that no round had before, then the same under another name; and its sequential read beside that of a bytea."""
    content = unlike("big_mlp", turn + 1)
    file.write_bytes(content)
    file.chmod(0o644)
    conn.execute("CHECKPOINT")
    figures.add("load first", timed(conn, "SELECT load_model_from_file('first', %s)", (str(file),)))
    figures.add("load again", timed(conn, "SELECT load_model_from_file('again', %s)", (str(file),)))
    conn.execute("CREATE TABLE whole (data bytea)")
    conn.execute("ALTER TABLE whole ALTER data SET STORAGE EXTERNAL")
    conn.execute("INSERT INTO whole VALUES (%b)", (content,))
    model = "COPY (SELECT data FROM tessera.weight) TO '/dev/null' (FORMAT binary)"
    whole = "COPY (SELECT data FROM whole) TO '/dev/null' (FORMAT binary)"
    conn.execute("SELECT drop_model('again')")
    conn.execute("VACUUM tessera.weight")
    for sql in (model, whole):
        conn.execute(sql)
    for _ in range(3):
        figures.add("read model", timed(conn, model))
        figures.add("read bytea", timed(conn, whole))
    conn.execute("DROP TABLE whole")
    conn.execute("SELECT drop_model('first')")
    conn.execute("VACUUM tessera.weight")
    conn.execute("VACUUM tessera.weight")


def report(figures: Figures, payload: int, blocks: int) -> str:
    def line(what: str, ratio: float, wanted: str) -> str:
        return f"| {what} | {ratio:.2f} | {wanted} |"

    mb = payload / 1e6
    m = figures.median
    return "\n".join([
        "| what | ratio | wanted |",
        "| --- | ---: | --- |",
        line("speed of COPY of distinct blocks : COPY into heap bytea, STORAGE EXTERNAL", m("copy heap") / m("copy blocks"), "at least 0.8"),
        line("speed of COPY of blocks that are stored : the same", m("copy heap") / m("copy again"), ""),
        line("speed of loading a stored model : loading it the first time", m("load first") / m("load again"), "at least 3"),
        line("WAL bytes : payload bytes, distinct blocks", m("wal blocks") / payload, "at most 1.1"),
        line("WAL bytes : payload bytes, heap", m("wal heap") / payload, ""),
        line("WAL bytes : payload bytes, blocks that are stored", m("wal again") / payload, "near 0"),
        line("speed of a sequential read of the blocks : heap", m("read heap") / m("read blocks"), "at least 0.9"),
        line("speed of a sequential read of a model's blocks : its bytea in heap", m("read bytea") / m("read model"), "at least 0.9"),
        "",
        f"{blocks} blocks of 64 kB, {mb:.0f} MB: COPY {mb / m('copy heap'):.0f} MB/s into heap, {mb / m('copy blocks'):.0f} MB/s into blocks,"
        f" {mb / m('copy again'):.0f} MB/s when stored; read {mb / m('read heap'):.0f} MB/s from heap, {mb / m('read blocks'):.0f} MB/s from blocks.",
    ])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=3000)
    arguments = parser.parse_args()
    settings = ("shared_buffers = 1GB", "max_wal_size = 8GB", "checkpoint_timeout = 1h", "autovacuum = off", "max_parallel_workers_per_gather = 0")
    cluster = Cluster("bench_storage", "15", settings)
    cluster.remove()
    cluster.start()
    figures = Figures()
    try:
        with Database(cluster, "storage") as database, database.connect() as conn, tempfile.TemporaryDirectory(dir="/tmp", prefix="pgt.") as folder:
            os.chmod(folder, 0o755)
            conn.execute("CREATE TABLE heap (id int, data bytea) USING heap")
            conn.execute("CREATE TABLE blocks (id int, data bytea) USING tensor_block")
            for table in TABLES:
                conn.execute(f"ALTER TABLE {table} ALTER data SET STORAGE EXTERNAL")
            assert onnx_file("big_mlp")
            for turn in range(arguments.rounds):
                print(f"round {turn + 1} of {arguments.rounds}", file=sys.stderr)
                bulk(conn, figures, turn, Path(folder, "blocks.copy"), arguments.blocks)
                reads(conn, figures, turn)
                models(conn, figures, turn, Path(folder, "model.onnx"))
            version = conn.execute("SHOW server_version").fetchone()[0]
    finally:
        cluster.remove()
    print(f"PostgreSQL {version}, {platform.machine()}, {arguments.rounds} rounds, interleaved.\n")
    print(report(figures, arguments.blocks * BLOCK, arguments.blocks))


if __name__ == "__main__":
    main()
