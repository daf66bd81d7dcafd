"""The arms that a study begins with. Whatever can't be is refused with the field's name, before anything is queued.

An arm becomes one ordinary job a seed. It does NOT know the database: what is known of the base model is handed in.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from store.errors import InvalidRequest
from store.studies import presets
from store.studies.arms import BaseModelInfo, PlannedArm, built
from store.studies.dotted_settings import Where, changed, label
from store.studies.search import first_arms
from store.studies.spec import MAX_ARMS, MAX_JOBS, StudySpec

#: Arms that are all compared with one another: 190 pairs. More are compared with a baseline.
MOST_PAIRWISE = 20
#: Points of a grid that a budget may draw from.
MOST_POINTS = 10**12


def plan(spec: StudySpec, base: BaseModelInfo | None = None) -> list[PlannedArm]:
    """The arms of a completed spec. Raises InvalidRequest naming the field of the first one that can't be."""
    if spec.search is not None:
        _check_search_size(spec)
        return first_arms(spec, base)
    arms = _arms(spec, base)
    like = presets.likened(spec.preset, [arm.name for arm in arms])
    arms = [replace(arm, like=like.get(arm.name)) for arm in arms]
    _check_names(arms, spec)
    if len(arms) * len(spec.seeds) > MAX_JOBS:
        message = f"{len(arms)} arms with {len(spec.seeds)} seeds are more than {MAX_JOBS} jobs"
        raise InvalidRequest(message, param="seeds")
    if spec.baseline is None and spec.tasks is None and len(arms) > MOST_PAIRWISE:
        message = f"more than {MOST_PAIRWISE} arms are compared with one of them: name it"
        raise InvalidRequest(message, param="baseline")
    return arms


def _arms(spec: StudySpec, base: BaseModelInfo | None) -> list[PlannedArm]:
    if spec.tasks is not None:
        return _arms_on_tasks(spec, base)
    if spec.preset is not None:
        methods = presets.arms(
            spec.preset, scale=spec.epochs_scale or 1.0, layers=base.n_layers if base else None
        )
        return [built(spec, name, {"method": method}, Where(), base) for name, method in methods]
    method = spec.method.model_dump(mode="json", exclude_none=True)
    if spec.grid is not None:
        return [
            built(
                spec,
                label(point),
                changed(method, point, "grid"),
                Where(changed="grid", settings=tuple(point)),
                base,
            )
            for point in grid_points(spec)
        ]
    arms: list[PlannedArm] = []
    for index, arm in enumerate(spec.arms or []):
        own = method if arm.method is None else arm.method.model_dump(mode="json", exclude_none=True)
        field = f"arms[{index}]"
        where = Where(
            field=field if arm.method is not None else "", changed=f"{field}.set", settings=tuple(arm.set)
        )
        arms.append(built(spec, arm.name, changed(own, arm.set, f"{field}.set"), where, base))
    return arms


def _arms_on_tasks(spec: StudySpec, base: BaseModelInfo | None) -> list[PlannedArm]:
    """Every method on every task, task by task."""
    assert spec.preset is not None
    methods = presets.arms(spec.preset, scale=spec.epochs_scale or 1.0, layers=None)
    arms: list[PlannedArm] = []
    for index, data in enumerate(spec.tasks or []):
        files = data.model_dump(mode="json", exclude={"name"}, exclude_none=True)
        where = Where(field=f"tasks[{index}]", own=tuple(files))
        for name, method in methods:
            arm = built(spec, f"{name} on {data.name}", {"method": method, **files}, where, base)
            arms.append(replace(arm, method_name=name, task=data.name))
    return arms


def grid_points(spec: StudySpec) -> list[dict[str, Any]]:
    grid = spec.grid or {}
    for path, values in grid.items():
        if not values:
            raise InvalidRequest("an empty list has no values to try", param=f"grid.{path}")
    size = prod(len(values) for values in grid.values())
    if size > MOST_POINTS:
        message = f"a grid of {size:,} points is too large to draw from: at most {MOST_POINTS:,}"
        raise InvalidRequest(message, param="grid")
    if spec.budget is None and size > MAX_ARMS:
        message = (
            f"a grid of {size:,} arms needs a budget: so many of them, drawn at random, at most {MAX_ARMS}"
        )
        raise InvalidRequest(message, param="grid")
    chosen: Iterable[int] = range(size)
    if spec.budget is not None and spec.budget < size:
        chosen = sorted(random.Random(spec.seeds[0]).sample(range(size), spec.budget))
    return [_point(grid, number) for number in chosen]


def _point(grid: Mapping[str, list[Any]], number: int) -> dict[str, Any]:
    """The combination of this number; the last setting varies first."""
    found: dict[str, Any] = {}
    for path in reversed(list(grid)):
        number, index = divmod(number, len(grid[path]))
        found[path] = grid[path][index]
    return {path: found[path] for path in grid}


def _check_names(arms: Sequence[PlannedArm], spec: StudySpec) -> None:
    seen: set[str] = set()
    for index, arm in enumerate(arms):
        if arm.name in seen:
            field = f"arms[{index}].name" if spec.arms is not None else "grid"
            raise InvalidRequest(f"two arms are called {arm.name!r}", param=field)
        seen.add(arm.name)
    known = seen if spec.tasks is None else {arm.method_name for arm in arms}
    if spec.baseline is not None and spec.baseline not in known:
        raise InvalidRequest(f"no arm is called {spec.baseline!r}", param="baseline")


def _check_search_size(spec: StudySpec) -> None:
    assert spec.search is not None
    arms = spec.search.budget + (spec.baseline is not None)
    if arms * len(spec.seeds) > MAX_JOBS:
        message = f"{arms} arms with {len(spec.seeds)} seeds are more than {MAX_JOBS} jobs"
        raise InvalidRequest(message, param="search.budget")
