"""Results of stages that whoever started this process brings on request: it alone knows whose run this is.

    this process     says STAGE_KEYS, with the keys of its stages in order
    the starter      puts what it has into <directory>/<key>/, whole and verified, and last of all makes the file
                     ANSWERED there, in any case
    this process     goes on with what is there; after PATIENCE seconds without an answer with nothing

New results go the other way with CHECKPOINT_SAVED, whose `key` says what the end of a stage may be kept under. It does
NOT know where the starter has results from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from heft_engine.events import Event, OnEvent

ANSWERED = "answered"
PATIENCE = 60.0
_LOOK_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class AskedStages:
    """A StageStore. `should_stop`: a run that shall end does not wait."""

    directory: Path
    on_event: OnEvent
    should_stop: Callable[[], bool]
    patience: float = PATIENCE

    def find(self, keys: Sequence[str]) -> list[Path]:
        self.on_event(
            Event(
                code="STAGE_KEYS",
                message="Looking for equal stages of earlier jobs",
                data={"keys": list(keys)},
            )
        )
        deadline = time.monotonic() + self.patience
        while not (self.directory / ANSWERED).exists():
            if self.should_stop() or time.monotonic() >= deadline:
                return []
            time.sleep(_LOOK_SECONDS)
        return list(takewhile(Path.is_dir, (self.directory / key for key in keys)))

    def put(self, key: str, write: Callable[[Path], None]) -> None:
        """The starter does it, when it hears of the checkpoint."""
