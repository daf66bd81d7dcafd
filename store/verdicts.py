"""The worker's side of studies: which wait to be judged, what there is to judge, and the verdict written down.

Nothing is locked while a verdict is computed: two workers may judge the same study, and what the one finds that has
seen fewer jobs end is dropped. A verdict that gets lost is made again. It does NOT compute verdicts:
heft_engine.statistics does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import exists, func, select, update
from sqlalchemy.orm import Session

from store import matching
from store.states import TERMINAL, JobState
from store.studies import Run, append_event, write
from store.study_tables import Study, StudyJob
from store.tables import Job

_LEVELS = {JobState.FAILED: "error", JobState.CANCELLED: "warn"}


def with_news(session: Session, *, but: Collection[str] = ()) -> Study | None:
    """A study of which jobs have ended that no verdict knows, the oldest; None when there is none `but` these."""
    ended = exists().where(StudyJob.study_id == Study.id, Job.id == StudyJob.job_id)
    news = ended.where(Job.state.in_(TERMINAL), StudyJob.told.is_(None))
    query = select(Study).where(Study.finished_at.is_(None), news, Study.id.not_in(but))
    return session.scalar(query.order_by(Study.created_at).limit(1))


def question(study: Study, runs: Sequence[Run]) -> dict[str, Any]:
    """What `python -m heft_engine judge` reads: the arms in order, and the rows of each run that has succeeded."""
    seeds = study.spec["seeds"]
    return {
        "arms": [
            {
                "name": arm["name"],
                "seeds": seeds,
                "runs": [_rows(run) for run in runs if _counts(run, arm["name"])],
            }
            for arm in study.spec["planned"]
        ],
        "baseline": study.spec["baseline"],
    }


def _counts(run: Run, arm: str) -> bool:
    return run.arm == arm and run.outcome is not None and run.outcome.outcomes is not None


def _rows(run: Run) -> dict[str, Any]:
    assert run.outcome is not None
    assert run.outcome.outcomes is not None
    found = run.outcome.outcomes
    rows = {name: text for name, text in found["results"][-1].items() if name in ("right", "values")}
    return {"seed": run.seed, "n": found["n"], "rows_sha256": found["rows_sha256"], **rows}


def record(session: Session, study_id: str, runs: Sequence[Run], verdict: Mapping[str, Any]) -> bool:
    """Write down what was found over these runs, tell of those that have ended since, and end the study with its last.

    False for a verdict that says nothing new: others have made it, or overtaken it.
    """
    study = session.scalars(select(Study).where(Study.id == study_id).with_for_update()).one()
    ended = {run.job.id: run for run in runs if JobState(run.job.state) in TERMINAL}
    known = select(StudyJob.job_id).where(StudyJob.study_id == study_id, StudyJob.told.is_not(None))
    told = set(session.scalars(known))
    if study.finished_at is not None or not told < ended.keys():
        return False
    for run in ended.values():
        if run.job.id not in told:
            _tell(session, study_id, run)
    write(session, study_id, verdict=dict(verdict))
    # Counted here, under the lock: others may have made jobs since `runs` was read.
    untold = exists().where(StudyJob.study_id == study_id, StudyJob.told.is_(None))
    if not matching.follow_up(session, study, runs) and not session.scalar(select(untold)):
        _finish(session, study, runs, verdict)
    return True


def _tell(session: Session, study_id: str, run: Run) -> None:
    session.execute(
        update(StudyJob)
        .where(StudyJob.job_id == run.job.id)
        .values(told=run.job.state)
        .execution_options(synchronize_session=False)
    )
    message = f"{run.arm}, seed {run.seed}: {run.job.state}."
    data = {"arm": run.arm, "seed": run.seed, "job": run.job.id, "status": run.job.state}
    append_event(session, study_id, "JOB_ENDED", message, data, _LEVELS.get(JobState(run.job.state), "info"))


def _finish(session: Session, study: Study, runs: Sequence[Run], verdict: Mapping[str, Any]) -> None:
    write(session, study.id, finished_at=func.now())
    succeeded = sum(run.job.state == JobState.SUCCEEDED for run in runs)
    for comparison in verdict["comparisons"]:
        data = {"a": comparison["a"], "b": comparison["b"], "separable": comparison["separable"]}
        append_event(session, study.id, "COMPARISON", comparison["sentence"], data)
    cancelled = study.cancel_requested_at is not None
    code = "CANCELLED" if cancelled else "SUCCEEDED" if succeeded else "FAILED"
    message = f"The study has ended: {succeeded} of {len(runs)} jobs have succeeded."
    append_event(session, study.id, code, message, {"succeeded": succeeded, "jobs": len(runs)})
