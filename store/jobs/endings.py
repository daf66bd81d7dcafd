"""The ends of an attempt: prepared, succeeded, failed, cancelled, paused, released, or its trainer crashed.

Each function sets the job's state, its results and the last event in one transaction, and returns the job. The user's
requests come first: a job that is to be cancelled becomes `cancelled` however its attempt ends. Each raises LostFence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import func, update
from sqlalchemy.orm import Session

from store.db.session import seconds
from store.db.states import PURPOSES, WAITING, AttemptOutcome, JobState
from store.db.study_tables import Outcome
from store.db.tables import FineTunedModel, Job
from store.jobs.checkpoints import model_row
from store.jobs.fence import Claim, fence, lock, lost_lease, write_fenced
from store.jobs.transitions import NewEvent, cancelled, close_attempt, failed, move, paused
from store.storage import files
from store.storage.files import RESULTS_PURPOSE, NewFile

MAX_TRAINER_DEATHS = 3


def finish_prepared(session: Session, claim: Claim, *, report: Mapping[str, Any]) -> Job:
    """Queues a job whose files are valid. After the commit, hint (job.id, "train") if its state is `queued`."""
    write_fenced(
        session,
        claim,
        {"validation": dict(report), "hinted_at": func.now()},
        NewEvent(code="VALIDATION_COMPLETE", message="The files have been checked.", data=report),
    )
    event = NewEvent(code="QUEUED", message="The job waits for a training worker.")
    return _finish(session, claim, JobState.QUEUED, event, "prepared")


def finish_dry_run(
    session: Session, claim: Claim, *, report: Mapping[str, Any], estimate: Mapping[str, Any]
) -> Job:
    """Ends a dry run whose files are valid: it has succeeded, without a model."""
    values = {"validation": {**report, "estimate": dict(estimate)}}
    message = "The files have been checked and the training is estimated; nothing is trained."
    event = NewEvent(code="SUCCEEDED", message=message, data={"estimate": dict(estimate)})
    return _finish(session, claim, JobState.SUCCEEDED, event, "succeeded", values)


def finish_succeeded(
    session: Session,
    claim: Claim,
    *,
    storage_key: str,
    manifest: dict[str, str],
    task: dict[str, Any],
    result: Mapping[str, Any],
    result_file: NewFile | None = None,
) -> Job:
    """Adds the model, whose files are durable under `storage_key`, and ends the job as succeeded.

    `result` is the data of the engine's SUCCEEDED event. Its outcomes and costs are for comparisons with other jobs.
    """
    job = lock(session, claim)
    if job.cancel_requested_at is not None:
        return finish_cancelled(session, claim)
    row = model_row(job, claim.spec, storage_key=storage_key, manifest=manifest, task=task)
    model = FineTunedModel(**row)
    outcomes, costs = result.get("outcomes"), list(result.get("costs", ()))
    session.add_all([model, Outcome(job_id=claim.job_id, outcomes=outcomes, costs=costs)])
    if result_file is not None:
        files.create(session, owner_id=claim.owner_id, purpose=RESULTS_PURPOSE, file=result_file)
    values = {
        "fine_tuned_model": model.id,
        **{name: result.get(name) for name in ("evaluation", "parity", "trained_tokens")},
        "result_file_id": result_file.file_id if result_file is not None else None,
    }
    event = NewEvent(
        code="SUCCEEDED",
        message=f"The job has succeeded; its model is {model.id}.",
        data={"fine_tuned_model": model.id, "evaluation": result.get("evaluation")},
    )
    return _finish(session, claim, JobState.SUCCEEDED, event, "succeeded", values)


def finish_failed(
    session: Session, claim: Claim, *, error: Mapping[str, Any], report: Mapping[str, Any] | None = None
) -> Job:
    """Ends a job as failed. `error` is {code, message, param}; `report` that on its files, if they are invalid."""
    values: dict[str, Any] = {"error": dict(error)}
    if report is not None:
        values["validation"] = dict(report)
    return _finish(session, claim, JobState.FAILED, failed(error), "failed", values)


def finish_cancelled(session: Session, claim: Claim) -> Job:
    """Ends a job as cancelled: its user asked for it, and the trainer is stopped."""
    return _finish(session, claim, JobState.CANCELLED, cancelled(), "cancelled")


def finish_paused(session: Session, claim: Claim) -> Job:
    """Pauses a job: the trainer is stopped, and its last checkpoint is recorded."""
    values = {"paused_from": WAITING[claim.purpose]}
    return _finish(session, claim, JobState.PAUSED, paused(), "paused", values)


def release(session: Session, claim: Claim, *, reason: str = "Its worker was asked to stop.") -> Job:
    """Gives the job back, to wait for another worker."""
    event = NewEvent(code="RESTARTED", message=f"{reason} The job waits for another.")
    return _finish(session, claim, WAITING[claim.purpose], event, "released", {"hinted_at": None})


def record_crash(
    session: Session,
    claim: Claim,
    *,
    error: Mapping[str, Any],
    max_deaths: int = MAX_TRAINER_DEATHS,
    pause_seconds: float = 10.0,
) -> Job:
    """Ends an attempt whose trainer crashed; `error` is {code, message, param}.

    The job is tried again after `pause_seconds`, four times as many after each further crash; the `max_deaths`-th crash
    without a new checkpoint in between fails it with `error`, unless its user has asked for a pause.
    """
    job = lock(session, claim)
    deaths = job.trainer_deaths + 1
    values: dict[str, Any] = {"trainer_deaths": deaths}
    if deaths >= max_deaths and job.pause_requested_at is None:
        values["error"] = dict(error)
        return _finish(session, claim, JobState.FAILED, failed(error), "trainer_died", values)
    pause = pause_seconds * 4 ** (deaths - 1)
    values |= {"not_before": func.now() + seconds(pause), "hinted_at": None}
    event = NewEvent(
        code="RESTARTED",
        message=f"{error['message']} The job is tried again in {pause:.0f} s ({deaths} of {max_deaths}).",
        data={"error": dict(error), "deaths": deaths},
        level="warn",
    )
    return _finish(session, claim, WAITING[claim.purpose], event, "trainer_died", values)


def _finish(
    session: Session,
    claim: Claim,
    to: JobState,
    event: NewEvent,
    outcome: AttemptOutcome,
    values: Mapping[str, Any] | None = None,
) -> Job:
    """Ends the attempt with `outcome` and moves its job into state `to`, or as its user's cancel or pause request says.

    A cancelled job ends as cancelled in any case; a pause request takes the place of the wait for another worker.
    """
    job = lock(session, claim)
    if job.cancel_requested_at is not None:
        to, event, outcome, values = JobState.CANCELLED, cancelled(), "cancelled", None
    elif job.pause_requested_at is not None and to in PURPOSES:
        to, event, outcome, values = JobState.PAUSED, paused(), "paused", {"paused_from": to}
    moved_job = move(session, fence(claim), to, event, values)
    if moved_job is None:
        raise lost_lease(claim)
    close_attempt(session, claim.job_id, claim.attempt, outcome)
    return moved_job


def record_cleanup_error(session: Session, claim: Claim, message: str) -> None:
    """Records an error after the attempt's end, which it does not change."""
    session.execute(
        update(Job).where(Job.id == claim.job_id, Job.attempt == claim.attempt).values(cleanup_error=message)
    )
