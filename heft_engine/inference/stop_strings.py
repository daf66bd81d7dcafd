"""Stop strings in a text that comes piece by piece: never told themselves, nor anything that may become one.

It does NOT know tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


class Stops:
    """What may be told of a text so far."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.is_hit = False

    def push(self, text: str) -> str:
        """What is certain now; with the first stop string, the last that is told at all."""
        if self.is_hit:
            return ""
        self._held += text
        found = [place for place in map(self._held.find, self._stops) if place >= 0]
        if found:
            self.is_hit = True
            return self._told(min(found))
        return self._told(len(self._held) - self._doubtful())

    def flush(self) -> str:
        """What was held back, when no more comes."""
        return "" if self.is_hit else self._told(len(self._held))

    def _told(self, length: int) -> str:
        told, self._held = self._held[:length], self._held[length:]
        return told

    def _doubtful(self) -> int:
        """Characters at the end that some stop string begins with."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
