"""Fixtures: a private server for the whole run, a database for each module, connections."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts" / "models"))

from cluster import Cluster, Database  # noqa: E402

VERSION = os.environ.get("TESSERA_SERVER", "15")


@pytest.fixture(scope="session")
def server():
    """A server with the extension preloaded, as `make start` has it, in a cluster of the tests' own."""
    cluster = Cluster(f"tests{VERSION}", VERSION)
    cluster.remove()
    cluster.start()
    yield cluster
    cluster.remove()


@pytest.fixture(scope="module")
def db(server, request):
    """A database with the extension, shared by the tests of a module."""
    with Database(server, request.module.__name__) as database:
        yield database


@pytest.fixture
def fresh(server):
    """A database with the extension, for one test."""
    with Database(server, "fresh") as database:
        yield database


@pytest.fixture
def conn(db):
    """An autocommit connection of a superuser to the module's database."""
    with db.connect() as connection:
        yield connection


@pytest.fixture
def folder():
    """A folder that the server can read."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="pgt.") as path:
        os.chmod(path, 0o755)
        yield Path(path)
