"""The states of a job and the allowed ways between them. Pure: no database, no clock."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal


class JobState(StrEnum):
    VALIDATING_FILES = (
        "validating_files"  #: Rows are being checked, or wait to be; a `prepare` worker claims it.
    )
    QUEUED = "queued"  #: The rows are good; waits for a training worker.
    RUNNING = "running"  #: A worker holds its lease and trains.
    PAUSED = "paused"  #: At a checkpoint, until resume; no worker holds it.
    SUCCEEDED = "succeeded"  #: Final. Exactly one model row names this job.
    FAILED = "failed"  #: Final. `error` says what to change.
    CANCELLED = "cancelled"  #: Final. Its user ended it.


TERMINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})

TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    # To itself: the worker that checked its files was lost or stopped, and it waits for another.
    JobState.VALIDATING_FILES: frozenset(
        {JobState.VALIDATING_FILES, JobState.QUEUED, JobState.FAILED, JobState.CANCELLED, JobState.PAUSED}
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


#: What a worker claims a waiting job for, by the state the job waits in. A message to a worker carries this
#: word.
Purpose = Literal["prepare", "train"]
PURPOSES: dict[JobState, Purpose] = {JobState.VALIDATING_FILES: "prepare", JobState.QUEUED: "train"}

#: Where a job stands while a worker holds it, and where it goes back to when that worker lets go of it or is
#: lost.
HELD: dict[Purpose, JobState] = {"prepare": JobState.VALIDATING_FILES, "train": JobState.RUNNING}
WAITING: dict[Purpose, JobState] = {"prepare": JobState.VALIDATING_FILES, "train": JobState.QUEUED}


def sources(target: JobState) -> list[JobState]:
    """The states from which `target` may be entered: the guard of its UPDATE."""
    return [state for state, targets in TRANSITIONS.items() if target in targets]
