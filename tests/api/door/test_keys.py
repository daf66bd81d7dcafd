"""The key is checked before one byte of the body is received, on every route; the database is asked for keys only."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import httpx
import pytest
from asgi_calls import Exchange, scope_of
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts

from api.app import create_app
from api.deps import Services
from api.door.keys import LOCAL_PATHS, OPEN_PATHS
from store import keys
from store.errors import Unauthenticated
from store.settings import StoreSettings

RIGHT, WRONG = "a-key-that-is-right", "heft_0123456789abcdef_" + "A" * 43
SETTINGS = StoreSettings(
    database_url="postgresql+psycopg://nowhere/heft",
    redis_url="redis://nowhere",
    artifacts_url="file:///nowhere",
    wrong_keys_per_minute=3,
)


class OneKey:
    """A database that knows one key."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def __call__(self, work: Callable[..., keys.Owner], key: str) -> keys.Owner:
        assert work is keys.authenticate
        self.asked.append(key)
        if key != RIGHT:
            raise Unauthenticated("unknown")
        return keys.Owner(id="me", key_id="x")


@pytest.fixture(autouse=True)
def _no_lingering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.middleware.LINGER_SECONDS", 0)


@pytest.fixture
def database() -> OneKey:
    return OneKey()


@pytest.fixture
def app(database: OneKey) -> FastAPI:
    app = create_app(SETTINGS)
    fields = dict.fromkeys(Services.__dataclass_fields__) | {"settings": SETTINGS, "database": database}
    app.state.services = Services(**cast(Any, fields))
    return app


def routes(app: FastAPI) -> list[tuple[str, str]]:
    """(method, path) of all routes of the application, with a value for each parameter."""
    return [
        (method, re.sub(r"\{[^}]*\}", "x", context.path or ""))
        for context in iter_route_contexts(app.routes)
        for method in sorted(context.methods or ())
    ]


def test_the_applications_routes_are_all_seen(app: FastAPI) -> None:
    seen = routes(app)
    assert len(seen) > 30
    for route in (("POST", "/v1/predict"), ("POST", "/v1/files"), ("GET", "/openapi.json")):
        assert route in seen


def test_every_route_refuses_without_a_key_before_the_body_is_received(app: FastAPI) -> None:
    for method, path in routes(app):
        if path in OPEN_PATHS:
            continue
        exchange = Exchange().run(app, scope_of(method, path, {"content-length": "7000000"}))
        assert (exchange.status, exchange.received) == (401, 0), path
        assert exchange.error["type"] == "invalid_request_error"
        assert exchange.headers["connection"] == "close"


@pytest.mark.parametrize("key", [WRONG, "short", "x" * 513, "not ascii \xfcber alles", "heft_x"])
def test_a_wrong_key_is_refused_before_the_body_is_received(app: FastAPI, key: str) -> None:
    headers = {"authorization": f"Bearer {key}", "transfer-encoding": "chunked"}
    exchange = Exchange().run(app, scope_of("POST", "/v1/chat/completions", headers))
    assert (exchange.status, exchange.received) == (401, 0)
    assert exchange.error["code"] == "invalid_api_key"
    assert exchange.headers["connection"] == "close"


def test_a_refusal_is_complete_before_the_connection_is_closed(app: FastAPI) -> None:
    """A proxy that is still sending the body can read it."""
    exchange = Exchange().run(app, scope_of("POST", "/predict", {"content-length": "7000000"}))
    assert [message.get("more_body") for message in exchange.sent] == [None, True, False]
    assert len(exchange.sent[1]["body"]) == int(exchange.headers["content-length"])
    with_key = {"content-length": "7000000", "authorization": f"Bearer {RIGHT}"}
    known = Exchange().run(app, scope_of("POST", "/predict", with_key))
    assert (known.status, len(known.sent)) == (413, 2)
    assert "connection" not in known.headers
    small = Exchange().run(app, scope_of("POST", "/predict", {"content-length": "70"}))
    assert "connection" not in small.headers
    assert len(small.sent) == 2


def test_the_database_is_not_asked_for_a_string_that_is_no_key(app: FastAPI, database: OneKey) -> None:
    for key in ("", "short", "x" * 513, "sixteen and m\xf6re"):
        Exchange().run(app, scope_of("GET", "/v1/files", {"authorization": f"Bearer {key}"}))
    assert database.asked == []


def test_a_new_path_needs_a_key_unless_it_is_named(app: FastAPI) -> None:
    for path in ("/new", "/v1/nothing", "/healthz/x", "/metrics/", "/docs/x", "/redoc", "//healthz/v1"):
        assert Exchange().run(app, scope_of("POST", path)).status == 401
    assert {"/healthz", "/readyz", "/docs", "/openapi.json"} == OPEN_PATHS
    assert {"/metrics"} == LOCAL_PATHS


def test_wrong_keys_are_slowed_without_asking_the_database(app: FastAPI, database: OneKey) -> None:
    def ask(key: str, host: str = "192.0.2.1") -> Exchange:
        headers = {"authorization": f"Bearer {key}"}
        return Exchange([b""]).run(app, scope_of("DELETE", "/v1/nothing", headers, host))

    assert ask(RIGHT).status == 404
    assert [ask(WRONG).status for _ in range(4)] == [401, 401, 401, 429]
    asked = len(database.asked)
    refused = ask(WRONG)
    assert (refused.status, refused.error["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(refused.headers["retry-after"]) <= 20
    assert len(database.asked) == asked
    assert ask(RIGHT).status == 404, "a key that was right lately is not slowed by others on its address"
    assert ask(WRONG, "192.0.2.2").status == 401, "another address has tries of its own"


def test_a_large_body_without_a_key_is_not_read_from_the_socket(
    settings: StoreSettings, serving: Callable[[FastAPI], AbstractContextManager[str]]
) -> None:
    """The server answers while the client still waits to be asked for its body, and closes the connection."""
    with serving(create_app(settings)) as url, httpx.Client() as client:
        sent: list[int] = []

        def body() -> Any:
            for number in range(4_000):
                sent.append(number)
                yield b"[" * 65_536

        answer = client.post(f"{url}/v1/chat/completions", content=body())
    assert answer.status_code == 401
    assert answer.headers["connection"] == "close"
    assert len(sent) < 4_000
