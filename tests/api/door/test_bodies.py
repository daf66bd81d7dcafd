"""Bounds of bodies by route: announced and streamed bytes, slowness, depth and number of values."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest
from asgi_calls import Exchange, scope_of
from fastapi.routing import iter_route_contexts
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.app import create_app
from api.door.bodies import (
    MAX_OTHER_BYTES,
    ArrivalRate,
    BodyMemory,
    BodyMiddleware,
    announced_length,
    bounds_by_route,
)
from store.errors import Unavailable
from store.keys import Owner
from store.settings import StoreSettings

SETTINGS = StoreSettings(
    database_url="postgresql+psycopg://nowhere/heft",
    redis_url="redis://nowhere",
    artifacts_url="file:///nowhere",
    max_question_bytes=20_000,
    max_job_bytes=10_000,
    max_file_bytes=1_000_000,
)
PATIENT = ArrivalRate(grace_seconds=60, bytes_per_second=1)
MEMORY = BodyMemory(2_000_000)


def keyed(method: str, path: str, headers: dict[str, str] | None = None, owner: str = "alice") -> Scope:
    """Returns the scope of a request whose key has been checked."""
    return scope_of(method, path, headers) | {"state": {"caller": Owner(id=owner, key_id="key")}}


class Route:
    """An application that reads its body."""

    body: bytes | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.body = await Request(scope, receive).body()
        await PlainTextResponse("ok")(scope, receive, send)


def post(path: str, *chunks: bytes, slowest: ArrivalRate = PATIENT, **more: Any) -> tuple[Exchange, Route]:
    route = Route()
    app = BodyMiddleware(route, routes=bounds_by_route(SETTINGS), slowest=slowest, memory=MEMORY)
    headers = more.pop("headers", {"transfer-encoding": "chunked"})
    return Exchange(chunks, **more).run(app, keyed("POST", path, headers)), route


def test_every_route_with_a_body_has_bounds_of_its_own() -> None:
    app = create_app(SETTINGS)
    with_body = {
        ("POST", context.path)
        for context in iter_route_contexts(app.routes)
        if getattr(context.original_route, "body_field", None) is not None
    }
    assert len(with_body) >= 6
    assert with_body | {("POST", "/v1/files")} == set(bounds_by_route(SETTINGS))


@pytest.mark.parametrize(
    ("path", "size", "setting"),
    [
        ("/predict", 20_000, "HEFT_MAX_QUESTION_BYTES"),
        ("/v1/chat/completions", 20_000, "HEFT_MAX_QUESTION_BYTES"),
        ("/v1/fine_tuning/jobs", 10_000, "HEFT_MAX_JOB_BYTES"),
        ("/v1/studies", 10_000, "HEFT_MAX_JOB_BYTES"),
        ("/v1/fine_tuning/jobs/x/cancel", MAX_OTHER_BYTES, "this route"),
    ],
)
def test_a_body_may_be_as_large_as_its_route_allows(path: str, size: int, setting: str) -> None:
    allowed, route = post(path, b"x" * (size - 1), b"x")
    assert (allowed.status, route.body) == (200, b"x" * size)
    announced, route = post(path, headers={"content-length": str(size + 1)})
    assert (announced.status, announced.received, route.body) == (413, 0, None)
    streamed, route = post(path, b"x" * size, b"x", b"y" * size)
    assert (streamed.status, streamed.received, route.body) == (413, 2, None)
    for refused in (announced, streamed):
        assert refused.error["code"] == "too_large"
        assert setting in refused.error["message"]
        assert f"{size:,}" in refused.error["message"]


def test_an_upload_is_streamed_to_its_route() -> None:
    received: list[int] = []

    async def route(scope: Scope, receive: Receive, send: Send) -> None:
        async for chunk in Request(scope, receive).stream():
            received.append(len(chunk))
        await PlainTextResponse("ok")(scope, receive, send)

    app = BodyMiddleware(route, routes=bounds_by_route(SETTINGS), slowest=PATIENT, memory=MEMORY)
    Exchange([b"x" * 10, b"y" * 20]).run(app, keyed("POST", "/v1/files"))
    assert received == [10, 20, 0]


@pytest.mark.parametrize("path", ["/predict", "/v1/fine_tuning/jobs", "/v1/fine_tuning/jobs/x/cancel"])
def test_a_body_that_trickles_is_refused(path: str) -> None:
    hasty = ArrivalRate(grace_seconds=0.01, bytes_per_second=1_000_000)
    exchange, route = post(path, b"{", slowest=hasty, hangs=True)
    assert (exchange.status, exchange.error["code"]) == (408, "request_timeout")
    assert exchange.headers["connection"] == "close"
    assert route.body is None


class Clock(asyncio.SelectorEventLoop):
    """An event loop whose time a test can move on."""

    passed = 0.0

    def time(self) -> float:
        return super().time() + self.passed


def test_a_route_that_reads_slowly_is_not_the_clients_fault() -> None:
    """The storage takes an hour for each chunk, and the client sends the next one when it is asked for."""
    received: list[bytes] = []

    class Prompt(Exchange):
        async def _call(self, app: ASGIApp, scope: Scope) -> None:
            chunks = iter([b"a", b"b", b"c"])

            async def receive() -> Message:
                await asyncio.sleep(0)
                chunk = next(chunks, None)
                return {"type": "http.request", "body": chunk or b"", "more_body": chunk is not None}

            async def send(message: Message) -> None:
                self.sent.append(message)

            await app(scope, receive, send)

    async def route(scope: Scope, receive: Receive, send: Send) -> None:
        async for chunk in Request(scope, receive).stream():
            received.append(chunk)
            loop = asyncio.get_running_loop()
            assert isinstance(loop, Clock)
            loop.passed += 3_600
        await PlainTextResponse("ok")(scope, receive, send)

    app = BodyMiddleware(route, routes=bounds_by_route(SETTINGS), slowest=PATIENT, memory=MEMORY)
    with asyncio.Runner(loop_factory=Clock) as runner:
        runner.run(Prompt()._call(app, keyed("POST", "/v1/files")))
    assert b"".join(received) == b"abc"


def test_the_time_allowed_grows_with_what_has_arrived() -> None:
    slowest = ArrivalRate(grace_seconds=30, bytes_per_second=1_000)
    assert slowest.seconds(0) == 30
    assert slowest.seconds(60_000) == 90


def test_depth_and_values_are_checked_before_the_route_parses() -> None:
    deep, route = post("/predict", b'{"inputs":' + b"[" * 33)
    assert (deep.status, route.body) == (400, None)
    many, route = post("/v1/fine_tuning/jobs/x/cancel", b"[" + b"0," * 1_000 + b"0]")
    assert (many.status, many.error["code"], route.body) == (413, "too_large", None)


def test_bodies_hold_their_memory_until_their_requests_end() -> None:
    memory = BodyMemory(15_000)
    held: list[int] = []

    async def other(scope: Scope, receive: Receive, send: Send) -> None:
        """A route during which another request arrives."""
        held.append(memory.held_bytes.total())
        second = Exchange([b"y" * 4_000, b"y" * 4_000])
        await second._call(app, keyed("POST", "/predict"))
        assert (second.status, second.error["code"]) == (503, "overloaded")
        assert second.headers["retry-after"]
        held.append(memory.held_bytes.total())
        await PlainTextResponse("ok")(scope, receive, send)

    app = BodyMiddleware(other, routes=bounds_by_route(SETTINGS), slowest=PATIENT, memory=memory)
    first = Exchange([b"x" * 7_000]).run(app, keyed("POST", "/predict"))
    assert first.status == 200
    assert held == [7_000, 7_000]
    assert memory.held_bytes == {}


def test_one_owners_slow_uploads_leave_memory_for_anothers_request() -> None:
    """Alice's bodies, one after the other, never end. Bob's question is answered all the same."""
    memory = BodyMemory(100_000)
    app = BodyMiddleware(Route(), routes=bounds_by_route(SETTINGS), slowest=PATIENT, memory=memory)

    async def test() -> None:
        flood = [Exchange([b"x" * 10_000], hangs=True) for _ in range(20)]
        calls = [asyncio.create_task(request._call(app, keyed("POST", "/predict"))) for request in flood]
        await asyncio.sleep(0)
        refused = [request for request in flood if request.sent]
        assert [request.error["code"] for request in refused] == ["overloaded"] * 15
        assert memory.held_bytes == {"alice": 50_000}
        question = Exchange([b"y" * 20_000])
        await question._call(app, keyed("POST", "/predict", owner="bob"))
        assert question.status == 200
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        assert memory.held_bytes == {}

    asyncio.run(test())


def test_owners_share_the_memory_evenly_and_some_is_always_left() -> None:
    memory = BodyMemory(100_000)
    for owner in ("alice", "bob", "carol"):
        for _ in range(100):
            with suppress(Unavailable):
                memory.take(owner, 1_000)
    assert memory.held_bytes == {"alice": 50_000, "bob": 25_000, "carol": 12_000}
    memory.take("dave", 6_000)
    memory.give_back("alice", 50_000)
    for _ in range(100):
        with suppress(Unavailable):
            memory.take("carol", 1_000)
    assert memory.held_bytes["carol"] == 34_000, "as much as remains free"


def test_a_request_without_a_key_holds_no_memory() -> None:
    received: list[bool] = []

    async def probe(scope: Scope, receive: Receive, send: Send) -> None:
        received.append(MEMORY.held_bytes == {})
        await PlainTextResponse("ok")(scope, receive, send)

    app = BodyMiddleware(probe, routes=bounds_by_route(SETTINGS), slowest=PATIENT, memory=MEMORY)
    request = Exchange([b"x" * 10_000]).run(app, scope_of("POST", "/healthz"))
    assert (request.status, request.received, received) == (200, 0, [True])


def test_a_body_that_is_refused_gives_its_memory_back() -> None:
    for path, chunks in (("/predict", [b"x" * 20_000, b"x"]), ("/predict", [b"[" * 50])):
        post(path, *chunks)
    assert MEMORY.held_bytes == {}


def test_a_client_that_disconnects_gets_no_route() -> None:
    class Gone(Exchange):
        def _messages(self) -> Any:
            yield {"type": "http.request", "body": b"{", "more_body": True}
            yield {"type": "http.disconnect"}

    route = Route()
    app = BodyMiddleware(route, routes=bounds_by_route(SETTINGS), slowest=PATIENT, memory=MEMORY)
    exchange = Gone().run(app, keyed("POST", "/predict"))
    assert (exchange.sent, route.body) == ([], None)


@pytest.mark.parametrize(
    ("length", "announced"),
    [("70", 70), ("0" * 5_000 + "70", 70), ("9" * 5_000, int("9" * 20)), ("-1", 0), ("²", 0)],
)
def test_announced_lengths_of_any_form_are_numbers(length: str, announced: int) -> None:
    """int() raises for more than 4,300 digits: it was a 500 for anybody."""
    assert announced_length(Headers({"content-length": length})) == announced
