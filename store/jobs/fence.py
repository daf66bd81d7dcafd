"""Fenced writes of a claimed job: they change it only while this attempt of this worker is the current one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, and_, select
from sqlalchemy.orm import Session

from store.db.states import CLAIMED, Purpose
from store.db.tables import Checkpoint, Job
from store.errors import LostFence
from store.jobs.spec import TrainingSpec
from store.jobs.transitions import NewEvent, write


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A worker's claim on a job: one attempt."""

    job_id: str
    owner_id: str
    worker_id: str
    purpose: Purpose
    attempt: int
    lease_seconds: float
    spec: TrainingSpec
    checkpoints: tuple[Checkpoint, ...]  #: to resume from, the best first; may be empty
    validation: Mapping[str, Any] | None = None  #: the report on its files, once they are checked


@dataclass(frozen=True, kw_only=True)
class StopRequest:
    """The cancel and the pause that a job's user has asked for. member_lost: a worker of its group is gone."""

    cancel: bool
    pause: bool
    member_lost: bool = False


def fence(claim: Claim) -> ColumnElement[bool]:
    """Returns the condition under which `claim` is current."""
    return and_(
        Job.id == claim.job_id,
        Job.attempt == claim.attempt,
        # A job that is taken back while its files are checked keeps state and attempt, but not the worker.
        Job.worker_id == claim.worker_id,
        Job.state == CLAIMED[claim.purpose],
    )


def lost_lease(claim: Claim) -> LostFence:
    """Returns the error of a write whose claim is no longer current."""
    return LostFence(f"attempt {claim.attempt} of {claim.job_id} is no longer the current one")


def write_fenced(
    session: Session, claim: Claim, values: Mapping[str, Any], event: NewEvent | None = None
) -> Job:
    """Changes the claimed job and adds `event`. Returns the job. Raises LostFence."""
    job = write(session, fence(claim), values, event)
    if job is None:
        raise lost_lease(claim)
    return job


def lock(session: Session, claim: Claim) -> Job:
    """Locks the claimed job's row until this transaction ends. Returns the job. Raises LostFence."""
    job = session.scalar(select(Job).where(fence(claim)).with_for_update())
    if job is None:
        raise lost_lease(claim)
    return job
