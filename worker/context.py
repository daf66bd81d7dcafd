"""What every part of a worker process needs, put together once in `worker.__main__`. It does NOT know any
job."""

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

#: -P: what lies in a job's folder is never imported.
ENGINE = (sys.executable, "-P", "-m", "heft_engine")


@dataclass(frozen=True, kw_only=True)
class Context:
    """One worker process: who it is, where things are, and `stopping`, set when it shall end."""

    worker_id: str
    settings: StoreSettings
    sessions: SessionFactory
    artifacts: Artifacts
    hints: Hints
    scratch: Path
    shared: Path  #: all workers of this machine have it, and none clears it away
    stopping: threading.Event
    #: Names the GPUs that this process shares with others (worker.chores.gpu_handoff); None without a GPU.
    device: str | None = None
    #: How a child of the engine is started; tests put a stand-in here.
    engine_command: Sequence[str] = ENGINE
