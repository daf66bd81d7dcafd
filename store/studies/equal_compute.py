"""Arms that shall take as much arithmetic as another: their epochs are chosen from what its first run has measured.

A stage that is trained alone costs what it cost inside the other arm, epoch by epoch: the same rows, the same model. It
does NOT count arithmetic: the engine does (heft_engine.training.costs).
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

MOST_EPOCHS = 1_000


def follow_up(
    session: Session, study: Study, runs: Sequence[Run], *, reuse_enabled: bool = True
) -> list[str]:
    """Make the jobs of arms that wait for another's arithmetic, now that it may be known; the ids of any new.

    The study's row is locked. Where it can't be known any more, the arms are given up, with an event.
    """
    waiting = [arm for arm in study.spec["planned"] if arm.get("like")]
    if not waiting or study.cancel_requested_at is not None:
        return []
    reference = [run for run in runs if run.arm == waiting[0]["like"]]
    measured = next((run.outcome.costs for run in reference if run.outcome is not None), None)
    if measured is None:
        if all(JobState(run.job.state) in TERMINAL for run in reference):
            _give_up(session, study, f"no run of {waiting[0]['like']} has succeeded")
        return []
    try:
        # All or nothing: a file may have been deleted since.
        with session.begin_nested():
            return _create(session, study, measured, place=len(runs), reuse_enabled=reuse_enabled)
    except InvalidRequest as refusal:
        _give_up(session, study, refusal.message)
        return []


def _create(
    session: Session,
    study: Study,
    measured: Sequence[Mapping[str, Any]],
    *,
    place: int,
    reuse_enabled: bool,
) -> list[str]:
    spec = spec_of(study)
    arms = [_with_epochs(arm, measured) if arm.like else arm for arm in plan(spec)]
    new = [arm for arm in arms if arm.like]
    wanted = [(arm, seed) for seed in spec.seeds for arm in new]
    made = create_jobs(session, study, wanted, first=place, reuse_enabled=reuse_enabled)
    planned = [{**arm.to_json(), "like": None} for arm in arms]
    write(session, study.id, spec={**study.spec, "planned": planned})
    epochs = {arm.name: arm.spec.stages()[0].n_epochs for arm in new}
    told = ", ".join(f"{name} {count}" for name, count in epochs.items())
    message = f"Epochs that take as much arithmetic as {new[0].like}: {told}."
    append_event(session, study.id, "MATCHED", message, {"epochs": epochs})
    return made


def _with_epochs(arm: PlannedArm, measured: Sequence[Mapping[str, Any]]) -> PlannedArm:
    """The arm's one stage for as many epochs as the measured run's arithmetic pays for, at least one."""
    kind = arm.spec.method.type
    stage = next(cost for cost in measured if cost["stage"] == kind)
    an_epoch = (stage["flops"] - stage["flops_once"]) / stage["epochs"]
    budget = sum(cost["flops"] for cost in measured) - stage["flops_once"]
    epochs = min(MOST_EPOCHS, max(1, round(budget / an_epoch)))
    settings = arm.spec.stages()[0].model_copy(update={"n_epochs": epochs})
    method = arm.spec.method.model_copy(update={kind: settings})
    return replace(arm, spec=arm.spec.model_copy(update={"method": method}))


def _give_up(session: Session, study: Study, reason: str) -> None:
    planned = [{**arm, "like": None} for arm in study.spec["planned"]]
    write(session, study.id, spec={**study.spec, "planned": planned})
    message = f"Arms of equal arithmetic can't be made: {reason}."
    append_event(session, study.id, "NOT_MATCHED", message, level="error")
