"""Stop strings in streamed text: neither a stop string nor anything that may become one is emitted."""

from __future__ import annotations

from collections.abc import Sequence


class StopStringFilter:
    """Holds back the end of a text while it may be the beginning of a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = [string for string in stop if string]
        self._buffer = ""
        self.is_matched = False

    def push(self, text: str) -> str:
        """Returns the text that can be emitted; after a match nothing more."""
        if self.is_matched:
            return ""
        self._buffer += text
        matches = [index for index in map(self._buffer.find, self._stop) if index >= 0]
        if matches:
            self.is_matched = True
            return self._emit(min(matches))
        return self._emit(len(self._buffer) - self._partial_match())

    def flush(self) -> str:
        """Returns what was held back, at the end of the text."""
        return "" if self.is_matched else self._emit(len(self._buffer))

    def _emit(self, length: int) -> str:
        text, self._buffer = self._buffer[:length], self._buffer[length:]
        return text

    def _partial_match(self) -> int:
        """Returns the length of the longest end of the buffer that a stop string begins with."""
        longest = max((len(string) - 1 for string in self._stop), default=0)
        for length in range(min(longest, len(self._buffer)), 0, -1):
            if any(string.startswith(self._buffer[-length:]) for string in self._stop):
                return length
        return 0
