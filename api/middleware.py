"""The outermost middleware, plain ASGI: request ids, metrics, and a 500 for unexpected exceptions.

Every response has an `x-request-id`, and the headers that its route put into `request.state.headers`. Requests with a
content encoding or a NUL in their path are refused here. A connection is closed when its request had no valid key and
is answered before a large body has been received. With a key the server reads and discards the rest, so that every
client can read the refusal (`api.door.connections`).
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.door.bodies import announced_length
from api.errors import error_response
from api.metrics import ApiMetrics
from store.logs import bound

log = logging.getLogger(__name__)

#: The server discards so much of a body that nobody wants even without a key, to keep the connection.
MAX_DISCARDED_BYTES = 64 * 1024
#: Of ": " and the line's end, which are not in the scope.
_HEADER_FRAMING = 4
#: A connection with an unread body is reset when it is closed. nginx, still sending, would then answer 502: it gets so
#: long to read the response, which is complete by its Content-Length.
LINGER_SECONDS = 0.5
_SLASHES = re.compile("/{2,}")


class RequestMiddleware:
    """Gives each request its id, and records its response."""

    def __init__(self, app: ASGIApp, *, max_header_bytes: int, metrics: ApiMetrics) -> None:
        self.app = app
        self.max_header_bytes = max_header_bytes
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope["path"] = _plain_path(scope["path"])
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
        added_headers: dict[str, str] = {}
        scope.setdefault("state", {}).update(request_id=request_id, headers=added_headers)
        started = False
        unreceived = _has_large_body(scope)

        async def receive_and_record() -> Message:
            nonlocal unreceived
            message = await receive()
            unreceived = unreceived and message.get("more_body", False)
            return message

        closes = False

        async def send_with_id(message: Message) -> None:
            nonlocal started, closes
            if message["type"] == "http.response.start":
                started, closes = True, unreceived and "caller" not in scope["state"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers.update(added_headers)
                if closes:
                    headers["connection"] = "close"
            elif closes and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await asyncio.sleep(LINGER_SECONDS)
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)

        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, send_with_id)
            return
        try:
            with bound(request_id=request_id):
                await self.app(scope, receive_and_record, send_with_id)
        except Exception:
            with bound(request_id=request_id):
                log.exception("%s %s failed", scope["method"], scope["path"])
            if started:
                raise  # part of the response is sent: breaking the connection is all that is left
            message = f"internal error; the log of the service has details under {request_id}"
            await error_response(500, message)(scope, receive, send_with_id)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        """Returns an error response if the request line and headers are not acceptable."""
        if "\0" in scope["path"] or b"%00" in scope["query_string"]:
            return error_response(400, "path and query must not contain NUL")
        size = len(scope["raw_path"]) + len(scope["query_string"])
        size += sum(len(name) + len(value) + _HEADER_FRAMING for name, value in scope["headers"])
        if size > self.max_header_bytes:
            message = (
                f"the headers are larger than the {self.max_header_bytes:,} bytes of HEFT_MAX_HEADER_BYTES"
            )
            return error_response(431, message)
        encoding = Headers(scope=scope).get("content-encoding", "identity")
        if encoding.lower() != "identity":
            return error_response(415, f"Content-Encoding {encoding!r} is not supported")
        return None


def _plain_path(path: str) -> str:
    """Returns a path without repeated slashes and without one at its end: a base URL often ends in one.

    Every layer after this one sees the same path: keys, bounds of bodies, and routes.
    """
    return _SLASHES.sub("/", path).rstrip("/") or "/"


def _has_large_body(scope: Scope) -> bool:
    """Returns whether a large body is announced, or one of unknown length."""
    headers = Headers(scope=scope)
    return "transfer-encoding" in headers or announced_length(headers) > MAX_DISCARDED_BYTES
