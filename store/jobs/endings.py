"""How a claimed job is let go of: prepared, succeeded, failed, cancelled, paused; released, or its trainer
died.

Each is one transaction that sets the state, what came of it, and the last event. A job that was told to
cancel ends as cancelled however it was about to end; so each returns the job as it now stands. Each raises
LostFence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import func, update
from sqlalchemy.orm import Session

from store import ids
from store.db.session import seconds
from store.db.states import WAITING, JobState
from store.db.study_tables import Outcome
from store.db.tables import FineTunedModel, Job
from store.jobs.fence import Claim, apply_stop_request, finish_attempt, lock, write_fenced
from store.jobs.transitions import NewEvent, cancelled, failed, paused
from store.storage import files
from store.storage.files import NewFile

MAX_TRAINER_DEATHS = 3


def finish_prepared(session: Session, claim: Claim, *, report: Mapping[str, Any]) -> Job:
    """The files are good: the job is queued. After the commit, hint (job.id, "train") if its state is
    `queued`.
    """
    job = write_fenced(
        session,
        claim,
        {"validation": dict(report), "hinted_at": func.now()},
        NewEvent(code="VALIDATION_COMPLETE", message="The files have been checked.", data=report),
    )
    ended = apply_stop_request(session, claim, job, resume_to=JobState.QUEUED)
    if ended is not None:
        return ended
    event = NewEvent(code="QUEUED", message="The job waits for a training worker.")
    return finish_attempt(session, claim, JobState.QUEUED, event, "prepared")


def finish_succeeded(
    session: Session,
    claim: Claim,
    *,
    storage_key: str,
    manifest: Mapping[str, str],
    task: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None = None,
    parity: Mapping[str, Any] | None = None,
    trained_tokens: int | None = None,
    result_file: NewFile | None = None,
    outcomes: Mapping[str, Any] | None = None,
    costs: Sequence[Mapping[str, Any]] = (),
) -> Job:
    """End state, model row, result file and last event in one transaction. The model's files are durable
    under `storage_key`. `outcomes` and `costs` serve comparisons with other jobs. Returns the job: `succeeded`,
    or `cancelled` if that was asked for first. Raises LostFence.
    """
    job = lock(session, claim)
    if job.cancel_requested_at is not None:
        return finish_attempt(session, claim, JobState.CANCELLED, cancelled(), "cancelled")
    model_id = ids.model_id(
        base=claim.spec.model, owner_id=claim.owner_id, suffix=claim.spec.suffix, job_id=claim.job_id
    )
    session.add(
        FineTunedModel(
            id=model_id,
            owner_id=claim.owner_id,
            job_id=claim.job_id,
            kind="final",
            base_model=claim.spec.model,
            storage_key=storage_key,
            manifest=dict(manifest),
            task=dict(task),
        )
    )
    if result_file is not None:
        files.create_result(session, owner_id=claim.owner_id, file=result_file)
    session.add(
        Outcome(
            job_id=claim.job_id,
            outcomes=dict(outcomes) if outcomes is not None else None,
            costs=[dict(cost) for cost in costs],
        )
    )
    values = {
        "fine_tuned_model": model_id,
        "evaluation": dict(evaluation) if evaluation is not None else None,
        "parity": dict(parity) if parity is not None else None,
        "trained_tokens": trained_tokens,
        "result_file_id": result_file.file_id if result_file is not None else None,
    }
    event = NewEvent(
        code="SUCCEEDED",
        message=f"The job has succeeded; its model is {model_id}.",
        data={"fine_tuned_model": model_id, "evaluation": values["evaluation"]},
    )
    return finish_attempt(session, claim, JobState.SUCCEEDED, event, "succeeded", values)


def finish_failed(
    session: Session, claim: Claim, *, error: Mapping[str, Any], report: Mapping[str, Any] | None = None
) -> Job:
    """The job can't be done: `error` is {code, message, param} in words that say what to change. Never
    retried. `report`: what the check of its files found, if that is why.
    """
    job = lock(session, claim)
    if job.cancel_requested_at is not None:
        return finish_attempt(session, claim, JobState.CANCELLED, cancelled(), "cancelled")
    values: dict[str, Any] = {"error": dict(error)}
    if report is not None:
        values["validation"] = dict(report)
    return finish_attempt(session, claim, JobState.FAILED, failed(error), "failed", values)


def finish_cancelled(session: Session, claim: Claim) -> Job:
    """The trainer has been ended because its user asked for it."""
    return finish_attempt(session, claim, JobState.CANCELLED, cancelled(), "cancelled")


def finish_paused(session: Session, claim: Claim) -> Job:
    """The trainer has been ended for a pause; its last checkpoint is recorded. `cancelled` if that was asked
    for.
    """
    job = lock(session, claim)
    ended = apply_stop_request(session, claim, job, resume_to=WAITING[claim.purpose])
    if ended is not None:
        return ended
    values = {"paused_from": WAITING[claim.purpose]}
    return finish_attempt(session, claim, JobState.PAUSED, paused(), "paused", values)


def release(session: Session, claim: Claim, *, reason: str = "Its worker was asked to stop.") -> Job:
    """Put the job back to where it waits, at no cost to it; `cancelled` or `paused` if that was asked for."""
    job = lock(session, claim)
    ended = apply_stop_request(session, claim, job, resume_to=WAITING[claim.purpose])
    if ended is not None:
        return ended
    event = NewEvent(code="RESTARTED", message=f"{reason} The job waits for another.")
    return finish_attempt(session, claim, WAITING[claim.purpose], event, "released", {"hinted_at": None})


def record_crash(
    session: Session,
    claim: Claim,
    *,
    error: Mapping[str, Any],
    max_deaths: int = MAX_TRAINER_DEATHS,
    pause_seconds: float = 10.0,
) -> Job:
    """The trainer ended without a word while its supervisor lives.

    The job waits `pause_seconds`, four times as long after each further death, and is tried again; the
    `max_deaths`-th one without a new checkpoint between them ends it as failed with `error` ({code, message,
    param}).
    """
    job = lock(session, claim)
    ended = apply_stop_request(session, claim, job, resume_to=WAITING[claim.purpose])
    if ended is not None:
        return ended
    deaths = job.trainer_deaths + 1
    values: dict[str, Any] = {"trainer_deaths": deaths}
    if deaths >= max_deaths:
        values["error"] = dict(error)
        return finish_attempt(session, claim, JobState.FAILED, failed(error), "trainer_died", values)
    pause = pause_seconds * 4 ** (deaths - 1)
    values |= {"not_before": func.now() + seconds(pause), "hinted_at": None}
    event = NewEvent(
        code="RESTARTED",
        message=f"{error['message']} The job is tried again in {pause:.0f} s ({deaths} of {max_deaths}).",
        data={"error": dict(error), "deaths": deaths},
        level="warn",
    )
    return finish_attempt(session, claim, WAITING[claim.purpose], event, "trainer_died", values)


def record_cleanup_error(session: Session, claim: Claim, message: str) -> None:
    """Trouble after the end: noted beside the end, which it does not change."""
    session.execute(
        update(Job)
        .where(Job.id == claim.job_id, Job.attempt == claim.attempt)
        .values(cleanup_error=message)
        .execution_options(synchronize_session=False)
    )
