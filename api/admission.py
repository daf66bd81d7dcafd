"""Who may wait: a request that could not be answered in time is refused at once, with the time to come back.

Two bounds: the rows that wait in this process (429), and the messages that wait in the broker for all API processes
together (503). Both are looked up without asking anybody, so a request to an idle service pays nothing. It does NOT
know what is asked.
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
from store.errors import RateLimited, Unavailable

log = logging.getLogger(__name__)

#: So many rows may always wait, however slow the last answers were: the next ones may come from another model.
LEAST_WAITING = 64
#: The part of a request's time that may go by before its turn comes.
PATIENCE = 0.75
#: A rate counts once it was observed for so long (seconds) over so many rows, until it has faded in a long rest.
_SURE_SECONDS, _SURE_ROWS, _FADED_SECONDS = 5.0, 16.0, 1.0
_MEMORY_SECONDS = 30.0
_MOST_RETRY_SECONDS, _UNSURE_RETRY_SECONDS = 30, 2
_BROKER_RETRY_SECONDS = 5

_SAMPLE_SECONDS = 0.25
_STALE_SECONDS = 1.5
_SAMPLE_TIMEOUT = 1.0
#: Sampling goes on for so long after somebody has asked.
_AWAKE_SECONDS = 10.0


class Admission:
    """`with admission.admit(len(rows)): …` around everything that a request waits for.

    At most `max_waiting` rows wait, and once answers have been observed no more than are answered in time. A request
    that finds nobody waiting is let in whatever its size.
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
        self._at = clock()
        self._answered = 0.0
        self._busy_seconds = 0.0
        self._sure = False
        self._next_turn = -math.inf  #: when the next one who is refused may come back, if nobody left early

    @contextmanager
    def admit(self, rows: int) -> Iterator[None]:
        """Raises RateLimited or Unavailable, both with the time to come back."""
        self._refuse(rows)
        self._advance()
        self.waiting += rows
        answered = rows
        try:
            yield
        except (Unavailable, ClientDisconnect, asyncio.CancelledError):
            answered = 0
            raise
        finally:
            self._advance()
            self.waiting -= rows
            self._answered += answered

    @property
    def rate(self) -> float | None:
        """Rows a second while any waited, over the last half minute or so; None while that is not known."""
        self._advance()
        if self._busy_seconds >= _SURE_SECONDS and self._answered >= _SURE_ROWS:
            self._sure = True
        elif self._busy_seconds < _FADED_SECONDS:
            self._sure = False
        return self._answered / self._busy_seconds if self._sure else None

    def _refuse(self, rows: int) -> None:
        if self._queued() >= self._max_queued:
            raise Unavailable(
                "more is being asked than the workers can answer",
                retry_after=_BROKER_RETRY_SECONDS,
                code="overloaded",
            )
        rate = self.rate
        limit = self._max_waiting
        if rate is not None:
            limit = min(limit, max(LEAST_WAITING, int(rate * self._timeout * PATIENCE)))
        excess = self.waiting + rows - limit
        if self.waiting and excess > 0:
            raise RateLimited(
                f"{self.waiting:,} inputs are waiting already: {rows:,} more would not be answered in time",
                retry_after=self._retry_after(rows, excess, rate),
            )

    def _retry_after(self, rows: int, excess: int, rate: float | None) -> int:
        """Seconds until there is room, also for those who were sent away before: all at once, most would be again."""
        if rate is None:
            return _UNSURE_RETRY_SECONDS
        pace = max(rate, 1e-3)
        turn = max(self._at + min(excess, self.waiting) / pace, self._next_turn)
        self._next_turn = min(turn + rows / pace, self._at + _MOST_RETRY_SECONDS)
        return math.ceil(min(max(turn - self._at, 1.0), _MOST_RETRY_SECONDS))

    def _advance(self) -> None:
        """Time passes: what was observed fades, and time in which somebody waited counts."""
        now = self._clock()
        passed, self._at = now - self._at, now
        fading = math.exp(-passed / _MEMORY_SECONDS)
        self._answered *= fading
        self._busy_seconds = self._busy_seconds * fading + (passed if self.waiting else 0.0)


class QueueDepth:
    """Messages that wait in one queue of the broker, sampled in the background while anybody wants to know."""

    def __init__(self, redis: Redis, queue: str) -> None:
        self._redis = redis
        self._queue = queue
        self._messages = 0
        self._at = self._asked_at = -math.inf
        self._wanted = asyncio.Event()
        self._sampler = asyncio.create_task(self._sample(), name="queue-depth")

    def __call__(self) -> int:
        """The last sample; 0 where there is no fresh one. Never waits."""
        self._asked_at = time.monotonic()
        self._wanted.set()
        return self._messages if time.monotonic() - self._at < _STALE_SECONDS else 0

    async def close(self) -> None:
        await cancel_and_wait(self._sampler)

    async def _sample(self) -> None:
        while True:
            if time.monotonic() - self._asked_at > _AWAKE_SECONDS:
                self._wanted.clear()
                await self._wanted.wait()
            try:
                async with asyncio.timeout(_SAMPLE_TIMEOUT):
                    self._messages = await self._redis.llen(self._queue)
                self._at = time.monotonic()
            except (RedisError, OSError, TimeoutError) as fault:
                log.debug("the queue's length is not known: %s", fault)  # publishing will say so
            await asyncio.sleep(_SAMPLE_SECONDS)
