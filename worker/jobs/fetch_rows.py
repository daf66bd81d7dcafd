"""Copies the rows that a job names to this machine.

Uploaded files are in storage already. `prepare` puts rows from the hub and samples there too, under the job and their
own SHA-256. So a job trains on the rows that were checked, wherever and however often it runs.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

from heft_engine.config.run_file import FileField
from store.storage import files
from store.storage.artifacts import prepared_key
from worker.jobs.attempt import Attempt


def store_rows(attempt: Attempt, path: Path) -> str:
    """Stores rows that `prepare` has created and returns their SHA-256, which is part of their key."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    key = prepared_key(attempt.claim.job_id, sha256)
    return attempt.retry_storage(partial(attempt.context.artifacts.put_file, key, path))


def fetch_uploads(attempt: Attempt) -> dict[FileField, Path]:
    """Returns the paths of the job's uploaded files, by field."""
    paths: dict[FileField, Path] = {}
    for field, reference in attempt.claim.spec.files().items():
        if reference.startswith("file-"):
            paths[field] = _fetch_upload(attempt, field, reference)
    return paths


def fetch_rows(attempt: Attempt) -> dict[FileField, Path]:
    """Returns the paths of all of the job's files, by field. Needs the report of `prepare`."""
    paths = fetch_uploads(attempt)
    report = attempt.claim.validation or {}
    for field in attempt.claim.spec.files():
        if field not in paths:
            sha256 = report["files"][field]["sha256"]
            paths[field] = _fetch(attempt, field, prepared_key(attempt.claim.job_id, sha256), sha256)
    return paths


def _fetch_upload(attempt: Attempt, field: str, file_id: str) -> Path:
    row = attempt.write(
        lambda session, claim: files.for_job(session, owner_id=claim.owner_id, file_id=file_id)
    )
    return _fetch(attempt, field, row.storage_key, row.sha256)


def _fetch(attempt: Attempt, field: str, key: str, sha256: str) -> Path:
    attempt.raise_if_stopping()
    path = attempt.folder / f"{field}.jsonl"
    attempt.retry_storage(partial(attempt.context.artifacts.fetch_file, key, path, sha256))
    return path
