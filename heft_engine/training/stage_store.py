"""Results of stages in a local folder, under a budget of bytes: what a person's runs share on one machine.

    <directory>/<key>/      a sealed directory (heft_engine.runtime.sealed_directory), put there by one rename

Processes may share the folder. It does NOT know what keys stand for, nor what is in a result.
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
from pathlib import Path

from heft_engine.errors import BundleError
from heft_engine.runtime.sealed_directory import seal, verify

MAX_BYTES = 8 * 1024**3
_PARTIAL = ".partial-"
#: A writer that has not finished after so long was killed.
_ABANDONED_SECONDS = 3_600.0


@dataclass(frozen=True, kw_only=True)
class LocalStages:
    """A StageStore. What was used least recently goes first."""

    directory: Path
    max_bytes: int = MAX_BYTES

    def find(self, keys: Sequence[str]) -> list[Path]:
        """The directories of the first so many keys. One that is damaged is removed."""
        found = []
        for path in (self.directory / key for key in keys):
            if not _is_whole(path):
                break
            found.append(path)
        for path in found:
            with suppress(OSError):  # a folder that may only be read
                os.utime(path)
        return found

    def put(self, key: str, write: Callable[[Path], None]) -> None:
        """Replaces what was there under this key. Raises OSError."""
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=self.directory))
        try:
            write(partial)
            seal(partial)
            shutil.rmtree(self.directory / key, ignore_errors=True)
            partial.rename(self.directory / key)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another run has kept the same meanwhile
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self._make_room()

    def _make_room(self) -> None:
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


def _is_whole(path: Path) -> bool:
    if not path.is_dir():
        return False
    try:
        verify(path)
    except BundleError:
        shutil.rmtree(path, ignore_errors=True)
        return False
    return True


def _age(path: Path) -> float | None:
    """Seconds since its last use; None for what another process has just removed."""
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
