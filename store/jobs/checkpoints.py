"""Checkpoint rows. The caller checks the fence and stores the bytes.

Each job keeps two step checkpoints: the newest, and the one before in case that is damaged. The checkpoints at the end
of stages stay, since they are models. Of those at the end of epochs, models too, the newest stay and the best one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import ColumnElement, Select, exists, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from heft_engine.config.train import StoppingMetric
from store import ids
from store.db.tables import Checkpoint, FineTunedModel, Job
from store.jobs.spec import TrainingSpec

_KEPT_STEPS = 2
_BUNDLE = "bundle/"

#: Newest first. Those of a later attempt are newer, also where it fell back to an earlier step.
_NEWEST_FIRST = (Checkpoint.attempt.desc(), Checkpoint.step.desc(), Checkpoint.created_at.desc())


def resumable(session: Session, job_id: str) -> list[Checkpoint]:
    """Returns the checkpoints to resume from, the best first: the newest and the one before."""
    query = select(Checkpoint).where(
        Checkpoint.job_id == job_id, Checkpoint.kind != "epoch", Checkpoint.removed_at.is_(None)
    )
    return list(session.scalars(query.order_by(*_NEWEST_FIRST).limit(_KEPT_STEPS)))


def committed_key(session: Session, checkpoint: Checkpoint) -> str | None:
    """Returns the storage key of the committed checkpoint of the same attempt, step and kind; None without one.

    That of an epoch may be of any attempt: one that fell back reaches the epoch a second time, and the first model
    stays.
    """
    query = select(Checkpoint.storage_key).where(
        Checkpoint.job_id == checkpoint.job_id,
        Checkpoint.step == checkpoint.step,
        Checkpoint.kind == checkpoint.kind,
    )
    if checkpoint.kind != "epoch":
        query = query.where(Checkpoint.attempt == checkpoint.attempt)
    return session.scalar(query)


def add(session: Session, job: Job, checkpoint: Checkpoint, task: Mapping[str, Any]) -> Checkpoint:
    """Adds the row; of an epoch's or a stage's checkpoint, also its model, which answers `task`.

    An attempt that fell back behind the end of a stage reaches it a second time. The first model stays; the second
    checkpoint is one to resume from, without a model.
    """
    if checkpoint.kind != "step":
        spec = TrainingSpec.model_validate(job.spec)
        label = f"step-{checkpoint.step}"
        if checkpoint.kind == "stage":
            label = spec.stage_label(checkpoint.stage, checkpoint.stage_index)
        files = checkpoint.manifest.items()
        manifest = {name.removeprefix(_BUNDLE): sha256 for name, sha256 in files if name.startswith(_BUNDLE)}
        key = f"{checkpoint.storage_key}/bundle"
        row = model_row(job, spec, label=label, storage_key=key, manifest=manifest, task=task)
        new_model = insert(FineTunedModel).values(row).on_conflict_do_nothing().returning(FineTunedModel.id)
        checkpoint.model_id = session.scalar(new_model)
    session.add(checkpoint)
    session.flush()
    return checkpoint


def is_model() -> ColumnElement[bool]:
    """Returns the condition that a checkpoint is a model, which nobody has deleted."""
    return exists().where(FineTunedModel.id == Checkpoint.model_id, FineTunedModel.deleted_at.is_(None))


def best(session: Session, job_id: str, metric: StoppingMetric | None = None) -> str | None:
    """Returns the id of the checkpoint with the best model; None without validation rows.

    metric: of the job's early stopping; None: valid_accuracy, where it was measured (tasks with labels), else
    valid_loss. Equal accuracies are ordered by the loss.
    """
    loss, token_accuracy, accuracy = (
        Checkpoint.metrics[name].as_float()
        for name in ("valid_loss", "valid_mean_token_accuracy", "valid_accuracy")
    )
    models = _present(job_id).where(is_model(), or_(loss.is_not(None), accuracy.is_not(None)))
    by: tuple[ColumnElement[Any], ...] = (loss.nulls_last(),)
    if metric == "valid_mean_token_accuracy":
        by = (token_accuracy.desc().nulls_last(), *by)
    elif metric != "valid_loss":
        by = (accuracy.desc().nulls_last(), *by)
    # A stage that stops early ends with the parameters of its best epoch, and comes first.
    return session.scalar(models.order_by(*by, Checkpoint.step.desc()).limit(1))


def remove_old_steps(session: Session, job_id: str, *, keep: int = _KEPT_STEPS) -> list[str]:
    """Marks all but the newest `keep` checkpoints that are no models as removed. Returns their storage keys."""
    old = _present(job_id).where(Checkpoint.model_id.is_(None)).order_by(*_NEWEST_FIRST).offset(keep)
    return [key for key, _ in _remove(session, session.scalars(old))]


def remove_old_epochs(session: Session, job_id: str, spec: TrainingSpec) -> None:
    """Marks all but the newest `n_checkpoints` models of epochs and the best one as removed, and deletes the models.

    Their files stay for a while (store.storage.garbage): a worker may be reading them.
    """
    epochs = _present(job_id).where(Checkpoint.kind == "epoch", is_model())
    old = epochs.order_by(Checkpoint.step.desc()).offset(spec.n_checkpoints)
    removed = _remove(session, {*session.scalars(old)} - {best(session, job_id, spec.best_by)})
    models = FineTunedModel.id.in_([model_id for _, model_id in removed])
    statement = update(FineTunedModel).where(models, FineTunedModel.deleted_at.is_(None))
    session.execute(statement.values(deleted_at=func.now()))


def _present(job_id: str) -> Select[str]:
    return select(Checkpoint.id).where(Checkpoint.job_id == job_id, Checkpoint.removed_at.is_(None))


def _remove(session: Session, old_ids: Iterable[str]) -> list[tuple[str, str | None]]:
    """Marks checkpoints as removed. Returns storage key and model id of each."""
    statement = update(Checkpoint).where(Checkpoint.id.in_(list(old_ids))).values(removed_at=func.now())
    rows = session.execute(statement.returning(Checkpoint.storage_key, Checkpoint.model_id))
    return [(key, model_id) for key, model_id in rows]


def model_row(
    job: Job,
    spec: TrainingSpec,
    *,
    label: str | None = None,
    storage_key: str,
    manifest: Mapping[str, str],
    task: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the values of a model's row: of the job's result, or with `label` of a checkpoint."""
    model_id = ids.model_id(base=spec.base_model, owner_id=job.owner_id, suffix=spec.suffix, job_id=job.id)
    return {
        "id": model_id if label is None else ids.checkpoint_model_id(model_id, label),
        "owner_id": job.owner_id,
        "job_id": job.id,
        "kind": "final" if label is None else "checkpoint",
        "base_model": spec.base_model,
        "started_from": spec.model if spec.goes_on else None,
        "storage_key": storage_key,
        "manifest": dict(manifest),
        "task": dict(task),
    }
