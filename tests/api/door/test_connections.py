"""Limits of connections: number, time and size of headers. A protocol on a transport that only records."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from api.door import connections
from api.door.connections import ConnectionLimits, LimitedProtocol
from store.settings import StoreSettings

LIMITS = ConnectionLimits(total=3, per_address=2, header_seconds=60, header_bytes=1_000)
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


class Recorder(asyncio.Transport):
    """A client's end of a connection."""

    def __init__(self, host: str) -> None:
        super().__init__({"peername": (host, 1), "sockname": ("127.0.0.1", 80)})
        self.written = b""
        self.closed = asyncio.Event()
        self.aborted = False

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def close(self) -> None:
        self.closed.set()

    def abort(self) -> None:
        self.aborted = True
        self.closed.set()

    def is_closing(self) -> bool:
        return self.closed.is_set()

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    @property
    def status(self) -> int:
        return int(self.written.split()[1])

    @property
    def error(self) -> dict[str, Any]:
        return dict(json.loads(self.written.partition(b"\r\n\r\n")[2])["error"])


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse(await Request(scope, receive).body())(scope, receive, send)


Connect = Callable[..., tuple[LimitedProtocol, Recorder]]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """`connect(host)` opens a connection to one server. To be called in a running event loop."""
    config = uvicorn.Config(echo, log_config=None, ws="none")
    state = ServerState()

    def connect(
        host: str = "192.0.2.1", limits: ConnectionLimits = LIMITS
    ) -> tuple[LimitedProtocol, Recorder]:
        loop = asyncio.get_running_loop()
        protocol = LimitedProtocol(config, state, {}, loop, limits=limits)
        transport = Recorder(host)
        protocol.connection_made(transport)
        return protocol, transport

    yield connect
    assert connections._addresses[state].total() == len(state.connections)


async def finished(protocol: LimitedProtocol) -> None:
    await asyncio.gather(*protocol.tasks)


def run(test: Any) -> None:
    asyncio.run(test())


def test_connections_of_one_address_are_limited(connect: Connect) -> None:
    async def test() -> None:
        first, _ = connect()
        connect()
        refused, third = connect()
        assert (third.status, third.error["code"], third.is_closing()) == (429, "rate_limit_exceeded", True)
        assert b"x-ratelimit-limit-requests: 2\r\n" in third.written
        refused.connection_lost(None)
        assert not connect("192.0.2.2")[1].written, "another address"
        first.connection_lost(None)
        assert not connect()[1].written

    run(test)


def test_connections_in_all_are_limited(connect: Connect) -> None:
    async def test() -> None:
        for number in range(3):
            assert not connect(f"192.0.2.{number}")[1].written
        _, fourth = connect("192.0.2.9")
        assert (fourth.status, fourth.error["code"], fourth.is_closing()) == (503, "unavailable", True)

    run(test)


@pytest.mark.parametrize("start", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: a\r\nX: ", b"\r\n"])
def test_headers_that_are_not_complete_in_time_end_the_connection(connect: Connect, start: bytes) -> None:
    limits = ConnectionLimits(total=9, per_address=9, header_seconds=0.01, header_bytes=1_000)

    async def test() -> None:
        protocol, transport = connect(limits=limits)
        if start:
            protocol.data_received(start)
        await asyncio.wait_for(transport.closed.wait(), 5)
        assert (transport.status, transport.error["code"]) == (408, "request_timeout")

    run(test)


def test_requests_ahead_of_their_turn_end_the_connection(connect: Connect) -> None:
    """They would wait in memory without bound, before any key was looked at."""

    async def test() -> None:
        protocol, transport = connect()
        protocol.data_received(GET * 50)
        assert transport.aborted
        assert not protocol.pipeline
        protocol.connection_lost(None)
        await finished(protocol)

    run(test)


@pytest.mark.parametrize("requests", [1, 2])
def test_the_next_request_may_come_when_the_last_byte_is_sent(connect: Connect, requests: int) -> None:
    """A file's response ends a moment later: the file is closed first. A second request is ahead of its turn."""
    closes = asyncio.Event()

    async def send_file(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        await send({"type": "http.response.body", "body": b"file", "more_body": True})
        await closes.wait()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def test() -> None:
        protocol, transport = connect()
        protocol.app = send_file
        protocol.data_received(GET)
        await asyncio.sleep(0)
        assert transport.written.endswith(b"file")
        protocol.data_received(GET * requests)
        assert transport.aborted == (requests > 1)
        closes.set()
        for _ in range(3):
            await finished(protocol)
            await asyncio.sleep(0)
        assert transport.written.count(b"file") == (2 if requests == 1 else 1)
        if requests > 1:
            protocol.connection_lost(None)

    run(test)


def test_a_client_that_does_not_read_its_answer_is_not_waited_for(connect: Connect) -> None:
    limits = replace(LIMITS, read_seconds=0.01)

    async def test() -> None:
        protocol, transport = connect(limits=limits)
        protocol.pause_writing()
        protocol.resume_writing()
        assert protocol._unread is None
        protocol.pause_writing()
        await asyncio.wait_for(transport.closed.wait(), 5)
        assert transport.aborted

    run(test)


def test_a_second_request_has_a_deadline_too_and_an_answer_has_none(connect: Connect) -> None:
    async def test() -> None:
        protocol, transport = connect()
        protocol.data_received(GET)
        assert protocol._deadline is None
        await finished(protocol)
        assert transport.status == 200
        assert protocol._deadline is None, "uvicorn's own deadline is for idle connections"
        protocol.data_received(b"\r\n")
        assert protocol._deadline is not None
        protocol._give_up()
        assert transport.is_closing()

    run(test)


def test_a_body_that_trickles_after_its_answer_has_a_deadline(connect: Connect) -> None:
    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("no", 401)(scope, receive, send)

    async def test() -> None:
        protocol, transport = connect()
        protocol.app = refuse
        protocol.data_received(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n")
        await finished(protocol)
        assert transport.status == 401
        protocol.data_received(b"x")
        assert protocol._deadline is not None

    run(test)


@pytest.mark.parametrize("rest", [b"x" * 10, b"x" * 10 + b"\r\n", b"x"])
def test_nothing_is_written_after_an_answer_without_a_request(connect: Connect, rest: bytes) -> None:
    """A client reads what is written there as the answer to its next request."""

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("no", 413)(scope, receive, send)

    async def test() -> None:
        protocol, transport = connect(limits=replace(LIMITS, header_seconds=0.01))
        protocol.timeout_keep_alive = 0.02
        protocol.app = refuse
        protocol.data_received(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n")
        await finished(protocol)
        answer = transport.written
        protocol.data_received(rest)
        await asyncio.wait_for(transport.closed.wait(), 5)
        assert transport.written == answer

    run(test)


def test_a_request_after_a_discarded_body_is_answered(connect: Connect) -> None:
    async def test() -> None:
        protocol, _ = connect()
        protocol.data_received(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n")
        protocol.cycle.response_complete = True
        protocol.data_received(b"abc" + GET[:5])
        assert protocol.timeout_keep_alive_task is None
        assert protocol._deadline is not None
        protocol.data_received(GET[5:])
        assert protocol._deadline is None

    run(test)


def test_the_rest_of_a_body_is_discarded_up_to_a_bound(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_MAX_DISCARDED_BYTES", 1_000)

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("no", 413)(scope, receive, send)

    async def test() -> None:
        protocol, transport = connect()
        protocol.app = refuse
        for _ in range(2):
            protocol.data_received(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 900\r\n\r\n")
            await finished(protocol)
            protocol.data_received(b"x" * 900)
            assert not transport.is_closing()
        assert transport.written.count(b" 413 ") == 2
        protocol.data_received(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2000\r\n\r\n")
        await finished(protocol)
        protocol.data_received(b"x" * 1_001)
        assert transport.is_closing()

    run(test)


def test_large_headers_are_refused_before_they_are_complete(connect: Connect) -> None:
    async def test() -> None:
        protocol, transport = connect()
        protocol.data_received(b"GET / HTTP/1.1\r\nX: ")
        protocol.data_received(b"x" * 500)
        assert not transport.written
        protocol.data_received(b"x" * 500)
        assert (transport.status, transport.error["code"]) == (431, "headers_too_large")
        assert transport.is_closing()
        protocol.data_received(b"x" * 500)

    run(test)


def test_requests_on_one_connection_do_not_add_up(connect: Connect) -> None:
    async def test() -> None:
        protocol, transport = connect()
        for _ in range(100):
            protocol.data_received(GET)
            await finished(protocol)
        assert transport.written.count(b"200 OK") == 100

    run(test)


def test_a_body_in_small_chunks_is_no_header(connect: Connect) -> None:
    async def test() -> None:
        protocol, transport = connect()
        protocol.data_received(CHUNKED)
        for _ in range(1_000):
            protocol.data_received(b"1\r\nx\r\n")
        protocol.data_received(b"0\r\n\r\n")
        await finished(protocol)
        assert transport.written.endswith(b"x" * 1_000)

    run(test)


def test_large_trailers_end_the_connection(connect: Connect) -> None:
    async def test() -> None:
        protocol, transport = connect()
        protocol.data_received(CHUNKED + b"1\r\nx\r\n0\r\nX: ")
        protocol.data_received(b"x" * 2_000)
        assert transport.aborted
        protocol.connection_lost(None)
        await asyncio.gather(*protocol.tasks, return_exceptions=True)

    run(test)


@pytest.mark.parametrize(
    "start", [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"]
)
def test_no_client_fills_the_log(connect: Connect, caplog: pytest.LogCaptureFixture, start: bytes) -> None:
    async def test() -> None:
        connect()
        logging.getLogger("uvicorn.error.connections").setLevel(
            logging.NOTSET
        )  # as another configuration does
        protocol, _ = connect()
        protocol.data_received(start)
        await finished(protocol)

    with caplog.at_level(logging.WARNING):
        run(test)
    assert not caplog.records


def test_a_fault_of_the_application_is_logged(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("a fault of ours")

    async def test() -> None:
        protocol, _ = connect()
        protocol.app = fail
        protocol.data_received(GET)
        await finished(protocol)

    run(test)
    assert "a fault of ours" in caplog.text


def test_bytes_that_are_no_http_get_the_apis_own_error(connect: Connect) -> None:
    async def test() -> None:
        protocol, transport = connect()
        protocol.data_received(b"\x16\x03\x01 nonsense\r\n\r\n")
        assert (transport.status, transport.error["code"]) == (400, "invalid_request")
        assert transport.is_closing()
        assert protocol._deadline is None

    run(test)


def test_there_are_no_more_connections_than_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = StoreSettings(database_url="a", redis_url="b", artifacts_url="c", max_connections=2_048)
    for descriptors, total in ((1_024, 768), (100, 1), (65_536, 2_048), (-1, 2_048)):
        monkeypatch.setattr(connections.resource, "getrlimit", lambda _, soft=descriptors: (soft, soft))
        assert ConnectionLimits.of(chosen).total == total
