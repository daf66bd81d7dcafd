"""How one file gets into storage: whole or not at all. It does NOT know keys: see artifacts."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from store.errors import Damaged, Unavailable

try:
    from botocore.exceptions import BotoCoreError
except ImportError:  # without the extra `s3` there is no S3 that could fail

    class BotoCoreError(Exception):  # type: ignore[no-redef]
        pass


#: One part of a multipart upload, held in memory. S3 takes 10,000 of them: 160 GB a file.
PART_BYTES = 16 * 1024 * 1024


class Upload(Protocol):
    """A file on its way into storage: nobody sees it before `commit`."""

    size: int  #: bytes written so far

    def write(self, chunk: bytes) -> None:
        """Raises Unavailable when storage does not take it; then `abort`."""

    def commit(self) -> str:
        """Make it durable and visible; returns its SHA-256 in hex. Raises Unavailable."""

    def abort(self) -> None:
        """Leave nothing behind."""


class LocalUpload:
    """Into the storage's folder for what is not complete; then fsync, rename, and fsync of the folder."""

    def __init__(self, path: Path, temporary: Path) -> None:
        self.size = 0
        self._path = path
        self._digest = hashlib.sha256()
        with storage_faults(path.name):
            _make_durable_folder(temporary)
            # Not mkstemp: another user's process (the API's, the worker's) may have to read what this one wrote.
            self._temporary = temporary / secrets.token_hex(16)
            self._file = self._temporary.open("xb")

    def write(self, chunk: bytes) -> None:
        with storage_faults(self._path.name):
            self._file.write(chunk)
        self._digest.update(chunk)
        self.size += len(chunk)

    def commit(self) -> str:
        with storage_faults(self._path.name):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            _make_durable_folder(self._path.parent)
            os.rename(self._temporary, self._path)
            _fsync_folder(self._path.parent)
        return self._digest.hexdigest()

    def abort(self) -> None:
        with suppress(OSError):  # on a full disk closing fails too: what it still holds can't be written
            self._file.close()
        self._temporary.unlink(missing_ok=True)


class RemoteUpload:
    """An object appears when its put, or its multipart upload, is complete; an aborted one never does."""

    def __init__(self, fs: Any, path: str) -> None:
        self.size = 0
        self._fs = fs
        self._path = path
        self._digest = hashlib.sha256()
        self._small = bytearray()  # one request is enough for what fits into one part
        self._parts: Any = None

    def write(self, chunk: bytes) -> None:
        self._digest.update(chunk)
        self.size += len(chunk)
        if self._parts is None:
            self._small += chunk
            if len(self._small) < PART_BYTES:
                return
            chunk, self._small = bytes(self._small), bytearray()
        with storage_faults(self._path):
            if self._parts is None:
                self._parts = self._fs.open(self._path, "wb", autocommit=False, block_size=PART_BYTES)
            self._parts.write(chunk)

    def commit(self) -> str:
        with storage_faults(self._path):
            if self._parts is None:
                self._fs.pipe_file(self._path, bytes(self._small))
            else:
                self._parts.close()
                self._parts.commit()
        return self._digest.hexdigest()

    def abort(self) -> None:
        with storage_faults(self._path):
            if self._parts is not None:
                self._parts.discard()
                self._parts.closed = True  # or its destructor would try to upload the rest


@contextmanager
def storage_faults(key: str) -> Iterator[None]:
    """Raises Damaged for what is missing, Unavailable for a storage that does not answer (or is full)."""
    try:
        yield
    except FileNotFoundError as error:
        raise Damaged(f"{key} is missing in storage") from error
    except OSError as error:
        raise Unavailable(f"the artifact storage does not answer: {error.strerror or error}") from error
    except BotoCoreError as error:  # its text may hold an address
        raise Unavailable("the artifact storage does not answer") from error


def _make_durable_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    _make_durable_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _fsync_folder(folder.parent)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
