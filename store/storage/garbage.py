"""Deletes bytes that nothing needs any more. Rows say which; no row is forgotten before its bytes are gone.

Three kinds: what a row gave up (a deleted file or model, an old checkpoint or stage's result), what an attempt
left that died before its row, and uploads that were cut off. Deleting twice is harmless, so two processes may
do this at the same time.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Delete, Update, delete, func, select, update
from sqlalchemy.orm import Session

from store.db.session import SessionFactory, seconds, transaction
from store.db.tables import Attempt, Checkpoint, Export, File, FineTunedModel, Job, StageResult
from store.errors import Damaged
from store.storage import files
from store.storage.artifacts import EXPORTS, FILES, PREPARED, Artifacts, attempt_prefix, file_key

_BATCH = 100


@dataclass(frozen=True, kw_only=True)
class _Garbage:
    storage_key: str
    gone: Update | Delete  #: what to write when the bytes are


def collect(factory: SessionFactory, artifacts: Artifacts, *, quiet_seconds: float = 600.0) -> None:
    """Delete up to a hundred of each kind. What an attempt left is looked at `quiet_seconds` after its end,
    when no zombie of it can still be writing. Raises Unavailable when database or storage is away; call it
    again.
    """
    with transaction(factory) as session:
        garbage = _given_up(session)
    for item in garbage:
        artifacts.delete(item.storage_key)
        with transaction(factory) as session:
            session.execute(item.gone)
    with transaction(factory) as session:
        attempts = _ended_attempts(session, quiet_seconds)
    for job_id, number in attempts:
        _sweep_attempt(factory, artifacts, job_id, number)
    artifacts.delete_incomplete(older_than_seconds=quiet_seconds)


def collect_uploads(
    factory: SessionFactory, artifacts: Artifacts, *, quiet_seconds: float = 86_400.0
) -> None:
    """Delete uploads that no row names: the API ended between their bytes and their row. It lists every file,
    so once an hour is often enough. Raises Unavailable.
    """
    stored = artifacts.children(FILES)
    for start in range(0, len(stored), _BATCH):
        names = stored[start : start + _BATCH]
        with transaction(factory) as session:
            known = set(session.scalars(select(File.id).where(File.id.in_(names))))
        _delete_old(artifacts, [file_key(name) for name in names if name not in known], quiet_seconds)


def collect_archives(
    factory: SessionFactory, artifacts: Artifacts, *, quiet_seconds: float = 86_400.0
) -> None:
    """Delete archives whose worker was lost before it could write their row. Raises Unavailable."""
    for job_id in artifacts.children(EXPORTS):
        keys = [f"{EXPORTS}/{job_id}/{name}" for name in artifacts.children(f"{EXPORTS}/{job_id}")]
        with transaction(factory) as session:
            known = set(session.scalars(select(Export.storage_key).where(Export.storage_key.in_(keys))))
        _delete_old(artifacts, [key for key in keys if key not in known], quiet_seconds)


def collect_prepared(factory: SessionFactory, artifacts: Artifacts) -> None:
    """Delete the rows that were made for jobs which have ended. Raises Unavailable."""
    stored = artifacts.children(PREPARED)
    for start in range(0, len(stored), _BATCH):
        names = stored[start : start + _BATCH]
        with transaction(factory) as session:
            query = select(Job.id).where(Job.id.in_(names), Job.finished_at.is_not(None))
            ended = list(session.scalars(query))
        for job_id in ended:
            artifacts.delete(f"{PREPARED}/{job_id}")


def _delete_old(artifacts: Artifacts, keys: list[str], quiet_seconds: float) -> None:
    for key in keys:
        with suppress(Damaged):  # another process was quicker
            if artifacts.age_seconds(key) > quiet_seconds:
                artifacts.delete(key)


def _given_up(session: Session) -> list[_Garbage]:
    old = select(Checkpoint).where(Checkpoint.removed_at.is_not(None), Checkpoint.purged_at.is_(None))
    deleted = (
        select(FineTunedModel)
        .join(Job, Job.id == FineTunedModel.job_id)
        .where(FineTunedModel.deleted_at.is_not(None), FineTunedModel.purged_at.is_(None))
        .where(Job.finished_at.is_not(None))  # until then the job may resume from it
    )
    archives = (
        select(Export)
        .join(FineTunedModel, FineTunedModel.id == Export.model_id)
        .where(FineTunedModel.deleted_at.is_not(None), Export.storage_key.is_not(None))
    )
    results = select(StageResult).where(StageResult.removed_at.is_not(None))
    return [
        *(_purged(File, row, row.storage_key) for row in files.purgeable(session, limit=_BATCH)),
        *(_purged(Checkpoint, row, row.storage_key) for row in session.scalars(old.limit(_BATCH))),
        *(_purged(FineTunedModel, row, _whole(row)) for row in session.scalars(deleted.limit(_BATCH))),
        *(_dropped(row) for row in session.scalars(archives.limit(_BATCH))),
        *(_forgotten(row) for row in session.scalars(results.limit(_BATCH))),
    ]


def _purged(
    table: type[File] | type[Checkpoint] | type[FineTunedModel], row: Any, storage_key: str
) -> _Garbage:
    return _Garbage(storage_key=storage_key, gone=_set(table, table.id == row.id, {"purged_at": func.now()}))


def _whole(model: FineTunedModel) -> str:
    """The model of a checkpoint is a part of it, and nobody resumes from the rest any more."""
    return model.storage_key.removesuffix("/bundle") if model.kind == "checkpoint" else model.storage_key


def _dropped(archive: Export) -> _Garbage:
    assert archive.storage_key is not None
    where = Export.storage_key == archive.storage_key
    return _Garbage(storage_key=archive.storage_key, gone=_set(Export, where, {"storage_key": None}))


def _forgotten(result: StageResult) -> _Garbage:
    this = delete(StageResult).where(StageResult.storage_key == result.storage_key)
    return _Garbage(storage_key=result.storage_key, gone=this.execution_options(synchronize_session=False))


def _ended_attempts(session: Session, quiet_seconds: float) -> list[tuple[str, int]]:
    query = select(Attempt.job_id, Attempt.number).where(
        Attempt.ended_at < func.now() - seconds(quiet_seconds), Attempt.swept_at.is_(None)
    )
    return [(job_id, number) for job_id, number in session.execute(query.limit(_BATCH))]


def _sweep_attempt(factory: SessionFactory, artifacts: Artifacts, job_id: str, number: int) -> None:
    prefix = attempt_prefix(job_id, number)
    names = artifacts.children(prefix)
    with transaction(factory) as session:
        needed = _needed(session, job_id)
    for key in (f"{prefix}/{name}" for name in names):
        if not any(named == key or named.startswith(f"{key}/") for named in needed):
            artifacts.delete(key)
    this = (Attempt.job_id == job_id) & (Attempt.number == number)
    with transaction(factory) as session:
        session.execute(_set(Attempt, this, {"swept_at": func.now()}))


def _needed(session: Session, job_id: str) -> list[str]:
    """The keys of a job that rows name."""
    checkpoints = select(Checkpoint.storage_key).where(
        Checkpoint.job_id == job_id, Checkpoint.purged_at.is_(None)
    )
    models = select(FineTunedModel.storage_key).where(
        FineTunedModel.job_id == job_id, FineTunedModel.purged_at.is_(None)
    )
    results = select(File.storage_key).join(Job, Job.result_file_id == File.id).where(Job.id == job_id)
    stages = select(StageResult.storage_key).where(StageResult.job_id == job_id)
    return [key for query in (checkpoints, models, results, stages) for key in session.scalars(query)]


def _set(table: type[Any], where: ColumnElement[bool], values: dict[str, Any]) -> Update:
    return update(table).where(where).values(values).execution_options(synchronize_session=False)
