"""The worker's side of a running job: claim it, renew its lease, record events and checkpoints. See endings for its
end.

A claim raises the job's attempt number, the fencing token, and sets a lease. Every later write of that attempt says
`WHERE attempt = :mine`: a worker whose lease was taken over changes nothing and gets LostFence, on which it must kill
its trainer and drop the job.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from sqlalchemy import ColumnElement, and_, func, or_, select
from sqlalchemy.orm import Session

from store import ids
from store.db.session import seconds
from store.db.states import CLAIMED, WAITING, Purpose
from store.db.tables import Attempt, Checkpoint, Job
from store.jobs import checkpoints
from store.jobs.fence import Claim, StopRequest, fence, lock, lost_lease, write_fenced
from store.jobs.shared_prefix import may_train
from store.jobs.spec import TrainingSpec
from store.jobs.transitions import EventType, Level, NewEvent, append, write


def is_claimable(purpose: Purpose) -> ColumnElement[bool]:
    """Returns the condition under which a job can be claimed for `purpose`."""
    return and_(
        Job.state == WAITING[purpose],
        Job.lease_until.is_(None),
        or_(Job.not_before.is_(None), Job.not_before <= func.now()),
        *([may_train()] if purpose == "train" else []),
    )


def longest_waiting(session: Session, *, purpose: Purpose) -> str | None:
    """Returns the id of the oldest job that can be claimed for `purpose`; None when there is none."""
    query = select(Job.id).where(is_claimable(purpose)).order_by(Job.created_at, Job.id).limit(1)
    return session.scalar(query)


def claim(
    session: Session, *, job_id: str, worker_id: str, purpose: Purpose, lease_seconds: float = 60.0
) -> Claim | None:
    """Claims a job; None when it can't be claimed (any more).

    A job with an expired lease can't be claimed: the reconciler takes it back first, so that one place counts lost
    leases, carries out cancel requests, and waits after an outage of the database.
    """
    guard = and_(Job.id == job_id, is_claimable(purpose))
    values = {
        "state": CLAIMED[purpose],
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
    """Renews the lease. Returns the user's stop request. Raises LostFence."""
    job = write_fenced(session, claim, {"lease_until": func.now() + seconds(claim.lease_seconds)})
    return _stop_request(job)


def read_stop_request(session: Session, claim: Claim) -> StopRequest:
    """Returns the user's stop request without renewing the lease. Raises LostFence."""
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
    """Adds an event and changes the columns that are not None. Returns the job. Raises LostFence.

    `progress` replaces the job's; `metrics` ({stage: its latest metrics}) and `resolved` are merged into the job's.
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
    kind: Literal["step", "epoch", "stage"],
    storage_key: str,
    manifest: Mapping[str, str],
    metrics: Mapping[str, Any] | None = None,
    task: Mapping[str, Any] | None = None,
) -> list[str]:
    """Commits a checkpoint whose files are durable under `storage_key`, with its CHECKPOINT_SAVED event.

    A checkpoint of an epoch or a stage also becomes a model for `task`, of its files `bundle/…`. `metrics` have
    OpenAI's names (train_loss, valid_loss, …). The job's count of crashes starts again at 0, unless the checkpoint is
    an epoch's, from which no attempt resumes. Returns the storage keys of older checkpoints that are no longer needed,
    to be deleted after the commit (else the sweep deletes them). Raises LostFence.
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
    # First, since it locks the row.
    job = lock(session, claim) if kind == "epoch" else write_fenced(session, claim, {"trainer_deaths": 0})
    committed = checkpoints.committed_key(session, checkpoint)
    if committed is not None:  # this call was repeated, or the same state was saved again under another key
        return [] if committed == storage_key else [storage_key]
    checkpoints.add(session, job, checkpoint, task or {})
    data = {"stage": stage, "stage_index": stage_index, "step": step, "checkpoint": checkpoint.id}
    if checkpoint.model_id is not None:
        data["model"] = checkpoint.model_id
    message = f"Checkpoint saved at step {step}."
    append(session, claim.job_id, NewEvent(code="CHECKPOINT_SAVED", message=message, data=data))
    if kind != "step":  # the end of a stage may be the best model, and no epoch is then
        checkpoints.remove_old_epochs(session, claim.job_id, claim.spec)
    return checkpoints.remove_old_steps(session, claim.job_id)


def record_stage_passed(session: Session, claim: Claim, *, stages: int) -> None:
    """Records that the results of the first `stages` stages can be reused by other jobs. Raises LostFence."""
    write_fenced(session, claim, {"stages_passed": func.greatest(Job.stages_passed, stages)})


def _stop_request(job: Job) -> StopRequest:
    return StopRequest(cancel=job.cancel_requested_at is not None, pause=job.pause_requested_at is not None)
