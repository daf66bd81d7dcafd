"""The fine-tuned models that jobs go on from.

A model may be deleted while such a job is unfinished: its bytes stay until then (store.storage.garbage). The job's own
model holds all that it needs of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from store.db.tables import FineTunedModel, Job
from store.errors import InvalidRequest
from store.jobs.spec import TrainingSpec


def lock_for_jobs(session: Session, *, owner_id: str, specs: Iterable[TrainingSpec]) -> None:
    """Locks the models that jobs go on from against deletion until this transaction ends.

    Raises InvalidRequest for one that is unknown, deleted, or another owner's (param `model`), and for a setting that
    contradicts the model's.
    """
    going_on = [spec for spec in specs if spec.goes_on]
    if not going_on:
        return
    statement = (
        select(FineTunedModel.id, Job.resolved, Job.spec)
        .join(Job, Job.id == FineTunedModel.job_id)
        .where(FineTunedModel.id.in_({spec.model for spec in going_on}), FineTunedModel.owner_id == owner_id)
        .where(FineTunedModel.deleted_at.is_(None))
        .order_by(FineTunedModel.id)  # one order for all: no deadlock between two jobs
        .with_for_update(read=True, of=FineTunedModel)
    )
    # The settings of the models' jobs; a job that ran before the engine reported a setting has it in its spec alone.
    settings = {row.id: {**row.spec, **row.resolved} for row in session.execute(statement)}
    for spec in going_on:
        if spec.model not in settings:
            message = f"there is no model {spec.model!r} to go on from"
            raise InvalidRequest(message, param="model", code="model_not_found")
        _check_settings(spec, settings[spec.model])


def _check_settings(spec: TrainingSpec, start: Mapping[str, Any]) -> None:
    """Raises InvalidRequest for a dtype or a quantisation other than that of the model's job."""
    dtype, quantization = start.get("dtype", "auto"), start.get("base_quantization")
    if "auto" not in (spec.dtype, dtype) and spec.dtype != dtype:
        message = f"{spec.model} was trained in {dtype}: dtype must be auto or {dtype}"
        raise InvalidRequest(message, param="dtype")
    if spec.base_quantization not in (None, quantization):
        message = (
            f"{spec.model} was not trained on a base in {spec.base_quantization}: leave base_quantization out"
        )
        raise InvalidRequest(message, param="base_quantization")
