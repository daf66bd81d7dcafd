"""The service over HTTP, as the commands use it. It does NOT print."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from cli.errors import CommandError

#: A model that is still loading answers when it is loaded.
_READ_SECONDS = 120.0
#: How long a service that is being started again may be away before a command gives up.
_PATIENCE_SECONDS = 60.0
_PAUSE_SECONDS = 1.0

Json = dict[str, Any]


class Refused(CommandError):
    """The service answered with an error; `status` is HTTP's."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """`with Client(url, key) as client: client.get("/v1/models")`. Every fault is a CommandError."""

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
        """The same service for several requests at once. Its faults are httpx's own."""
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        return httpx.AsyncClient(
            base_url=self.url, headers=self._headers, timeout=self._timeout, limits=limits
        )

    def get(self, path: str, params: Mapping[str, str | int] | None = None) -> Json:
        return self._json("GET", path, params=dict(params or {}))

    def patient_get(self, path: str, params: Mapping[str, str | int] | None = None) -> Json:
        """`get` for watching: waits out a restart of the service."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                return self.get(path, params)
            except CommandError as error:
                away = not isinstance(error, Refused) or error.status >= 500
                if not away or time.monotonic() >= deadline:
                    raise
            time.sleep(_PAUSE_SECONDS)

    def post(self, path: str, body: Json | None = None) -> Json:
        return self._json("POST", path, json=body)

    def delete(self, path: str) -> Json:
        return self._json("DELETE", path)

    def everything(self, path: str, params: Mapping[str, str | int] | None = None) -> Iterator[Json]:
        """All items of a list, page by page."""
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
        """Write the answer's body to `target`, waiting while the service still builds it (202)."""
        partial = target.with_name(target.name + ".partial")
        while True:
            with self._answer("GET", path, params=dict(params)) as answer:
                if answer.status_code == 200:
                    with partial.open("wb") as file:
                        for chunk in answer.iter_bytes():
                            file.write(chunk)
                    partial.replace(target)
                    return
                pause = float(answer.headers.get("Retry-After", "1"))
            time.sleep(pause)

    def _json(self, method: str, path: str, **request: Any) -> Json:
        with self._answer(method, path, **request) as answer:
            answer.read()
            value: Json = answer.json()
            return value

    @contextmanager
    def _answer(self, method: str, path: str, **request: Any) -> Iterator[httpx.Response]:
        try:
            with self._http.stream(method, path, **request) as answer:
                if answer.is_error:
                    answer.read()
                    raise Refused(message_of(answer), status=answer.status_code)
                yield answer
        except httpx.TransportError as error:
            raise CommandError(f"{self.url} does not answer ({error}); is `heft up` running?") from None


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        if error.filename is None:
            raise
        raise CommandError(f"cannot read {path}: {error.strerror}") from None


def message_of(answer: httpx.Response) -> str:
    """What an error answer says, in one line."""
    try:
        error = answer.json()["error"]
        field = f" ({error['param']})" if error.get("param") else ""
        return f"{error['message']}{field}"
    except (ValueError, KeyError, TypeError):
        return f"{answer.request.url} answered {answer.status_code}"
