"""How one file gets into storage: whole or not at all. It does NOT know keys: see artifacts."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any, Protocol


class Upload(Protocol):
    """A file on its way into storage: nobody sees it before `commit`."""

    size: int  #: bytes written so far

    def write(self, chunk: bytes) -> None: ...

    def commit(self) -> str:
        """Make it durable and visible; returns its SHA-256 in hex."""
        ...

    def abort(self) -> None:
        """Leave nothing behind."""
        ...


class LocalUpload:
    """Beside its place, then fsync, rename, and fsync of every folder that gained an entry."""

    def __init__(self, path: Path) -> None:
        self.size = 0
        self._path = path
        self._digest = hashlib.sha256()
        _make_durable_folders(path.parent)
        descriptor, self._temporary = tempfile.mkstemp(prefix=f".{path.name[:64]}-", dir=path.parent)
        self._file = os.fdopen(descriptor, "wb")

    def write(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._digest.update(chunk)
        self.size += len(chunk)

    def commit(self) -> str:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.rename(self._temporary, self._path)
        _fsync_folder(self._path.parent)
        return self._digest.hexdigest()

    def abort(self) -> None:
        self._file.close()
        Path(self._temporary).unlink(missing_ok=True)


class RemoteUpload:
    """An object appears when its (multipart) upload is completed; an aborted one never does."""

    def __init__(self, fs: Any, path: str) -> None:
        self.size = 0
        self._digest = hashlib.sha256()
        self._file = fs.open(path, "wb", autocommit=False)

    def write(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._digest.update(chunk)
        self.size += len(chunk)

    def commit(self) -> str:
        self._file.close()
        self._file.commit()
        return self._digest.hexdigest()

    def abort(self) -> None:
        self._file.discard()


def _make_durable_folders(folder: Path) -> None:
    if folder.is_dir():
        return
    _make_durable_folders(folder.parent)
    folder.mkdir(exist_ok=True)
    _fsync_folder(folder.parent)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
