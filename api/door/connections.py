"""Limits of connections that uvicorn lacks: their number, in all and by address, and the time and size of headers.

uvicorn limits headers with h11 only, knows no deadline for them, and counts connections once a request is there. This
is its protocol on httptools with those added. The deadline of bodies is in `api.door.bodies`.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from api.door.addresses import counted_address
from api.errors import error_response
from api.rate_limits import RateLimit
from store.settings import StoreSettings, settings

#: Descriptors for databases, brokers, files and logs.
_OTHER_DESCRIPTORS = 256
#: For a client with too many connections to try again.
_RETRY_SECONDS = 2
#: A chunk of one byte is sent as six.
_FRAMING = 6

#: Of the rest of a body whose request has been answered. Many clients read no response before they have sent all.
_MAX_DISCARDED_BYTES = 32 * 1024**2

#: The number of connections of each address.
_addresses: WeakKeyDictionary[ServerState, Counter[str]] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """Limits of a server's connections."""

    total: int
    per_address: int
    header_seconds: (
        float  #: from a request's first byte, or the connection's start, to the end of its headers
    )
    header_bytes: int
    read_seconds: float = 60.0  #: without a byte read of a response that waits to be sent

    @classmethod
    def of(cls, chosen: StoreSettings) -> ConnectionLimits:
        """Returns the chosen limits, with no more connections than this process may open files."""
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        total = chosen.max_connections
        if descriptors != resource.RLIM_INFINITY:
            total = max(1, min(total, descriptors - _OTHER_DESCRIPTORS))
        return cls(
            total=total,
            per_address=chosen.max_connections_per_client,
            header_seconds=chosen.header_seconds,
            header_bytes=chosen.max_header_bytes,
        )


@cache
def _process_limits() -> ConnectionLimits:
    return ConnectionLimits.of(settings())


def _error_log() -> logging.Logger:
    """Returns uvicorn's logger without its warnings of invalid requests, with which any client could fill the log."""
    log = logging.getLogger("uvicorn.error.connections")
    if log.level != logging.ERROR:  # a later configuration of uvicorn's logging resets it
        log.setLevel(logging.ERROR)
    return log


class PipelinedRequest(Exception):
    """A request that was sent before the one ahead of it was answered."""


class LimitedProtocol(HttpToolsProtocol):
    """A connection with limits, those of the process's settings. The server makes one for each."""

    def __init__(self, *args: Any, limits: ConnectionLimits | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logger = _error_log()
        self._limits = limits or _process_limits()
        self._counts = _addresses.setdefault(self.server_state, Counter())
        self._address = ""
        self._deadline: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._in_headers = False
        self._received_bytes = 0  #: of the message at hand
        self._body_bytes = 0
        self._discarded_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._address = counted_address(self.client[0]) if self.client else ""
        self._counts[self._address] += 1
        if len(self.connections) > self._limits.total:
            self._refuse(503, "the service has too many open connections")
        elif self._counts[self._address] > self._limits.per_address:
            limit = RateLimit(limit=self._limits.per_address, remaining=0, reset_seconds=_RETRY_SECONDS)
            message = "too many open connections from this address"
            self._refuse(429, message, limit.headers() | {"Retry-After": str(_RETRY_SECONDS)})
        else:
            self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_deadline()
        self._stop_waiting_for_reader()
        self._counts[self._address] -= 1
        if self._counts[self._address] <= 0:
            del self._counts[self._address]
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._received_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        # The rest is headers, trailers, and the framing of chunks.
        rest = self._received_bytes - self._body_bytes
        if rest > self._limits.header_bytes + _FRAMING * self._body_bytes:
            self._refuse(431, f"the headers are larger than {self._limits.header_bytes:,} bytes")
        elif not self._is_answering and self._deadline is None and self.timeout_keep_alive_task is None:
            self._expect_headers()

    def on_message_begin(self) -> None:
        self._unset_keepalive_if_required()
        self._in_headers = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._stop_deadline()
        if self._is_answering:
            # Requests sent ahead of their turn would wait in memory without bound, and hide a disconnection from the
            # one that is being answered. No client of today sends them: the connection is closed.
            raise PipelinedRequest
        super().on_headers_complete()
        self._in_headers = False

    def pause_writing(self) -> None:
        """Gives the client a time to read: it holds a connection until then."""
        super().pause_writing()
        self._unread = self.loop.call_later(self._limits.read_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_waiting_for_reader()
        super().resume_writing()

    def _stop_waiting_for_reader(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self.cycle.response_complete:
            self._discarded_bytes += len(body)
            if self._discarded_bytes > _MAX_DISCARDED_BYTES:
                self.transport.close()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._received_bytes = self._body_bytes = self._discarded_bytes = 0
        super().on_message_complete()
        if (
            not self._is_answering
        ):  # the answer came first, and now the rest of the body: the connection is idle
            self._stop_deadline()
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def send_400_response(self, msg: str) -> None:
        """Refuses bytes that are no HTTP, in the API's own format."""
        self._refuse(400, "this is not a valid HTTP request")

    @property
    def _is_answering(self) -> bool:
        """True until a client has its response, which may be before the application has ended it.

        Of a streamed file the last byte of its Content-Length is sent before the end of the stream. A client may send
        its next request at once, and uvicorn starts it when the first one has ended.
        """
        if self.cycle is None or self.cycle.response_complete:
            return False
        cycle = self.cycle
        is_sent = cycle.chunked_encoding is False and cycle.expected_content_length == 0
        return not (cycle.response_started and is_sent)

    def _expect_headers(self) -> None:
        """Closes the connection unless a request's headers are complete in time."""
        self._deadline = self.loop.call_later(self._limits.header_seconds, self._give_up)

    def _give_up(self) -> None:
        self._deadline = None
        self._refuse(408, "the headers arrive too slowly")

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        """Closes the connection, with an error response unless the request has one, complete or under way.

        A client that sends nothing after an answer would take this one for that of its next request.
        """
        self._stop_deadline()
        if self.transport.is_closing():
            return
        if self._is_answering:
            self.transport.abort()
            return
        if self.cycle is not None and not self._in_headers:
            self.transport.close()
            return
        response = error_response(status, message, headers={"Connection": "close", **(headers or {})})
        lines = b"".join(name + b": " + value + b"\r\n" for name, value in response.raw_headers)
        self.transport.write(STATUS_LINE[status] + lines + b"\r\n" + bytes(response.body))
        self.transport.close()
