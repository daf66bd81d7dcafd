"""Artifact storage: bytes by key, on fsspec. `file://` on one machine, `s3://` on a cluster.

A key holds a whole file or nothing: a local file is written to a temporary one, made durable (fsync of the file and of
its folders) and renamed; an object store shows an object when its upload completes, and has no rename. A key is never
written twice with different bytes, since every attempt has a prefix of its own. The commit point of anything stored is
its row in Postgres.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from store.errors import Damaged, InvalidRequest
from store.storage.atomic_write import PART_BYTES, LocalUpload, RemoteUpload, Upload, storage_faults

MANIFEST = "manifest.json"
#: A folder of local storage for files that are still being written. No key can name it.
_TEMPORARY = ".incomplete"
_CHUNK = 1024 * 1024
_SEGMENT = re.compile(r"[A-Za-z0-9_@+=-][A-Za-z0-9_.@+= -]{0,254}")


FILES = "files"
PREPARED = "prepared"
EXPORTS = "exports"


def file_key(file_id: str) -> str:
    """Returns the key of an uploaded file's bytes."""
    return f"{FILES}/{file_id}"


def prepared_key(job_id: str, sha256: str) -> str:
    """Returns the key of a job's rows of a hub dataset or a sample: by their content, the same for all attempts."""
    return f"{PREPARED}/{job_id}/{sha256}"


def attempt_prefix(job_id: str, attempt: int) -> str:
    """Returns the prefix of all keys of one attempt at a job; no other attempt writes there."""
    return f"jobs/{job_id}/{attempt}"


def export_key(job_id: str, name: str, format: str, attempt: int, *, suffix: str = "tar") -> str:
    """Returns the key of one attempt at an archive of a job's model. `name`: the last part of the model's id."""
    return f"{EXPORTS}/{job_id}/{name}-{format}-{attempt}.{suffix}"


class Artifacts:
    """The storage under one URL. Thread-safe."""

    def __init__(self, url: str) -> None:
        # Other processes write here too: a listing must never come from a cache.
        options = {} if url.startswith("file:") else {"use_listings_cache": False}
        self._fs, root = fsspec.core.url_to_fs(url, **options)
        self._root = str(root).rstrip("/")
        self._local = isinstance(self._fs, LocalFileSystem)

    def upload(self, key: str) -> Upload:
        """Starts an upload: call `write(chunk)`…, then `commit()`, else `abort()`. Nothing is visible before commit."""
        path = self._path(key)
        if self._local:
            return LocalUpload(Path(path), Path(self._root) / _TEMPORARY)
        return RemoteUpload(self._fs, path)

    def put_stream(self, key: str, chunks: Iterable[bytes]) -> str:
        """Stores the joined `chunks`; returns their SHA-256 in hex. An error leaves nothing behind."""
        upload = self.upload(key)
        try:
            for chunk in chunks:
                upload.write(chunk)
            return upload.commit()
        except BaseException:
            upload.abort()
            raise

    def put_file(self, key: str, path: Path) -> str:
        """Stores a local file; returns its SHA-256 in hex."""
        with path.open("rb") as file:
            return self.put_stream(key, iter(lambda: file.read(_CHUNK), b""))

    def put_directory(self, prefix: str, path: Path) -> dict[str, str]:
        """Stores all files of a local directory; returns {file: SHA-256}, the manifest for Postgres.

        `manifest.json` is written last: the directory's own, or else the returned manifest.
        """
        names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        manifest = {
            name: self.put_file(f"{prefix}/{name}", path / name) for name in names if name != MANIFEST
        }
        if MANIFEST in names:
            manifest[MANIFEST] = self.put_file(f"{prefix}/{MANIFEST}", path / MANIFEST)
        else:
            self.put_stream(f"{prefix}/{MANIFEST}", [json.dumps(manifest, indent=1).encode()])
        return manifest

    def fetch_directory(self, prefix: str, path: Path, manifest: Mapping[str, str]) -> None:
        """Downloads the files of `manifest`, all or none, to `path`, which must be missing or empty.

        Raises Damaged when one is missing or differs from its SHA-256.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            for name, sha256 in manifest.items():
                target = scratch / _checked(name)
                target.parent.mkdir(parents=True, exist_ok=True)
                self._fetch(f"{prefix}/{name}", target, sha256)
            scratch.rename(path)
        except BaseException:
            shutil.rmtree(scratch)
            raise

    def fetch_file(self, key: str, path: Path, sha256: str) -> None:
        """Downloads one file to `path`. Raises Damaged when it is missing or differs from its SHA-256."""
        try:
            self._fetch(key, path, sha256)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def open(self, key: str) -> IO[bytes]:
        """Opens a stored file to read and seek. Raises Damaged when it is missing."""
        path = self._path(key)
        with storage_faults(key):
            if self._local:
                return Path(path).open("rb")
            size = self._fs.info(path)["size"]  # fsspec's file objects report their own failure badly
            return cast("IO[bytes]", self._fs.open(path, "rb", block_size=PART_BYTES, size=size))

    def iter_bytes(self, key: str) -> Iterator[bytes]:
        """Yields a stored file in chunks of at most 1 MiB. Raises Damaged when it is missing."""
        with self.open(key) as file:
            while True:
                with storage_faults(key):
                    chunk = file.read(_CHUNK)
                if not chunk:
                    return
                yield chunk

    def children(self, prefix: str) -> list[str]:
        """Returns the names directly under `prefix`, sorted; an empty list when there are none."""
        with storage_faults(prefix):
            try:
                paths = self._fs.ls(self._path(prefix), detail=False)
            except FileNotFoundError:
                return []
        return sorted(str(path).rstrip("/").rpartition("/")[2] for path in paths)

    def age_seconds(self, key: str) -> float:
        """Returns the seconds since a file was stored, by this machine's clock. Raises Damaged when it is missing."""
        with storage_faults(key):
            stored_at: datetime = self._fs.modified(self._path(key))
        return (datetime.now(UTC) - stored_at).total_seconds()

    def delete_incomplete(self, *, older_than_seconds: float) -> None:
        """Deletes temporary files of uploads whose process was killed. In an object store lifecycle rules do that."""
        if not self._local:
            return
        for path in (Path(self._root) / _TEMPORARY).glob("*"):
            # Another process may rename or delete the file meanwhile.
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > older_than_seconds:
                    path.unlink()

    def delete(self, prefix: str) -> None:
        """Deletes a file, or all files under a prefix, if there are any."""
        path = self._path(prefix)
        with storage_faults(prefix):
            try:
                self._fs.rm(path, recursive=True)
            except FileNotFoundError:
                return

    def _fetch(self, key: str, target: Path, sha256: str) -> None:
        digest = hashlib.sha256()
        with target.open("wb") as file:
            for chunk in self.iter_bytes(key):
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != sha256:
            raise Damaged(f"{key} is damaged: its SHA-256 differs from the stored one")

    def _path(self, key: str) -> str:
        return f"{self._root}/{_checked(key)}"


def _checked(key: str) -> str:
    """Returns `key`. Raises InvalidRequest unless it consists of plain names between single slashes (no `..`)."""
    for segment in key.split("/"):
        if not _SEGMENT.fullmatch(segment):
            raise InvalidRequest(f"{key!r} is not a valid storage key")
    return key
