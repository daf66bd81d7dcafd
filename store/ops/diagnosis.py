"""What the tables say about the service's health. It reads only, and does NOT advise: `heft doctor` does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, SQLColumnExpression, and_, func, or_, select
from sqlalchemy.orm import Session

from store.db.session import seconds
from store.db.states import CLAIMED, WAITING, JobState, Purpose
from store.db.tables import Event, Job, Reconciler, Worker

#: A lease that ran out so long ago should have been taken back.
_TAKEN_BACK_SECONDS = 120.0
#: Losing its worker now and then is a job's everyday life.
_MANY_LOSSES = 3
_LISTED = 20

Trouble = Literal["lease_expired", "no_progress", "trainer_dies", "workers_lost", "files_left"]


@dataclass(frozen=True, kw_only=True)
class SeenWorker:
    """`silent_seconds`: since it last wrote its row."""

    id: str
    role: str
    host: str
    pid: int
    silent_seconds: float


@dataclass(frozen=True, kw_only=True)
class Queue:
    """Jobs that wait for a worker to `prepare` or `train` them, and how long the first of them has waited."""

    purpose: Purpose
    length: int
    oldest_seconds: float
    held: int  #: jobs that are being worked on for the same purpose


@dataclass(frozen=True, kw_only=True)
class TroubledJob:
    id: str
    state: str
    trouble: Trouble
    number: float  #: of seconds, deaths or losses


def seen_workers(session: Session) -> list[SeenWorker]:
    """Every worker that did not say goodbye, by id."""
    silent = func.extract("epoch", func.now() - Worker.seen_at)
    return [
        SeenWorker(
            id=row.id,
            role=row.role,
            host=str(row.info.get("host", "")),
            pid=int(row.info.get("pid", 0)),
            silent_seconds=float(age),
        )
        for row, age in session.execute(select(Worker, silent).order_by(Worker.id))
    ]


def seconds_since_sweep(session: Session) -> float | None:
    """None: no worker has ever looked for lost jobs."""
    age = session.scalar(select(func.extract("epoch", func.now() - Reconciler.swept_at)))
    return None if age is None else float(age)


def queues(session: Session) -> list[Queue]:
    """What waits and is free to be taken."""
    found = []
    for purpose, state in WAITING.items():
        free = and_(
            Job.state == state,
            Job.lease_until.is_(None),
            or_(Job.not_before.is_(None), Job.not_before <= func.now()),
        )
        waited = func.extract("epoch", func.now() - func.min(_last_event()))
        length, oldest = session.execute(select(func.count(), waited).where(free)).one()
        held = and_(Job.state == CLAIMED[purpose], Job.lease_until.is_not(None))
        working = session.scalar(select(func.count()).select_from(Job).where(held)) or 0
        found.append(Queue(purpose=purpose, length=length, oldest_seconds=float(oldest or 0), held=working))
    return found


def troubled_jobs(session: Session, *, stall_seconds: float) -> list[TroubledJob]:
    """Unfinished jobs that an operator should look at, and ended ones whose files stayed behind."""
    expired = func.extract("epoch", func.now() - Job.lease_until)
    quiet = func.extract("epoch", func.now() - _last_event())
    return [
        *_jobs(
            session, "lease_expired", expired, Job.lease_until < func.now() - seconds(_TAKEN_BACK_SECONDS)
        ),
        *_jobs(
            session,
            "no_progress",
            quiet,
            and_(Job.state == JobState.RUNNING, _last_event() < func.now() - seconds(stall_seconds)),
        ),
        *_jobs(
            session,
            "trainer_dies",
            Job.trainer_deaths,
            and_(Job.finished_at.is_(None), Job.trainer_deaths > 0),
        ),
        *_jobs(
            session,
            "workers_lost",
            Job.lost_leases,
            and_(Job.finished_at.is_(None), Job.lost_leases >= _MANY_LOSSES),
        ),
        *_jobs(session, "files_left", Job.attempt, Job.cleanup_error.is_not(None)),
    ]


def _jobs(
    session: Session, trouble: Trouble, number: SQLColumnExpression[Any], where: ColumnElement[bool]
) -> list[TroubledJob]:
    query = select(Job.id, Job.state, number).where(where).order_by(Job.created_at.desc()).limit(_LISTED)
    return [
        TroubledJob(id=job_id, state=state, trouble=trouble, number=float(value))
        for job_id, state, value in session.execute(query)
    ]


def _last_event() -> ColumnElement[object]:
    """When a job's last event happened; it was made if it has none."""
    last = select(func.max(Event.created_at)).where(Event.job_id == Job.id).correlate(Job).scalar_subquery()
    return func.coalesce(last, Job.created_at)
