"""One GPU may have to train and to answer: who is about to train asks those who answer there for room.

Both sides speak through their workers' rows: the trainer notes its request, the inference worker those that
it has heard. Without a GPU nobody asks: a machine's memory is swapped and shared by its system. It does NOT
measure memory: the inference side puts away every model that nobody is asking just then, once for each
request, and may load them again when they are asked for.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from store.db.session import transaction
from store.errors import Unavailable
from store.ops import workers
from worker.chores.chore import Chore
from worker.context import Context

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
#: How long a trainer waits for room; then it takes what there is.
_PATIENCE_SECONDS = 15.0


def own_device() -> str | None:
    """What names the GPUs that this process may use, the same for all processes that share them; None
    without."""
    if not Path("/dev/nvidiactl").exists():
        return None
    return f"{socket.gethostname()}/{os.environ.get('CUDA_VISIBLE_DEVICES', 'all')}"


@contextmanager
def room(context: Context, request: str) -> Iterator[None]:
    """Ask for room, wait until it is given or patience ends, and take the request back after the body."""
    if context.device is None:
        yield
        return
    _note(context, {"gpu_requested": request})
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not _is_given(context, request) and time.monotonic() < deadline and not context.stopping.is_set():
        context.stopping.wait(_LOOK_SECONDS)
    try:
        yield
    finally:
        _note(context, {"gpu_requested": None})


def handoff_chores(context: Context, evict_idle: Callable[[], None]) -> list[Chore]:
    """The inference side's chore: hear who asks, put models away, say so."""
    if context.device is None:
        return []
    heard: set[str] = set()

    def look() -> None:
        asked = {row.info.get("gpu_requested") for row in _neighbours(context, "train")} - {None}
        if asked - heard:
            evict_idle()
        if asked != heard:
            heard.clear()
            heard.update(asked)
            _note(context, {"gpu_released_to": sorted(heard)})

    return [Chore(name="room", seconds=_LOOK_SECONDS, do=look)]


def _is_given(context: Context, request: str) -> bool:
    try:
        return all(
            request in row.info.get("gpu_released_to", ()) for row in _neighbours(context, "inference")
        )
    except Unavailable:
        return True


def _neighbours(context: Context, role: str) -> list[Any]:
    with transaction(context.sessions) as session:
        rows = workers.list_workers(session, role=role)
    return [row for row in rows if row.info.get("device") == context.device]


def _note(context: Context, changes: Mapping[str, Any]) -> None:
    try:
        with transaction(context.sessions) as session:
            workers.note(session, worker_id=context.worker_id, changes=changes)
    except Unavailable as fault:
        log.warning("not noted: %s: %s", dict(changes), fault)
