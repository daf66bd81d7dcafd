"""The reconciler: finds jobs whose hint or whose worker was lost. The caller sends the hints, after its commit.

An advisory lock, which ends with the transaction, allows one sweep at a time in the whole cluster.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, and_, case, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from store.db.session import seconds
from store.db.states import CLAIMED, WAITING, JobState, Purpose
from store.db.tables import Job, Reconciler
from store.jobs.leases import is_claimable
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
    """Takes back expired leases. Returns (job id, purpose) of waiting jobs whose last hint is `stale_seconds` old.

    They are at most `limit` of each purpose, the oldest first, so that a long queue is not hinted whole again and
    again. Empty while another process sweeps. When no process has swept for half a lease, the database was away and
    workers could not renew their leases: none is taken back for one full lease.
    """
    if not session.scalar(select(func.pg_try_advisory_xact_lock(_LOCK))):
        return []
    if _may_take_back(session, lease_seconds):
        _take_back(session, Job.lease_until < func.now() - seconds(grace_seconds), max_lost_leases)
    return [hint for purpose in WAITING for hint in _stale(session, purpose, stale_seconds, limit)]


def take_back_from(session: Session, *, worker_id: str, max_lost_leases: int = 20) -> None:
    """Takes back the jobs of an earlier process of this worker, when it starts; the next sweep hints them.

    Only for a worker whose id no other process can have: so the earlier process is dead.
    """
    _take_back(session, Job.worker_id == worker_id, max_lost_leases)


def _may_take_back(session: Session, lease_seconds: float) -> bool:
    """Records this sweep. Returns False for one lease after an outage."""
    lease, outage = seconds(lease_seconds), seconds(lease_seconds / 2)
    first = {"id": _ROW, "swept_at": func.now(), "takeover_after": func.now()}
    statement = insert(Reconciler).values(first)
    after_gap = case(
        (Reconciler.swept_at < func.now() - outage, func.now() + lease), else_=Reconciler.takeover_after
    )
    statement = statement.on_conflict_do_update(
        index_elements=[Reconciler.id], set_={"swept_at": func.now(), "takeover_after": after_gap}
    )
    return bool(session.scalar(statement.returning(Reconciler.takeover_after <= func.now())))


def _take_back(session: Session, condition: ColumnElement[bool], max_lost_leases: int) -> None:
    claimed = Job.state.in_(tuple(CLAIMED.values()))
    query = select(Job).where(claimed, Job.lease_until.is_not(None), condition).order_by(Job.id)
    # SKIP LOCKED: a row that is being written has a living worker.
    for job in session.scalars(query.with_for_update(skip_locked=True)).all():
        purpose: Purpose = "train" if job.state == JobState.RUNNING else "prepare"
        close_attempt(session, job.id, job.attempt, "lease_lost")
        to, event, values = _after_loss(job, purpose, max_lost_leases)
        move(session, and_(Job.id == job.id, Job.attempt == job.attempt), to, event, values)


def _after_loss(
    job: Job, purpose: Purpose, max_lost_leases: int
) -> tuple[JobState, NewEvent, dict[str, Any]]:
    """Returns the next state of a job whose worker was lost, its event, and values. Its user's requests come first."""
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
        message="The job's worker was lost. Another one continues from the last checkpoint.",
        data={"lost_leases": job.lost_leases + 1},
        level="warn",
    )
    return WAITING[purpose], event, values


def _stale(session: Session, purpose: Purpose, stale_seconds: float, limit: int) -> list[Hint]:
    is_stale = or_(Job.hinted_at.is_(None), Job.hinted_at <= func.now() - seconds(stale_seconds))
    # SKIP LOCKED: a study's cancel locks many jobs in its own order; the next sweep looks at them.
    oldest = select(Job.id).where(is_claimable(purpose)).order_by(Job.created_at, Job.id).limit(limit)
    job_ids = list(session.scalars(oldest.with_for_update(of=Job, skip_locked=True)))
    to_hint = update(Job).where(Job.id.in_(job_ids), is_claimable(purpose), is_stale)
    hinted = set(session.scalars(to_hint.values(hinted_at=func.now()).returning(Job.id)))
    return [(job_id, purpose) for job_id in job_ids if job_id in hinted]
