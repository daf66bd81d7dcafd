"""A place for one worker process: a folder for its files, and a name that is its alone.

Places are numbered folders, held by a lock that ends with the process, however it ends. So whoever holds a
place knows that the worker that had it before is dead: its files can go, and what it held can be taken back
at once. It does NOT know what is put there.

Beside the places lie folders that all workers of the machine share.
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
    """`worker_id` is the same for every holder of this place, one after the other, and nobody else's."""

    worker_id: str
    folder: Path


@contextmanager
def acquire_slot(root: Path, role: str) -> Iterator[Slot]:
    """Hold the first free place of this role below `root`, with an empty folder; waits for nobody."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / _LOCK).open("w") as choosing:
        fcntl.flock(choosing, fcntl.LOCK_EX)
        identity = _identity(root / _IDENTITY)
        for abandoned in root.glob("*-*/"):
            _clear_if_free(abandoned)
        number, lock = _first_free(root, role)
    place = root / f"{role}-{number}"
    folder = place / "files"
    folder.mkdir()
    try:
        yield Slot(worker_id=f"{role}-{number}-{identity}", folder=folder)
    finally:
        shutil.rmtree(folder)
        lock.close()


def remove_older_than(folder: Path, seconds: float) -> None:
    """Removes what in a shared folder has not been touched for so long."""
    for path in folder.glob("*"):
        with suppress(FileNotFoundError):  # another worker was quicker
            if time.time() - path.stat().st_mtime > seconds:
                shutil.rmtree(path, ignore_errors=True)


def _identity(path: Path) -> str:
    """Tells this root from those of other machines; made once."""
    known = path.read_text() if path.exists() else ""
    if not known:
        known = uuid.uuid4().hex[:12]
        path.write_text(known)
    return known


def _clear_if_free(place: Path) -> None:
    lock = _try_lock(place)
    if lock is not None:
        shutil.rmtree(place / "files", ignore_errors=True)
        lock.close()


def _first_free(root: Path, role: str) -> tuple[int, IO[str]]:
    for number in count():
        place = root / f"{role}-{number}"
        place.mkdir(exist_ok=True)
        lock = _try_lock(place)
        if lock is not None:
            return number, lock
    raise AssertionError("numbers don't end")


def _try_lock(place: Path) -> IO[str] | None:
    lock = (place / _LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock
