"""Atomic uploads of one file, to a local disk or an object store: the whole file becomes visible, or nothing."""

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
except ImportError:  # without the extra `s3`

    class BotoCoreError(Exception):  # type: ignore[no-redef]
        pass


#: One part of a multipart upload, in memory. S3 allows 10,000 of them: 160 GB a file.
PART_BYTES = 16 * 1024 * 1024


class Upload(Protocol):
    """An upload of one file, which is invisible before `commit`."""

    size: int  #: bytes written so far

    def write(self, chunk: bytes) -> None:
        """Appends a chunk. Raises Unavailable when the storage fails; then call `abort`."""

    def commit(self) -> str:
        """Makes the file durable and visible; returns its SHA-256 in hex. Raises Unavailable."""

    def abort(self) -> None:
        """Deletes what was written."""


class LocalUpload:
    """An upload to a local disk: a temporary file, fsync, rename, and fsync of the folder."""

    def __init__(self, path: Path, temporary: Path) -> None:
        self.size = 0
        self._path = path
        self._digest = hashlib.sha256()
        with storage_faults(path.name):
            _make_durable_folder(temporary)
            # Not mkstemp: processes of another user (API and worker) must be able to read the file.
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
        with suppress(OSError):  # on a full disk close() fails too: it can't flush its buffer
            self._file.close()
        self._temporary.unlink(missing_ok=True)


class RemoteUpload:
    """An upload to an object store: one put, or a multipart upload of more than one part."""

    def __init__(self, fs: Any, path: str) -> None:
        self.size = 0
        self._fs = fs
        self._path = path
        self._digest = hashlib.sha256()
        self._first_part = bytearray()  # a file that fits into one part takes one request
        self._parts: Any = None

    def write(self, chunk: bytes) -> None:
        self._digest.update(chunk)
        self.size += len(chunk)
        if self._parts is None:
            self._first_part += chunk
            if len(self._first_part) < PART_BYTES:
                return
            chunk, self._first_part = bytes(self._first_part), bytearray()
        with storage_faults(self._path):
            if self._parts is None:
                self._parts = self._fs.open(self._path, "wb", autocommit=False, block_size=PART_BYTES)
            self._parts.write(chunk)

    def commit(self) -> str:
        with storage_faults(self._path):
            if self._parts is None:
                self._fs.pipe_file(self._path, bytes(self._first_part))
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
    """Raises Damaged for a missing file, Unavailable when the storage does not answer or is full."""
    try:
        yield
    except FileNotFoundError as error:
        raise Damaged(f"{key} is missing in storage") from error
    except OSError as error:
        raise Unavailable(f"the artifact storage does not answer: {error.strerror or error}") from error
    except BotoCoreError as error:  # its message may contain an address
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
