"""Garbage collection: deletes stored bytes that are no longer needed, then updates or deletes their rows.

There are three kinds of garbage: the bytes of deleted rows (files, models, old checkpoints and stage results), those of
attempts that ended before they wrote a row, and interrupted uploads. Deleting twice is harmless, so two processes may
collect at the same time.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from sqlalchemy import ColumnElement, Delete, Update, delete, exists, func, or_, select, update
from sqlalchemy.orm import InstrumentedAttribute, Session, aliased

from store.db.session import SessionFactory, seconds, transaction
from store.db.tables import Attempt, Checkpoint, Export, File, FineTunedModel, Job, StageResult
from store.errors import Damaged
from store.storage import files
from store.storage.artifacts import EXPORTS, FILES, PREPARED, Artifacts, attempt_prefix, file_key

_BATCH = 100


#: A storage key, and the statement to execute once its bytes are deleted.
_Garbage = tuple[str, Update | Delete]


def collect(factory: SessionFactory, artifacts: Artifacts, *, quiet_seconds: float = 600.0) -> None:
    """Deletes up to a hundred items of each kind.

    An attempt's bytes are deleted `quiet_seconds` after its end, when none of its processes can still be writing; those
    of an epoch's model so long after it was replaced, when no worker is still reading them.
    Raises Unavailable when database or storage do not answer; then call it again.
    """
    with transaction(factory) as session:
        garbage = _of_deleted_rows(session, quiet_seconds)
    for storage_key, deleted in garbage:
        artifacts.delete(storage_key)
        with transaction(factory) as session:
            session.execute(deleted)
    with transaction(factory) as session:
        attempts = _ended_attempts(session, quiet_seconds)
    for job_id, number in attempts:
        _sweep_attempt(factory, artifacts, job_id, number)
    artifacts.delete_incomplete(older_than_seconds=quiet_seconds)


def collect_uploads(
    factory: SessionFactory, artifacts: Artifacts, *, quiet_seconds: float = 86_400.0
) -> None:
    """Deletes uploads without a row: the API ended after it had stored their bytes. Raises Unavailable.

    It lists all files; once an hour is often enough.
    """
    file_ids = artifacts.children(FILES)
    for start in range(0, len(file_ids), _BATCH):
        batch = file_ids[start : start + _BATCH]
        with transaction(factory) as session:
            with_row = set(session.scalars(select(File.id).where(File.id.in_(batch))))
        keys = [file_key(file_id) for file_id in batch if file_id not in with_row]
        _delete_old(artifacts, keys, quiet_seconds)


def collect_archives(
    factory: SessionFactory, artifacts: Artifacts, *, quiet_seconds: float = 86_400.0
) -> None:
    """Deletes archives without a row: their worker was lost before it wrote one. Raises Unavailable."""
    for job_id in artifacts.children(EXPORTS):
        keys = [f"{EXPORTS}/{job_id}/{name}" for name in artifacts.children(f"{EXPORTS}/{job_id}")]
        with transaction(factory) as session:
            query = select(Export.storage_key).where(Export.storage_key.in_(keys))
            with_row = set(session.scalars(query))
        _delete_old(artifacts, [key for key in keys if key not in with_row], quiet_seconds)


def collect_prepared(factory: SessionFactory, artifacts: Artifacts) -> None:
    """Deletes the prepared training rows of jobs that have ended. Raises Unavailable."""
    job_ids = artifacts.children(PREPARED)
    for start in range(0, len(job_ids), _BATCH):
        batch = job_ids[start : start + _BATCH]
        with transaction(factory) as session:
            query = select(Job.id).where(Job.id.in_(batch), Job.finished_at.is_not(None))
            ended = list(session.scalars(query))
        for job_id in ended:
            artifacts.delete(f"{PREPARED}/{job_id}")


def _delete_old(artifacts: Artifacts, keys: list[str], quiet_seconds: float) -> None:
    for key in keys:
        with suppress(Damaged):  # another process deleted it first
            if artifacts.age_seconds(key) > quiet_seconds:
                artifacts.delete(key)


def _of_deleted_rows(session: Session, quiet_seconds: float) -> list[_Garbage]:
    unread = or_(Checkpoint.kind != "epoch", Checkpoint.removed_at < func.now() - seconds(quiet_seconds))
    checkpoints = select(Checkpoint).where(
        Checkpoint.removed_at.is_not(None), Checkpoint.purged_at.is_(None), unread
    )
    checkpoints = checkpoints.where(~_is_start(Checkpoint.model_id))
    models = (
        select(FineTunedModel)
        .join(Job, Job.id == FineTunedModel.job_id)
        .where(FineTunedModel.deleted_at.is_not(None), FineTunedModel.purged_at.is_(None))
        .where(Job.finished_at.is_not(None))  # until then the job may resume from it
        .where(~_is_start(FineTunedModel.id))
    )
    archives = (
        select(Export.storage_key)
        .join(FineTunedModel, FineTunedModel.id == Export.model_id)
        .where(FineTunedModel.deleted_at.is_not(None), Export.storage_key.is_not(None))
    )
    results = select(StageResult.storage_key).where(StageResult.removed_at.is_not(None))
    return [
        *(_of_row(File, row, row.storage_key) for row in files.purgeable(session, limit=_BATCH)),
        *(_of_row(Checkpoint, row, row.storage_key) for row in session.scalars(checkpoints.limit(_BATCH))),
        *(_of_row(FineTunedModel, row, _model_key(row)) for row in session.scalars(models.limit(_BATCH))),
        *(
            (key, update(Export).where(Export.storage_key == key).values(storage_key=None))
            for key in session.scalars(archives.limit(_BATCH))
            if key is not None
        ),
        *(
            (key, delete(StageResult).where(StageResult.storage_key == key))
            for key in session.scalars(results.limit(_BATCH))
        ),
    ]


def _is_start(model_id: InstrumentedAttribute[Any]) -> ColumnElement[bool]:
    """Returns the condition that an unfinished job goes on from a model."""
    job = aliased(Job)
    return exists().where(job.finished_at.is_(None), job.spec["model"].astext == model_id)


def _of_row(
    table: type[File] | type[Checkpoint] | type[FineTunedModel], row: Any, storage_key: str
) -> _Garbage:
    return storage_key, update(table).where(table.id == row.id).values(purged_at=func.now())


def _model_key(model: FineTunedModel) -> str:
    """Returns the key to delete: of a checkpoint's model the whole checkpoint, which no job resumes from any more."""
    return model.storage_key.removesuffix("/bundle") if model.kind == "checkpoint" else model.storage_key


def _ended_attempts(session: Session, quiet_seconds: float) -> list[tuple[str, int]]:
    query = select(Attempt.job_id, Attempt.number).where(
        Attempt.ended_at < func.now() - seconds(quiet_seconds), Attempt.swept_at.is_(None)
    )
    return [(job_id, number) for job_id, number in session.execute(query.limit(_BATCH))]


def _sweep_attempt(factory: SessionFactory, artifacts: Artifacts, job_id: str, number: int) -> None:
    prefix = attempt_prefix(job_id, number)
    names = artifacts.children(prefix)
    with transaction(factory) as session:
        needed = _keys_in_rows(session, job_id)
    for key in (f"{prefix}/{name}" for name in names):
        if not any(row_key == key or row_key.startswith(f"{key}/") for row_key in needed):
            artifacts.delete(key)
    swept = update(Attempt).where(Attempt.job_id == job_id, Attempt.number == number)
    with transaction(factory) as session:
        session.execute(swept.values(swept_at=func.now()))


def _keys_in_rows(session: Session, job_id: str) -> list[str]:
    """Returns the storage keys of a job's rows."""
    checkpoints = select(Checkpoint.storage_key).where(
        Checkpoint.job_id == job_id, Checkpoint.purged_at.is_(None)
    )
    models = select(FineTunedModel.storage_key).where(
        FineTunedModel.job_id == job_id, FineTunedModel.purged_at.is_(None)
    )
    results = select(File.storage_key).join(Job, Job.result_file_id == File.id).where(Job.id == job_id)
    stages = select(StageResult.storage_key).where(StageResult.job_id == job_id)
    return [key for query in (checkpoints, models, results, stages) for key in session.scalars(query)]
