"""The worker's side of studies: which wait to be judged, what there is to judge, and the verdict written down.

Nothing is locked while a verdict is computed: two workers may judge the same study, and what the one finds that has
seen fewer jobs end is dropped. A verdict that gets lost is made again. It does NOT compute verdicts:
heft_engine.studies does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import exists, func, select, update
from sqlalchemy.orm import Session

from store.db.states import TERMINAL, JobState
from store.db.study_tables import Study, StudyJob
from store.db.tables import Job
from store.errors import InvalidRequest
from store.studies import equal_compute, search_rounds
from store.studies.events import append_event, write
from store.studies.search import Proposal, best
from store.studies.studies import Run

_LEVELS = {JobState.FAILED: "error", JobState.CANCELLED: "warn"}


def next_study(session: Session, *, exclude: Collection[str] = ()) -> Study | None:
    """A study of which jobs have ended that no verdict knows, the oldest; None when there is none `but` these."""
    ended = exists().where(StudyJob.study_id == Study.id, Job.id == StudyJob.job_id)
    news = ended.where(Job.state.in_(TERMINAL), StudyJob.reported_state.is_(None))
    query = select(Study).where(Study.finished_at.is_(None), news, Study.id.not_in(exclude))
    return session.scalar(query.order_by(Study.created_at).limit(1))


def compare_input(
    study: Study, runs: Sequence[Run], arms: Sequence[Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """What `python -m heft_engine compare` reads: the arms in order, and the rows of each run that has succeeded.

    arms: all of them, or those of a search that may be judged.
    """
    seeds = study.spec["seeds"]
    return {
        "arms": [
            {
                "name": arm["name"],
                "seeds": seeds,
                "runs": [_rows(run) for run in runs if _counts(run, arm["name"])],
                "task": arm.get("task"),
                "method": arm.get("method_name"),
            }
            for arm in (study.spec["planned"] if arms is None else arms)
        ],
        "baseline": study.spec["baseline"],
    }


def arms_to_compare(planned: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The best trial and the baseline, once the search is over. The test rows of other trials are looked at by nobody,
    and those of the best not before it is known: what was chosen among is no fair estimate of what was chosen.
    """
    if not search_rounds.is_over(planned):
        return []
    found = best(planned)
    return [arm for arm in planned if "trial" not in arm] + ([found] if found is not None else [])


def _counts(run: Run, arm: str) -> bool:
    return run.arm == arm and run.outcome is not None and run.outcome.outcomes is not None


def _rows(run: Run) -> dict[str, Any]:
    assert run.outcome is not None
    assert run.outcome.outcomes is not None
    found = run.outcome.outcomes
    rows = {name: text for name, text in found["results"][-1].items() if name in ("right", "values")}
    return {"seed": run.seed, "n": found["n"], "rows_sha256": found["rows_sha256"], **rows}


def record(
    session: Session,
    study_id: str,
    runs: Sequence[Run],
    verdict: Mapping[str, Any],
    proposal: Proposal | None = None,
    *,
    reuse_enabled: bool = True,
) -> list[str] | None:
    """Write down what was found over these runs, tell of those that have ended since, and end the study with its last.

    The ids of jobs that follow: after the commit, hint each with "prepare". None for a verdict that says nothing new:
    others have made it, or overtaken it. `proposal`: of a search, what to try next.
    """
    study = session.scalars(select(Study).where(Study.id == study_id).with_for_update()).one()
    ended = {run.job.id: run for run in runs if JobState(run.job.state) in TERMINAL}
    known = select(StudyJob.job_id).where(StudyJob.study_id == study_id, StudyJob.reported_state.is_not(None))
    told = set(session.scalars(known))
    if study.finished_at is not None or not told < ended.keys():
        return None
    if proposal is not None and search_rounds.is_stale(study, proposal):
        return None
    try:
        # All or nothing: a file may have been deleted since.
        with session.begin_nested():
            for run in ended.values():
                if run.job.id not in told:
                    _tell(session, study_id, run)
            write(session, study_id, verdict=dict(verdict))
            made = _follow_up(session, study, runs, proposal, reuse_enabled)
    except InvalidRequest as refusal:
        search_rounds.close(session, study, refusal.message)
        return None
    # Counted here, under the lock: others may have made jobs since `runs` was read.
    untold = exists().where(StudyJob.study_id == study_id, StudyJob.reported_state.is_(None))
    if not made and not session.scalar(select(untold)):
        _finish(session, study, runs, verdict)
    return made


def _follow_up(
    session: Session, study: Study, runs: Sequence[Run], proposal: Proposal | None, reuse_enabled: bool
) -> list[str]:
    if proposal is not None:
        return search_rounds.follow_up(session, study, runs, proposal, reuse_enabled=reuse_enabled)
    return equal_compute.follow_up(session, study, runs, reuse_enabled=reuse_enabled)


def _tell(session: Session, study_id: str, run: Run) -> None:
    session.execute(
        update(StudyJob).where(StudyJob.job_id == run.job.id).values(reported_state=run.job.state)
    )
    message = f"{run.arm}, seed {run.seed}: {run.job.state}."
    data = {"arm": run.arm, "seed": run.seed, "job": run.job.id, "status": run.job.state}
    append_event(session, study_id, "JOB_ENDED", message, data, _LEVELS.get(JobState(run.job.state), "info"))


def _finish(session: Session, study: Study, runs: Sequence[Run], verdict: Mapping[str, Any]) -> None:
    write(session, study.id, finished_at=func.now())
    succeeded = sum(run.job.state == JobState.SUCCEEDED for run in runs)
    if study.spec.get("search") is not None:
        _tell_best(session, study, verdict)
    for comparison in verdict["comparisons"]:
        data = {"a": comparison["a"], "b": comparison["b"], "separable": comparison["separable"]}
        append_event(session, study.id, "COMPARISON", comparison["sentence"], data)
    cancelled = study.cancel_requested_at is not None
    code = "CANCELLED" if cancelled else "SUCCEEDED" if succeeded else "FAILED"
    message = f"The study has ended: {succeeded} of {len(runs)} jobs have succeeded."
    append_event(session, study.id, code, message, {"succeeded": succeeded, "jobs": len(runs)})


def _tell_best(session: Session, study: Study, verdict: Mapping[str, Any]) -> None:
    search = search_rounds.summary(study)
    found = search["best"]
    message = "No trial of the search has succeeded."
    if found is not None:
        shown: Mapping[str, Any] = next((arm for arm in verdict["arms"] if arm["name"] == found["arm"]), {})
        on_test = (
            f", {100 * shown['accuracy']:.1f} % on the test rows" if shown.get("accuracy") is not None else ""
        )
        message = f"The best is {found['arm']}: {100 * found['value']:.1f} % on the validation rows{on_test}."
    if (why := search["ended_because"]) is not None:
        message += f" The search has ended early: {why}."
    append_event(session, study.id, "SEARCH_ENDED", message, {"best": found, "trials": search["trials"]})
