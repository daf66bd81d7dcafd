"""Hands a GPU over from inference to training: before a job trains, inference workers on its GPU evict idle models.

Both sides communicate through their rows in `workers`: the trainer writes its request, each inference worker writes
the requests that it has served. An inference worker evicts every idle model once for each request, and may load
models again when they are asked for. Without a GPU there is nothing to hand over: the system shares and swaps memory.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import subprocess
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
#: There with NVIDIA's driver.
_DRIVER = Path("/dev/nvidiactl")
#: A trainer waits this long for inference workers; then it starts with the memory that there is.
_MAX_WAIT_SECONDS = 15.0


def visible_devices() -> frozenset[str]:
    """Returns the UUIDs of the GPUs that this process sees, those of MIG instances included; empty without any.

    CUDA_VISIBLE_DEVICES names them by number or by (the beginning of) their UUID. Where nvidia-smi does not answer, all
    GPUs of the host have one name.
    """
    if not _DRIVER.exists():
        return frozenset()
    uuids = _uuids()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not uuids:
        return frozenset() if visible in ("", "-1") else frozenset({f"{socket.gethostname()}/all"})
    if visible is None:
        return frozenset(uuids)
    chosen = [name.strip() for name in visible.split(",")]
    by_number = {str(number): uuid for number, uuid in enumerate(u for u in uuids if u.startswith("GPU-"))}
    return frozenset(
        uuid
        for uuid in uuids
        for name in chosen
        if name and (by_number.get(name) == uuid or uuid.startswith(name))
    )


def _uuids() -> list[str]:
    """Returns the UUIDs of all GPUs and MIG instances, in nvidia-smi's order (PCI bus)."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return re.findall(r"UUID: ((?:GPU|MIG)-[^)\s]+)", listing.stdout)


@contextmanager
def gpu_requested(context: Context, request: str) -> Iterator[None]:
    """Requests the GPU under this id, waits for the inference workers on it, and withdraws the request afterwards."""
    if not context.devices:
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
    if not context.devices:
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
    """Returns the workers of a role that share a GPU with this one."""
    with transaction(context.sessions) as session:
        rows = workers.list_workers(session, role=role)
    return [row for row in rows if context.devices & set(row.info.get("devices", ()))]


def _write_info(context: Context, changes: Mapping[str, Any]) -> None:
    try:
        with transaction(context.sessions) as session:
            workers.update_info(session, worker_id=context.worker_id, changes=changes)
    except Unavailable as error:
        log.warning("could not write %s to the worker's row: %s", dict(changes), error)
