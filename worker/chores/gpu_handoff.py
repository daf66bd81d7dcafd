"""Hands a GPU over from inference to training: before a job trains, inference workers on its GPU evict idle models.

Both sides communicate through their rows in `workers`: the trainer writes its request, each inference worker writes
the requests that it has served. An inference worker evicts every idle model once for each request, and may load
models again when they are asked for. Without a GPU there is nothing to hand over: the system shares and swaps memory.
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

#: Keys of a worker's `info`. A worker of an older version may lack them.
REQUEST = "gpu_requested"
SERVED = "gpu_released_to"

_POLL_SECONDS = 1.0
#: A trainer waits this long for inference workers; then it starts with the memory that there is.
_MAX_WAIT_SECONDS = 15.0


def visible_device() -> str | None:
    """Returns a name for the GPUs that this process sees, the same for all processes that share them; None without."""
    if not Path("/dev/nvidiactl").exists():
        return None
    return f"{socket.gethostname()}/{os.environ.get('CUDA_VISIBLE_DEVICES', 'all')}"


@contextmanager
def gpu_requested(context: Context, request: str) -> Iterator[None]:
    """Requests the GPU under this id, waits for the inference workers on it, and withdraws the request afterwards."""
    if context.device is None:
        yield
        return
    _write_info(context, {REQUEST: request})
    deadline = time.monotonic() + _MAX_WAIT_SECONDS
    while not _is_served(context, request) and time.monotonic() < deadline and not context.stopping.is_set():
        context.stopping.wait(_POLL_SECONDS)
    try:
        yield
    finally:
        _write_info(context, {REQUEST: None})


def handoff_chores(context: Context, evict_idle: Callable[[], None]) -> list[Chore]:
    """Returns the inference worker's chore: serve new requests by evicting idle models. Empty without a GPU."""
    if context.device is None:
        return []
    served: set[str] = set()

    def serve() -> None:
        requests = {row.info.get(REQUEST) for row in _workers_on_device(context, "train")} - {None}
        if requests - served:
            evict_idle()
        if requests != served:
            served.clear()
            served.update(requests)
            _write_info(context, {SERVED: sorted(served)})

    return [Chore(name="GPU handoff", seconds=_POLL_SECONDS, run=serve)]


def _is_served(context: Context, request: str) -> bool:
    try:
        return all(request in row.info.get(SERVED, ()) for row in _workers_on_device(context, "inference"))
    except Unavailable:
        return True


def _workers_on_device(context: Context, role: str) -> list[Any]:
    with transaction(context.sessions) as session:
        rows = workers.list_workers(session, role=role)
    return [row for row in rows if row.info.get("device") == context.device]


def _write_info(context: Context, changes: Mapping[str, Any]) -> None:
    try:
        with transaction(context.sessions) as session:
            workers.update_info(session, worker_id=context.worker_id, changes=changes)
    except Unavailable as error:
        log.warning("could not write %s to the worker's row: %s", dict(changes), error)
