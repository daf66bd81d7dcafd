"""What a search may choose from: for each setting its values, or a range of numbers; and points of it, at random.

It imports pydantic and nothing heavier, so that a request can be checked and a search begun without optuna. It does NOT
know which settings there are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from random import Random
from typing import Annotated, Any

from pydantic import Discriminator, Field, StrictFloat, StrictInt, Tag, model_validator

from heft_engine.config.train import Settings

MOST_SETTINGS, MOST_CHOICES = 20, 1_000
Number = StrictInt | StrictFloat


class Range(Settings):
    """From `low` to `high`, both included: whole numbers if both ends are. `log`: each order of magnitude alike."""

    low: Number
    high: Number
    log: bool = False

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    @model_validator(mode="after")
    def _has_points(self) -> Range:
        if self.low >= self.high:
            raise ValueError("low must be below high")
        if self.log and self.low <= 0:
            raise ValueError("a logarithmic range lies above zero")
        return self


Choices = Annotated[list[Any], Field(min_length=1, max_length=MOST_CHOICES)]


def _kind(values: Any) -> str:
    return "range" if isinstance(values, (dict, Range)) else "choices"


Values = Annotated[Annotated[Choices, Tag("choices")] | Annotated[Range, Tag("range")], Discriminator(_kind)]
Space = Mapping[str, list[Any] | Range]
Point = dict[str, Any]


def size(space: Space) -> float:
    """How many points it has; infinite with a range of any numbers."""
    return math.prod(_count(values) for values in space.values())


def _count(values: list[Any] | Range) -> float:
    if isinstance(values, Range):
        return int(values.high) - int(values.low) + 1 if values.whole else math.inf
    return len({_text(value) for value in values})


def draw(space: Space, random: Random) -> Point:
    return {name: _one(values, random) for name, values in space.items()}


def _one(values: list[Any] | Range, random: Random) -> Any:
    if not isinstance(values, Range):
        return random.choice(values)
    low, high = values.low, values.high
    if not values.whole:
        drawn = (
            math.exp(random.uniform(math.log(low), math.log(high)))
            if values.log
            else random.uniform(low, high)
        )
        return min(max(drawn, float(low)), float(high))
    if not values.log:
        return random.randint(int(low), int(high))
    drawn = math.exp(random.uniform(math.log(low - 0.5), math.log(high + 0.5)))
    return min(max(round(drawn), int(low)), int(high))


def extremes(values: list[Any] | Range) -> list[Any]:
    """Every value of a list, both ends of a range."""
    return [values.low, values.high] if isinstance(values, Range) else values


def same(point: Point) -> str:
    """Equal for equal points, and for no others: 1 and true are two."""
    return _text(point)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
