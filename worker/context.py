"""The dependencies of a worker process, created once in `worker.__main__`."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from store.db.session import SessionFactory
from store.messages.hints import Hints
from store.settings import StoreSettings
from store.storage.artifacts import Artifacts

#: -P: Python files in a job's folder are never imported.
ENGINE = (sys.executable, "-P", "-m", "heft_engine")
TRACKER = (sys.executable, "-P", "-m", "worker.jobs.tracker_process")


@dataclass(frozen=True, kw_only=True)
class Context:
    worker_id: str
    settings: StoreSettings
    sessions: SessionFactory
    artifacts: Artifacts
    hints: Hints
    scratch: Path  #: this worker's own folder, emptied when its slot is taken again
    shared: Path  #: a folder of all workers on this machine
    stopping: threading.Event  #: set when the worker is asked to shut down
    #: UUIDs of the GPUs that this process sees, which it may share with others (worker.chores.gpu_handoff).
    devices: frozenset[str] = frozenset()
    #: The commands that start an engine process and a tracker; tests put fakes here.
    engine_command: Sequence[str] = ENGINE
    tracker_command: Sequence[str] = TRACKER

    @property
    def activation_folder(self) -> Path:
        """Cached activations of training stages, which the engine keeps within a budget (`prefill_bytes`)."""
        return self.shared / "prefills"

    def model_options(self) -> list[str]:
        """Returns the options that tell an engine command where models lie."""
        options: list[str] = []
        if self.settings.model_dir is not None:
            options += ["--model-dir", str(self.settings.model_dir)]
        if self.settings.cache_dir is not None:
            options += ["--cache-dir", str(self.settings.cache_dir)]
        return options
