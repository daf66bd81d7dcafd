"""Slows down clients that send wrong keys: a token bucket for each address, in bounded memory.

A key that was right lately, in this process, is never refused here. So honest clients that share an address with a
guesser (a proxy, an office) go on, while a guesser waits. The key is still looked up in the database each time: a
revoked one ends at once.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from api.door.addresses import counted_address
from store.errors import RateLimited, Unauthenticated

#: Entries of each table; the one that was used least recently is dropped.
MAX_ENTRIES = 10_000
_ABSENT = object()

K = TypeVar("K")
V = TypeVar("V")


class WrongKeys:
    """Counts wrong keys. An address may send `per_minute` at once, and then one every 60 / `per_minute` seconds."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._tries: OrderedDict[str, tuple[float, float]] = OrderedDict()  #: tries left, and when
        self._right: OrderedDict[bytes, None] = OrderedDict()  #: digests of keys that were right lately

    @contextmanager
    def trying(self, host: str, key: str) -> Iterator[None]:
        """Inside, a key is looked up: Unauthenticated is raised for a wrong one.

        Raises RateLimited if the address has no tries left and the key was not right lately. A try is taken before the
        look-up, because many at once would all pass otherwise, and given back unless the key is wrong.
        """
        address, digest = counted_address(host), _digest(key)
        takes = digest not in self._right
        if takes:
            self._take(address)
        try:
            yield
        except Unauthenticated:
            if self._right.pop(digest, _ABSENT) is None:
                self._add(address, -1)  # it was right lately, and had taken none
            raise
        except BaseException:
            if takes:
                self._add(address, 1)
            raise
        if takes:
            self._add(address, 1)
        _put(self._right, digest, None)

    def _take(self, address: str) -> None:
        tries = self._tries_left(address)
        if tries < 1:
            seconds = math.ceil((1 - tries) * 60 / self._per_minute)
            message = f"too many wrong API keys from this address: try again in {seconds} seconds"
            raise RateLimited(message, limit=self._per_minute, retry_after=seconds)
        self._add(address, -1)

    def _add(self, address: str, tries: int) -> None:
        left = self._tries_left(address) + tries
        _put(self._tries, address, (min(max(left, 0.0), float(self._per_minute)), self._clock()))

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
