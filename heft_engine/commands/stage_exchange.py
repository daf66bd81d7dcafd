"""Stage results from the parent process, which alone knows whose run this is.

    this process     emits STAGE_KEYS, with the keys of its stages in order
    the parent       puts the results it has into <directory>/<key>/, complete and verified, and in any case creates
                     the file ANSWERED there at the end
    this process     continues with these results; without an answer for TIMEOUT_SECONDS, with none

New results go the other way with CHECKPOINT_SAVED, whose `key` says under which key a stage's end may be stored.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from heft_engine.events import Event, OnEvent, StageKeysData

ANSWERED = "answered"
TIMEOUT_SECONDS = 60.0
_POLL_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class RequestedStages:
    """A StageStore. `should_stop`: a run that is to stop does not wait."""

    directory: Path
    on_event: OnEvent
    should_stop: Callable[[], bool]
    timeout_seconds: float = TIMEOUT_SECONDS

    def find(self, keys: Sequence[str]) -> list[Path]:
        data = StageKeysData(keys=list(keys))
        self.on_event(Event(code="STAGE_KEYS", message="Looking for equal stages of earlier jobs", data=data))
        deadline = time.monotonic() + self.timeout_seconds
        while not (self.directory / ANSWERED).exists():
            if self.should_stop() or time.monotonic() >= deadline:
                return []
            time.sleep(_POLL_SECONDS)
        return list(takewhile(Path.is_dir, (self.directory / key for key in keys)))

    def put(self, key: str, write: Callable[[Path], None]) -> None:
        """Does nothing: the parent stores the result when it reads CHECKPOINT_SAVED."""
