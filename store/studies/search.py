"""The trials of a search: the first ones, their results, and how many more may run.

Each trial is an arm, stored with the study's other arms; nothing else is stored of a search. The first trials are drawn
at random, so that they are queued with the request. Later ones are suggested by optuna (heft_engine.studies.suggest),
whom a worker asks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from heft_engine.config.search_space import Range, draw, extremes, point_key, size
from store.errors import InvalidRequest
from store.studies.arms import BaseModelInfo, InvalidSetting, PlannedArm, Trial, build_arm, training_spec
from store.studies.dotted_settings import RequestFields, apply_settings, label
from store.studies.spec import SearchSpec, StudySpec

#: A search whose first so many random points are all invalid is refused.
_MAX_DRAWS = 100
#: A search stops when so many trials have failed and none is complete.
MAX_INITIAL_FAILURES = 5
_FIELD = "search.space"
_TRIAL = "trial "


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """The arms that a worker proposes to try next, as JSON."""

    known_arms: int  #: the number of arms that the study had when the worker read it
    new_arms: Sequence[Mapping[str, Any]]


def first_arms(spec: StudySpec, base: BaseModelInfo | None) -> list[PlannedArm]:
    """Returns the baseline, if the study has one, and the trials that run first. Raises InvalidRequest."""
    search = _search(spec)
    if spec.baseline is not None and spec.baseline.startswith(_TRIAL):
        message = f"the baseline's name must not start with {_TRIAL.strip()!r}: the trials' names do"
        raise InvalidRequest(message, param="baseline")
    _check_space(spec, search)
    arms = []
    if spec.baseline is not None:
        method = spec.method.model_dump(mode="json", exclude_none=True)
        arms.append(build_arm(spec, spec.baseline, {"method": method}, RequestFields(), base))
    seen: set[str] = set()
    for number in range(1, min(search.parallel, search.budget) + 1):
        arm = _draw_arm(spec, number, seen, base)
        if arm is None:
            break
        arms.append(arm)
    return arms


def _draw_arm(spec: StudySpec, number: int, seen: set[str], base: BaseModelInfo | None) -> PlannedArm | None:
    """Returns a trial with random settings that are valid and not in `seen`; None if there seem to be none.

    Raises InvalidRequest when even the first trial has none.
    """
    random = Random(f"{spec.seeds[0]} {number}")
    invalid: InvalidRequest | None = None
    for _ in range(_MAX_DRAWS):
        params = draw(_search(spec).space, random)
        if point_key(params) in seen:
            continue
        seen.add(point_key(params))
        try:
            return trial_arm(spec, Trial(number=number, params=params), base)
        except InvalidRequest as refusal:
            invalid = refusal
    if number == 1 and invalid is not None:
        message = (
            f"none of {len(seen)} random points of the search space has valid settings: {invalid.message}"
        )
        raise InvalidRequest(message, param=invalid.param)
    return None


def trial_arm(spec: StudySpec, trial: Trial, base: BaseModelInfo | None) -> PlannedArm:
    """Returns the arm of a trial. Raises InvalidRequest for invalid settings."""
    method = spec.method.model_dump(mode="json", exclude_none=True)
    changes = apply_settings(method, trial.params, _FIELD)
    fields = RequestFields(changes=_FIELD, changed_settings=tuple(trial.params))
    return replace(build_arm(spec, _name(trial), changes, fields, base), trial=trial)


def _name(trial: Trial) -> str:
    params = {
        path: f"{value:.3g}" if isinstance(value, float) else value for path, value in trial.params.items()
    }
    return f"{_TRIAL}{trial.number}: {label(params)}"


def trial_json(spec: StudySpec, trial: Trial, base: BaseModelInfo | None) -> dict[str, Any]:
    """Returns a trial's arm as JSON; with invalid settings it is pruned."""
    try:
        return trial_arm(spec, trial, base).to_json()
    except InvalidRequest as refusal:
        pruned = replace(trial, state="pruned", reason=refusal.message)
        method = {"type": spec.method.type}
        return {"name": _name(trial), "method": method, "like": None, "trial": pruned.to_json()}


def _check_space(spec: StudySpec, search: SearchSpec) -> None:
    """Raises InvalidRequest for unknown settings, values that are invalid whatever the others are, and duplicates."""
    method = spec.method.model_dump(mode="json", exclude_none=True)
    for path, values in search.space.items():
        for value in extremes(values):
            job_spec = training_spec(spec, apply_settings(method, {path: value}, _FIELD))
            if isinstance(job_spec, InvalidSetting) and f".{path}." in f".{job_spec.path}.":
                raise InvalidRequest(job_spec.reason, param=f"{_FIELD}.{path}")
            if isinstance(job_spec, InvalidSetting) and not job_spec.path.startswith("method"):
                raise InvalidRequest(job_spec.reason, param=job_spec.path)
        if not isinstance(values, Range) and len({point_key({"": value}) for value in values}) < len(values):
            raise InvalidRequest("values must be unique", param=f"{_FIELD}.{path}")


def _search(spec: StudySpec) -> SearchSpec:
    assert spec.search is not None
    return spec.search


# -- results of trials ------------------------------------------------------------------------------------------------


def trials_of(planned: Sequence[Mapping[str, Any]]) -> list[Trial]:
    """Returns the trials among these arms."""
    return [Trial(**arm["trial"]) for arm in planned if "trial" in arm]


def free_slots(search: Mapping[str, Any], trials: Sequence[Trial]) -> int:
    """Returns how many more trials may be started now."""
    states = Counter(trial.state for trial in trials)
    if stop_reason(search, trials) is not None:
        return 0
    started = len(trials) - states["pruned"]
    return int(min(search["parallel"] - states["running"], search["budget"] - started))


def stop_reason(search: Mapping[str, Any], trials: Sequence[Trial]) -> str | None:
    """Returns why a search starts no more trials before its budget is spent; None if it may go on."""
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
        return f"{states['pruned']} of the suggested points have invalid settings"
    return None


def best(planned: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Returns the arm of the complete trial with the highest value, the earliest of equal ones; None without any."""
    complete = [arm for arm in planned if "trial" in arm and arm["trial"]["state"] == "complete"]
    return dict(max(complete, key=lambda arm: arm["trial"]["value"])) if complete else None
