"""Arms of equal compute: their epochs are chosen so that they take as much as another arm's first run has measured.

A stage that is trained alone takes as much compute an epoch as inside the other arm: on the same rows and model. The
engine counts compute (heft_engine.training.costs).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy.orm import Session

from store.db.states import TERMINAL, JobState
from store.db.study_tables import Study
from store.errors import InvalidRequest
from store.studies.arms import PlannedArm
from store.studies.events import append_event, write
from store.studies.plan import plan
from store.studies.studies import Run, create_jobs, spec_of

MAX_EPOCHS = 1_000


def follow_up(
    session: Session, study: Study, runs: Sequence[Run], *, reuse_enabled: bool = True
) -> list[str]:
    """Creates the jobs of arms of equal compute, once that is measured. Returns their ids.

    The study's row is locked. If it can't be measured any more, the arms are dropped, with an event.
    """
    waiting = [arm for arm in study.spec["planned"] if arm.get("like")]
    if not waiting or study.cancel_requested_at is not None:
        return []
    reference_runs = [run for run in runs if run.arm == waiting[0]["like"]]
    costs = next((run.outcome.costs for run in reference_runs if run.outcome is not None), None)
    if costs is None:
        if all(JobState(run.job.state) in TERMINAL for run in reference_runs):
            _drop_arms(session, study, f"no job of {waiting[0]['like']} has succeeded")
        return []
    try:
        # All or nothing: a file may have been deleted since.
        with session.begin_nested():
            return _create_jobs(session, study, costs, place=len(runs), reuse_enabled=reuse_enabled)
    except InvalidRequest as refusal:
        _drop_arms(session, study, refusal.message)
        return []


def _create_jobs(
    session: Session,
    study: Study,
    costs: Sequence[Mapping[str, Any]],
    *,
    place: int,
    reuse_enabled: bool,
) -> list[str]:
    spec = spec_of(study)
    arms = [_with_epochs(arm, costs) if arm.equal_compute_to else arm for arm in plan(spec)]
    new_arms = [arm for arm in arms if arm.equal_compute_to]
    new_runs = [(arm, seed) for seed in spec.seeds for arm in new_arms]
    job_ids = create_jobs(session, study, new_runs, first=place, reuse_enabled=reuse_enabled)
    planned = [{**arm.to_json(), "like": None} for arm in arms]
    write(session, study.id, spec={**study.spec, "planned": planned})
    epochs = {arm.name: arm.spec.stages()[0].n_epochs for arm in new_arms}
    numbers = ", ".join(f"{name} {count}" for name, count in epochs.items())
    message = f"Epochs with as much compute as {new_arms[0].equal_compute_to}: {numbers}."
    append_event(session, study.id, "MATCHED", message, {"epochs": epochs})
    return job_ids


def _with_epochs(arm: PlannedArm, costs: Sequence[Mapping[str, Any]]) -> PlannedArm:
    """Returns the arm with the epochs of its one stage that take as much compute as `costs`, at least one epoch."""
    stage_type = arm.spec.method.type
    stage = next(cost for cost in costs if cost["stage"] == stage_type)
    epoch_flops = (stage["flops"] - stage["flops_once"]) / stage["epochs"]
    flops = sum(cost["flops"] for cost in costs) - stage["flops_once"]
    epochs = min(MAX_EPOCHS, max(1, round(flops / epoch_flops)))
    settings = arm.spec.stages()[0].model_copy(update={"n_epochs": epochs})
    method = arm.spec.method.model_copy(update={stage_type: settings})
    return replace(arm, spec=arm.spec.model_copy(update={"method": method}))


def _drop_arms(session: Session, study: Study, reason: str) -> None:
    planned = [{**arm, "like": None} for arm in study.spec["planned"]]
    write(session, study.id, spec={**study.spec, "planned": planned})
    message = f"The arms of equal compute are dropped: {reason}."
    append_event(session, study.id, "NOT_MATCHED", message, level="error")
