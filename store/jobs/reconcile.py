"""The reconciler: finds jobs whose message or whose worker was lost. It does NOT send messages; its caller
does, after the commit.

One sweep at a time in the whole cluster, by an advisory lock that ends with the transaction.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, and_, case, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from store.db.session import seconds
from store.db.states import HELD, PURPOSES, WAITING, JobState, Purpose
from store.db.tables import Job, Reconciler
from store.jobs.shared_prefix import is_free
from store.jobs.transitions import NewEvent, cancelled, close_attempt, failed, move, paused

_LOCK = 0x48454654  #: "HEFT"
_ROW = 1

Hint = tuple[str, Purpose]


def sweep(
    session: Session,
    *,
    lease_seconds: float = 60.0,
    grace_seconds: float = 5.0,
    stale_seconds: float = 15.0,
    max_lost_leases: int = 20,
    limit: int = 50,
) -> list[Hint]:
    """Take back expired leases; return (job id, purpose) of waiting jobs whose last hint is `stale_seconds`
    old.

    At most `limit` of each purpose, the oldest first, so that a long queue does not send itself again and
    again. Empty while another process sweeps. When nobody has swept for a lease's length, the database was
    away and no worker could renew anything: nothing is taken over for one full lease.
    """
    if not session.scalar(select(func.pg_try_advisory_xact_lock(_LOCK))):
        return []
    if _may_take_over(session, lease_seconds):
        expired = and_(Job.lease_until < func.now() - seconds(grace_seconds))
        _take_back(session, expired, max_lost_leases)
    return [hint for state in PURPOSES for hint in _stale(session, state, stale_seconds, limit)]


def take_back_from(session: Session, *, worker_id: str, max_lost_leases: int = 20) -> None:
    """Take back at once what `worker_id` held in an earlier life. For a worker that starts under a name that
    is its alone, and so knows that the one before it is dead; the next sweep hints what was taken back.
    """
    _take_back(session, Job.worker_id == worker_id, max_lost_leases)


def _may_take_over(session: Session, lease_seconds: float) -> bool:
    """Note this sweep; False for one lease after an outage.

    A gap of half a lease counts as one: leases that ran out in it may belong to workers that live.
    """
    lease, outage = seconds(lease_seconds), seconds(lease_seconds / 2)
    first = {"id": _ROW, "swept_at": func.now(), "takeover_after": func.now()}
    statement = insert(Reconciler).values(first)
    after_gap = case(
        (Reconciler.swept_at < func.now() - outage, func.now() + lease), else_=Reconciler.takeover_after
    )
    statement = statement.on_conflict_do_update(
        index_elements=[Reconciler.id], set_={"swept_at": func.now(), "takeover_after": after_gap}
    )
    open_now = session.scalar(statement.returning(Reconciler.takeover_after <= func.now()))
    return bool(open_now)


def _take_back(session: Session, where: ColumnElement[bool], max_lost_leases: int) -> None:
    held = or_(*(Job.state == state for state in HELD.values()))
    query = select(Job).where(held, Job.lease_until.is_not(None), where).order_by(Job.id)
    # SKIP LOCKED: a row that someone is writing just now has a worker that lives.
    for job in session.scalars(query.with_for_update(skip_locked=True)).all():
        purpose: Purpose = "train" if job.state == JobState.RUNNING else "prepare"
        close_attempt(session, job.id, job.attempt, "lease_lost")
        to, event, values = _after_loss(job, purpose, max_lost_leases)
        move(session, and_(Job.id == job.id, Job.attempt == job.attempt), to, event, values)


def _after_loss(
    job: Job, purpose: Purpose, max_lost_leases: int
) -> tuple[JobState, NewEvent, dict[str, Any]]:
    """Where a job goes whose worker is gone: what its user asked for comes first."""
    values: dict[str, Any] = {"lost_leases": job.lost_leases + 1, "hinted_at": None}
    if job.cancel_requested_at is not None:
        return JobState.CANCELLED, cancelled(), values
    if job.pause_requested_at is not None:
        return JobState.PAUSED, paused(), values | {"paused_from": WAITING[purpose]}
    if job.lost_leases >= max_lost_leases:
        error = {
            "code": "worker_lost",
            "message": f"The job's worker was lost {job.lost_leases + 1} times; look at the workers' logs.",
            "param": None,
        }
        return JobState.FAILED, failed(error), values | {"error": error}
    event = NewEvent(
        code="RESTARTED",
        message="The job's worker was lost; it goes on elsewhere from its last checkpoint.",
        data={"lost_leases": job.lost_leases + 1},
        level="warn",
    )
    return WAITING[purpose], event, values


def _stale(session: Session, state: JobState, stale_seconds: float, limit: int) -> list[Hint]:
    waiting = and_(
        Job.state == state,
        Job.lease_until.is_(None),
        or_(Job.not_before.is_(None), Job.not_before <= func.now()),
        *([is_free()] if PURPOSES[state] == "train" else []),
    )
    unheard = or_(Job.hinted_at.is_(None), Job.hinted_at <= func.now() - seconds(stale_seconds))
    # A study's cancel locks many jobs in an order of its own: who is locked is left to the next sweep.
    oldest = select(Job.id).where(waiting).order_by(Job.created_at, Job.id).limit(limit)
    oldest = oldest.with_for_update(of=Job, skip_locked=True)
    in_order = list(session.scalars(oldest))
    statement = (
        update(Job)
        .where(Job.id.in_(in_order), waiting, unheard)
        .values(hinted_at=func.now())
        .returning(Job.id)
        .execution_options(synchronize_session=False)
    )
    hinted = set(session.scalars(statement))
    return [(job_id, PURPOSES[state]) for job_id in in_order if job_id in hinted]
