"""Models in one shape: base models that workers offer, results of jobs, and checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from store.db.tables import BaseModelRow, FineTunedModel
from store.errors import Forbidden, NotFound

Kind = Literal["base", "final", "checkpoint"]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A base model (without owner and bundle), a job's result (`final`), or a checkpoint of a job.

    `manifest` is {file: sha256} of the bundle under `storage_key`; `info` describes a base model, as its worker sent
    it. `started_from`: the fine-tuned model that its job went on from.
    """

    id: str
    kind: Kind
    created_at: datetime
    base_model: str
    started_from: str | None = None
    owner_id: str | None = None
    job_id: str | None = None
    storage_key: str | None = None
    manifest: Mapping[str, str] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)


def list_models(session: Session, *, owner_id: str) -> list[Model]:
    """Returns this owner's results, then all base models, each newest first. Checkpoints are listed by their job."""
    base = session.scalars(select(BaseModelRow).order_by(BaseModelRow.created_at.desc(), BaseModelRow.id))
    results = session.scalars(
        select(FineTunedModel)
        .where(FineTunedModel.kind == "final", *_visible_to(owner_id))
        .order_by(FineTunedModel.created_at.desc(), FineTunedModel.id.desc())
    )
    return [_fine_tuned(row) for row in results] + [_base(row) for row in base]


def get(session: Session, *, owner_id: str, model_id: str) -> Model:
    """Returns a model. Raises NotFound for one that is unknown, deleted, or another owner's."""
    return _get(session, model_id, *_visible_to(owner_id))


def for_worker(session: Session, *, model_id: str) -> Model:
    """Returns a model whatever its owner, also a deleted one: the work was authorized when it was accepted.

    Raises NotFound for an unknown id.
    """
    return _get(session, model_id)


def _get(session: Session, model_id: str, *conditions: ColumnElement[bool]) -> Model:
    """Returns a base model, or a fine-tuned one that meets these conditions. Raises NotFound."""
    row = session.scalar(select(FineTunedModel).where(FineTunedModel.id == model_id, *conditions))
    if row is not None:
        return _fine_tuned(row)
    base = session.get(BaseModelRow, model_id)
    if base is None:
        raise NotFound(f"there is no model {model_id!r}", param="model", code="model_not_found")
    return _base(base)


def _visible_to(owner_id: str) -> tuple[ColumnElement[bool], ...]:
    return FineTunedModel.owner_id == owner_id, FineTunedModel.deleted_at.is_(None)


def present(session: Session, *, model_ids: Collection[str]) -> set[str]:
    """Returns those of these fine-tuned models and checkpoints that exist and are not deleted."""
    query = select(FineTunedModel.id).where(FineTunedModel.id.in_(model_ids))
    return set(session.scalars(query.where(FineTunedModel.deleted_at.is_(None))))


def delete(session: Session, *, owner_id: str, model_id: str) -> None:
    """Hides a fine-tuned model or a checkpoint; its bytes are deleted later. Raises NotFound; Forbidden for a base."""
    hidden_id = session.scalar(
        update(FineTunedModel)
        .where(FineTunedModel.id == model_id, *_visible_to(owner_id))
        .values(deleted_at=func.now())
        .returning(FineTunedModel.id)
    )
    if hidden_id is None:
        get(session, owner_id=owner_id, model_id=model_id)
        raise Forbidden("a base model belongs to the service and can't be deleted", param="model")


def offer_base(
    session: Session, *, model_id: str, source: str, revision: str | None = None, info: Mapping[str, Any]
) -> None:
    """Adds a base model, or updates it. `source` is alias, directory or hub."""
    values = {"source": source, "revision": revision, "info": dict(info)}
    session.execute(
        insert(BaseModelRow)
        .values({"id": model_id, **values})
        .on_conflict_do_update(index_elements=[BaseModelRow.id], set_={**values, "seen_at": func.now()})
    )


def _base(row: BaseModelRow) -> Model:
    return Model(id=row.id, kind="base", created_at=row.created_at, base_model=row.id, info=row.info)


def _fine_tuned(row: FineTunedModel) -> Model:
    return Model(
        id=row.id,
        kind="final" if row.kind == "final" else "checkpoint",
        created_at=row.created_at,
        base_model=row.base_model,
        started_from=row.started_from,
        owner_id=row.owner_id,
        job_id=row.job_id,
        storage_key=row.storage_key,
        manifest=row.manifest,
        task=row.task,
    )
