"""How much something is asked for: requests of about the last minute, older ones fading."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

#: After so long a request counts by 1/e.
MEMORY_SECONDS = 60.0


class Demand:
    """An exponentially fading count. Not thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._count = 0.0
        self._at = clock()

    def add(self, requests: float = 1.0) -> None:
        self._count = self.now + requests
        self._at = self._clock()

    @property
    def now(self) -> float:
        return self._count * math.exp(-(self._clock() - self._at) / MEMORY_SECONDS)
