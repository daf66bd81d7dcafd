"""The points of a grid: all of them, or as many as a budget allows. It does NOT know what becomes of them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

from store.errors import InvalidRequest
from store.studies.spec import MAX_ARMS, StudySpec

#: Points of a grid that a budget may draw from.
MOST_POINTS = 10**12


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
