"""Archives of models, built by a worker when first asked for. Claimed, leased and fenced as jobs are.

It does NOT build archives, nor send messages: the caller of `request` hints after its commit.
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
from store.db.tables import Export
from store.errors import Conflict, InvalidRequest, LostFence
from store.jobs import jobs
from store.models import Model

Format = Literal["bundle", "merged", "peft", "pyreft"]
#: What is asked for through the job: the diagnostics of its model, built by a worker as archives are.
DIAGNOSTICS = "diagnostics"
#: So many lost workers in a row and the archive fails: it may be what ends them.
MAX_LOSSES = 3
#: A failure is told for so long; whoever asks later has it tried again.
_FAILED_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class ExportClaim:
    """One attempt at one archive."""

    model: Model
    format: str
    attempt: int
    lease_seconds: float


def request(session: Session, *, owner_id: str, model_id: str, format: str) -> Export:
    """The archive's row: `pending` (made now or before), `building`, `ready` or `failed` (for ten minutes, then it is
    tried again).

    Raises NotFound for another owner's or a deleted model, InvalidRequest for a base model or an unknown
    format.
    """
    if format not in get_args(Format):
        raise InvalidRequest(f"a format is one of {', '.join(get_args(Format))}", param="format")
    return _request(session, owner_id=owner_id, model_id=model_id, format=format)


def request_diagnostics(session: Session, *, owner_id: str, job_id: str) -> Export:
    """The row of a job's diagnostics, in the states of an archive.

    Raises NotFound; Conflict for a job that has left no model (yet).
    """
    job = jobs.get(session, owner_id=owner_id, job_id=job_id)
    if job.fine_tuned_model is None:
        message = (
            f"this job is {job.state}: diagnostics are of the model that a job leaves when it has succeeded"
        )
        raise Conflict(message, code="job_has_no_model")
    return _request(session, owner_id=owner_id, model_id=job.fine_tuned_model, format=DIAGNOSTICS)


def _request(session: Session, *, owner_id: str, model_id: str, format: str) -> Export:
    if models.get(session, owner_id=owner_id, model_id=model_id).kind == "base":
        raise InvalidRequest("a base model is not exported: take it from where it came from", param="model")
    row = {"model_id": model_id, "format": format, "state": "pending"}
    session.execute(insert(Export).values(row).on_conflict_do_nothing())
    told = and_(Export.state == "failed", Export.failed_at < func.now() - seconds(_FAILED_SECONDS))
    session.execute(
        update(Export)
        .where(_this(model_id, format), told)
        .values(state="pending", losses=0, error=None, failed_at=None)
        .execution_options(synchronize_session=False)
    )
    return session.scalars(select(Export).where(_this(model_id, format))).one()


def claim(session: Session, *, model_id: str, format: str, lease_seconds: float = 60.0) -> ExportClaim | None:
    """Take an archive that waits, or whose worker was lost. None when there is nothing to do: drop the
    message.
    """
    statement = (
        update(Export)
        .where(_this(model_id, format), _waiting(), _losses() < MAX_LOSSES)
        .values(
            state="building",
            attempt=Export.attempt + 1,
            losses=_losses(),
            lease_until=func.now() + seconds(lease_seconds),
        )
        .returning(Export)
        .execution_options(synchronize_session=False)
    )
    export = session.scalars(statement).one_or_none()
    if export is None:
        return None
    model = models.for_worker(session, model_id=model_id)
    return ExportClaim(model=model, format=format, attempt=export.attempt, lease_seconds=lease_seconds)


def heartbeat(session: Session, claim: ExportClaim) -> None:
    """Renew the lease. Raises LostFence."""
    _write(session, claim, {"lease_until": func.now() + seconds(claim.lease_seconds)})


def finish(session: Session, claim: ExportClaim, *, storage_key: str, size: int) -> None:
    """The archive of `size` bytes is durable under `storage_key`. Raises LostFence."""
    _write(session, claim, {"state": "ready", "lease_until": None, "storage_key": storage_key, "bytes": size})


def release(session: Session, claim: ExportClaim) -> None:
    """Its worker was asked to stop: it waits for another, and nobody was lost. Raises LostFence."""
    _write(session, claim, {"state": "pending", "lease_until": None})


def fail(session: Session, claim: ExportClaim, *, error: Mapping[str, Any]) -> None:
    """It can't be built: `error` is {code, message, param}. Raises LostFence."""
    _write(session, claim, {"state": "failed", "lease_until": None, **_failure(error)})


def waiting(session: Session, *, limit: int = 50) -> list[tuple[str, str]]:
    """(model id, format) of archives to hint again. Those whose worker was lost too often are failed here."""
    error = {
        "code": "worker_lost",
        "message": "The workers that built this archive were lost.",
        "param": None,
    }
    session.execute(
        update(Export)
        .where(_waiting(), _losses() >= MAX_LOSSES)
        .values(state="failed", lease_until=None, losses=_losses(), **_failure(error))
        .execution_options(synchronize_session=False)
    )
    query = select(Export.model_id, Export.format).where(_waiting()).order_by(Export.created_at).limit(limit)
    return [(model_id, format) for model_id, format in session.execute(query)]


def _this(model_id: str, format: str) -> ColumnElement[bool]:
    return and_(Export.model_id == model_id, Export.format == format)


def _waiting() -> ColumnElement[bool]:
    return or_(Export.state == "pending", _lost())


def _lost() -> ColumnElement[bool]:
    return and_(Export.state == "building", Export.lease_until < func.now())


def _losses() -> ColumnElement[int]:
    """With the one that a waiting archive has just suffered, if it has."""
    return Export.losses + case((_lost(), 1), else_=0)


def _failure(error: Mapping[str, Any]) -> dict[str, Any]:
    return {"error": dict(error), "failed_at": func.now()}


def _write(session: Session, claim: ExportClaim, values: Mapping[str, Any]) -> None:
    statement = (
        update(Export)
        .where(_this(claim.model.id, claim.format))
        .where(Export.state == "building", Export.attempt == claim.attempt)
        .values(dict(values))
        .returning(Export.attempt)
        .execution_options(synchronize_session=False)
    )
    if session.scalar(statement) is None:
        raise LostFence(
            f"attempt {claim.attempt} at the {claim.format} of {claim.model.id} is no longer current"
        )
