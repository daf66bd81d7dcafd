"""The rounds of a search: what came of its trials is written down, and the next ones become jobs.

Within the transaction that writes a verdict, under the study's lock. It does NOT choose: a worker has asked optuna.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy.orm import Session

from store.db.states import TERMINAL, JobState
from store.db.study_tables import Study
from store.studies.events import append_event, write
from store.studies.search import (
    EndedRun,
    Proposal,
    best,
    stop_reason,
    trial_arm,
    trials_of,
    with_trial_results,
)
from store.studies.studies import Run, create_jobs, spec_of


def ended(runs: Sequence[Run]) -> list[EndedRun]:
    return [
        EndedRun(arm=run.arm, status=str(run.job.state), value=_value(run))
        for run in runs
        if JobState(run.job.state) in TERMINAL
    ]


def _value(run: Run) -> float | None:
    found = run.outcome.outcomes if run.outcome is not None else None
    return ((found or {}).get("validation") or {}).get("value")


def arms_with_results(study: Study, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The study's arms with what came of their trials by now."""
    return with_trial_results(study.spec["planned"], ended(runs), len(study.spec["seeds"]))


def is_over(planned: Sequence[Mapping[str, Any]]) -> bool:
    """Whether none of the trials among these arms runs."""
    return all(trial.state != "running" for trial in trials_of(planned))


def is_stale(study: Study, proposal: Proposal) -> bool:
    """Whether the study is not any more what a worker looked at: it must look again."""
    is_over = study.cancel_requested_at is not None or "closed" in study.spec["search"]
    return (is_over and bool(proposal.new_arms)) or len(study.spec["planned"]) != proposal.known_arms


def follow_up(
    session: Session, study: Study, runs: Sequence[Run], proposal: Proposal, *, reuse_enabled: bool = True
) -> list[str]:
    """Write down what came of the trials, and make the jobs of those to try next; their ids.

    The study's row is locked, and `proposal` is not stale. Raises InvalidRequest where no job can be made any more.
    """
    spec = spec_of(study)
    planned = arms_with_results(study, runs)
    _tell_ended(session, study, planned)
    arms = [
        trial_arm(spec, trial, None) for trial in trials_of(proposal.new_arms) if trial.state == "running"
    ]
    wanted = [(arm, seed) for seed in spec.seeds for arm in arms]
    made: list[str] = []
    if wanted:
        made = create_jobs(session, study, wanted, first=len(runs), reuse_enabled=reuse_enabled)
    for arm in proposal.new_arms:
        _tell_new(session, study, arm)
    _rewrite(session, study, planned=[*planned, *proposal.new_arms])
    return made


def close(session: Session, study: Study, reason: str) -> None:
    """No more trials are made. What there is will be judged as the search's end."""
    _rewrite(session, study, search={**study.spec["search"], "closed": reason})
    append_event(session, study.id, "SEARCH_CLOSED", f"No more trials are made: {reason}.", level="error")


def _rewrite(session: Session, study: Study, **changes: Any) -> None:
    write(session, study.id, spec={**study.spec, **changes})
    session.expire(study, ["spec"])


def _tell_ended(session: Session, study: Study, planned: Sequence[Mapping[str, Any]]) -> None:
    before = {trial.number: trial.state for trial in trials_of(study.spec["planned"])}
    for arm in planned:
        trial = arm.get("trial")
        if trial is None or trial["state"] == before[trial["number"]]:
            continue
        told = (
            f"{100 * trial['value']:.1f} % on the validation rows"
            if trial["value"] is not None
            else trial["reason"]
        )
        level = "info" if trial["state"] == "complete" else "warn"
        append_event(session, study.id, "TRIAL_ENDED", f"{arm['name']}: {told}.", trial, level)


def _tell_new(session: Session, study: Study, arm: Mapping[str, Any]) -> None:
    if arm["trial"]["state"] == "running":
        append_event(session, study.id, "TRIAL_STARTED", f"Next is {arm['name']}.", arm["trial"])
    else:
        message = f"{arm['name']} is left out: {arm['trial']['reason']}."
        append_event(session, study.id, "TRIAL_LEFT_OUT", message, arm["trial"], "warn")


def summary(study: Study) -> dict[str, Any]:
    """Where a search stands: how many trials there were of which kind, and the best of them on validation rows."""
    search, planned = study.spec["search"], study.spec["planned"]
    trials = trials_of(planned)
    states = [trial.state for trial in trials]
    found = best(planned)
    chosen = None if found is None else {"arm": found["name"], **found["trial"]}
    return {
        **{name: value for name, value in search.items() if name != "closed"},
        "trials": {state: states.count(state) for state in ("running", "complete", "failed", "pruned")},
        "ended_because": "it was cancelled" if study.cancel_requested_at else stop_reason(search, trials),
        "best": chosen,
    }
