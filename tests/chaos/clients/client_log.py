"""The client's log as JSON lines: requests, answers, missing answers, and the faults that were injected.

The verdict is based on it. Nothing in it comes from the service's own database.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


class ClientLog:
    """An append-only log, safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a")
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._started = time.monotonic()

    def write(self, kind: str, **fields: Any) -> int:
        """Appends an entry and returns its number."""
        with self._lock:
            number = next(self._numbers)
            entry = {"n": number, "t": round(time.monotonic() - self._started, 3), "kind": kind, **fields}
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
        return number

    def entries(self) -> list[Entry]:
        return list(read(self.path))

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> Iterator[Entry]:
    for line in path.read_text().splitlines():
        yield json.loads(line)
