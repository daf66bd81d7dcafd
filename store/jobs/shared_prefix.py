"""The order in which jobs of a study train, so that the stages which they share are trained once.

Two jobs of a study share a prefix when they begin with the same stages: equal settings, seed and files. Of the jobs
that share a prefix, the first in the study's order trains it, and the others wait. A job waits when both are true:

- An earlier job shares a prefix with it, has not trained all of it yet, and is neither ended nor paused.
- No job at all has trained that whole prefix yet. Once one has, its stage results are there to be reused, and all jobs
  that share the prefix may start.

So if the first job fails or is paused, the next one trains the prefix. The first unfinished job never waits. Where a
stage result could not be stored, each job trains the stage itself.

The rule is a condition on rows, evaluated when a job is hinted and when it is claimed. It stores nothing but
`study_prefixes`, which never change.
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

#: Settings on which the result of a stage does not depend, or only through its stage settings.
_NOT_IN_KEY = {"method", "suffix", "reuse", "n_checkpoints", "integrations"}


def prefix_keys(study_id: str, spec: TrainingSpec) -> list[str]:
    """Returns a key of the job's first stage, of its first two stages, …; an empty list for a job without reuse.

    Equal keys stand for equal settings, for which the engine's keys of stage results are equal too.
    """
    if not spec.reuse:
        return []
    shared = spec.model_dump(mode="json", exclude=_NOT_IN_KEY)
    stages = [stage.model_dump(mode="json") for stage in spec.stages()]
    parts = ([study_id, shared, stages[: count + 1]] for count in range(len(stages)))
    return [hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest() for part in parts]


def may_train() -> ColumnElement[bool]:
    """Returns the condition on a row of `jobs`; true for every job outside studies."""
    prefix, earlier_prefix, trained_prefix = aliased(StudyPrefix), aliased(StudyPrefix), aliased(StudyPrefix)
    earlier, trained = aliased(Job), aliased(Job)
    earlier_trains_it = (
        exists()
        .where(earlier_prefix.key == prefix.key, earlier_prefix.place < prefix.place)
        .where(earlier.id == earlier_prefix.job_id, earlier.stages_passed < prefix.length)
        .where(earlier.finished_at.is_(None), earlier.state != JobState.PAUSED)
        .correlate(prefix)
    )
    is_trained = (
        exists()
        .where(trained_prefix.key == prefix.key, trained.id == trained_prefix.job_id)
        .where(trained.stages_passed >= prefix.length)
        .correlate(prefix)
    )
    waits = exists().where(prefix.job_id == Job.id, and_(earlier_trains_it, not_(is_trained))).correlate(Job)
    return not_(waits)
