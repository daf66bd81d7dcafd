"""The Host header: loopback's names, configured ones and the service's own address; others are refused."""

from __future__ import annotations

from typing import Any

import pytest
from asgi_calls import Exchange, scope_of
from pydantic import ValidationError
from starlette.responses import PlainTextResponse

from api.app import create_app
from api.door.hosts import HostMiddleware, allowed_hosts
from store.settings import StoreSettings


def settings(**changes: Any) -> StoreSettings:
    return StoreSettings(database_url="postgresql+psycopg://x/y", redis_url="b", artifacts_url="c", **changes)


def status(name: str, server: tuple[str, int] = ("10.0.0.7", 8000), **changes: Any) -> int:
    app = HostMiddleware(PlainTextResponse("ok"), hosts=allowed_hosts(settings(**changes)))
    scope = scope_of("GET", "/metrics", {"host": name}) | {"server": server}
    return Exchange().run(app, scope).status


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "10.0.0.7:8000"]
)
def test_loopback_and_the_connections_own_address_are_allowed(host: str) -> None:
    assert status(host) == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "10.0.0.8", "", "a b", "[::2]"]
)
def test_other_names_are_refused(host: str) -> None:
    assert status(host) == 400
    assert status(host, host="0.0.0.0") == 400


def test_configured_names_are_allowed() -> None:
    names = "heft.example.org, *.lab.example"
    assert status("heft.example.org", allowed_hosts=names) == 200
    assert status("a.lab.example:443", allowed_hosts=names) == 200
    assert status("example.org", allowed_hosts=names) == 400
    assert status("lan-name:8000", host="lan-name") == 200
    assert status("[fd00::7]:8000", host="fd00::7") == 200
    assert status("0.0.0.0:8000", host="0.0.0.0") == 200, "as `heft up` prints it"
    assert status("[fd00::7]:8000", server=("fd00::7", 8000)) == 200
    assert status("anything.example", allowed_hosts="*") == 200


@pytest.mark.parametrize("names", ["*evil", "https://heft.example.org", "a b", "heft.example.org:443"])
def test_a_setting_that_is_no_name_is_refused(names: str) -> None:
    with pytest.raises(ValidationError, match="host name"):
        settings(allowed_hosts=names)


@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/docs", "/openapi.json", "/v1/files", "/predict"])
def test_every_path_is_checked_first(path: str) -> None:
    exchange = Exchange().run(create_app(settings()), scope_of("POST", path, {"host": "evil.example"}))
    assert (exchange.status, exchange.error["code"]) == (400, "host_not_allowed")
    assert exchange.headers["x-request-id"]
