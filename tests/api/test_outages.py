"""A broker or database that is stopped or frozen: fast errors, nothing lost, and recovery."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
import pytest
from api_calls import JOBS, MINIMAL
from fastapi import FastAPI
from sqlalchemy import event, text
from sqlalchemy.orm import Session

from api.app import create_app
from api.database import Database
from store import models
from store.db.session import SessionFactory, transaction
from store.errors import Unavailable
from store.settings import StoreSettings

QUESTION = {"model": "tiny", "question": "is it so"}
Serving = Callable[[FastAPI], AbstractContextManager[str]]


@pytest.fixture(autouse=True)
def _tiny(sessions: SessionFactory) -> None:
    with transaction(sessions) as session:
        models.offer_base(session, model_id="tiny", source="directory", info={})


@pytest.fixture
def silent_socket(tmp_path: Path) -> Iterator[Path]:
    """A server that accepts connections and never answers."""
    path = tmp_path / "silent"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(100)
        yield path


@contextmanager
def timed(at_most: float) -> Iterator[None]:
    """Does not count the time that threads of this process, the API's among them, waited for a processor."""
    started, in_line = time.monotonic(), seconds_in_line()
    yield
    waited = seconds_in_line() - in_line
    assert time.monotonic() - started - max(waited, 0.0) < at_most


def seconds_in_line() -> float:
    """Seconds that threads of this process were ready to run while other programs had the processors (proc(5))."""
    total = 0
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            total += int((task / "schedstat").read_text().split()[1])
    return total / 1e9


class TestBroker:
    @pytest.fixture(params=["absent", "frozen"])
    def url(
        self,
        request: pytest.FixtureRequest,
        settings: StoreSettings,
        serving: Serving,
        silent_socket: Path,
        tmp_path: Path,
    ) -> Iterator[str]:
        path = silent_socket if request.param == "frozen" else tmp_path / "absent"
        address = f"redis+socket://{path}?virtual_host=0"
        away = settings.model_copy(update={"redis_url": address, "predict_timeout_seconds": 30})
        with serving(create_app(away)) as url:
            yield url

    def test_jobs_are_accepted_and_questions_refused(self, url: str, client: httpx.Client) -> None:
        for _ in range(3):
            with timed(1):
                assert client.post(url + JOBS, json=MINIMAL).status_code == 200
        assert len(client.get(JOBS).json()["data"]) == 3

        with timed(5):
            answer = client.post(f"{url}/predict", json=QUESTION)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        assert answer.headers["retry-after"]

        with timed(5):
            answer = client.get(f"{url}/readyz")
        assert (answer.status_code, answer.json()["error"]["message"]) == (
            503,
            "the message broker does not answer",
        )
        with timed(1):
            assert client.get(f"{url}/healthz").status_code == 200


class TestDatabase:
    @pytest.fixture(params=["absent", "frozen"])
    def url(
        self,
        request: pytest.FixtureRequest,
        settings: StoreSettings,
        serving: Serving,
        tmp_path: Path,
        stack: Any,
        client: httpx.Client,
    ) -> Iterator[str]:
        """The API without its Postgres, which is stopped after `client` has got its key."""
        if request.param == "absent":
            away = settings.model_copy(
                update={"database_url": f"postgresql+psycopg://app@/postgres?host={tmp_path}"}
            )
            with serving(create_app(away)) as url:
                yield url
        else:
            with serving(create_app(settings)) as url:
                assert httpx.get(f"{url}/readyz").status_code == 200
                with frozen_postgres(stack.postgres_socket_folder):
                    yield url

    def test_every_route_that_needs_the_database_fails_within_the_deadline(
        self, url: str, client: httpx.Client
    ) -> None:
        requests: list[tuple[str, str, dict[str, Any]]] = [
            ("GET", "/readyz", {}),
            ("GET", "/v1/files", {}),
            ("POST", "/v1/files", {"files": {"file": ("x", b"{}")}, "data": {"purpose": "fine-tune"}}),
            ("GET", JOBS, {}),
            ("POST", JOBS, {"json": MINIMAL}),
            ("GET", f"{JOBS}/x/events?stream=true", {}),
            ("GET", "/v1/models", {}),
            ("POST", "/predict", {"json": QUESTION}),
        ] * 4  # more than the threads that wait for the database

        def ask(request: tuple[str, str, dict[str, Any]]) -> httpx.Response:
            method, path, options = request
            with timed(5):
                return client.request(method, url + path, **options)

        with ThreadPoolExecutor(len(requests)) as threads:
            waiting = [threads.submit(ask, request) for request in requests]
            with timed(1):
                assert httpx.get(f"{url}/healthz").status_code == 200
            for future in waiting:
                answer = future.result()
                assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
                assert int(answer.headers["retry-after"]) > 0


def test_requests_work_again_after_a_frozen_database(
    client: httpx.Client, stack: Any, new_files: Callable[[], set[Path]]
) -> None:
    """A refused request is not carried out later."""
    with frozen_postgres(stack.postgres_socket_folder):
        assert client.post(JOBS, json=MINIMAL).status_code == 503
    assert client.post(JOBS, json=MINIMAL).status_code == 200
    assert len(client.get(JOBS).json()["data"]) == 1


@contextmanager
def frozen_postgres(socket_folder: Path) -> Iterator[None]:
    """Freezes all processes of a server, as on an overloaded machine."""
    with psycopg.connect(host=str(socket_folder), user="app", dbname="postgres") as connection:
        server = psutil.Process(connection.info.backend_pid).parent()
    assert server is not None
    processes = [server, *server.children(recursive=True)]
    try:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGSTOP)
        yield
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):  # the connection that asked for the pid has ended
                process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize(
    ("slow", "message", "rows"),
    [("before COMMIT", "nothing was changed", 0), ("in COMMIT", "may or may not have been", 1)],
)
def test_a_timed_out_request_says_whether_it_was_carried_out(
    sessions: SessionFactory, slow: str, message: str, rows: int
) -> None:
    """A COMMIT that hangs may still be carried out, so the error must not say that nothing was changed."""
    released = threading.Event()
    others = set(threading.enumerate())

    def offer(session: Session) -> None:
        models.offer_base(session, model_id="late", source="directory", info={})
        if slow == "before COMMIT":
            released.wait()

    def hang(_: Any) -> None:
        if slow == "in COMMIT":
            released.wait()

    engine = sessions.kw["bind"]
    event.listen(engine, "commit", hang)
    database = Database(sessions, deadline=0.5)
    try:
        with pytest.raises(Unavailable, match=message):
            asyncio.run(database(offer))
    finally:
        released.set()
        database.close()
        for thread in set(threading.enumerate()) - others:
            thread.join(10)  # it ends its transaction first, either way
        event.remove(engine, "commit", hang)
    with transaction(sessions) as session:
        count = session.execute(text("SELECT count(*) FROM base_models WHERE id = 'late'")).scalar_one()
    assert count == rows
