"""Directories by key in a local folder, under a budget of bytes, for stage results and activations.

    <directory>/<key>/      a sealed directory (heft_engine.runtime.sealed_directory), moved there by one rename

Processes may share the folder.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from heft_engine.errors import BundleError
from heft_engine.runtime.sealed_directory import seal, verify

MAX_BYTES = 8 * 1024**3
_PARTIAL = ".partial-"
#: A writer that has not finished after so many seconds was killed.
_ABANDONED_SECONDS = 3_600.0


@dataclass(frozen=True, kw_only=True)
class LocalStages:
    """A StageStore that evicts the least recently used."""

    directory: Path
    max_bytes: int = MAX_BYTES

    def find(self, keys: Sequence[str]) -> list[Path]:
        """Returns the directories of the first keys, up to the first that is missing. Removes a damaged one."""
        paths = list(takewhile(_is_complete, (self.directory / key for key in keys)))
        for path in paths:
            with suppress(OSError):  # a read-only folder
                os.utime(path)
        return paths

    def put(self, key: str, write: Callable[[Path], None]) -> None:
        """Stores what `write` puts into an empty directory, in place of the key's earlier content. Raises OSError."""
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=self.directory))
        try:
            write(partial)
            seal(partial)
            shutil.rmtree(self.directory / key, ignore_errors=True)
            partial.rename(self.directory / key)
        except OSError as error:
            # Another run may have stored the same meanwhile.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self._evict()

    def _evict(self) -> None:
        ages = {path: age for path in self.directory.iterdir() if (age := _age(path)) is not None}
        total = 0
        for path in sorted(ages, key=lambda path: ages[path]):
            if path.name.startswith(_PARTIAL):
                if ages[path] > _ABANDONED_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)
                continue
            size = _size(path)
            if total + size > self.max_bytes:
                shutil.rmtree(path, ignore_errors=True)
            else:
                total += size


def _is_complete(path: Path) -> bool:
    if not path.is_dir():
        return False
    try:
        verify(path)
    except BundleError:
        shutil.rmtree(path, ignore_errors=True)
        return False
    return True


def _age(path: Path) -> float | None:
    """Returns seconds since the last use; None if another process has just removed it."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None


def _size(path: Path) -> int:
    total = 0
    for file in path.rglob("*"):
        with suppress(FileNotFoundError):
            total += file.stat().st_size
    return total
