"""Changes of a job's row: guarded UPDATEs, each with its event.

The same UPDATE numbers the event (`event_seq + 1`): the row's lock orders events, so a reader never sees number 8
before number 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import ColumnElement, and_, func, update
from sqlalchemy.orm import Session

from store import ids
from store.db.states import TERMINAL, AttemptOutcome, JobState, sources
from store.db.tables import Attempt, Event, Job
from store.jobs import checkpoints

Level = Literal["info", "warn", "error"]
EventType = Literal["message", "metrics"]


@dataclass(frozen=True, kw_only=True)
class NewEvent:
    """An event to be added to a job. `code` is one of the REST API's event codes; it is stored as `data.code`."""

    code: str
    message: str
    data: Mapping[str, Any] = field(default_factory=dict)
    level: Level = "info"
    type: EventType = "message"


def write(
    session: Session, guard: ColumnElement[bool], values: Mapping[str, Any], event: NewEvent | None = None
) -> Job | None:
    """Changes the one job that matches `guard` and adds `event`. Returns the job, None when no job matches."""
    changes = dict(values)
    if event is not None:
        changes["event_seq"] = Job.event_seq + 1
    statement = update(Job).where(guard).values(changes).returning(Job)
    job = session.scalars(statement).one_or_none()
    if job is not None and event is not None:
        session.add(Event(**event_row(job.id, seq=job.event_seq, attempt=job.attempt, event=event)))
        session.flush()
    return job


def move(
    session: Session,
    guard: ColumnElement[bool],
    to: JobState,
    event: NewEvent,
    values: Mapping[str, Any] | None = None,
) -> Job | None:
    """Moves the one job that matches `guard` into state `to`, if `states.TRANSITIONS` allows it, and adds `event`.

    The job's claim ends. Returns the job, None when no job matches.
    """
    changes: dict[str, Any] = {"state": to, "worker_id": None, "lease_until": None, "stage": None}
    if to is JobState.PAUSED:
        changes["pause_requested_at"] = None
    if to in TERMINAL:
        changes["finished_at"] = func.now()
    job = write(session, and_(guard, Job.state.in_(sources(to))), changes | dict(values or {}), event)
    if job is not None and to in TERMINAL:
        checkpoints.remove_old_steps(session, job.id, keep=0)  # no attempt resumes from them any more
    return job


def append(session: Session, job_id: str, event: NewEvent) -> None:
    """Adds an event to a job whose row this transaction has locked or created."""
    if write(session, Job.id == job_id, {}, event) is None:
        raise LookupError(job_id)


def event_row(job_id: str, *, seq: int, attempt: int, event: NewEvent) -> dict[str, Any]:
    """Returns the values of an event's row. `seq` is the `event_seq` of its job from then on."""
    return {
        "job_id": job_id,
        "seq": seq,
        "id": ids.new_event_id(),
        "attempt": attempt,
        "level": event.level,
        "type": event.type,
        "message": event.message,
        "data": {**event.data, "code": event.code},
    }


def close_attempt(session: Session, job_id: str, number: int, outcome: AttemptOutcome) -> None:
    """Writes the outcome of an attempt. An earlier outcome stays."""
    session.execute(
        update(Attempt)
        .where(Attempt.job_id == job_id, Attempt.number == number, Attempt.ended_at.is_(None))
        .values(ended_at=func.now(), outcome=outcome)
    )


def cancelled() -> NewEvent:
    return NewEvent(code="CANCELLED", message="The job was cancelled.")


def paused() -> NewEvent:
    return NewEvent(code="PAUSED", message="The job is paused. Resume continues from its last checkpoint.")


def failed(error: Mapping[str, Any]) -> NewEvent:
    return NewEvent(code="FAILED", message=str(error["message"]), data={"error": dict(error)}, level="error")
