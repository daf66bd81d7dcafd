"""The worker's side of jobs: claim one, keep it, tell what happens, let it go.

A claim raises the job's attempt number, the fencing token, and sets a lease. Every later write of that
attempt says `WHERE attempt = :mine`; a worker that was thought dead changes nothing and gets LostFence, on
which it must kill its trainer and forget the job. What the user asked for meanwhile wins: a run that was told
to cancel ends as cancelled, however it was about to end, so the functions that let go return the job as it
now stands. It does NOT know trainers, files or bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from sqlalchemy import ColumnElement, and_, func, or_, select
from sqlalchemy.orm import Session

from store import ids
from store.db.session import seconds
from store.db.states import HELD, WAITING, Purpose
from store.db.tables import Attempt, Checkpoint, Job
from store.jobs import checkpoints
from store.jobs.fence import Claim, StopRequest, fence, lost_lease, write_fenced
from store.jobs.shared_prefix import is_free
from store.jobs.spec import TrainingSpec
from store.jobs.transitions import EventType, Level, NewEvent, append, write


def longest_waiting(session: Session, *, purpose: Purpose) -> str | None:
    """The id of the job that has waited longest to be claimed for `purpose`; None when nobody waits."""
    query = select(Job.id).where(_is_waiting(purpose)).order_by(Job.created_at, Job.id).limit(1)
    return session.scalar(query)


def claim(
    session: Session, *, job_id: str, worker_id: str, purpose: Purpose, lease_seconds: float = 60.0
) -> Claim | None:
    """Take a waiting job. None when it isn't waiting (any more): drop the message.

    An expired lease is not taken over here: the reconciler takes it back first, so that one place counts it,
    carries out a cancel, and waits after an outage of the database.
    """
    guard = and_(Job.id == job_id, _is_waiting(purpose))
    values = {
        "state": HELD[purpose],
        "attempt": Job.attempt + 1,
        "worker_id": worker_id,
        "lease_until": func.now() + seconds(lease_seconds),
        "started_at": func.coalesce(Job.started_at, func.now()) if purpose == "train" else Job.started_at,
        "not_before": None,
    }
    job = write(session, guard, values)
    if job is None:
        return None
    session.add(Attempt(job_id=job.id, number=job.attempt, worker_id=worker_id, purpose=purpose))
    session.flush()
    return Claim(
        job_id=job.id,
        owner_id=job.owner_id,
        worker_id=worker_id,
        purpose=purpose,
        attempt=job.attempt,
        lease_seconds=lease_seconds,
        spec=TrainingSpec.model_validate(job.spec),
        checkpoints=tuple(checkpoints.resumable(session, job.id)) if purpose == "train" else (),
        validation=job.validation,
    )


def heartbeat(session: Session, claim: Claim) -> StopRequest:
    """Renew the lease. Raises LostFence."""
    job = write_fenced(session, claim, {"lease_until": func.now() + seconds(claim.lease_seconds)})
    return _stop_request(job)


def read_stop_request(session: Session, claim: Claim) -> StopRequest:
    """Read what is wanted without renewing the lease. Raises LostFence."""
    job = session.scalar(select(Job).where(fence(claim)))
    if job is None:
        raise lost_lease(claim)
    return _stop_request(job)


def record_event(
    session: Session,
    claim: Claim,
    *,
    code: str,
    message: str,
    data: Mapping[str, Any] | None = None,
    level: Level = "info",
    type: EventType = "message",
    stage: str | None = None,
    progress: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    resolved: Mapping[str, Any] | None = None,
) -> Job:
    """Add an event, and with it what the job shows from now on; None leaves a column as it is.

    `progress` replaces what was shown, `metrics` ({stage: its latest}) and `resolved` replace the names they
    give. Raises LostFence.
    """
    values: dict[str, Any] = {}
    if stage is not None:
        values["stage"] = stage
    if progress is not None:
        values["progress"] = dict(progress)
    if metrics is not None:
        values["metrics"] = Job.metrics.concat(dict(metrics))
    if resolved is not None:
        values["resolved"] = Job.resolved.concat(dict(resolved))
    event = NewEvent(code=code, message=message, data=data or {}, level=level, type=type)
    return write_fenced(session, claim, values, event)


def record_checkpoint(
    session: Session,
    claim: Claim,
    *,
    step: int,
    stage: str,
    stage_index: int,
    kind: Literal["step", "stage"],
    storage_key: str,
    manifest: Mapping[str, str],
    metrics: Mapping[str, Any] | None = None,
    task: Mapping[str, Any] | None = None,
) -> list[str]:
    """Commit a checkpoint whose files are already durable under `storage_key`, with its CHECKPOINT_SAVED
    event.

    One at a stage's end also becomes a model (files `bundle/…` of it), answering `task`. The trainer has
    proved that it moves: its deaths are forgotten. Returns the storage keys of step checkpoints that are no
    longer needed, to be deleted after the commit (the sweep deletes them otherwise). Raises LostFence.
    """
    checkpoint = Checkpoint(
        id=ids.new_checkpoint_id(),
        job_id=claim.job_id,
        attempt=claim.attempt,
        step=step,
        stage=stage,
        stage_index=stage_index,
        kind=kind,
        storage_key=storage_key,
        manifest=dict(manifest),
        metrics=dict(metrics or {}),
    )
    job = write_fenced(session, claim, {"trainer_deaths": 0})  # the fence first: it locks the row
    committed = checkpoints.committed_key(session, checkpoint)
    if committed is not None:  # the same call again, or the same state saved again under another key
        return [] if committed == storage_key else [storage_key]
    checkpoints.add(session, job, checkpoint, task or {})
    data = {"stage": stage, "stage_index": stage_index, "step": step, "checkpoint": checkpoint.id}
    if checkpoint.model_id is not None:
        data["model"] = checkpoint.model_id
    message = f"Checkpoint saved at step {step}."
    append(session, claim.job_id, NewEvent(code="CHECKPOINT_SAVED", message=message, data=data))
    return checkpoints.remove_old(session, claim.job_id)


def record_stage_passed(session: Session, claim: Claim, *, stages: int) -> None:
    """So many stages of this job have ended, and what they ended with is there for others. Raises LostFence."""
    write_fenced(session, claim, {"stages_passed": func.greatest(Job.stages_passed, stages)})


def _is_waiting(purpose: Purpose) -> ColumnElement[bool]:
    return and_(
        Job.state == WAITING[purpose],
        Job.lease_until.is_(None),
        or_(Job.not_before.is_(None), Job.not_before <= func.now()),
        *([is_free()] if purpose == "train" else []),
    )


def _stop_request(job: Job) -> StopRequest:
    return StopRequest(cancel=job.cancel_requested_at is not None, pause=job.pause_requested_at is not None)
