"""Archives of models, which a worker builds at the first request. They are claimed, leased and fenced as jobs are.

The caller of `request` sends a hint after its commit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sqlalchemy import ColumnElement, and_, case, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from store import models
from store.db.session import seconds
from store.db.states import ExportState
from store.db.tables import Export
from store.errors import InvalidRequest, LostFence, WrongState
from store.jobs import jobs
from store.models import Model

Format = Literal["bundle", "merged", "peft", "pyreft"]
#: The format of a job's diagnostics, which a worker builds as it builds archives.
DIAGNOSTICS = "diagnostics"
#: So many lost workers fail an archive: building it may be what ends them.
MAX_LOSSES = 3
#: A failed archive is tried again at a request that comes so much later.
_FAILED_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class ExportClaim:
    """One attempt at one archive."""

    model: Model
    format: str
    attempt: int
    lease_seconds: float


def request(session: Session, *, owner_id: str, model_id: str, format: str) -> Export:
    """Returns an archive's row, which is created at the first request.

    Its state is `pending`, `building`, `ready` or `failed`; a failed archive becomes pending again after ten minutes.
    Raises NotFound for another owner's or a deleted model, InvalidRequest for a base model or an unknown format.
    """
    if format not in get_args(Format):
        raise InvalidRequest(f"format must be one of {', '.join(get_args(Format))}", param="format")
    return _request(session, owner_id=owner_id, model_id=model_id, format=format)


def request_diagnostics(session: Session, *, owner_id: str, job_id: str) -> Export:
    """Returns the row of a job's diagnostics, in the states of an archive.

    Raises NotFound; WrongState for a job without a model.
    """
    job = jobs.get(session, owner_id=owner_id, job_id=job_id)
    if job.fine_tuned_model is None:
        message = f"the job is {job.state}: only a job that has succeeded has diagnostics"
        raise WrongState(message, code="job_has_no_model")
    return _request(session, owner_id=owner_id, model_id=job.fine_tuned_model, format=DIAGNOSTICS)


def _request(session: Session, *, owner_id: str, model_id: str, format: str) -> Export:
    if models.get(session, owner_id=owner_id, model_id=model_id).kind == "base":
        raise InvalidRequest("base models can't be exported, only fine-tuned ones", param="model")
    row = {"model_id": model_id, "format": format, "state": ExportState.PENDING}
    session.execute(insert(Export).values(row).on_conflict_do_nothing())
    to_retry = and_(
        Export.state == ExportState.FAILED, Export.failed_at < func.now() - seconds(_FAILED_SECONDS)
    )
    session.execute(
        update(Export)
        .where(_is_export(model_id, format), to_retry)
        .values(state=ExportState.PENDING, losses=0, error=None, failed_at=None)
    )
    return session.scalars(select(Export).where(_is_export(model_id, format))).one()


def claim(session: Session, *, model_id: str, format: str, lease_seconds: float = 60.0) -> ExportClaim | None:
    """Claims an archive that is pending or whose worker was lost; None when there is nothing to build."""
    statement = (
        update(Export)
        .where(_is_export(model_id, format), _is_waiting(), _losses() < MAX_LOSSES)
        .values(
            state=ExportState.BUILDING,
            attempt=Export.attempt + 1,
            losses=_losses(),
            lease_until=func.now() + seconds(lease_seconds),
        )
        .returning(Export)
    )
    export = session.scalars(statement).one_or_none()
    if export is None:
        return None
    model = models.for_worker(session, model_id=model_id)
    return ExportClaim(model=model, format=format, attempt=export.attempt, lease_seconds=lease_seconds)


def heartbeat(session: Session, claim: ExportClaim) -> None:
    """Renews the lease. Raises LostFence."""
    _write(session, claim, {"lease_until": func.now() + seconds(claim.lease_seconds)})


def finish(session: Session, claim: ExportClaim, *, storage_key: str, size: int) -> None:
    """Marks an archive of `size` bytes, which is durable under `storage_key`, as ready. Raises LostFence."""
    _write(
        session,
        claim,
        {"state": ExportState.READY, "lease_until": None, "storage_key": storage_key, "bytes": size},
    )


def release(session: Session, claim: ExportClaim) -> None:
    """Makes an archive whose worker was asked to stop pending again, without a loss. Raises LostFence."""
    _write(session, claim, {"state": ExportState.PENDING, "lease_until": None})


def fail(session: Session, claim: ExportClaim, *, error: Mapping[str, Any]) -> None:
    """Marks an archive that can't be built as failed: `error` is {code, message, param}. Raises LostFence."""
    _write(session, claim, {"state": ExportState.FAILED, "lease_until": None, **_failure(error)})


def waiting(session: Session, *, limit: int = 50) -> list[tuple[str, str]]:
    """Returns (model id, format) of archives that wait for a worker. Fails those whose worker was lost too often."""
    error = {
        "code": "worker_lost",
        "message": "The workers that built this archive were lost.",
        "param": None,
    }
    session.execute(
        update(Export)
        .where(_is_waiting(), _losses() >= MAX_LOSSES)
        .values(state=ExportState.FAILED, lease_until=None, losses=_losses(), **_failure(error))
    )
    query = select(Export.model_id, Export.format).where(_is_waiting())
    rows = session.execute(query.order_by(Export.created_at).limit(limit))
    return [(model_id, format) for model_id, format in rows]


def _is_export(model_id: str, format: str) -> ColumnElement[bool]:
    return and_(Export.model_id == model_id, Export.format == format)


def _is_waiting() -> ColumnElement[bool]:
    return or_(Export.state == ExportState.PENDING, _is_lost())


def _is_lost() -> ColumnElement[bool]:
    return and_(Export.state == ExportState.BUILDING, Export.lease_until < func.now())


def _losses() -> ColumnElement[int]:
    """The number of lost workers, with one whose lease has just run out."""
    return Export.losses + case((_is_lost(), 1), else_=0)


def _failure(error: Mapping[str, Any]) -> dict[str, Any]:
    return {"error": dict(error), "failed_at": func.now()}


def _write(session: Session, claim: ExportClaim, values: Mapping[str, Any]) -> None:
    statement = (
        update(Export)
        .where(_is_export(claim.model.id, claim.format))
        .where(Export.state == ExportState.BUILDING, Export.attempt == claim.attempt)
        .values(dict(values))
        .returning(Export.attempt)
    )
    if session.scalar(statement) is None:
        raise LostFence(
            f"attempt {claim.attempt} at the {claim.format} of {claim.model.id} is no longer current"
        )
