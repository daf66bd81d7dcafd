"""Which of the requests that wait here nobody waits for any more: the API marks them in Redis when clients go away.

One look for everything that waits, at most every quarter of a second; a request that came just now costs none. It does
NOT know what is asked, nor who runs it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from redis import Redis
from redis.exceptions import RedisError

from store.messages.predict import cancelled_key

log = logging.getLogger(__name__)

#: Between two looks; after one that failed.
LOOK_SECONDS = 0.25
_REST_SECONDS = 5.0


class Cancelled:
    """Safe to use from many threads. Redis away: nobody is known to be cancelled."""

    def __init__(
        self,
        redis: Redis,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._redis = redis
        self._clock = clock
        self._wall_clock = wall_clock
        self._lock = threading.Lock()
        self._looking = threading.Lock()
        self._sent_at: dict[str, float] = {}
        self._cancelled: set[str] = set()
        self._next_look = clock()

    @contextmanager
    def waiting(self, request_id: str, *, sent_at: float) -> Iterator[None]:
        """While the request waits and runs. `sent_at`: unix time at which the API sent it."""
        with self._lock:
            self._sent_at[request_id] = sent_at
        try:
            yield
        finally:
            with self._lock:
                self._sent_at.pop(request_id, None)
                self._cancelled.discard(request_id)

    def is_cancelled(self, request_id: str) -> bool:
        """Of a request that is `waiting`. May be a quarter of a second late."""
        sent_at = self._sent_at.get(request_id)
        if sent_at is None:
            return False
        if self._wall_clock() - sent_at >= LOOK_SECONDS:
            self._look()
        return request_id in self._cancelled

    def _look(self) -> None:
        if self._clock() < self._next_look or not self._looking.acquire(blocking=False):
            return
        try:
            with self._lock:
                waiting = list(self._sent_at)
            found = cast("list[Any]", self._redis.mget([cancelled_key(one) for one in waiting]))
            self._next_look = self._clock() + LOOK_SECONDS
            marked = {one for one, mark in zip(waiting, found, strict=True) if mark is not None}
            with self._lock:
                self._cancelled |= marked & self._sent_at.keys()
        except RedisError as fault:
            self._next_look = self._clock() + _REST_SECONDS
            log.warning("whether requests were cancelled is not known: %s", fault)
        finally:
            self._looking.release()
