"""Numbered slots for the worker processes of a machine: a worker id and an empty folder, held by a file lock.

The lock ends with the process, however it ends. The next holder of a slot therefore knows that the previous one is
dead: its files are deleted, and its jobs can be taken back at once, under the same worker id.
"""

from __future__ import annotations

import fcntl
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO

_LOCK = "lock"
_IDENTITY = "identity"


@dataclass(frozen=True, kw_only=True)
class Slot:
    """`worker_id` is the same for every holder of this slot, one after the other, and unique otherwise."""

    worker_id: str
    folder: Path


@contextmanager
def acquire_slot(root: Path, role: str) -> Iterator[Slot]:
    """Holds the first free slot of this role below `root`, with an empty folder."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / _LOCK).open("w") as root_lock:
        fcntl.flock(root_lock, fcntl.LOCK_EX)
        identity = _machine_identity(root / _IDENTITY)
        for slot in root.glob("*-*/"):
            _delete_files_if_free(slot)
        number, slot_lock = _lock_first_free(root, role)
    folder = root / f"{role}-{number}" / "files"
    folder.mkdir()
    try:
        yield Slot(worker_id=f"{role}-{number}-{identity}", folder=folder)
    finally:
        shutil.rmtree(folder)
        slot_lock.close()


def remove_older_than(folder: Path, seconds: float) -> None:
    """Removes the directories in `folder` that have not been touched for this time."""
    for path in folder.glob("*"):
        with suppress(FileNotFoundError):  # another worker has removed it
            if time.time() - path.stat().st_mtime > seconds:
                shutil.rmtree(path, ignore_errors=True)


def _machine_identity(path: Path) -> str:
    """Returns a random name of this root, created once, which differs from those of other machines."""
    identity = path.read_text() if path.exists() else ""
    if not identity:
        identity = uuid.uuid4().hex[:12]
        path.write_text(identity)
    return identity


def _delete_files_if_free(slot: Path) -> None:
    lock = _try_lock(slot)
    if lock is not None:
        shutil.rmtree(slot / "files", ignore_errors=True)
        lock.close()


def _lock_first_free(root: Path, role: str) -> tuple[int, IO[str]]:
    for number in count():
        slot = root / f"{role}-{number}"
        slot.mkdir(exist_ok=True)
        lock = _try_lock(slot)
        if lock is not None:
            return number, lock
    raise AssertionError("count() does not end")


def _try_lock(slot: Path) -> IO[str] | None:
    lock = (slot / _LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock
