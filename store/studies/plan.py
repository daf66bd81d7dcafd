"""The plan of a study: the arms that it begins with. Invalid settings are refused before any job is created."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from store.errors import InvalidRequest
from store.studies import presets
from store.studies.arms import BaseModelInfo, PlannedArm, build_arm
from store.studies.dotted_settings import RequestFields, apply_settings, label
from store.studies.search import first_arms
from store.studies.spec import MAX_ARMS, MAX_JOBS, StudySpec

#: The most arms that are all compared with one another: 190 pairs. More need a baseline.
MAX_PAIRWISE = 20
#: The largest grid from which a budget draws.
MAX_POINTS = 10**12


def plan(spec: StudySpec, base: BaseModelInfo | None = None) -> list[PlannedArm]:
    """Returns the first arms of a completed spec. Raises InvalidRequest naming the first invalid field."""
    if spec.search is not None:
        _check_jobs(spec.search.budget + (spec.baseline is not None), spec, "search.budget")
        return first_arms(spec, base)
    arms = _arms(spec, base)
    references = presets.equal_compute_references(spec.preset, [arm.name for arm in arms])
    arms = [replace(arm, equal_compute_to=references.get(arm.name)) for arm in arms]
    _check_names(arms, spec)
    _check_jobs(len(arms), spec, "seeds")
    if spec.baseline is None and spec.tasks is None and len(arms) > MAX_PAIRWISE:
        message = f"more than {MAX_PAIRWISE} arms are compared with a baseline: name one of the arms"
        raise InvalidRequest(message, param="baseline")
    return arms


def _arms(spec: StudySpec, base: BaseModelInfo | None) -> list[PlannedArm]:
    if spec.tasks is not None:
        return _arms_on_tasks(spec, base)
    if spec.preset is not None:
        layers = base.n_layers if base is not None else None
        methods = presets.arms(spec.preset, scale=spec.epochs_scale or 1.0, layers=layers)
        return [build_arm(spec, name, {"method": method}, RequestFields(), base) for name, method in methods]
    method = spec.method.model_dump(mode="json", exclude_none=True)
    arms: list[PlannedArm] = []
    for point in grid_points(spec):
        fields = RequestFields(changes="grid", changed_settings=tuple(point))
        arms.append(build_arm(spec, label(point), apply_settings(method, point, "grid"), fields, base))
    for index, arm in enumerate(spec.arms or []):
        field = f"arms[{index}]"
        fields = RequestFields(changes=f"{field}.set", changed_settings=tuple(arm.set))
        arm_method = method
        if arm.method is not None:
            fields = replace(fields, arm=field)
            arm_method = arm.method.model_dump(mode="json", exclude_none=True)
        changes = apply_settings(arm_method, arm.set, f"{field}.set")
        arms.append(build_arm(spec, arm.name, changes, fields, base))
    return arms


def _arms_on_tasks(spec: StudySpec, base: BaseModelInfo | None) -> list[PlannedArm]:
    """Returns an arm for each method on each task, task by task."""
    assert spec.preset is not None
    methods = presets.arms(spec.preset, scale=spec.epochs_scale or 1.0, layers=None)
    arms: list[PlannedArm] = []
    for index, task in enumerate(spec.tasks or []):
        task_settings = task.model_dump(mode="json", exclude={"name"}, exclude_none=True)
        fields = RequestFields(arm=f"tasks[{index}]", arm_settings=tuple(task_settings))
        for name, method in methods:
            arm = build_arm(spec, f"{name} on {task.name}", {"method": method, **task_settings}, fields, base)
            arms.append(replace(arm, method_name=name, task=task.name))
    return arms


def grid_points(spec: StudySpec) -> list[dict[str, Any]]:
    """Returns all points of the study's grid, or as many random ones as its budget allows; none without a grid."""
    if spec.grid is None:
        return []
    for path, values in spec.grid.items():
        if not values:
            raise InvalidRequest("a setting of the grid needs at least one value", param=f"grid.{path}")
    size = prod(len(values) for values in spec.grid.values())
    if size > MAX_POINTS:
        message = f"the grid has {size:,} points: {MAX_POINTS:,} is the most that a budget can draw from"
        raise InvalidRequest(message, param="grid")
    if spec.budget is None and size > MAX_ARMS:
        message = f"the grid has {size:,} points: set a budget of at most {MAX_ARMS}, and as many are drawn at random"
        raise InvalidRequest(message, param="grid")
    numbers: Iterable[int] = range(size)
    if spec.budget is not None and spec.budget < size:
        numbers = sorted(random.Random(spec.seeds[0]).sample(range(size), spec.budget))
    return [_point(spec.grid, number) for number in numbers]


def _point(grid: Mapping[str, list[Any]], number: int) -> dict[str, Any]:
    """Returns point `number` of the grid; the last setting varies first."""
    values: dict[str, Any] = {}
    for path in reversed(list(grid)):
        number, index = divmod(number, len(grid[path]))
        values[path] = grid[path][index]
    return {path: values[path] for path in grid}


def _check_names(arms: Sequence[PlannedArm], spec: StudySpec) -> None:
    names: set[str] = set()
    for index, arm in enumerate(arms):
        if arm.name in names:
            field = f"arms[{index}].name" if spec.arms is not None else "grid"
            raise InvalidRequest(f"names of arms must be unique: {arm.name!r} is there twice", param=field)
        names.add(arm.name)
    baselines = names if spec.tasks is None else {arm.method_name for arm in arms}
    if spec.baseline is not None and spec.baseline not in baselines:
        raise InvalidRequest(f"there is no arm {spec.baseline!r}", param="baseline")


def _check_jobs(arms: int, spec: StudySpec, field: str) -> None:
    if arms * len(spec.seeds) > MAX_JOBS:
        message = f"{arms} arms with {len(spec.seeds)} seeds are more than {MAX_JOBS} jobs"
        raise InvalidRequest(message, param=field)
