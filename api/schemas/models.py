"""Model objects as in OpenAI's API, and pending archives of models."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel

from api.schemas.common import Identified, seconds
from store.models import Kind, Model

#: The owner of base models.
SERVICE = "heft"


class ModelObject(Identified):
    """A base model (`kind` is `base`), a fine-tuned model (`final`) or a `checkpoint` of a job.

    `started_from`: the fine-tuned model or checkpoint that the job went on from, which may be deleted since.
    """

    object: Literal["model"] = "model"
    created: int
    owned_by: str
    kind: Kind
    base_model: str
    started_from: str | None
    job_id: str | None
    task: dict[str, Any] | None
    info: dict[str, Any]

    @classmethod
    def of(cls, model: Model) -> Self:
        return cls(
            id=model.id,
            created=seconds(model.created_at),
            owned_by=model.owner_id or SERVICE,
            kind=model.kind,
            base_model=model.base_model,
            started_from=model.started_from,
            job_id=model.job_id,
            task=dict(model.task) or None,
            info=dict(model.info),
        )


class ExportPending(BaseModel):
    """A worker is building the archive: retry after `Retry-After` seconds."""

    object: Literal["model.export"] = "model.export"
    model: str
    format: str
    status: str
