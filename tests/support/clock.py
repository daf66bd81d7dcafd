"""A clock that a test moves."""

from __future__ import annotations


class Clock:
    """Returns `now`, in seconds, in place of time.monotonic."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now
