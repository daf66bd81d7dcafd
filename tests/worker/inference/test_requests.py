"""Requests that their clients abandoned: found with few looks, and never a reason to fail."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from store.messages.broker import redis_py_url
from store.messages.predict import Intervention, PredictMessage, PredictModel, PredictReply, cancelled_key
from worker.inference.requests import POLL_SECONDS, RequestAbandoned, Requests

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


def test_a_cancelled_request_is_abandoned_and_no_other(
    redis: Redis, requests: Requests, clock: Clock
) -> None:
    redis.set(cancelled_key("gone"), 1)
    with (
        requests.open(message("gone", clock.now)) as gone,
        requests.open(message("there", clock.now)) as there,
    ):
        clock.now += POLL_SECONDS
        assert not gone.is_active()
        assert there.is_active()
        with pytest.raises(RequestAbandoned):
            gone.check_active()
    with requests.open(message("gone", clock.now)) as again:
        assert again.is_active(), "a cancellation is forgotten with its request"


def test_a_request_is_abandoned_after_its_deadline(requests: Requests, clock: Clock, redis: Redis) -> None:
    with requests.open(message("late", clock.now)) as late:
        clock.now += 61
        late.check_active()
    assert replies(redis) == []


def test_one_poll_for_all_and_none_for_a_request_that_came_just_now(
    redis: Redis, requests: Requests, clock: Clock
) -> None:
    before = polls(redis)
    with requests.open(message("first", clock.now)) as first:
        assert first.is_active()
        assert polls(redis) == before
        clock.now += POLL_SECONDS
        with requests.open(message("second", clock.now - 1)) as second:
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
    with Redis(host="127.0.0.1", port=1, retry=Retry(NoBackoff(), 0)) as nowhere:
        requests = Requests(nowhere, clock=clock, wall_clock=clock)
        with requests.open(message("one", clock.now - 1)) as request, caplog.at_level(logging.WARNING):
            assert request.is_active()
            clock.now += 1
            assert request.is_active()
            assert len(caplog.records) == 1
            request.reply(PredictReply(request_id="one"))
    assert "no reply to one" in caplog.text


def test_an_unknown_error_is_replied_and_raised(redis: Redis, requests: Requests, clock: Clock) -> None:
    with pytest.raises(ZeroDivisionError), requests.open(message("one", clock.now)):
        1 // 0  # noqa: B018
    with (
        pytest.raises(ValueError, match="not JSON compliant"),
        requests.open(message("two", clock.now)) as two,
    ):
        two.reply({"request_id": "two", "ok": {"data": [{"probability": float("nan")}]}})  # type: ignore[typeddict-item]
    assert [(reply["request_id"], reply["error"]["code"]) for reply in replies(redis)] == [
        ("one", "internal_error"),
        ("two", "internal_error"),
    ]
