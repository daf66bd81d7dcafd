"""Checkpoint rows: the commit points of a run. It does NOT touch bytes, nor check the fence: see leases.

Two step checkpoints are kept for each job: the newest to resume from, and the one before in case that is
damaged. The checkpoint at a stage's end stays, for it is a model that can be asked.
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

_KEPT = 2
_BUNDLE = "bundle/"

#: Newest first. An attempt that fell back to an older step goes on from there: its own are newer than all
#: before.
_NEWEST = (Checkpoint.attempt.desc(), Checkpoint.step.desc(), Checkpoint.created_at.desc())


def resumable(session: Session, job_id: str) -> list[Checkpoint]:
    """Where a run may go on from, the best first: the newest checkpoint and the one before."""
    query = select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.removed_at.is_(None))
    return list(session.scalars(query.order_by(*_NEWEST).limit(_KEPT)))


def committed_key(session: Session, checkpoint: Checkpoint) -> str | None:
    """Where the checkpoint of the same attempt, step and kind is stored, if there is one already."""
    query = select(Checkpoint.storage_key).where(
        Checkpoint.job_id == checkpoint.job_id,
        Checkpoint.attempt == checkpoint.attempt,
        Checkpoint.step == checkpoint.step,
        Checkpoint.kind == checkpoint.kind,
    )
    return session.scalar(query)


def add(session: Session, job: Job, checkpoint: Checkpoint, task: Mapping[str, Any]) -> Checkpoint:
    """Write the row; for a stage's end, also its model."""
    if checkpoint.kind == "stage":
        checkpoint.model_id = _add_model(session, job, checkpoint, task)
    session.add(checkpoint)
    session.flush()
    return checkpoint


def remove_old(session: Session, job_id: str, *, keep: int = _KEPT) -> list[str]:
    """Mark all but the newest `keep` step checkpoints as removed. Returns the storage keys to delete."""
    steps = select(Checkpoint.id).where(
        Checkpoint.job_id == job_id, Checkpoint.kind == "step", Checkpoint.removed_at.is_(None)
    )
    old = steps.order_by(*_NEWEST).offset(keep)
    statement = (
        update(Checkpoint)
        .where(Checkpoint.id.in_(old))
        .values(removed_at=func.now())
        .returning(Checkpoint.storage_key)
        .execution_options(synchronize_session=False)
    )
    return list(session.scalars(statement))


def _add_model(session: Session, job: Job, checkpoint: Checkpoint, task: Mapping[str, Any]) -> str:
    spec = TrainingSpec.model_validate(job.spec)
    final = ids.model_id(base=spec.model, owner_id=job.owner_id, suffix=spec.suffix, job_id=job.id)
    model_id = ids.checkpoint_model_id(final, _label(spec, checkpoint))
    manifest = {
        name.removeprefix(_BUNDLE): sha256
        for name, sha256 in checkpoint.manifest.items()
        if name.startswith(_BUNDLE)
    }
    row = {
        "id": model_id,
        "owner_id": job.owner_id,
        "job_id": job.id,
        "kind": "checkpoint",
        "base_model": spec.model,
        "storage_key": f"{checkpoint.storage_key}/bundle",
        "manifest": manifest,
        "task": dict(task),
    }
    # An attempt that had to fall back behind a stage's end reaches it a second time: the first model stands.
    session.execute(insert(FineTunedModel).values(row).on_conflict_do_nothing())
    return model_id


def _label(spec: TrainingSpec, checkpoint: Checkpoint) -> str:
    """`lora`; `lora-3` where the recipe has more than one stage of that type (counted from 1)."""
    alone = sum(stage.type == checkpoint.stage for stage in spec.stages()) == 1
    return checkpoint.stage if alone else f"{checkpoint.stage}-{checkpoint.stage_index + 1}"
