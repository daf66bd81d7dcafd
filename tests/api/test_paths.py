"""Paths as base URLs make them: with a slash too many."""

from __future__ import annotations

import httpx
import pytest


@pytest.mark.parametrize(
    "path", ["/v1/models/", "//v1/models", "/v1//models", "/v1/models//", "///v1///models///"]
)
def test_slashes_too_many_change_nothing(client: httpx.Client, path: str) -> None:
    host = str(client.base_url).rstrip("/")
    answer = client.get(f"{host}{path}")
    assert answer.status_code == 200
    assert answer.json()["data"] == client.get("/v1/models").json()["data"]


@pytest.mark.parametrize("path", ["//v1/models", "/healthz/../v1/models", "//healthz/v1", "/v1/models/"])
def test_slashes_open_no_path(client: httpx.Client, path: str) -> None:
    host = str(client.base_url).rstrip("/")
    request = client.build_request("GET", host)
    request.url = request.url.copy_with(raw_path=path.encode())
    del request.headers["authorization"]
    assert client.send(request).status_code == 401


def test_probes_are_open_with_a_slash_at_their_end(client: httpx.Client) -> None:
    del client.headers["authorization"]
    assert client.get("/healthz/").status_code == 200
