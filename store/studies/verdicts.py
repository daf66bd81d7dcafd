"""The worker's side of studies: find one to compare, and record the verdict, which heft_engine.studies computes.

Nothing is locked meanwhile: two workers may compare the same study, and the verdict over fewer ended jobs is dropped. A
lost verdict is computed again.
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
    """Returns the oldest unfinished study with ended jobs that are not reported yet; None when there is none."""
    is_job = exists().where(StudyJob.study_id == Study.id, Job.id == StudyJob.job_id)
    has_news = is_job.where(Job.state.in_(TERMINAL), StudyJob.reported_state.is_(None))
    query = select(Study).where(Study.finished_at.is_(None), has_news, Study.id.not_in(exclude))
    return session.scalar(query.order_by(Study.created_at).limit(1))


def compare_input(
    study: Study, runs: Sequence[Run], arms: Sequence[Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Returns the input of `python -m heft_engine compare`: the arms, each with the rows of its runs that have
    succeeded.

    `arms`: those to compare; None: all.
    """
    seeds = study.spec["seeds"]
    return {
        "arms": [
            {
                "name": arm["name"],
                "seeds": seeds,
                "runs": [_rows(run) for run in runs if run.arm == arm["name"] and _has_rows(run)],
                "task": arm.get("task"),
                "method": arm.get("method_name"),
            }
            for arm in (study.spec["planned"] if arms is None else arms)
        ],
        "baseline": study.spec["baseline"],
    }


def arms_to_compare(planned: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the arms of a search to compare on the test rows: once it is over, the baseline and the best trial.

    Other trials are never evaluated on the test rows: a choice by them would bias the result.
    """
    if not search_rounds.is_over(planned):
        return []
    arms = [arm for arm in planned if "trial" not in arm]
    best_arm = best(planned)
    return arms if best_arm is None else [*arms, best_arm]


def _has_rows(run: Run) -> bool:
    return run.outcome is not None and run.outcome.outcomes is not None


def _rows(run: Run) -> dict[str, Any]:
    assert run.outcome is not None
    assert run.outcome.outcomes is not None
    outcomes = run.outcome.outcomes
    rows = {name: value for name, value in outcomes["results"][-1].items() if name in ("right", "values")}
    return {"seed": run.seed, "n": outcomes["n"], "rows_sha256": outcomes["rows_sha256"], **rows}


def record(
    session: Session,
    study_id: str,
    runs: Sequence[Run],
    verdict: Mapping[str, Any],
    proposal: Proposal | None = None,
    *,
    reuse_enabled: bool = True,
) -> list[str] | None:
    """Writes the verdict over these runs, reports those that have ended since the last one, and may end the study.

    `proposal`: the next trials of a search. Returns the ids of new jobs: after the commit, hint each with "prepare".
    Returns None for a verdict that is dropped, since another one covers the same runs or more.
    """
    study = session.scalars(select(Study).where(Study.id == study_id).with_for_update()).one()
    ended = {run.job.id: run for run in runs if JobState(run.job.state) in TERMINAL}
    query = select(StudyJob.job_id).where(StudyJob.study_id == study_id, StudyJob.reported_state.is_not(None))
    reported = set(session.scalars(query))
    if study.finished_at is not None or not reported < ended.keys():
        return None
    if proposal is not None and search_rounds.is_stale(study, proposal):
        return None
    try:
        # All or nothing: a file may have been deleted since.
        with session.begin_nested():
            for run in ended.values():
                if run.job.id not in reported:
                    _report(session, study_id, run)
            write(session, study_id, verdict=dict(verdict))
            new_job_ids = _follow_up(session, study, runs, proposal, reuse_enabled)
    except InvalidRequest as refusal:
        search_rounds.close(session, study, refusal.message)
        return None
    # Queried under the lock: another worker may have created jobs since `runs` was read.
    has_unreported = exists().where(StudyJob.study_id == study_id, StudyJob.reported_state.is_(None))
    if not new_job_ids and not session.scalar(select(has_unreported)):
        _finish(session, study, runs, verdict)
    return new_job_ids


def _follow_up(
    session: Session, study: Study, runs: Sequence[Run], proposal: Proposal | None, reuse_enabled: bool
) -> list[str]:
    if proposal is not None:
        return search_rounds.follow_up(session, study, runs, proposal, reuse_enabled=reuse_enabled)
    return equal_compute.follow_up(session, study, runs, reuse_enabled=reuse_enabled)


def _report(session: Session, study_id: str, run: Run) -> None:
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
        _report_search(session, study, verdict)
    for comparison in verdict["comparisons"]:
        data = {"a": comparison["a"], "b": comparison["b"], "separable": comparison["separable"]}
        append_event(session, study.id, "COMPARISON", comparison["sentence"], data)
    cancelled = study.cancel_requested_at is not None
    code = "CANCELLED" if cancelled else "SUCCEEDED" if succeeded else "FAILED"
    message = f"The study has ended: {succeeded} of {len(runs)} jobs have succeeded."
    append_event(session, study.id, code, message, {"succeeded": succeeded, "jobs": len(runs)})


def _report_search(session: Session, study: Study, verdict: Mapping[str, Any]) -> None:
    search = search_rounds.summary(study)
    trial = search["best"]
    message = "No trial of the search has succeeded."
    if trial is not None:
        message = f"The best is {trial['arm']}: {100 * trial['value']:.1f} % on the validation rows"
        accuracies = [arm.get("accuracy") for arm in verdict["arms"] if arm["name"] == trial["arm"]]
        if accuracies and accuracies[0] is not None:
            message += f", {100 * accuracies[0]:.1f} % on the test rows"
        message += "."
    if (reason := search["ended_because"]) is not None:
        message += f" The search has ended early: {reason}."
    append_event(session, study.id, "SEARCH_ENDED", message, {"best": trial, "trials": search["trials"]})
