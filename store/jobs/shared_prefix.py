"""In which order the jobs of a study may train: stages that several of them share are trained once.

The rule. Two jobs of a study that begin with the same stages (same settings, seed, files) share that prefix. A job
waits while another job before it in the study shares a prefix with it, may still train, and has not passed that prefix;
unless some job has passed it: then what its stages ended with is there to be reused, and all that share it may start at
once. A job before it that has ended or is paused holds nobody back. So exactly one job of those that share stages
trains them at a time, and should it fail, the next one does. The first of the jobs that are left never waits.

A pure condition on rows, looked at when a job is hinted and when it is claimed: there is nothing to be undone or lost.
Where a result could not be kept, each job trains its own stages, as any other does. It does NOT know what the engine's
own keys are made of; equal settings are enough for them to be equal.
"""

from __future__ import annotations

import hashlib
import json

from sqlalchemy import ColumnElement, and_, exists, not_
from sqlalchemy.orm import aliased

from store.db.states import JobState
from store.db.study_tables import StudyPrefix
from store.db.tables import Job
from store.jobs.spec import TrainingSpec

#: What the engine's result of a stage does not depend on, or what its stages say better.
_ELSEWHERE = {"method", "suffix", "reuse"}


def prefix_keys(study_id: str, spec: TrainingSpec) -> list[str]:
    """A key for the first stage, for the first two, … of this job; none if it reuses nothing."""
    if not spec.reuse:
        return []
    common = spec.model_dump(mode="json", exclude=_ELSEWHERE)
    stages = [stage.model_dump(mode="json") for stage in spec.stages()]
    parts = ([study_id, common, stages[: count + 1]] for count in range(len(stages)))
    return [hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest() for part in parts]


def is_free() -> ColumnElement[bool]:
    """The rule, as a condition on a row of jobs; true for every job outside studies."""
    mine, theirs, passed = aliased(StudyPrefix), aliased(StudyPrefix), aliased(StudyPrefix)
    other, done = aliased(Job), aliased(Job)
    may_still_train = and_(other.finished_at.is_(None), other.state != JobState.PAUSED)
    held_back = (
        exists()
        .where(theirs.key == mine.key, theirs.place < mine.place, other.id == theirs.job_id)
        .where(may_still_train, other.stages_passed < mine.length)
        .correlate(mine)
    )
    is_there = (
        exists()
        .where(passed.key == mine.key, done.id == passed.job_id, done.stages_passed >= mine.length)
        .correlate(mine)
    )
    waits = exists().where(mine.job_id == Job.id, held_back, not_(is_there)).correlate(Job)
    return not_(waits)
