"""Checkpoint rows. The caller checks the fence and stores the bytes.

Each job keeps two step checkpoints: the newest, and the one before in case that is damaged. The checkpoints at the end
of stages stay, since they are models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from store import ids
from store.db.tables import Checkpoint, FineTunedModel, Job
from store.jobs.spec import TrainingSpec

_KEPT_STEPS = 2
_BUNDLE = "bundle/"

#: Newest first. Those of a later attempt are newer, also where it fell back to an earlier step.
_NEWEST_FIRST = (Checkpoint.attempt.desc(), Checkpoint.step.desc(), Checkpoint.created_at.desc())


def resumable(session: Session, job_id: str) -> list[Checkpoint]:
    """Returns the checkpoints to resume from, the best first: the newest and the one before."""
    query = select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.removed_at.is_(None))
    return list(session.scalars(query.order_by(*_NEWEST_FIRST).limit(_KEPT_STEPS)))


def committed_key(session: Session, checkpoint: Checkpoint) -> str | None:
    """Returns the storage key of the committed checkpoint of the same attempt, step and kind; None without one."""
    query = select(Checkpoint.storage_key).where(
        Checkpoint.job_id == checkpoint.job_id,
        Checkpoint.attempt == checkpoint.attempt,
        Checkpoint.step == checkpoint.step,
        Checkpoint.kind == checkpoint.kind,
    )
    return session.scalar(query)


def add(session: Session, job: Job, checkpoint: Checkpoint, task: Mapping[str, Any]) -> Checkpoint:
    """Adds the row; of a stage checkpoint, also its model, which answers `task`."""
    if checkpoint.kind == "stage":
        spec = TrainingSpec.model_validate(job.spec)
        label = spec.stage_label(checkpoint.stage, checkpoint.stage_index)
        files = checkpoint.manifest.items()
        manifest = {name.removeprefix(_BUNDLE): sha256 for name, sha256 in files if name.startswith(_BUNDLE)}
        key = f"{checkpoint.storage_key}/bundle"
        row = model_row(job, spec, stage_label=label, storage_key=key, manifest=manifest, task=task)
        # An attempt that fell back behind the end of a stage reaches it a second time: the first model stays.
        session.execute(insert(FineTunedModel).values(row).on_conflict_do_nothing())
        checkpoint.model_id = row["id"]
    session.add(checkpoint)
    session.flush()
    return checkpoint


def remove_old(session: Session, job_id: str, *, keep: int = _KEPT_STEPS) -> list[str]:
    """Marks all but the newest `keep` step checkpoints as removed. Returns their storage keys."""
    steps = select(Checkpoint.id).where(
        Checkpoint.job_id == job_id, Checkpoint.kind == "step", Checkpoint.removed_at.is_(None)
    )
    old = steps.order_by(*_NEWEST_FIRST).offset(keep)
    statement = (
        update(Checkpoint)
        .where(Checkpoint.id.in_(old))
        .values(removed_at=func.now())
        .returning(Checkpoint.storage_key)
    )
    return list(session.scalars(statement))


def model_row(
    job: Job,
    spec: TrainingSpec,
    *,
    stage_label: str | None = None,
    storage_key: str,
    manifest: Mapping[str, str],
    task: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the values of a model's row: of the job's result, or with `stage_label` of a checkpoint."""
    model_id = ids.model_id(base=spec.model, owner_id=job.owner_id, suffix=spec.suffix, job_id=job.id)
    return {
        "id": model_id if stage_label is None else ids.checkpoint_model_id(model_id, stage_label),
        "owner_id": job.owner_id,
        "job_id": job.id,
        "kind": "final" if stage_label is None else "checkpoint",
        "base_model": spec.model,
        "storage_key": storage_key,
        "manifest": dict(manifest),
        "task": dict(task),
    }
