"""The outermost middleware, plain ASGI: request ids, metrics, body limits, and a 500 for unexpected exceptions.

Every response has an `x-request-id`. Requests that are too large, have a content encoding or a NUL in their path are
refused here.
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


class RequestMiddleware:
    """`streamed`: (method, path) pairs of routes that stream their body and limit its size themselves."""

    def __init__(self, app: ASGIApp, *, streamed: frozenset[tuple[str, str]], metrics: ApiMetrics) -> None:
        self.app = app
        self.streamed = streamed
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, started_at = 0, time.perf_counter()

        async def send_and_record(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with self.metrics.in_flight.track_inprogress():
            try:
                await self._respond(scope, receive, send_and_record)
            finally:
                self.metrics.answered(scope, status, time.perf_counter() - started_at)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
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
                raise  # part of the response is sent: breaking the connection is all that is left
            message = f"internal error; the log of the service has details under {request_id}"
            await error_response(500, message)(scope, receive, send_with_id)


def _refusal(scope: Scope, *, streamed: bool) -> JSONResponse | None:
    """Returns an error response if the request line and headers are not acceptable."""
    headers = Headers(scope=scope)
    if "\0" in scope["path"] or b"%00" in scope["query_string"]:
        return error_response(400, "path and query must not contain NUL")
    encoding = headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        return error_response(415, f"Content-Encoding {encoding!r} is not supported")
    length = headers.get("content-length", "0")
    if not streamed and length.isdecimal() and int(length) > MAX_JSON_BYTES:
        return error_response(413, _too_large())
    return None


def _counted(receive: Receive) -> Receive:
    """Wraps `receive`; raises a 413 when a body without a Content-Length grows too large."""
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
