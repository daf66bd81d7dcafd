"""The one way a job changes its state: an UPDATE whose WHERE is the guard, with the event that tells of it.

Events are numbered by the same UPDATE (`event_seq + 1`), in the same transaction: the row's lock orders them,
so a reader never sees number 8 before number 7. It does NOT know who may ask for a change: see jobs, leases,
reconcile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import ColumnElement, and_, func, update
from sqlalchemy.orm import Session

from store import ids
from store.db.states import TERMINAL, JobState, sources
from store.db.tables import Attempt, Event, Job
from store.jobs import checkpoints

Level = Literal["info", "warn", "error"]
EventType = Literal["message", "metrics"]


@dataclass(frozen=True, kw_only=True)
class NewEvent:
    """What happened. `code` is one of the codes of the REST API's events; it is stored as `data.code`."""

    code: str
    message: str
    data: Mapping[str, Any] = field(default_factory=dict)
    level: Level = "info"
    type: EventType = "message"


def write(
    session: Session, guard: ColumnElement[bool], values: Mapping[str, Any], event: NewEvent | None = None
) -> Job | None:
    """Change the one job that `guard` finds, and number and add `event`. None: the guard found no row."""
    changes = dict(values)
    if event is not None:
        changes["event_seq"] = Job.event_seq + 1
    statement = (
        update(Job).where(guard).values(changes).returning(Job).execution_options(synchronize_session=False)
    )
    job = session.scalars(statement).one_or_none()
    if job is not None and event is not None:
        _append(session, job, event)
    return job


def move(
    session: Session,
    guard: ColumnElement[bool],
    to: JobState,
    event: NewEvent,
    values: Mapping[str, Any] | None = None,
) -> Job | None:
    """Bring the one job that `guard` finds into state `to`, if `states.TRANSITIONS` allows it from where it
    stands.

    Whoever held it holds it no longer (a claim sets its holder in `values`).
    """
    changes: dict[str, Any] = {"state": to, "worker_id": None, "lease_until": None, "stage": None}
    if to is JobState.PAUSED:
        changes["pause_requested_at"] = None
    if to in TERMINAL:
        changes["finished_at"] = func.now()
    job = write(session, and_(guard, Job.state.in_(sources(to))), changes | dict(values or {}), event)
    if job is not None and to in TERMINAL:
        checkpoints.remove_old(session, job.id, keep=0)  # nothing resumes from them any more
    return job


def append(session: Session, job_id: str, event: NewEvent) -> None:
    """Add an event to a job whose row this transaction has already locked or made."""
    if write(session, Job.id == job_id, {}, event) is None:
        raise LookupError(job_id)


def _append(session: Session, job: Job, event: NewEvent) -> None:
    session.add(
        Event(
            job_id=job.id,
            seq=job.event_seq,
            id=ids.new_event_id(),
            attempt=job.attempt,
            level=event.level,
            type=event.type,
            message=event.message,
            data={**event.data, "code": event.code},
        )
    )
    session.flush()


def first_event(job_id: str, event: NewEvent) -> dict[str, Any]:
    """The row of event 1 of a job that is made with `event_seq` 1: nobody else can see it yet."""
    return {
        "job_id": job_id,
        "seq": 1,
        "id": ids.new_event_id(),
        "attempt": 0,
        "level": event.level,
        "type": event.type,
        "message": event.message,
        "data": {**event.data, "code": event.code},
    }


def close_attempt(session: Session, job_id: str, number: int, outcome: str) -> None:
    """Note how an attempt ended. One that has ended already keeps its outcome."""
    session.execute(
        update(Attempt)
        .where(Attempt.job_id == job_id, Attempt.number == number, Attempt.ended_at.is_(None))
        .values(ended_at=func.now(), outcome=outcome)
        .execution_options(synchronize_session=False)
    )


def cancelled(reason: str = "The job was cancelled.") -> NewEvent:
    return NewEvent(code="CANCELLED", message=reason)


def paused() -> NewEvent:
    return NewEvent(code="PAUSED", message="The job is paused; resume goes on from its last checkpoint.")


def failed(error: Mapping[str, Any]) -> NewEvent:
    return NewEvent(code="FAILED", message=str(error["message"]), data={"error": dict(error)}, level="error")
