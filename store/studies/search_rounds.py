"""The rounds of a search: results of trials are written down, and proposed trials become jobs.

All of it happens in the transaction that writes a verdict, while the study's row is locked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy.orm import Session

from store.db.states import TERMINAL, JobState
from store.db.study_tables import Study
from store.studies.arms import Trial
from store.studies.events import append_event, write
from store.studies.search import Proposal, best, stop_reason, trial_arm, trials_of
from store.studies.studies import Run, create_jobs, spec_of


def arms_with_results(study: Study, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Returns the study's arms with the results of those trials whose jobs, one a seed, have all ended."""
    ended = [run for run in runs if run.job.state in TERMINAL]
    seeds = len(study.spec["seeds"])
    return [
        _with_result(arm, [run for run in ended if run.arm == arm["name"]], seeds)
        for arm in study.spec["planned"]
    ]


def _with_result(arm: Mapping[str, Any], ended: Sequence[Run], seeds: int) -> dict[str, Any]:
    if "trial" not in arm or len(ended) < seeds:
        return dict(arm)
    trial = Trial(**arm["trial"])
    if trial.state != "running":
        return dict(arm)
    values = [value for run in ended if (value := _validation_value(run)) is not None]
    if len(values) == seeds:
        trial = replace(trial, state="complete", value=sum(values) / seeds)
    else:
        states = Counter(run.job.state for run in ended if _validation_value(run) is None)
        reason = ", ".join(f"{count} {state}" for state, count in states.items()) + f" of {seeds} jobs"
        if JobState.SUCCEEDED in states:
            reason = "a job has no value on the validation rows"
        trial = replace(trial, state="failed", reason=reason)
    return {**arm, "trial": trial.to_json()}


def _validation_value(run: Run) -> float | None:
    outcomes = (run.outcome.outcomes if run.outcome is not None else None) or {}
    return (outcomes.get("validation") or {}).get("value")


def is_over(planned: Sequence[Mapping[str, Any]]) -> bool:
    """Returns True if none of the trials among these arms runs."""
    return all(trial.state != "running" for trial in trials_of(planned))


def is_stale(study: Study, proposal: Proposal) -> bool:
    """Returns True if the study has changed since the worker read it for this proposal."""
    accepts_none = study.cancel_requested_at is not None or "closed" in study.spec["search"]
    return (accepts_none and bool(proposal.new_arms)) or len(study.spec["planned"]) != proposal.known_arms


def follow_up(
    session: Session, study: Study, runs: Sequence[Run], proposal: Proposal, *, reuse_enabled: bool = True
) -> list[str]:
    """Writes down the results of trials, and creates the jobs of the proposed ones. Returns their ids.

    The study's row is locked, and `proposal` is not stale. Raises InvalidRequest when the jobs can't be created.
    """
    spec = spec_of(study)
    planned = arms_with_results(study, runs)
    _report_ended_trials(session, study, planned)
    arms = [
        trial_arm(spec, trial, None) for trial in trials_of(proposal.new_arms) if trial.state == "running"
    ]
    new_runs = [(arm, seed) for seed in spec.seeds for arm in arms]
    job_ids: list[str] = []
    if new_runs:
        job_ids = create_jobs(session, study, new_runs, first=len(runs), reuse_enabled=reuse_enabled)
    for arm in proposal.new_arms:
        _report_new_trial(session, study, arm)
    _update_spec(session, study, planned=[*planned, *proposal.new_arms])
    return job_ids


def close(session: Session, study: Study, reason: str) -> None:
    """Ends a search: it starts no more trials."""
    _update_spec(session, study, search={**study.spec["search"], "closed": reason})
    message = f"The search starts no more trials: {reason}."
    append_event(session, study.id, "SEARCH_CLOSED", message, level="error")


def _update_spec(session: Session, study: Study, **changes: Any) -> None:
    write(session, study.id, spec={**study.spec, **changes})
    session.expire(study, ["spec"])


def _report_ended_trials(session: Session, study: Study, planned: Sequence[Mapping[str, Any]]) -> None:
    earlier_states = {trial.number: trial.state for trial in trials_of(study.spec["planned"])}
    for arm in planned:
        trial = arm.get("trial")
        if trial is None or trial["state"] == earlier_states[trial["number"]]:
            continue
        result = trial["reason"]
        if trial["value"] is not None:
            result = f"{100 * trial['value']:.1f} % on the validation rows"
        level = "info" if trial["state"] == "complete" else "warn"
        append_event(session, study.id, "TRIAL_ENDED", f"{arm['name']}: {result}.", trial, level)


def _report_new_trial(session: Session, study: Study, arm: Mapping[str, Any]) -> None:
    if arm["trial"]["state"] == "running":
        append_event(session, study.id, "TRIAL_STARTED", f"Next is {arm['name']}.", arm["trial"])
    else:
        message = f"{arm['name']} is left out: {arm['trial']['reason']}."
        append_event(session, study.id, "TRIAL_LEFT_OUT", message, arm["trial"], "warn")


def summary(study: Study) -> dict[str, Any]:
    """Returns a search's progress: its numbers of trials by state, and the best one on the validation rows."""
    search, planned = study.spec["search"], study.spec["planned"]
    trials = trials_of(planned)
    states = [trial.state for trial in trials]
    best_arm = best(planned)
    cancelled = study.cancel_requested_at is not None
    return {
        **{name: value for name, value in search.items() if name != "closed"},
        "trials": {state: states.count(state) for state in ("running", "complete", "failed", "pruned")},
        "ended_because": "it was cancelled" if cancelled else stop_reason(search, trials),
        "best": None if best_arm is None else {"arm": best_arm["name"], **best_arm["trial"]},
    }
