"""Slows down clients that send wrong keys: a token bucket for each address, in bounded memory.

A key that was right lately is never refused here. So honest clients that share an address with a guesser (a proxy, an
office) go on, while a guesser waits. It is still looked up in the database each time: a revoked key ends at once.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from api.door.addresses import counted_address
from store.errors import RateLimited

#: Entries of each table; the one that was used least recently is dropped.
MAX_ENTRIES = 10_000

K = TypeVar("K")
V = TypeVar("V")


class WrongKeys:
    """Counts wrong keys. An address may send `per_minute` at once, and then one every 60 / `per_minute` seconds."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._tries: OrderedDict[str, tuple[float, float]] = OrderedDict()  #: tries left, and when
        self._right: OrderedDict[bytes, None] = OrderedDict()  #: digests of keys that were right lately

    def check(self, host: str, key: str) -> None:
        """Raises RateLimited if the address has no tries left and the key was not right lately."""
        if _digest(key) in self._right:
            return
        tries = self._tries_left(counted_address(host))
        if tries < 1:
            seconds = math.ceil((1 - tries) * 60 / self._per_minute)
            message = f"too many wrong API keys from this address: try again in {seconds} seconds"
            raise RateLimited(message, retry_after=seconds)

    def wrong(self, host: str, key: str) -> None:
        """Records a key that the database does not know."""
        self._right.pop(_digest(key), None)
        address = counted_address(host)
        _put(self._tries, address, (max(self._tries_left(address) - 1, 0.0), self._clock()))

    def right(self, key: str) -> None:
        """Records a key that the database knows."""
        _put(self._right, _digest(key), None)

    def _tries_left(self, address: str) -> float:
        tries, recorded_at = self._tries.get(address, (float(self._per_minute), 0.0))
        return min(tries + (self._clock() - recorded_at) * self._per_minute / 60, self._per_minute)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _put(table: OrderedDict[K, V], key: K, value: V) -> None:
    """Stores a value as the table's newest, and drops the oldest beyond MAX_ENTRIES."""
    table[key] = value
    table.move_to_end(key)
    if len(table) > MAX_ENTRIES:
        table.popitem(last=False)
