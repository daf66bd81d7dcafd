"""Hands a GPU over from inference to training: before a job trains, inference workers on its GPU evict idle models.

Both sides communicate through their rows in `workers`: the trainer writes its request, each inference worker writes
the requests that it has served. An inference worker evicts every idle model once for each request, and may load
models again when they are asked for. Once a stage is planned, the trainer claims what it takes, and inference workers
keep their models to the rest until the claim is withdrawn. Without a GPU there is nothing to hand over: the system
shares and swaps memory.
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
from dataclasses import dataclass, field
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
CLAIMED = "gpu_claimed_bytes"

_POLL_SECONDS = 1.0
#: There with NVIDIA's driver.
_DRIVER = Path("/dev/nvidiactl")
#: A trainer waits this long for inference workers; then it starts with the memory that there is.
_MAX_WAIT_SECONDS = 15.0


def visible_devices() -> frozenset[str]:
    """Returns the UUIDs of the GPUs that this process sees, or of their MIG instances; empty without any.

    CUDA_VISIBLE_DEVICES names them by number or by (the beginning of) their UUID. Numbers are known only where CUDA
    counts as nvidia-smi does: with GPUs of one kind, or CUDA_DEVICE_ORDER=PCI_BUS_ID. Otherwise they stand for all.
    Where nvidia-smi does not answer, all GPUs of the host have one name.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not _DRIVER.exists() or visible in ("", "-1"):
        return frozenset()
    gpus = _gpus()
    if not gpus:
        return frozenset({f"{socket.gethostname()}/all"})
    every = frozenset(uuid for gpu in gpus for uuid in gpu.uuids)
    if visible is None:
        return every
    is_counted_alike = (
        len({gpu.name for gpu in gpus}) == 1 or os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    )
    chosen: set[str] = set()
    for name in filter(None, map(str.strip, visible.split(","))):
        if not name.isdecimal():
            chosen |= {uuid for gpu in gpus for uuid in gpu.named(name)}
        elif is_counted_alike:
            chosen |= {uuid for gpu in gpus[int(name) : int(name) + 1] for uuid in gpu.uuids}
        else:
            return every
    return frozenset(chosen)


@dataclass(kw_only=True)
class _Gpu:
    """A GPU of nvidia-smi's list, with its MIG instances."""

    name: str
    uuid: str
    instances: list[str] = field(default_factory=list)

    @property
    def uuids(self) -> list[str]:
        """The UUIDs that processes can have in common: those of its instances, where it is divided into any."""
        return self.instances or [self.uuid]

    def named(self, prefix: str) -> list[str]:
        if self.uuid.startswith(prefix):
            return self.uuids
        return [uuid for uuid in self.instances if uuid.startswith(prefix)]


def _gpus() -> list[_Gpu]:
    """Returns this machine's GPUs in the order of their PCI buses."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    gpus: list[_Gpu] = []
    for line in listing.stdout.splitlines():
        gpu = re.match(r"GPU \d+: (.+) \(UUID: (GPU-[^)]+)\)", line)
        instance = re.search(r"UUID: (MIG-[^)]+)\)", line)
        if gpu is not None:
            gpus.append(_Gpu(name=gpu[1], uuid=gpu[2]))
        elif instance is not None and gpus:
            gpus[-1].instances.append(instance[1])
    return gpus


@dataclass(frozen=True, kw_only=True)
class GpuRequest:
    """A trainer's standing request for its GPU."""

    context: Context

    def claim(self, claimed_bytes: int) -> None:
        """Claims so many bytes of the GPU, instead of what was claimed before. Without a GPU it does nothing."""
        if self.context.devices:
            _write_info(self.context, {CLAIMED: claimed_bytes})


@contextmanager
def gpu_requested(context: Context, request: str) -> Iterator[GpuRequest]:
    """Requests the GPU under this id, waits for the inference workers on it, and yields the request, for claims.

    At the end request and claim are withdrawn.
    """
    if not context.devices:
        yield GpuRequest(context=context)
        return
    _write_info(context, {REQUEST: request})
    deadline = time.monotonic() + _MAX_WAIT_SECONDS
    while not _is_served(context, request) and time.monotonic() < deadline and not context.stopping.is_set():
        context.stopping.wait(_POLL_SECONDS)
    try:
        yield GpuRequest(context=context)
    finally:
        _write_info(context, {REQUEST: None, CLAIMED: None})


def handoff_chores(
    context: Context, evict_idle: Callable[[], None], leave_free: Callable[[int], None]
) -> list[Chore]:
    """Returns the inference worker's chore: evict idle models on request, and leave free what is claimed.

    leave_free: called with the bytes that all trainers on this GPU claim, whenever they change. Empty without a GPU.
    """
    if not context.devices:
        return []
    served: set[str] = set()
    claimed_bytes = 0

    def serve() -> None:
        nonlocal claimed_bytes
        trainers = _workers_on_device(context, "train")
        requests = {row.info.get(REQUEST) for row in trainers} - {None}
        if requests - served:
            evict_idle()
        if requests != served:
            served.clear()
            served.update(requests)
            _write_info(context, {SERVED: sorted(served)})
        total = sum(row.info.get(CLAIMED) or 0 for row in trainers)
        if total != claimed_bytes:
            claimed_bytes = total
            leave_free(total)

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
