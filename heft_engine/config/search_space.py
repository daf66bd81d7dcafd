"""The search space of a hyperparameter search: a list of values or a numeric range for each setting, and random points.

Imports nothing heavier than pydantic: requests are validated and searches started without optuna.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from random import Random
from typing import Annotated, Any

from pydantic import Discriminator, Field, StrictFloat, StrictInt, Tag, model_validator

from heft_engine.config.train import Settings

MAX_SETTINGS, MAX_CHOICES = 20, 1_000
Number = StrictInt | StrictFloat


class Range(Settings):
    """A range from `low` to `high`, both included; of integers if both ends are. `log`: uniform in the logarithm."""

    low: Number
    high: Number
    log: bool = False

    @property
    def is_integer(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    @model_validator(mode="after")
    def _not_empty(self) -> Range:
        if self.low >= self.high:
            raise ValueError("low must be less than high")
        if self.log and self.low <= 0:
            raise ValueError("low must be greater than 0 in a logarithmic range")
        return self


Choices = Annotated[list[Any], Field(min_length=1, max_length=MAX_CHOICES)]


def _tag(values: Any) -> str:
    return "range" if isinstance(values, (dict, Range)) else "choices"


Values = Annotated[Annotated[Choices, Tag("choices")] | Annotated[Range, Tag("range")], Discriminator(_tag)]
Space = Mapping[str, list[Any] | Range]
Point = dict[str, Any]


def size(space: Space) -> float:
    """Number of points; infinite if any range is not of integers."""
    return math.prod(_size(values) for values in space.values())


def _size(values: list[Any] | Range) -> float:
    if isinstance(values, Range):
        return int(values.high) - int(values.low) + 1 if values.is_integer else math.inf
    return len({json.dumps(value, sort_keys=True) for value in values})


def draw(space: Space, random: Random) -> Point:
    """Returns a random point."""
    return {name: _draw(values, random) for name, values in space.items()}


def _draw(values: list[Any] | Range, random: Random) -> Any:
    if not isinstance(values, Range):
        return random.choice(values)
    low, high = values.low, values.high
    if values.is_integer and not values.log:
        return random.randint(int(low), int(high))
    if values.is_integer:
        exact = math.exp(random.uniform(math.log(low - 0.5), math.log(high + 0.5)))
        return min(max(round(exact), int(low)), int(high))
    bounds = (math.log(low), math.log(high)) if values.log else (low, high)
    exact = random.uniform(*bounds)
    exact = math.exp(exact) if values.log else exact
    return min(max(exact, float(low)), float(high))


def extremes(values: list[Any] | Range) -> list[Any]:
    """Returns every value of a list, or both ends of a range."""
    return [values.low, values.high] if isinstance(values, Range) else values


def point_key(point: Point) -> str:
    """Returns a string that two points share exactly if they are equal; 1 and true differ."""
    return json.dumps(point, sort_keys=True)
