"""The states of jobs, attempts, archives and trials, and the transitions of jobs."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal


class JobState(StrEnum):
    VALIDATING_FILES = "validating_files"  #: A `prepare` worker checks its rows, or will.
    QUEUED = "queued"  #: Its rows are valid; it waits for a training worker.
    RUNNING = "running"  #: A worker holds its lease and trains.
    PAUSED = "paused"  #: Stopped at a checkpoint until its user resumes it; no worker holds it.
    SUCCEEDED = "succeeded"  #: Final. Exactly one model row names this job; none, if it was a dry run.
    FAILED = "failed"  #: Final. `error` says what to change.
    CANCELLED = "cancelled"  #: Final. Its user cancelled it.


TERMINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})

TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    # To itself: the worker that checked its files was lost or stopped; the job waits for another. A dry run succeeds.
    JobState.VALIDATING_FILES: frozenset(
        {
            JobState.VALIDATING_FILES,
            JobState.QUEUED,
            JobState.SUCCEEDED,
            JobState.FAILED,
            JobState.CANCELLED,
            JobState.PAUSED,
        }
    ),
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.PAUSED, JobState.CANCELLED}),
    JobState.RUNNING: frozenset(
        {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.PAUSED, JobState.QUEUED}
    ),
    # A job paused while its files were checked goes back there; one paused later goes back to the queue.
    JobState.PAUSED: frozenset({JobState.QUEUED, JobState.VALIDATING_FILES, JobState.CANCELLED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}


#: The work that a worker claims a job for. Messages to workers carry this word.
Purpose = Literal["prepare", "train"]
#: The purpose of claiming a job, by the state in which it waits.
PURPOSES: dict[JobState, Purpose] = {JobState.VALIDATING_FILES: "prepare", JobState.QUEUED: "train"}
#: A job's state while it waits to be claimed, and after its worker releases it or is lost.
WAITING: dict[Purpose, JobState] = {purpose: state for state, purpose in PURPOSES.items()}
#: A job's state while a worker holds it.
CLAIMED: dict[Purpose, JobState] = {"prepare": JobState.VALIDATING_FILES, "train": JobState.RUNNING}


#: The outcome of an attempt.
AttemptOutcome = Literal[
    "prepared",  #: The files are valid; the job is queued.
    "succeeded",  #: The job has a model.
    "failed",  #: The job can't be done.
    "cancelled",  #: Its user cancelled the job.
    "paused",  #: Its user paused the job.
    "released",  #: The worker was asked to stop; the job waits for another.
    "trainer_died",  #: The trainer crashed; the job is tried again or has failed.
    "lease_lost",  #: The worker was lost.
]


class ExportState(StrEnum):
    PENDING = "pending"  #: Waits for a worker.
    BUILDING = "building"  #: A worker holds its lease and builds it.
    READY = "ready"  #: Stored under its storage key.
    FAILED = "failed"  #: Tried again at a request after ten minutes.


TrialState = Literal[
    "running",  #: Some of its jobs have not ended.
    "complete",  #: All its jobs have a value on the validation rows.
    "failed",  #: At least one of its jobs has none.
    "pruned",  #: Its settings are invalid; it has no jobs.
]

StudyStatus = Literal[
    "queued",  #: No job has started training.
    "running",  #: Jobs train, or the last verdict is on its way.
    "paused",  #: All unfinished jobs are paused.
    "succeeded",  #: Final. At least one job has succeeded.
    "failed",  #: Final. No job has succeeded.
    "cancelled",  #: Final. Its user cancelled it.
]


def sources(target: JobState) -> list[JobState]:
    """Returns the states from which a job may enter `target`: the guard of that UPDATE."""
    return [state for state, targets in TRANSITIONS.items() if target in targets]
