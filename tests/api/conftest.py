"""A real server on loopback, on real Postgres and Valkey: one for each module, and an owner for each test."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import uvicorn
from fastapi import FastAPI
from psycopg import sql

from api.app import create_app
from api.door.connections import ConnectionLimits, LimitedProtocol
from cli.stack.postgres import database_url as address
from store import keys
from store.db.session import SessionFactory, make_engine, session_factory, transaction
from store.settings import StoreSettings

_numbers = itertools.count()


@pytest.fixture(scope="module")
def settings(stack: Any, _template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreSettings]:
    """A migrated database, a Valkey and a folder for the tests of one module."""
    name = sql.Identifier(f"heft_api_{next(_numbers)}")
    with psycopg.connect(
        host=str(stack.postgres_socket_folder), user="app", dbname="postgres", autocommit=True
    ) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(name, sql.Identifier(_template)))
        yield StoreSettings(
            database_url=address(stack.postgres_socket_folder, name.as_string().strip('"')),
            redis_url=stack.redis_url,
            artifacts_url=tmp_path_factory.mktemp("artifacts").as_uri(),
            predict_timeout_seconds=2,
            generate_timeout_seconds=2,
            max_file_bytes=1024 * 1024,
        )
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))


@contextmanager
def _serving(app: FastAPI) -> Iterator[str]:
    limits = ConnectionLimits(total=500, per_address=500, header_seconds=30, header_bytes=32 * 1024)
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        log_level="warning",
        http=partial(LimitedProtocol, limits=limits),  # type: ignore[arg-type]
        ws="none",
    )
    server = uvicorn.Server(config)
    started = threading.Event()
    startup = server.startup

    async def announced_startup(*args: Any, **kwargs: Any) -> None:
        await startup(*args, **kwargs)
        started.set()

    server.startup = announced_startup  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert started.wait(10)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def serving() -> Callable[[FastAPI], AbstractContextManager[str]]:
    """`with serving(app) as url:` serves an app of the test's own."""
    return _serving


@pytest.fixture(scope="module")
def url(settings: StoreSettings) -> Iterator[str]:
    """The URL of a running API."""
    with _serving(create_app(settings)) as url:
        yield url


@pytest.fixture(scope="module")
def sessions(settings: StoreSettings) -> Iterator[SessionFactory]:
    """Sessions of the API's database, as a worker has them."""
    engine = make_engine(settings.database_url, pool_size=2)
    yield session_factory(engine)
    engine.dispose()


@pytest.fixture
def owner() -> str:
    """The owner of `client`'s key, used by this test only."""
    return f"owner-{next(_numbers)}"


@pytest.fixture
def make_client(url: str, sessions: SessionFactory) -> Iterator[Callable[[str], httpx.Client]]:
    """`make_client("bob")` returns a client with a new key of that owner."""
    clients: list[httpx.Client] = []

    def make(owner: str) -> httpx.Client:
        with transaction(sessions) as session:
            key = keys.create(session, owner_id=owner, name="test")
        client = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=20)
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def client(make_client: Callable[[str], httpx.Client], owner: str) -> httpx.Client:
    return make_client(owner)


@pytest.fixture
def stranger(make_client: Callable[[str], httpx.Client]) -> httpx.Client:
    """A client of another owner."""
    return make_client(f"stranger-{next(_numbers)}")


@pytest.fixture
def new_files(settings: StoreSettings) -> Callable[[], set[Path]]:
    """Returns the files that were added to storage since the test started."""
    root = Path(settings.artifacts_url.removeprefix("file://"))

    def files() -> set[Path]:
        return {path for path in root.rglob("*") if path.is_file()}

    before = files()
    return lambda: files() - before
