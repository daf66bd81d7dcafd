"""What every write of a claimed job says: this attempt, this worker, still in the state it claimed.

It does NOT decide how a job ends, except that what its user asked for comes first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, and_, select
from sqlalchemy.orm import Session

from store.db.states import HELD, JobState, Purpose
from store.db.tables import Checkpoint, Job
from store.errors import LostFence
from store.jobs.spec import TrainingSpec
from store.jobs.transitions import NewEvent, cancelled, close_attempt, move, paused, write


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One attempt at one job, held by one worker. `checkpoints`: where to resume from, the best first; may be
    empty.
    """

    job_id: str
    owner_id: str
    worker_id: str
    purpose: Purpose
    attempt: int
    lease_seconds: float
    spec: TrainingSpec
    checkpoints: tuple[Checkpoint, ...]
    validation: Mapping[str, Any] | None = None  #: the report on its files, once they are checked

    @property
    def resume_from(self) -> Checkpoint | None:
        return self.checkpoints[0] if self.checkpoints else None


@dataclass(frozen=True, kw_only=True)
class StopRequest:
    """The cancel and the pause that a job's user has asked for."""

    cancel: bool
    pause: bool


def fence(claim: Claim) -> ColumnElement[bool]:
    return and_(
        Job.id == claim.job_id,
        Job.attempt == claim.attempt,
        # Taken back while files were checked, a job keeps its state and its attempt's number; not its worker.
        Job.worker_id == claim.worker_id,
        Job.state == HELD[claim.purpose],
    )


def lost_lease(claim: Claim) -> LostFence:
    return LostFence(f"attempt {claim.attempt} of {claim.job_id} is no longer the current one")


def write_fenced(
    session: Session, claim: Claim, values: Mapping[str, Any], event: NewEvent | None = None
) -> Job:
    job = write(session, fence(claim), values, event)
    if job is None:
        raise lost_lease(claim)
    return job


def lock(session: Session, claim: Claim) -> Job:
    """The job, its row locked: what it says stays true until this transaction ends. Raises LostFence."""
    job = session.scalar(select(Job).where(fence(claim)).with_for_update())
    if job is None:
        raise lost_lease(claim)
    return job


def finish_attempt(
    session: Session,
    claim: Claim,
    to: JobState,
    event: NewEvent,
    outcome: str,
    values: Mapping[str, Any] | None = None,
) -> Job:
    job = move(session, fence(claim), to, event, values)
    if job is None:
        raise lost_lease(claim)
    close_attempt(session, claim.job_id, claim.attempt, outcome)
    return job


def apply_stop_request(session: Session, claim: Claim, job: Job, *, resume_to: JobState) -> Job | None:
    """Carry out the cancel or the pause that the user asked for; None if neither."""
    if job.cancel_requested_at is not None:
        return finish_attempt(session, claim, JobState.CANCELLED, cancelled(), "cancelled")
    if job.pause_requested_at is not None:
        return finish_attempt(session, claim, JobState.PAUSED, paused(), "paused", {"paused_from": resume_to})
    return None
