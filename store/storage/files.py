"""The rows of uploaded files and of jobs' result files.

Deleting a file hides it at once; its bytes stay until the last unfinished job that uses it has ended.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import get_args

from sqlalchemy import exists, func, or_, select, update
from sqlalchemy.orm import Session

from heft_engine.config.run_file import FileField
from store.db.pagination import Order, Page, fetch_page
from store.db.tables import File, Job
from store.errors import InvalidRequest, NotFound

#: The settings of a job that name files.
FILE_FIELDS: tuple[FileField, ...] = get_args(FileField)
TRAINING_PURPOSE = "fine-tune"
RESULTS_PURPOSE = "fine-tune-results"


@dataclass(frozen=True, kw_only=True)
class NewFile:
    """A file whose bytes are durable under `storage_key`. `size` in bytes, `sha256` in hex."""

    file_id: str
    filename: str
    size: int
    sha256: str
    storage_key: str


def create(session: Session, *, owner_id: str, purpose: str, file: NewFile) -> File:
    """Adds a file's row."""
    row = File(
        id=file.file_id,
        owner_id=owner_id,
        filename=file.filename,
        purpose=purpose,
        bytes=file.size,
        sha256=file.sha256,
        storage_key=file.storage_key,
    )
    session.add(row)
    session.flush()
    return row


def get(session: Session, *, owner_id: str, file_id: str) -> File:
    """Returns a file. Raises NotFound for one that is unknown, deleted, or another owner's."""
    row = session.scalar(
        select(File).where(File.id == file_id, File.owner_id == owner_id, File.deleted_at.is_(None))
    )
    if row is None:
        raise _no_file(file_id)
    return row


def list_page(
    session: Session,
    *,
    owner_id: str,
    limit: int = 20,
    after: str | None = None,
    order: Order = "desc",
    purpose: str | None = None,
) -> Page[File]:
    """Returns a page of this owner's files in `order`. Raises InvalidRequest (param `after`) for an unknown cursor."""
    # A file that was deleted between two pages is still a valid cursor.
    conditions = [File.deleted_at.is_(None), *([File.purpose == purpose] if purpose is not None else [])]
    owned, by = select(File).where(File.owner_id == owner_id), (File.created_at, File.id)
    return fetch_page(session, owned, *conditions, by=by, after=after, limit=limit, order=order)


def delete(session: Session, *, owner_id: str, file_id: str) -> None:
    """Hides a file. Waits for a transaction that creates a job on it; that job keeps the bytes. Raises NotFound."""
    hidden_id = session.scalar(
        update(File)
        .where(File.id == file_id, File.owner_id == owner_id, File.deleted_at.is_(None))
        .values(deleted_at=func.now())
        .returning(File.id)
    )
    if hidden_id is None:
        raise _no_file(file_id)


def for_job(session: Session, *, owner_id: str, file_id: str) -> File:
    """Returns a file that a job of this owner uses, also a deleted one that has its bytes. Raises NotFound."""
    row = session.scalar(
        select(File).where(File.id == file_id, File.owner_id == owner_id, File.purged_at.is_(None))
    )
    if row is None:
        raise _no_file(file_id)
    return row


def lock_for_job(session: Session, *, owner_id: str, references: Iterable[tuple[str, str]]) -> None:
    """Locks uploaded files against deletion until this transaction ends.

    `references` are pairs of the request's field and its value, of which only file ids (file-…) are looked at. Raises
    InvalidRequest naming the field of the first file that is unknown, deleted, another owner's, or not for fine-tuning.
    """
    uploads = [(param, value) for param, value in references if value.startswith("file-")]
    statement = (
        select(File.id, File.purpose)
        .where(File.id.in_([file_id for _, file_id in uploads]), File.owner_id == owner_id)
        .where(File.deleted_at.is_(None))
        .order_by(File.id)  # one order for all: no deadlock between two jobs on the same files
        .with_for_update(read=True)
    )
    purposes = {row.id: row.purpose for row in session.execute(statement)}
    for param, file_id in uploads:
        if file_id not in purposes:
            raise InvalidRequest(f"there is no file {file_id!r}", param=param, code="file_not_found")
        if purposes[file_id] != TRAINING_PURPOSE:
            message = (
                f"file {file_id!r} was uploaded with purpose {purposes[file_id]!r}, not {TRAINING_PURPOSE!r}"
            )
            raise InvalidRequest(message, param=param)


def purgeable(session: Session, *, limit: int = 100) -> list[File]:
    """Returns deleted files that no unfinished job uses and that still have their bytes."""
    uses = or_(*(Job.spec[field].astext == File.id for field in FILE_FIELDS))
    in_use = exists().where(Job.owner_id == File.owner_id, Job.finished_at.is_(None), uses)
    query = select(File).where(File.deleted_at.is_not(None), File.purged_at.is_(None), ~in_use)
    return list(session.scalars(query.order_by(File.deleted_at).limit(limit)))


def _no_file(file_id: str) -> NotFound:
    return NotFound(f"there is no file {file_id!r}", param="file_id")
