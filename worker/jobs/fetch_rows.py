"""The rows that a job names, brought to this machine.

Uploaded files lie in storage already. Rows from the hub and samples are put there by `prepare`, under the
job and their own SHA-256, so that what is trained on is what was checked, wherever and however often that
happens. It does NOT know what is in them.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import get_args

from heft_engine.config.run_file import FileField
from store.storage import files
from store.storage.artifacts import prepared_key
from worker.jobs.attempt import Attempt

#: The job's fields that name rows.
FIELDS: tuple[FileField, ...] = get_args(FileField)


def store_rows(attempt: Attempt, path: Path) -> str:
    """Store rows that were made for this job; returns their SHA-256. Same rows, same key: attempts can't
    clash."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    key = prepared_key(attempt.claim.job_id, sha256)
    return attempt.retrying(partial(attempt.context.artifacts.put_file, key, path))


def fetch_uploads(attempt: Attempt) -> dict[FileField, Path]:
    """The uploaded ones among the job's files, by field."""
    return {
        field: _fetch_upload(attempt, field, reference)
        for field in FIELDS
        if (reference := getattr(attempt.claim.spec, field)) and reference.startswith("file-")
    }


def fetch_rows(attempt: Attempt) -> dict[FileField, Path]:
    """All of the job's files, by field. Only after `prepare`, whose report names the rows that it made."""
    paths = fetch_uploads(attempt)
    report = attempt.claim.validation or {}
    for field in FIELDS:
        if getattr(attempt.claim.spec, field) and field not in paths:
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
    attempt.retrying(partial(attempt.context.artifacts.fetch_file, key, path, sha256))
    return path
