"""The trials of a search: which it begins with, what became of them, and how many may be made next.

Each trial is an arm, kept with the study's other arms: there is no other record of the search. The first ones are drawn
at random here, so that they are queued with the request; what to try after them a worker asks optuna
(heft_engine.studies.suggest). It does NOT know the database.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from heft_engine.config.search_space import Range, draw, extremes, point_key, size
from store.errors import InvalidRequest
from store.studies.arms import BaseModelInfo, Fault, PlannedArm, Trial, built, training_spec
from store.studies.dotted_settings import Where, changed, label
from store.studies.spec import SearchSpec, StudySpec

#: Of points drawn at random, so many that can't be in a row show that (nearly) none can.
_DRAWS = 100
#: So many trials that fail before the first that doesn't, and no more are made: something else is wrong.
MAX_INITIAL_FAILURES = 5
_FIELD = "search.space"
_TRIAL = "trial "


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """Arms that a worker proposes to try next, as JSON. `known_arms`: how many arms the study had when it looked."""

    known_arms: int
    new_arms: Sequence[Mapping[str, Any]]


def first_arms(spec: StudySpec, base: BaseModelInfo | None) -> list[PlannedArm]:
    """The baseline, if one is named, and as many trials as run at a time. Raises InvalidRequest, naming the field."""
    search = _search(spec)
    if spec.baseline is not None and spec.baseline.startswith(_TRIAL):
        raise InvalidRequest("trials are called so: name the baseline otherwise", param="baseline")
    _check_settings(spec, search)
    method = spec.method.model_dump(mode="json", exclude_none=True)
    arms = []
    if spec.baseline is not None:
        arms.append(built(spec, spec.baseline, {"method": method}, Where(), base))
    seen: set[str] = set()
    for number in range(1, min(search.parallel, search.budget) + 1):
        arm = _drawn(spec, number, seen, base)
        if arm is None:
            break
        arms.append(arm)
    return arms


def _drawn(spec: StudySpec, number: int, seen: set[str], base: BaseModelInfo | None) -> PlannedArm | None:
    """A trial that was not seen and can be; None where none is found. Raises InvalidRequest if it were the first."""
    random = Random(f"{spec.seeds[0]} {number}")
    for _ in range(_DRAWS):
        params = draw(_search(spec).space, random)
        if point_key(params) in seen:
            continue
        seen.add(point_key(params))
        try:
            return trial_arm(spec, Trial(number=number, params=params), base)
        except InvalidRequest as refusal:
            refused = refusal
    if number == 1:
        message = f"of {len(seen)} points drawn at random none can be: {refused.message}"
        raise InvalidRequest(message, param=refused.param)
    return None


def trial_arm(spec: StudySpec, trial: Trial, base: BaseModelInfo | None) -> PlannedArm:
    """Raises InvalidRequest where that can't be."""
    method = spec.method.model_dump(mode="json", exclude_none=True)
    where = Where(changed=_FIELD, settings=tuple(trial.params))
    arm = built(spec, _name(trial), changed(method, trial.params, _FIELD), where, base)
    return replace(arm, trial=trial)


def _name(trial: Trial) -> str:
    shown = {
        path: f"{value:.3g}" if isinstance(value, float) else value for path, value in trial.params.items()
    }
    return f"{_TRIAL}{trial.number}: {label(shown)}"


def trial_json(spec: StudySpec, trial: Trial, base: BaseModelInfo | None) -> dict[str, Any]:
    """A trial as it is kept with the study's arms: pruned where it can't be."""
    try:
        return trial_arm(spec, trial, base).to_json()
    except InvalidRequest as refusal:
        pruned = replace(trial, state="pruned", reason=refusal.message)
        method = {"type": spec.method.type}
        return {"name": _name(trial), "method": method, "like": None, "trial": pruned.to_json()}


def _check_settings(spec: StudySpec, search: SearchSpec) -> None:
    """Refuse a setting that there isn't, and values that it can't have whatever the others are."""
    method = spec.method.model_dump(mode="json", exclude_none=True)
    for path, values in search.space.items():
        for value in extremes(values):
            made = training_spec(spec, changed(method, {path: value}, _FIELD))
            if isinstance(made, Fault) and f".{path}." in f".{made.path}.":
                raise InvalidRequest(made.reason, param=f"{_FIELD}.{path}")
            if isinstance(made, Fault) and not made.path.startswith("method"):
                raise InvalidRequest(made.reason, param=made.path)
        if not isinstance(values, Range) and len({point_key({"": value}) for value in values}) < len(values):
            raise InvalidRequest("each value once", param=f"{_FIELD}.{path}")


def _search(spec: StudySpec) -> SearchSpec:
    assert spec.search is not None
    return spec.search


# -- what became of them ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EndedRun:
    """A job of a trial that has ended. value: on the validation rows; None: there is none."""

    arm: str
    status: str
    value: float | None


def trials_of(planned: Sequence[Mapping[str, Any]]) -> list[Trial]:
    return [Trial(**arm["trial"]) for arm in planned if "trial" in arm]


def with_trial_results(
    planned: Sequence[Mapping[str, Any]], ended: Sequence[EndedRun], seeds: int
) -> list[dict[str, Any]]:
    """The arms, with what came of the trials all of whose jobs have ended."""
    by_arm: dict[str, list[EndedRun]] = {}
    for one in ended:
        by_arm.setdefault(one.arm, []).append(one)
    return [_settled(arm, by_arm.get(arm["name"], []), seeds) for arm in planned]


def _settled(arm: Mapping[str, Any], ended: Sequence[EndedRun], seeds: int) -> dict[str, Any]:
    if "trial" not in arm or len(ended) < seeds:
        return dict(arm)
    trial = Trial(**arm["trial"])
    if trial.state != "running":
        return dict(arm)
    values = [one.value for one in ended if one.value is not None]
    if len(values) == seeds:
        trial = replace(trial, state="complete", value=sum(values) / seeds)
    else:
        told = Counter(one.status for one in ended if one.value is None)
        lost = ", ".join(f"{count} {status}" for status, count in told.items())
        reason = f"{lost} of {seeds} jobs" if "succeeded" not in told else "no number on validation rows"
        trial = replace(trial, state="failed", reason=reason)
    return {**arm, "trial": trial.to_json()}


def free_slots(search: Mapping[str, Any], trials: Sequence[Trial]) -> int:
    """How many trials may be made now."""
    states = Counter(trial.state for trial in trials)
    if stop_reason(search, trials) is not None:
        return 0
    spent = len(trials) - states["pruned"]
    return int(min(search["parallel"] - states["running"], search["budget"] - spent))


def stop_reason(search: Mapping[str, Any], trials: Sequence[Trial]) -> str | None:
    """Why a search makes no more trials though its budget is not spent; None if nothing else hinders it."""
    if (closed := search.get("closed")) is not None:
        return str(closed)
    states = Counter(trial.state for trial in trials)
    if len(trials) - states["pruned"] >= search["budget"]:
        return None
    space = SearchSpec.model_validate(search).space
    if len({point_key(trial.params) for trial in trials}) >= size(space):
        return "every point of the space has been tried"
    if states["failed"] >= MAX_INITIAL_FAILURES and not states["complete"]:
        return f"the first {states['failed']} trials have all failed"
    if states["pruned"] >= search["budget"]:
        return f"{states['pruned']} of the points that were chosen can't be"
    return None


def best(planned: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The arm that did best on the validation rows, the earliest of equals."""
    complete = [arm for arm in planned if "trial" in arm and arm["trial"]["state"] == "complete"]
    return dict(max(complete, key=lambda arm: arm["trial"]["value"])) if complete else None
