"""A folder for the files of one worker process, gone when it ends; what a killed worker left goes with the
next.

It does NOT know what is put there.
"""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = "worker-"
_LOCK = "lock"


@contextmanager
def scratch_folder(root: Path) -> Iterator[Path]:
    """An empty folder below `root` for this process alone. Its lock file tells the living from the dead."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / _LOCK).open("w") as all_workers:
        fcntl.flock(all_workers, fcntl.LOCK_EX)
        _remove_abandoned(root)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
        mine = (folder / _LOCK).open("w")
        fcntl.flock(mine, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
        mine.close()


def _remove_abandoned(root: Path) -> None:
    for folder in root.glob(f"{_PREFIX}*"):
        with (folder / _LOCK).open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # its worker lives
            shutil.rmtree(folder)
