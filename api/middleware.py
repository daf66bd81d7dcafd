"""The outermost layer, plain ASGI: what holds for every request and every answer, whatever happens inside.

Each is counted, and each answer gets an `x-request-id`, the answer to a bug included. Bodies are counted while
they are read, and a request that is too large, encoded or aimed at a path with a NUL ends here.
It does NOT know keys: authentication is a dependency of the routes.
"""

from __future__ import annotations

import logging
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import error_response
from api.metrics import ApiMetrics
from store.logs import bound

log = logging.getLogger(__name__)

MAX_JSON_BYTES = 8 * 1024**2


class Envelope:
    """`streamed`: the (method, path) pairs that read their body piece by piece and count it themselves."""

    def __init__(self, app: ASGIApp, *, streamed: frozenset[tuple[str, str]], metrics: ApiMetrics) -> None:
        self.app = app
        self.streamed = streamed
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, began = 0, time.perf_counter()

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with self.metrics.in_flight.track_inprogress():
            try:
                await self._answer(scope, receive, watched_send)
            finally:
                self.metrics.answered(scope, status, time.perf_counter() - began)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        streamed = (scope["method"], scope["path"]) in self.streamed
        refusal = _refusal(scope, streamed=streamed)
        if refusal is not None:
            await refusal(scope, receive, send_with_id)
            return
        try:
            with bound(request_id=request_id):
                await self.app(scope, receive if streamed else _counted(receive), send_with_id)
        except Exception:
            with bound(request_id=request_id):
                log.exception("%s %s failed", scope["method"], scope["path"])
            if started:
                raise  # half an answer is out: only a broken connection can say so
            message = f"the service made a mistake; its log says more under {request_id}"
            await error_response(500, message)(scope, receive, send_with_id)


def _refusal(scope: Scope, *, streamed: bool) -> JSONResponse | None:
    """The answer to a request that its first line and headers already rule out."""
    headers = Headers(scope=scope)
    if "\0" in scope["path"] or b"%00" in scope["query_string"]:
        return error_response(400, "a path and a query can't hold a NUL")
    encoding = headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        return error_response(415, f"Content-Encoding {encoding!r} is not accepted: send the plain bytes")
    length = headers.get("content-length", "0")
    if not streamed and length.isdecimal() and int(length) > MAX_JSON_BYTES:
        return error_response(413, _too_large())
    return None


def _counted(receive: Receive) -> Receive:
    """`receive`, ending in a 413 when the body grows too large without having said so."""
    size = 0

    async def counted() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > MAX_JSON_BYTES:
            # FastAPI lets only HTTPException through while it reads a body.
            raise HTTPException(413, _too_large())
        return message

    return counted


def _too_large() -> str:
    return f"the body is larger than {MAX_JSON_BYTES:,} bytes"
