"""The service's health as its tables show it, for `heft doctor`. Read-only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, SQLColumnExpression, and_, func, select
from sqlalchemy.orm import Session

from store.db.session import seconds
from store.db.states import CLAIMED, WAITING, JobState, Purpose
from store.db.tables import Event, Job, Reconciler, Worker
from store.jobs.leases import is_claimable

#: A lease that expired so long ago should have been taken back.
_TAKEN_BACK_SECONDS = 120.0
#: Fewer lost workers of one job are normal.
_MANY_LOSSES = 3
_MAX_LISTED = 20

Trouble = Literal["lease_expired", "no_progress", "trainer_dies", "workers_lost", "files_left"]


@dataclass(frozen=True, kw_only=True)
class SeenWorker:
    """A worker's row. `silent_seconds`: since its last heartbeat."""

    id: str
    role: str
    host: str
    pid: int
    silent_seconds: float


@dataclass(frozen=True, kw_only=True)
class Queue:
    """The jobs that wait to be claimed for one purpose."""

    purpose: Purpose
    length: int
    oldest_seconds: float  #: the longest wait, since the job's last event
    claimed: int  #: jobs that workers hold for the same purpose


@dataclass(frozen=True, kw_only=True)
class TroubledJob:
    """A job that an operator should look at."""

    id: str
    state: str
    trouble: Trouble
    number: float  #: of seconds, crashes or lost workers


def seen_workers(session: Session) -> list[SeenWorker]:
    """Returns all workers that have not removed their row, by id."""
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
    """Returns the seconds since the last sweep for lost jobs; None when there was none."""
    age = session.scalar(select(func.extract("epoch", func.now() - Reconciler.swept_at)))
    return None if age is None else float(age)


def queues(session: Session) -> list[Queue]:
    """Returns the queue of each purpose."""
    result = []
    for purpose in WAITING:
        waited = func.extract("epoch", func.now() - func.min(_last_event()))
        length, oldest = session.execute(select(func.count(), waited).where(is_claimable(purpose))).one()
        is_claimed = and_(Job.state == CLAIMED[purpose], Job.lease_until.is_not(None))
        claimed = session.scalar(select(func.count()).select_from(Job).where(is_claimed)) or 0
        result.append(
            Queue(purpose=purpose, length=length, oldest_seconds=float(oldest or 0), claimed=claimed)
        )
    return result


def troubled_jobs(session: Session, *, stall_seconds: float) -> list[TroubledJob]:
    """Returns unfinished jobs that an operator should look at, and ended ones whose files could not be deleted."""
    now, unfinished = func.now(), Job.finished_at.is_(None)
    expired_seconds = func.extract("epoch", now - Job.lease_until)
    quiet_seconds = func.extract("epoch", now - _last_event())
    stalls = and_(Job.state == JobState.RUNNING, _last_event() < now - seconds(stall_seconds))
    troubles: list[tuple[Trouble, SQLColumnExpression[Any], ColumnElement[bool]]] = [
        ("lease_expired", expired_seconds, Job.lease_until < now - seconds(_TAKEN_BACK_SECONDS)),
        ("no_progress", quiet_seconds, stalls),
        ("trainer_dies", Job.trainer_deaths, and_(unfinished, Job.trainer_deaths > 0)),
        ("workers_lost", Job.lost_leases, and_(unfinished, Job.lost_leases >= _MANY_LOSSES)),
        ("files_left", Job.attempt, Job.cleanup_error.is_not(None)),
    ]
    return [job for trouble in troubles for job in _jobs(session, *trouble)]


def _jobs(
    session: Session, trouble: Trouble, number: SQLColumnExpression[Any], condition: ColumnElement[bool]
) -> list[TroubledJob]:
    query = select(Job.id, Job.state, number).where(condition)
    rows = session.execute(query.order_by(Job.created_at.desc()).limit(_MAX_LISTED))
    return [
        TroubledJob(id=job_id, state=state, trouble=trouble, number=float(value))
        for job_id, state, value in rows
    ]


def _last_event() -> ColumnElement[object]:
    """The time of a job's last event, or of its creation."""
    last = select(func.max(Event.created_at)).where(Event.job_id == Job.id).correlate(Job).scalar_subquery()
    return func.coalesce(last, Job.created_at)
