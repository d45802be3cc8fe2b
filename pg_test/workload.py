"""Sessions that change tensor_block tables all at once, each with a record of what it committed.

A record is kept outside the server: what the client was told. A statement whose answer was lost may or may not have
been done; then both outcomes count as right (in doubt), and the first look after recovery decides.
"""

import hashlib
import random
import threading
import time

import numpy as np
import psycopg

import fleet_models
from cluster import Cluster
from helpers import onnx_file
from near_models import Task

SEEDS = 60
MAKE = f"""
CREATE FUNCTION value(seed int) RETURNS tensor_block LANGUAGE sql IMMUTABLE AS
    'SELECT array_agg(((i * 37 + seed * 7919) % 65521)::real ORDER BY i)::tensor_block
     FROM generate_series(1, CASE WHEN seed % 30 = 0 THEN 200000 ELSE 1 << (seed % 8 + 7) END) AS i';
CREATE FUNCTION note(seed int) RETURNS text LANGUAGE sql IMMUTABLE AS
    'SELECT string_agg(md5((seed * 1000 + i)::text), '''') FROM generate_series(1, seed % 10 * 30) AS i';
CREATE TABLE original AS SELECT seed, value(seed) AS data, note(seed) AS note FROM generate_series(1, {SEEDS}) AS seed;
CREATE TABLE held (session int, id int, seed int, version int DEFAULT 1, note text, data tensor_block, PRIMARY KEY (session, id))
    USING tensor_block;
ALTER TABLE held ALTER note SET STORAGE external;
"""
# Rows whose values are not those of their seed.
WRONG = """SELECT session, id, seed FROM held JOIN original AS o USING (seed)
           WHERE held.data::bytea IS DISTINCT FROM o.data::bytea OR held.note IS DISTINCT FROM o.note"""
CONTENTS = ["fraud_fc_256", "fraud_fc_256_tuned", "fraud_fc_512", "cnn", "matmul_1024", "matmul_1024_edited"]
TABLES = "SELECT c.oid::regclass::text FROM pg_class c JOIN pg_am a ON a.oid = relam WHERE amname = 'tensor_block' AND relkind IN ('r', 'm')"


def problems(conn: psycopg.Connection) -> list:
    """What check_store says of every tensor_block table."""
    tables = [row[0] for row in conn.execute(TABLES)]
    assert "tessera.weight" in tables
    return [(table, *row) for table in tables for row in conn.execute("SELECT * FROM check_store(%s::regclass)", (table,))]


def gone(error: psycopg.Error) -> bool:
    """True if the server went away, so that the outcome of the statement is unknown."""
    return error.sqlstate is None or error.sqlstate.startswith(("57P0", "08"))


class Session:
    """One client: its own keys, what it committed, and what it does not know."""

    def __init__(self, load: "Workload", number: int, seed: int):
        self.load, self.number, self.dice = load, number, random.Random(seed)
        self.state: dict = {}
        self.doubt: dict | None = None
        self.committed = 0
        self.what = ""

    def run(self, stop: threading.Event) -> None:
        """Works until told to stop, or until the server is gone; any other error is a failure of the test."""
        try:
            with self.load.connect() as conn:
                while not stop.is_set():
                    self.step(conn)
        except psycopg.OperationalError as error:
            if not gone(error):
                self.load.failures.append(f"session {self.number}, {self.what}: {error.sqlstate} {error}")
        except BaseException as error:  # noqa: BLE001: shown by the test
            self.load.failures.append(f"session {self.number}, {self.what}: {error!r}")

    def step(self, conn: psycopg.Connection) -> None:
        raise NotImplementedError

    def seen(self, conn: psycopg.Connection) -> dict:
        """What the server has of this session's keys."""
        return {}

    def settle(self, conn: psycopg.Connection, where: str) -> None:
        """The server has what was committed; what was in doubt is decided."""
        seen = self.seen(conn)
        if self.doubt is not None and seen == self.doubt:
            self.state = self.doubt
        lost = {key: (value, seen.get(key)) for key, value in self.state.items() if seen.get(key) != value}
        more = {key: value for key, value in seen.items() if key not in self.state}
        assert seen == self.state, f"{where}: session {self.number} misses {lost} and has {more} too, after {self.what}"
        self.doubt = None


class Rows(Session):
    """Inserts, updates and deletes rows, in transactions of a few statements; some are rolled back, some prepared."""

    def step(self, conn: psycopg.Connection) -> None:
        new, dice = dict(self.state), self.dice
        self.what = "BEGIN"
        conn.execute("BEGIN")
        for _ in range(dice.randint(1, 4)):
            self.change(conn, new, dice)
        end = dice.random()
        if end < 0.1:
            conn.execute("ROLLBACK")
            return
        self.doubt = new
        if end < 0.25 and self.load.prepares:
            self.prepared(conn, new)
        else:
            conn.execute("COMMIT")
            self.state = new
        self.doubt = None
        self.committed += 1

    def prepared(self, conn: psycopg.Connection, new: dict) -> None:
        conn.execute(f"PREPARE TRANSACTION 's{self.number}'")
        time.sleep(self.dice.uniform(0, 0.05))
        if self.dice.random() < 0.3:
            conn.execute(f"ROLLBACK PREPARED 's{self.number}'")
        else:
            conn.execute(f"COMMIT PREPARED 's{self.number}'")
            self.state = new

    def change(self, conn: psycopg.Connection, new: dict, dice: random.Random) -> None:
        session, seed = self.number, dice.randint(1, SEEDS)
        row = "SELECT %s, %s, seed, 1, note, data FROM original WHERE seed = %s"
        choice = dice.choice(["insert", "insert", "update", "touch", "delete", "copy", "upsert"])
        if choice == "insert" or not new:
            key = max(new, default=0) + 1
            self.what = f"insert {key}"
            conn.execute(f"INSERT INTO held {row}", (session, key, seed))
            new[key] = seed
            return
        key = dice.choice(list(new))
        self.what = f"{choice} {key}"
        if choice == "update":
            conn.execute("UPDATE held SET seed = o.seed, note = o.note, data = o.data FROM original AS o WHERE o.seed = %s AND (session, id) = (%s, %s)", (seed, session, key))
            new[key] = seed
        elif choice == "touch":
            conn.execute("UPDATE held SET version = version + 1 WHERE (session, id) = (%s, %s)", (session, key))
        elif choice == "delete" or len(new) > 40:
            conn.execute("DELETE FROM held WHERE (session, id) = (%s, %s)", (session, key))
            del new[key]
        elif choice == "copy":
            other = max(new) + 1
            conn.execute("INSERT INTO held SELECT session, %s, seed, 1, note, data FROM held WHERE (session, id) = (%s, %s)", (other, session, key))
            new[other] = new[key]
        else:
            conn.execute(f"INSERT INTO held {row} ON CONFLICT (session, id) DO UPDATE SET seed = excluded.seed, note = excluded.note, data = excluded.data", (session, key, seed))
            new[key] = seed

    def seen(self, conn: psycopg.Connection) -> dict:
        gid = f"s{self.number}"
        if conn.execute("SELECT 1 FROM pg_prepared_xacts WHERE gid = %s", (gid,)).fetchone():
            # Prepared before the crash, so it can still be committed.
            conn.execute(f"COMMIT PREPARED '{gid}'")
        return dict(conn.execute("SELECT id, seed FROM held WHERE session = %s", (self.number,)).fetchall())


class Models(Session):
    """Loads and drops models that share most of their blocks with those of the other sessions."""

    def step(self, conn: psycopg.Connection) -> None:
        name, content = f"m{self.number}_{self.dice.randint(1, 3)}", self.dice.choice(CONTENTS)
        if name in self.state:
            self.what = f"drop {name}"
            self.doubt = {key: value for key, value in self.state.items() if key != name}
            conn.execute("SELECT drop_model(%s)", (name,))
        else:
            self.what = f"load {name} = {content}"
            self.doubt = self.state | {name: self.load.hashes[content]}
            conn.execute("SELECT load_model(%s, %b)", (name, onnx_file(content)))
        self.state, self.doubt = self.doubt, None
        self.committed += 1

    def seen(self, conn: psycopg.Connection) -> dict:
        names = conn.execute("SELECT name FROM tessera.models WHERE name LIKE %s", (f"m{self.number}\\_%",)).fetchall()
        return {name: exported(conn, name) for (name,) in names}


def exported(conn: psycopg.Connection, name: str) -> str:
    return hashlib.sha256(conn.execute("SELECT export_model(%s)", (name,)).fetchone()[0]).hexdigest()


class Sets(Session):
    """Saves sets of models, from members and based on other sets, trains them, and drops them."""

    def step(self, conn: psycopg.Connection) -> None:
        dice, name = self.dice, f"s{self.number}_{self.dice.randint(1, 4)}"
        stored = sorted(key for key in self.state if not key.endswith("t"))
        if name in self.state or name + "t" in self.state:
            name = name if name in self.state else name + "t"
            self.what = f"drop set {name}"
            if any(key.endswith("t") and key != name for key in self.state):
                name = next(key for key in self.state if key.endswith("t"))
            self.doubt = {key: value for key, value in self.state.items() if key != name}
            conn.execute("SELECT drop_model_set(%s)", (name,))
        elif stored and dice.random() < 0.3:
            name, base = name + "t", dice.choice(stored)
            self.what = f"train set {name} of {base}"
            # What it will be is known once it is there.
            self.doubt = self.state | {name: "trained"}
            conn.execute("SELECT train_model_set(%s, %s, 'train_feed_forward', 'SELECT x, y FROM sampled ORDER BY id', '{}', ARRAY['0001'], false)", (name, base))
        else:
            turn, base = dice.randint(1, 5), dice.choice([None, *stored])
            self.what = f"save set {name} of {base}"
            architecture, parameters = fleet_models.battery_nets(20)
            parameters[:10, architecture.last_layers(1)] += np.float32(turn)
            rows = list(fleet_models.members(architecture, parameters))
            self.doubt = self.state | {name: digest(rows)}
            query = "SELECT n, m FROM unnest(ARRAY['{}'], ARRAY[{}]) AS u (n, m)"
            query = query.format("','".join(name for name, _ in rows), ",".join(f"'\\x{model.hex()}'::bytea" for _, model in rows))
            conn.execute("SELECT save_model_set(%s, %s, %s)", (name, query, base))
        self.state, self.doubt = self.doubt, None
        self.committed += 1

    def seen(self, conn: psycopg.Connection) -> dict:
        names = conn.execute("SELECT name FROM tessera.model_sets WHERE name LIKE %s", (f"s{self.number}\\_%",)).fetchall()
        seen = {}
        for (name,) in names:
            rows = conn.execute("SELECT name, model FROM recover_model_set(%s)", (name,)).fetchall()
            # Recovery compares what is trained with what it was.
            seen[name] = "trained" if name.endswith("t") else digest(rows)
        return seen


def digest(rows) -> str:
    """Of names and files of a set's members."""
    return hashlib.sha256(b"".join(name.encode() + model for name, model in sorted(rows))).hexdigest()


class Maintenance(Session):
    """Vacuums, rewrites, repacks and checkpoints."""

    JOBS = ["VACUUM held", "VACUUM held", "VACUUM tessera.weight", "VACUUM tessera.weight", "VACUUM FULL held", "CLUSTER held USING held_pkey",
            "VACUUM FULL tessera.weight", "SELECT repack('held')", "SELECT repack('tessera.weight')", "SELECT repack('held', 'session')", "CHECKPOINT", "REINDEX TABLE held",
            "VACUUM (FREEZE, DISABLE_PAGE_SKIPPING) held", "VACUUM tessera.set_block, tessera.set_map", "VACUUM FULL tessera.set_block",
            "SELECT repack('tessera.set_block', 'architecture')"]

    def step(self, conn: psycopg.Connection) -> None:
        self.what = self.dice.choice(self.JOBS)
        conn.execute(self.what)
        self.committed += 1
        time.sleep(self.dice.uniform(0, 0.1))


class Workload:
    """Three sessions of rows, two of models, one of sets of models, one of maintenance, beside a model with near duplicates."""

    def __init__(self, cluster: Cluster, seed: int, prepares: bool = False):
        self.cluster, self.prepares = cluster, prepares
        self.failures: list[str] = []
        self.hashes: dict[str, str] = {}
        self.near = ""
        kinds = [Rows, Rows, Rows, Models, Models, Maintenance, Sets]
        self.sessions = [kind(self, i, seed * 100 + i) for i, kind in enumerate(kinds)]
        self.threads: list[threading.Thread] = []
        self.stopping = threading.Event()

    def connect(self) -> psycopg.Connection:
        return self.cluster.connect()

    def prepare(self) -> None:
        """Makes the tables, and learns what each model looks like when it is read back."""
        with self.connect() as conn:
            conn.execute(MAKE)
            for content in CONTENTS:
                conn.execute("SELECT load_model('sample', %b)", (onnx_file(content),))
                self.hashes[content] = exported(conn, "sample")
                conn.execute("SELECT drop_model('sample')")
            conn.execute("CREATE TABLE sampled AS SELECT i AS id, ARRAY[i, 1, 2, 3]::real[] AS x, 0.5::real AS y FROM generate_series(1, 20) i")
            near = Task()
            near.table(conn)
            near.load(conn, "near", near.first)
            near.load(conn, "nearby", near.noised())
            report = conn.execute("SELECT merged FROM deduplicate_model('nearby', 'SELECT x, label FROM v ORDER BY id', max_drop => 0.5)").fetchone()
            assert report[0] > 0, "nothing is merged"
            self.near = exported(conn, "nearby")
        assert len(set(self.hashes.values())) == len(CONTENTS)

    def start(self) -> None:
        self.stopping.clear()
        self.threads = [threading.Thread(target=session.run, args=(self.stopping,), daemon=True) for session in self.sessions]
        for thread in self.threads:
            thread.start()

    def wait(self) -> None:
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive(), "a session hangs"
        assert not self.failures, "\n".join(self.failures)

    def stop(self) -> None:
        """Lets every session end its transaction."""
        self.stopping.set()
        self.wait()

    def check(self, where: str) -> None:
        """Nothing that was committed is lost or wrong, and every store is sound."""
        with self.connect() as conn:
            for session in self.sessions:
                session.settle(conn, where)
            assert exported(conn, "nearby") == self.near, f"{where}: the model with near duplicates has changed"
            wrong = conn.execute(WRONG).fetchall()
            assert not wrong, f"{where}: rows with wrong values: {wrong}"
            found = problems(conn)
            assert not found, f"{where}: {found}"

    def committed(self) -> int:
        return sum(session.committed for session in self.sessions)
