"""Requests that their clients gave up: found with few looks, and never a reason to fail."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from store.messages.broker import redis_py_url
from store.messages.predict import cancelled_key
from worker.inference.cancellations import LOOK_SECONDS, Cancelled


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
def cancelled(redis: Redis, clock: Clock) -> Cancelled:
    return Cancelled(redis, clock=clock, wall_clock=clock)


def looks(redis: Redis) -> int:
    found: Any = redis.info("commandstats").get("cmdstat_mget", {"calls": 0})
    return int(found["calls"])


def test_a_cancelled_request_is_found_and_no_other(redis: Redis, cancelled: Cancelled, clock: Clock) -> None:
    redis.set(cancelled_key("gone"), 1)
    with cancelled.waiting("gone", sent_at=clock.now), cancelled.waiting("there", sent_at=clock.now):
        clock.now += LOOK_SECONDS
        assert cancelled.is_cancelled("gone")
        assert not cancelled.is_cancelled("there")
    assert not cancelled.is_cancelled("gone"), "it waits no more"


def test_one_look_for_all_and_none_for_a_request_that_came_just_now(
    redis: Redis, cancelled: Cancelled, clock: Clock
) -> None:
    before = looks(redis)
    with cancelled.waiting("first", sent_at=clock.now):
        assert not cancelled.is_cancelled("first")
        assert looks(redis) == before
        clock.now += LOOK_SECONDS
        with cancelled.waiting("second", sent_at=clock.now - 1):
            assert not any(cancelled.is_cancelled(one) for one in ["first", "second"] * 10)
            assert looks(redis) == before + 1
            redis.set(cancelled_key("second"), 1)
            assert not cancelled.is_cancelled("second")
            clock.now += LOOK_SECONDS
            assert cancelled.is_cancelled("second")
            assert looks(redis) == before + 2


def test_a_broker_that_is_away_cancels_nobody_and_is_left_alone_for_a_while(clock: Clock) -> None:
    with Redis(host="127.0.0.1", port=1, retry=Retry(NoBackoff(), 0)) as nowhere:
        cancelled = Cancelled(nowhere, clock=clock, wall_clock=clock)
        with cancelled.waiting("one", sent_at=0):
            assert not cancelled.is_cancelled("one")
            clock.now += 1
            assert not cancelled.is_cancelled("one")
