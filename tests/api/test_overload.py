"""Overload: requests are refused at once with Retry-After, and those of disconnected clients are dropped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import httpx
import pytest
import redis
from fastapi import FastAPI
from kombu import Connection

from api.admission import MIN_WAITING, Admission
from api.app import create_app
from store import keys, models
from store.db.session import SessionFactory, transaction
from store.errors import RateLimited, Unavailable
from store.messages.broker import redis_py_url
from store.messages.predict import CANCELLED_SECONDS, cancelled_key
from store.settings import StoreSettings

MODEL = "tiny"
Serving = Callable[[FastAPI], AbstractContextManager[str]]


@pytest.fixture(scope="module")
def key(sessions: SessionFactory) -> str:
    with transaction(sessions) as session:
        models.offer_base(session, model_id=MODEL, source="directory", info={})
        return keys.create(session, owner_id="someone", name="test")


@pytest.fixture
def ask(settings: StoreSettings, serving: Serving, key: str) -> Iterator[Callable[..., httpx.Response]]:
    """Sends rows to an API that lets 8 rows wait and 6 requests queue in the broker; no worker runs."""
    with redis.Redis.from_url(redis_py_url(settings.redis_url)) as connection:
        connection.flushdb()
    tight = settings.model_copy(update={"predict_max_waiting": 8, "predict_max_queued": 6})
    with (
        serving(create_app(tight)) as url,
        httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=20) as client,
    ):

        def post(rows: int, timeout: float = 20) -> httpx.Response:
            body = {"model": MODEL, "inputs": [{"question": "q"}] * rows}
            return client.post("/predict", json=body, timeout=timeout)

        yield post


def queued(settings: StoreSettings) -> int:
    with redis.Redis.from_url(redis_py_url(settings.redis_url)) as connection:
        return int(connection.llen("predict"))  # type: ignore[arg-type]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline


def test_rows_above_the_limit_are_refused_at_once(
    settings: StoreSettings, ask: Callable[..., httpx.Response]
) -> None:
    with ThreadPoolExecutor(2) as threads:
        large = threads.submit(ask, 20)  # finds nobody waiting
        until(lambda: queued(settings) == 1)
        refused = ask(1)
        assert not large.done(), "refused while the first one waits"
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert refused.headers["x-ratelimit-limit-requests"] == "8"
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert refused.headers["x-ratelimit-reset-requests"] == f"{refused.headers['retry-after']}s"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert large.result().status_code == 503, "nobody answers it"
    assert ask(1).status_code == 503, "let in again"
    assert queued(settings) == 2, "what was refused has sent nothing"


def test_a_full_broker_gets_no_more_messages(
    settings: StoreSettings, ask: Callable[..., httpx.Response]
) -> None:
    with Connection(settings.redis_url) as broker, broker.SimpleQueue("predict") as queue:
        for number in range(6):
            queue.put(number)
    answers = [ask(1) for _ in range(3)]
    refused = answers[-1]
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    with redis.Redis.from_url(redis_py_url(settings.redis_url)) as connection:
        connection.delete("predict")
    until(lambda: ask(1).json()["error"]["code"] == "model_not_ready")


def test_a_disconnected_client_cancels_its_request(
    settings: StoreSettings, ask: Callable[..., httpx.Response]
) -> None:
    with pytest.raises(httpx.ReadTimeout):
        ask(8, timeout=0.5)
    with redis.Redis.from_url(redis_py_url(settings.redis_url)) as connection:
        until(lambda: len(list(connection.scan_iter("heft:cancelled:*"))) == 1)
        (marked,) = connection.scan_iter("heft:cancelled:*")
        assert marked.decode().startswith(cancelled_key("req_"))
        assert 0 < connection.ttl(marked) <= CANCELLED_SECONDS  # type: ignore[operator]
    until(lambda: ask(8).json()["error"]["code"] == "model_not_ready")  # nobody waits in front of it


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def admission(clock: Clock, **changes: int) -> Admission:
    bounds = {"max_waiting": 4_000, "max_queued": 10, **changes}
    return Admission(**bounds, timeout=30, queued=lambda: 0, clock=clock)  # type: ignore[arg-type]


def test_no_more_rows_wait_than_the_rate_answers_in_time() -> None:
    clock = Clock()
    door = admission(clock)
    for _ in range(10):  # ten rows a second
        with door.admit(10):
            clock.now += 1
    assert door.rate == pytest.approx(10, rel=0.05)
    with door.admit(200):
        with pytest.raises(RateLimited) as refused:
            door.admit(100).__enter__()
        assert 7 <= refused.value.retry_after <= 9, "75 rows too many, at ten a second"
        with pytest.raises(RateLimited) as another:
            door.admit(100).__enter__()
        assert 16 <= another.value.retry_after <= 19, "and the 100 before it"
        with door.admit(20) as limit:
            assert door.waiting == 220
            assert (limit.limit, limit.remaining) == (225, 5)
            assert limit.reset_seconds == pytest.approx(22, rel=0.05), "220 rows, at ten a second"
    assert door.waiting == 0


def test_unanswered_rows_give_no_rate_and_a_minimum_may_always_wait() -> None:
    clock = Clock()
    door = admission(clock)
    with door.admit(100):
        clock.now += 10

    def in_vain(fault: BaseException) -> None:
        with door.admit(500):
            clock.now += 30
            raise fault

    for fault in (Unavailable("away"), asyncio.CancelledError()):
        with pytest.raises(type(fault)):
            in_vain(fault)
    assert door.rate is not None
    assert door.rate < 1
    with door.admit(1), door.admit(MIN_WAITING - 1), pytest.raises(RateLimited):
        door.admit(1).__enter__()


def test_idle_time_does_not_lower_the_rate_and_the_rate_decays() -> None:
    clock = Clock()
    door = admission(clock)
    with door.admit(100):
        clock.now += 10
    clock.now += 10
    assert door.rate == pytest.approx(10, rel=0.2)
    clock.now += 300
    assert door.rate is None
