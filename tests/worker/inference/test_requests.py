"""Requests that their clients abandoned: found with few looks, and never a reason to fail."""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from heft_engine.errors import Overloaded
from store.messages.broker import redis_py_url
from store.messages.predict import Intervention, PredictMessage, PredictModel, PredictReply, cancelled_key
from worker.inference.requests import POLL_SECONDS, ActiveRequest, RequestAbandoned, Requests

MODEL = PredictModel(id="m", owner="o", kind="base", base_model="m", storage_key=None, manifest=None)


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def redis(redis_url: str) -> Iterator[Redis]:
    with Redis.from_url(redis_py_url(redis_url)) as connection:
        yield connection


@pytest.fixture
def requests(redis: Redis, clock: Clock) -> Requests:
    return Requests(redis, clock=clock, wall_clock=clock)


def message(request_id: str, sent_at: float) -> PredictMessage:
    return PredictMessage(
        request_id=request_id,
        model=MODEL,
        inputs=[],
        intervention=Intervention(enabled=True, scale=1.0),
        sent_at=sent_at,
        deadline=sent_at + 60,
        reply_to="replies",
    )


def polls(redis: Redis) -> int:
    stats: Any = redis.info("commandstats").get("cmdstat_mget", {"calls": 0})
    return int(stats["calls"])


def replies(redis: Redis) -> list[PredictReply]:
    payloads: Any = redis.lrange("replies", 0, -1)
    return [json.loads(payload) for payload in payloads]


@contextmanager
def opened(requests: Requests, message: PredictMessage) -> Iterator[ActiveRequest]:
    """The request, while a thread of its own answers it."""
    active: queue.SimpleQueue[ActiveRequest] = queue.SimpleQueue()
    done = threading.Event()

    def handler(request: ActiveRequest) -> None:
        active.put(request)
        assert done.wait(60)

    thread = threading.Thread(target=requests.answer, args=(message, handler))
    thread.start()
    try:
        yield active.get(timeout=60)
    finally:
        done.set()
        thread.join(60)


def test_a_cancelled_request_is_abandoned_and_no_other(
    redis: Redis, requests: Requests, clock: Clock
) -> None:
    redis.set(cancelled_key("gone"), 1)
    with (
        opened(requests, message("gone", clock.now)) as gone,
        opened(requests, message("there", clock.now)) as there,
    ):
        clock.now += POLL_SECONDS
        assert not gone.is_active()
        assert there.is_active()
        with pytest.raises(RequestAbandoned):
            gone.check_active()
    with opened(requests, message("gone", clock.now)) as again:
        assert again.is_active(), "a cancellation is forgotten with its request"


def test_an_abandoned_request_gets_no_reply(requests: Requests, clock: Clock, redis: Redis) -> None:
    def late(request: ActiveRequest) -> None:
        clock.now += 61
        request.check_active()

    assert requests.answer(message("late", clock.now), lambda request: None)
    assert not requests.answer(message("late", clock.now), late)
    assert not requests.answer(message("too late", clock.now - 61), lambda request: pytest.fail("handled"))
    assert replies(redis) == []


def test_one_poll_for_all_and_none_for_a_request_that_came_just_now(
    redis: Redis, requests: Requests, clock: Clock
) -> None:
    before = polls(redis)
    with opened(requests, message("first", clock.now)) as first:
        assert first.is_active()
        assert polls(redis) == before
        clock.now += POLL_SECONDS
        with opened(requests, message("second", clock.now - 1)) as second:
            assert all(request.is_active() for request in [first, second] * 10)
            assert polls(redis) == before + 1
            redis.set(cancelled_key("second"), 1)
            assert second.is_active()
            clock.now += POLL_SECONDS
            assert not second.is_active()
            assert polls(redis) == before + 2


def test_a_broker_that_is_away_cancels_nobody_and_is_left_alone_for_a_while(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    def handler(request: ActiveRequest) -> None:
        clock.now += 1
        assert request.is_active()
        assert len(caplog.records) == 1
        request.reply(PredictReply(request_id="one"))

    with Redis(host="127.0.0.1", port=1, retry=Retry(NoBackoff(), 0)) as nowhere:
        requests = Requests(nowhere, clock=clock, wall_clock=clock)
        assert requests.answer(message("one", clock.now - 1), handler)
    assert "no reply to one" in caplog.text


def test_an_unknown_error_is_replied_and_raised(redis: Redis, requests: Requests, clock: Clock) -> None:
    def reply_nan(request: ActiveRequest) -> None:
        request.reply({"request_id": "two", "ok": {"data": [{"probability": float("nan")}]}})  # type: ignore[typeddict-item]

    with pytest.raises(ZeroDivisionError):
        requests.answer(message("one", clock.now), lambda request: [][1 // 0])
    with pytest.raises(ValueError, match="not JSON compliant"):
        requests.answer(message("two", clock.now), reply_nan)
    assert [(reply["request_id"], reply["error"]["code"]) for reply in replies(redis)] == [
        ("one", "internal_error"),
        ("two", "internal_error"),
    ]


def test_a_worker_without_time_is_no_fault_of_the_request(
    redis: Redis, requests: Requests, clock: Clock
) -> None:
    def refuse(_: ActiveRequest) -> None:
        raise Overloaded("ask again later")

    requests.answer(message("one", clock.now), refuse)
    (reply,) = replies(redis)
    assert (reply["error"]["status"], reply["error"]["code"]) == (503, "overloaded")


@pytest.mark.parametrize(
    ("error", "signals"),
    [
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), [signal.SIGTERM]),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), [signal.SIGTERM]),
        (torch.AcceleratorError("CUDA error: out of memory"), []),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 86.00 MiB"), []),
        (RuntimeError("shapes do not match"), []),
    ],
    ids=str,
)
def test_a_failure_of_the_device_ends_the_worker_once(
    requests: Requests,
    redis: Redis,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    signals: list[signal.Signals],
) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))

    def handler(request: ActiveRequest) -> None:
        raise error

    for name in ("first", "second"):
        with pytest.raises(type(error)):
            requests.answer(message(name, clock.now), handler)
    assert sent == [(os.getpid(), number) for number in signals]
    assert [reply["error"]["code"] for reply in replies(redis)] == ["internal_error"] * 2
