"""Fixtures of all tests: a real Postgres and a real Valkey, started once, with an empty database of each."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
import redis
from psycopg import sql

from cli.stack.embedded import embedded_stack
from cli.stack.home import Home
from cli.stack.postgres import database_url as address

pytest_plugins = ["tiny_models", "amx_fixtures"]  # tests/support: tiny_llama_dir, make_tiny_model

# Before torch is loaded: on busy cores, threads that spin while they wait make every step several times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Child processes import this checkout, even if another one is the installed one.
_ROOT = str(Path(__file__).parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))

_TEMPLATE = "heft_template"
_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Two running servers. `database_url` here is an empty database; the fixture's is a migrated one."""

    database_url: str
    redis_url: str
    postgres_socket_folder: Path
    valkey_socket: Path


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """Postgres and Valkey of this test run, in a short folder that Postgres' own user can walk into."""
    folder = Path(tempfile.mkdtemp(prefix="heft-test-", dir="/tmp"))
    if os.geteuid() == 0:
        folder.chmod(0o711)
    try:
        with embedded_stack(Home.at(folder / "home"), durable=False) as embedded:
            yield Stack(
                database_url=embedded.database_url,
                redis_url=embedded.redis_url,
                postgres_socket_folder=embedded.postgres.socket_folder,
                valkey_socket=embedded.valkey.socket,
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def _template(stack: Stack) -> str:
    """A database that the migrations have built, once for the whole run; tests get copies."""
    from migrations import upgrade

    _administer(stack, sql.SQL("CREATE DATABASE {}").format(sql.Identifier(_TEMPLATE)))
    upgrade(address(stack.postgres_socket_folder, _TEMPLATE))
    return _TEMPLATE


@pytest.fixture
def make_database(stack: Stack, _template: str) -> Iterator[Callable[[], str]]:
    """Makes migrated, empty databases: each call gives the URL of a new one."""
    names: list[str] = []

    def make() -> str:
        name = f"heft_test_{next(_numbers)}"
        _administer(
            stack,
            sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(_template)),
        )
        names.append(name)
        return address(stack.postgres_socket_folder, name)

    yield make
    for name in names:
        _administer(stack, sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
def database_url(make_database: Callable[[], str]) -> str:
    """The URL of a migrated, empty database of this test alone."""
    return make_database()


@pytest.fixture
def redis_url(stack: Stack) -> str:
    """The URL of an empty Valkey database. Tests run one after the other, and take sixteen in turn."""
    number = next(_numbers) % 16
    client = redis.Redis(unix_socket_path=str(stack.valkey_socket), db=number)
    try:
        client.flushdb()
    finally:
        client.close()
    return f"redis+socket://{stack.valkey_socket}?virtual_host={number}"


@pytest.fixture
def artifacts_url(tmp_path: Path) -> str:
    """An empty place for bytes."""
    folder = tmp_path / "artifacts"
    folder.mkdir()
    return f"file://{folder}"


def _administer(stack: Stack, statement: sql.Composable) -> None:
    with psycopg.connect(
        host=str(stack.postgres_socket_folder), user="app", dbname="postgres", autocommit=True
    ) as connection:
        connection.execute(statement)
