"""Error responses: OpenAI's object with all four keys, a request id, and no internals."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from api.app import create_app
from store import errors
from store.logs import add_ids
from store.settings import StoreSettings

JOBS = "/v1/fine_tuning/jobs"


def error(answer: httpx.Response) -> dict[str, Any]:
    """Returns the error of a response after checking its format."""
    body = answer.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert answer.headers["x-request-id"].startswith("req_")
    assert answer.headers["content-type"] == "application/json"
    return dict(body["error"])


@pytest.mark.parametrize(
    ("raised", "status", "kind", "headers"),
    [
        (errors.InvalidRequest("no", param="p"), 400, "invalid_request_error", {}),
        (errors.WrongState("no"), 400, "invalid_request_error", {}),
        (errors.Unauthenticated("no"), 401, "invalid_request_error", {"www-authenticate": "Bearer"}),
        (errors.Forbidden("no"), 403, "permission_error", {}),
        (errors.NotFound("no"), 404, "invalid_request_error", {}),
        (errors.Conflict("no"), 409, "conflict_error", {"x-should-retry": "false"}),
        (errors.TooLarge("no"), 413, "invalid_request_error", {}),
        (
            errors.RateLimited("no", limit=30, remaining=2, retry_after=67),
            429,
            "rate_limit_error",
            {
                "retry-after": "67",
                "x-ratelimit-limit-requests": "30",
                "x-ratelimit-remaining-requests": "2",
                "x-ratelimit-reset-requests": "1m7s",
            },
        ),
        (errors.Unavailable("no", retry_after=9), 503, "server_error", {"retry-after": "9"}),
        (errors.Damaged("no"), 500, "server_error", {}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_the_store_errors_have_one_map(
    settings: StoreSettings,
    serving: Callable[[FastAPI], AbstractContextManager[str]],
    client: httpx.Client,
    raised: errors.StoreError,
    status: int,
    kind: str,
    headers: dict[str, str],
) -> None:
    app = create_app(settings)

    @app.get("/raise")
    async def route() -> None:
        raise raised

    with serving(app) as url:
        answer = client.get(f"{url}/raise")
    assert answer.status_code == status
    assert error(answer) == {"message": "no", "type": kind, "param": raised.param, "code": raised.code}
    assert headers.items() <= dict(answer.headers).items()


def test_an_unexpected_exception_shows_only_its_request_id(
    settings: StoreSettings,
    serving: Callable[[FastAPI], AbstractContextManager[str]],
    client: httpx.Client,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app = create_app(settings)
    monkeypatch.setattr(caplog.handler, "filters", [add_ids])

    @app.get("/bug")
    async def bug() -> None:
        raise RuntimeError("password=hunter2")

    with serving(app) as url:
        answer = client.get(f"{url}/bug")

    assert (answer.status_code, error(answer)["type"]) == (500, "server_error")
    assert "hunter2" not in answer.text
    assert "Traceback" not in answer.text
    request_id = answer.headers["x-request-id"]
    assert request_id in error(answer)["message"]
    exceptions = [record for record in caplog.records if record.exc_info]
    assert [record.__dict__["ids"] for record in exceptions] == [{"request_id": request_id}]


class TestKeys:
    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"Authorization": "Bearer"},
            {"Authorization": "Basic YTpi"},
            {"Authorization": "Bearer heft_0123456789abcdef_nobody"},
            {"Authorization": "Bearer \xff"},
        ],
    )
    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("GET", "/v1/files"),
            ("POST", "/v1/files"),
            ("GET", JOBS),
            ("GET", "/v1/models"),
            ("DELETE", "/v1/models/x"),
            ("GET", f"{JOBS}/x/events?stream=true"),
            ("POST", "/predict"),
            ("POST", "/v1/completions"),
            ("POST", "/v1/chat/completions"),
        ],
    )
    def test_requests_without_a_key_are_refused(
        self, url: str, headers: dict[str, str], method: str, path: str
    ) -> None:
        raw = {name: value.encode("latin-1") for name, value in headers.items()}
        answer = httpx.request(method, url + path, headers=raw)
        assert (answer.status_code, error(answer)["type"]) == (401, "invalid_request_error")

    @pytest.mark.parametrize("path", ["/healthz", "/readyz", "/docs", "/openapi.json"])
    def test_health_routes_need_no_key(self, url: str, path: str) -> None:
        answer = httpx.get(url + path)
        assert answer.status_code == 200
        assert answer.headers["x-request-id"].startswith("req_")


def test_the_docs_load_nothing_from_another_site(url: str) -> None:
    page = httpx.get(f"{url}/docs").text
    addresses = re.findall(r"""(?:src|href|url)\s*[=:]\s*["']([^"']+)""", page)
    assert len(addresses) >= 3
    for address in addresses:
        assert address.startswith("/"), address
        assert not address.startswith("//")
        assert httpx.get(url + address).status_code == 200


class TestPaths:
    @pytest.mark.parametrize(
        "path", ["/", "/v1", "/v1/nothing", "/v1/files//x/y", f"{JOBS}/a/b", "/v2/files"]
    )
    def test_an_unknown_path_is_404(self, client: httpx.Client, path: str) -> None:
        answer = client.get(path)
        assert answer.status_code == 404
        assert error(answer)["type"] == "invalid_request_error"

    @pytest.mark.parametrize(
        ("method", "path"),
        [("PUT", "/v1/files"), ("DELETE", JOBS), ("GET", "/predict"), ("PATCH", "/healthz")],
    )
    def test_a_method_that_is_not_allowed_is_405(self, client: httpx.Client, method: str, path: str) -> None:
        answer = client.request(method, path)
        assert answer.status_code == 405
        assert answer.headers["allow"]
        assert error(answer)["code"] == "method_not_allowed"

    def test_large_headers_are_431(self, client: httpx.Client, settings: StoreSettings) -> None:
        for path, headers in (
            ("/healthz", {"X": "x" * settings.max_header_bytes}),
            ("/healthz?" + "x" * settings.max_header_bytes, {}),
        ):
            answer = client.get(path, headers=headers)
            assert (answer.status_code, error(answer)["code"]) == (431, "headers_too_large")

    @pytest.mark.parametrize("path", ["/v1/files/a%00b", "/v1/models/%00", f"{JOBS}?after=%00"])
    def test_a_nul_in_a_path_is_400(self, client: httpx.Client, path: str) -> None:
        answer = client.get(path)
        assert answer.status_code == 400
        assert error(answer)["type"] == "invalid_request_error"

    @pytest.mark.parametrize(
        "path",
        [
            f"{JOBS}/..%2F..%2Fetc",
            f"{JOBS}/" + "x" * 3_000,
            "/v1/models/%2Fetc%2Fpasswd",
            "/v1/models/..%2F..%2Fetc",
            "/v1/files/%F0%9F%98%80",
            "/v1/files/%ff",
        ],
    )
    def test_a_path_is_not_taken_for_an_id(self, client: httpx.Client, path: str) -> None:
        answer = client.get(path)
        assert answer.status_code == 404
        assert error(answer)["type"] == "invalid_request_error"


def post(client: httpx.Client, content: bytes | Iterator[bytes], **headers: str) -> httpx.Response:
    return client.post(JOBS, content=content, headers={"Content-Type": "application/json"} | headers)


class TestBodies:
    @pytest.mark.parametrize(
        "content", [b"{", b"nonsense", b'{"a": }', b"\xff\xfe{}", b"[" * 100_000, b'{"seed": ' + b"9" * 9_999]
    )
    def test_a_body_that_is_not_json_is_400(self, client: httpx.Client, content: bytes) -> None:
        answer = post(client, content)
        assert answer.status_code == 400
        assert error(answer)["type"] == "invalid_request_error"

    @pytest.mark.parametrize("content", [b"[]", b'"text"', b"3", b"null", b"", b"NaN"])
    def test_a_body_that_is_not_an_object_is_400(self, client: httpx.Client, content: bytes) -> None:
        answer = post(client, content)
        assert answer.status_code == 400
        assert error(answer)["type"] == "invalid_request_error"

    @pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "nonsense"])
    def test_another_content_type_is_415(self, client: httpx.Client, kind: str) -> None:
        answer = client.post(JOBS, content=b"{}", headers={"Content-Type": kind})
        assert answer.status_code == 415
        assert "application/json" in error(answer)["message"]

    @pytest.mark.parametrize("path", [JOBS, "/v1/files", "/predict"])
    @pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip"])
    def test_an_encoded_body_is_415(self, client: httpx.Client, path: str, encoding: str) -> None:
        answer = client.post(path, content=b"{}", headers={"Content-Encoding": encoding})
        assert (answer.status_code, error(answer)["code"]) == (415, "unsupported_media_type")

    @pytest.mark.parametrize("path", [JOBS, "/predict", "/v1/nothing"])
    def test_a_large_body_is_413(self, client: httpx.Client, path: str, settings: StoreSettings) -> None:
        body = json.dumps({"model": "x" * settings.max_question_bytes}).encode()
        answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, error(answer)["code"]) == (413, "too_large")

    def test_an_asynchronous_client_reads_the_refusal_of_a_body_that_it_still_sends(
        self, client: httpx.Client, url: str
    ) -> None:
        async def send() -> httpx.Response:
            async with httpx.AsyncClient(base_url=url, headers=client.headers) as sender:
                return await sender.post("/predict", content=b"x" * 20_000_000)

        answer = asyncio.run(send())
        assert (answer.status_code, error(answer)["code"]) == (413, "too_large")

    def test_a_large_body_without_a_content_length_is_413(self, client: httpx.Client) -> None:
        answer = post(client, (b"x" * 65_536 for _ in range(200)))
        assert (answer.status_code, error(answer)["code"]) == (413, "too_large")

    def test_the_largest_body_is_read(self, client: httpx.Client, settings: StoreSettings) -> None:
        head, tail = b'{"model": "', b'"}'
        answer = post(client, head + b"x" * (settings.max_job_bytes - len(head + tail)) + tail)
        assert answer.status_code == 400

    def test_an_unknown_field_is_named(self, client: httpx.Client) -> None:
        fault = error(post(client, b'{"model": "m", "training_file": "sample:passages", "modl": 1}'))
        assert (fault["param"], fault["code"]) == ("modl", "unknown_parameter")

    def test_a_missing_field_is_named(self, client: httpx.Client) -> None:
        fault = error(post(client, b'{"model": "m"}'))
        assert (fault["param"], fault["code"]) == ("training_file", "missing_required_parameter")

    def test_a_key_that_postgres_can_not_store_is_refused(self, client: httpx.Client) -> None:
        answer = post(client, b'{"model": "m", "training_file": "sample:p", "metadata": {"\\u0000": ""}}')
        assert (answer.status_code, error(answer)["param"]) == (400, "metadata")

    def test_an_error_in_a_union_names_the_setting(self, client: httpx.Client) -> None:
        method = {"type": "heft", "heft": {"lora": {"target_modules": 3}}}
        answer = client.post(JOBS, json={"model": "m", "training_file": "sample:p", "method": method})
        assert error(answer)["param"] == "method.heft.lora.target_modules"
