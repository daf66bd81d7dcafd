"""The fine-tuned models that jobs go on from.

A model may be deleted while such a job is unfinished: its bytes stay until then (store.storage.garbage). The job's own
model holds all that it needs of them.
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import select
from sqlalchemy.orm import Session

from store.db.tables import FineTunedModel
from store.errors import InvalidRequest
from store.jobs.spec import TrainingSpec


def lock_for_jobs(session: Session, *, owner_id: str, specs: Iterable[TrainingSpec]) -> None:
    """Locks the models that jobs go on from against deletion until this transaction ends.

    Raises InvalidRequest (param `model`) for one that is unknown, deleted, or another owner's.
    """
    model_ids = sorted({spec.model for spec in specs if spec.goes_on})
    if not model_ids:
        return
    statement = (
        select(FineTunedModel.id)
        .where(FineTunedModel.id.in_(model_ids), FineTunedModel.owner_id == owner_id)
        .where(FineTunedModel.deleted_at.is_(None))
        .order_by(FineTunedModel.id)  # one order for all: no deadlock between two jobs
        .with_for_update(read=True)
    )
    existing = set(session.scalars(statement))
    for model_id in model_ids:
        if model_id not in existing:
            message = f"there is no model {model_id!r} to go on from"
            raise InvalidRequest(message, param="model", code="model_not_found")
