"""The commands' HTTP client of the service."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from cli.errors import CommandError

#: Long, because a model that is loading answers only when it is loaded.
_READ_SECONDS = 120.0
#: `get_with_retries` gives up after the service has been down for this long.
_RETRY_SECONDS = 60.0
_PAUSE_SECONDS = 1.0

Json = dict[str, Any]


class Refused(CommandError):
    """The service responded with an error; `status` is the HTTP status."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """`with Client(url, key) as client: client.get("/v1/models")`. Raises CommandError for all errors."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {key}"}
        self._timeout = httpx.Timeout(_READ_SECONDS, connect=10)
        self._http = httpx.Client(base_url=self.url, headers=self._headers, timeout=self._timeout)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def asynchronous(self, connections: int) -> httpx.AsyncClient:
        """Returns an asynchronous httpx client of the same service, which raises httpx's errors."""
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        return httpx.AsyncClient(
            base_url=self.url, headers=self._headers, timeout=self._timeout, limits=limits
        )

    def get(self, path: str, params: Mapping[str, str | int] | None = None) -> Json:
        return self._json("GET", path, params=dict(params or {}))

    def get_with_retries(self, path: str, params: Mapping[str, str | int] | None = None) -> Json:
        """`get` that retries while the service restarts."""
        deadline = time.monotonic() + _RETRY_SECONDS
        while True:
            try:
                return self.get(path, params)
            except CommandError as error:
                is_down = not isinstance(error, Refused) or error.status >= 500
                if not is_down or time.monotonic() >= deadline:
                    raise
            time.sleep(_PAUSE_SECONDS)

    def post(self, path: str, body: Json | None = None) -> Json:
        return self._json("POST", path, json=body)

    def delete(self, path: str) -> Json:
        return self._json("DELETE", path)

    def get_all(self, path: str, params: Mapping[str, str | int] | None = None) -> Iterator[Json]:
        """Yields all items of a list, page by page."""
        after: dict[str, str] = {}
        while True:
            page = self.get(path, {"limit": 100, **(params or {}), **after})
            yield from page["data"]
            if not page.get("has_more"):
                return
            after = {"after": page["data"][-1]["id"]}

    def upload(self, path: Path, purpose: str = "fine-tune") -> Json:
        with _opened(path) as file:
            return self._json(
                "POST", "/v1/files", data={"purpose": purpose}, files={"file": (path.name, file)}
            )

    def download(self, path: str, target: Path, params: Mapping[str, str]) -> None:
        """Writes the response's body to `target`; waits while the service builds it (202)."""
        partial = target.with_name(target.name + ".partial")
        while True:
            with self._response("GET", path, params=dict(params)) as response:
                if response.status_code == 200:
                    with partial.open("wb") as file:
                        for chunk in response.iter_bytes():
                            file.write(chunk)
                    partial.replace(target)
                    return
                pause = float(response.headers.get("Retry-After", "1"))
            time.sleep(pause)

    def _json(self, method: str, path: str, **request: Any) -> Json:
        with self._response(method, path, **request) as response:
            response.read()
            value: Json = response.json()
            return value

    @contextmanager
    def _response(self, method: str, path: str, **request: Any) -> Iterator[httpx.Response]:
        try:
            with self._http.stream(method, path, **request) as response:
                if response.is_error:
                    response.read()
                    raise Refused(error_message(response), status=response.status_code)
                yield response
        except httpx.TransportError as error:
            raise CommandError(f"{self.url} does not answer ({error}): is `heft up` running?") from None


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        if error.filename is None:
            raise
        raise CommandError(f"can't read {path}: {error.strerror}") from None


def error_message(response: httpx.Response) -> str:
    """Returns the message of an error response in one line."""
    try:
        error = response.json()["error"]
        field = f" ({error['param']})" if error.get("param") else ""
        return f"{error['message']}{field}"
    except (ValueError, KeyError, TypeError):
        return f"{response.request.url} responded with status {response.status_code}"
