"""Admission control: refuses requests that would not be answered in time, at once and with a Retry-After.

Two limits: the rows waiting in this process (429), and the messages waiting in the broker for all API processes (503).
Both are read from memory, so a request to an idle service costs nothing.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from redis.asyncio import Redis
from redis.exceptions import RedisError
from starlette.requests import ClientDisconnect

from api.cancellation import cancel_and_wait
from api.rate_limits import RateLimit
from store.errors import RateLimited, Unavailable

log = logging.getLogger(__name__)

#: Rows that may always wait, however slow the last answers were: another model may be faster.
MIN_WAITING = 64
#: The share of a request's timeout that it may spend waiting for its turn.
MAX_WAIT_SHARE = 0.75
#: Busy seconds and rows from which the rate is known, and decayed busy seconds under which it is unknown again.
_KNOWN_SECONDS, _KNOWN_ROWS, _UNKNOWN_SECONDS = 5.0, 16.0, 1.0
_DECAY_SECONDS = 30.0
_MAX_RETRY_SECONDS, _DEFAULT_RETRY_SECONDS = 30, 2
_BROKER_RETRY_SECONDS = 5

_SAMPLE_SECONDS = 0.25
_STALE_SECONDS = 1.5
_SAMPLE_TIMEOUT = 1.0
#: Sampling pauses this long after the last request.
_IDLE_SECONDS = 10.0


class Admission:
    """Limits the rows that wait: `with admission.admit(len(rows)): …` around everything that a request waits for.

    The limit is `max_waiting`, and once the rate of answers is known no more than are answered in time. A request is
    always admitted if none waits.
    """

    def __init__(
        self,
        *,
        max_waiting: int,
        max_queued: int,
        timeout: float,
        queued: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_waiting = max_waiting
        self._max_queued = max_queued
        self._timeout = timeout
        self._queued = queued
        self._clock = clock
        self.waiting = 0  #: rows
        self._updated_at = clock()
        self._answered = 0.0
        self._busy_seconds = 0.0
        self._rate_known = False
        self._next_turn = -math.inf  #: the earliest time for the next refused request to retry

    @contextmanager
    def admit(self, rows: int) -> Iterator[RateLimit]:
        """Gives the limit with these rows counted. Raises RateLimited or Unavailable, both with `retry_after`."""
        rate, limit = self._check(rows)
        self._advance()
        self.waiting += rows
        answered = rows
        try:
            reset_seconds = self.waiting / rate if rate else _DEFAULT_RETRY_SECONDS
            remaining = max(0, limit - self.waiting)
            yield RateLimit(limit=limit, remaining=remaining, reset_seconds=reset_seconds)
        except (Unavailable, ClientDisconnect, asyncio.CancelledError):
            answered = 0
            raise
        finally:
            self._advance()
            self.waiting -= rows
            self._answered += answered

    @property
    def rate(self) -> float | None:
        """Rows answered per second while any waited, exponentially averaged over 30 seconds; None while unknown."""
        self._advance()
        if self._busy_seconds >= _KNOWN_SECONDS and self._answered >= _KNOWN_ROWS:
            self._rate_known = True
        elif self._busy_seconds < _UNKNOWN_SECONDS:
            self._rate_known = False
        return self._answered / self._busy_seconds if self._rate_known else None

    def _check(self, rows: int) -> tuple[float | None, int]:
        """Returns the rate and the limit of rows that may wait."""
        if self._queued() >= self._max_queued:
            raise Unavailable(
                "the service is overloaded: too many requests wait for the inference workers",
                retry_after=_BROKER_RETRY_SECONDS,
                code="overloaded",
            )
        rate = self.rate
        limit = self._max_waiting
        if rate is not None:
            limit = min(limit, max(MIN_WAITING, int(rate * self._timeout * MAX_WAIT_SHARE)))
        excess = self.waiting + rows - limit
        if self.waiting and excess > 0:
            raise RateLimited(
                f"too many inputs are waiting ({self.waiting:,}): {rows:,} more would not be answered in time",
                limit=limit,
                remaining=max(0, limit - self.waiting),
                retry_after=self._retry_after(rows, excess, rate),
            )
        return rate, limit

    def _retry_after(self, rows: int, excess: int, rate: float | None) -> int:
        """Seconds until the rows would be admitted, staggered after earlier refused requests."""
        if rate is None:
            return _DEFAULT_RETRY_SECONDS
        rate = max(rate, 1e-3)
        turn = max(self._updated_at + min(excess, self.waiting) / rate, self._next_turn)
        self._next_turn = min(turn + rows / rate, self._updated_at + _MAX_RETRY_SECONDS)
        return math.ceil(min(max(turn - self._updated_at, 1.0), _MAX_RETRY_SECONDS))

    def _advance(self) -> None:
        """Decays the averages by the elapsed time, and counts it as busy if rows were waiting."""
        now = self._clock()
        elapsed, self._updated_at = now - self._updated_at, now
        decay = math.exp(-elapsed / _DECAY_SECONDS)
        self._answered *= decay
        self._busy_seconds = self._busy_seconds * decay + (elapsed if self.waiting else 0.0)


class QueueDepth:
    """The number of messages in a queue of the broker, sampled in the background while it is being read."""

    def __init__(self, redis: Redis, queue: str) -> None:
        self._redis = redis
        self._queue = queue
        self._messages = 0
        self._sampled_at = self._read_at = -math.inf
        self._is_read = asyncio.Event()
        self._sampler = asyncio.create_task(self._sample(), name="queue-depth")

    def __call__(self) -> int:
        """Returns the last sample, or 0 if it is stale. Never waits."""
        self._read_at = time.monotonic()
        self._is_read.set()
        return self._messages if time.monotonic() - self._sampled_at < _STALE_SECONDS else 0

    async def close(self) -> None:
        await cancel_and_wait(self._sampler)

    async def _sample(self) -> None:
        while True:
            if time.monotonic() - self._read_at > _IDLE_SECONDS:
                self._is_read.clear()
                await self._is_read.wait()
            try:
                async with asyncio.timeout(_SAMPLE_TIMEOUT):
                    self._messages = await self._redis.llen(self._queue)
                self._sampled_at = time.monotonic()
            except (RedisError, OSError, TimeoutError) as fault:
                log.debug("can't read the length of queue %s: %s", self._queue, fault)  # publishing raises
            await asyncio.sleep(_SAMPLE_SECONDS)
