"""What all wire shapes share: strict bodies, lists, and times as unix seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Generic, Literal, TypeVar, overload

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

Item = TypeVar("Item", bound="Identified")


class Identified(BaseModel):
    """Base of every object that a list may hold."""

    id: str


class RequestBody(BaseModel):
    """Base of every JSON body: unknown fields are errors, and so is what Postgres can't hold."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _storable(cls, body: Any) -> Any:
        fault = find_unstorable(body)
        if fault is not None:
            path, reason = fault
            raise PydanticCustomError("unstorable", "{reason}", {"path": path, "reason": reason})
        return body


def dotted(steps: Sequence[str | int]) -> str:
    """A place in a body as callers write it: `method.recipe.stages[0].rank`."""
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    return path.removeprefix(".")


def find_unstorable(body: Any) -> tuple[str, str] | None:
    """The path of the first value that can't be stored and the reason, or None. Any depth: no recursion."""
    waiting: list[tuple[tuple[str | int, ...], Any]] = [((), body)]
    while waiting:
        steps, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [((*steps, key), part) for key, part in value.items()]
            waiting += [(steps, key) for key in value]  # looked at first: no path has a key that is at fault
        elif isinstance(value, list):
            waiting += [((*steps, index), part) for index, part in enumerate(value)]
        elif (reason := _why_unstorable(value)) is not None:
            return dotted(steps), reason
    return None


def _why_unstorable(value: Any) -> str | None:
    if isinstance(value, str):
        if "\0" in value:
            return "text can't hold a NUL"
        try:
            value.encode()
        except UnicodeEncodeError:
            return "text can't hold half of a surrogate pair"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "an integer has at most 64 bits"
    if isinstance(value, float) and not math.isfinite(value):
        return "a number must be finite"
    return None


class Listing(BaseModel, Generic[Item]):
    """One page, newest first. `?after=<last id>` gives the next one while `has_more`."""

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None

    @classmethod
    def of(cls, items: Sequence[Item], *, has_more: bool = False) -> Listing[Item]:
        first, last = (items[0].id, items[-1].id) if items else (None, None)
        return cls(data=list(items), has_more=has_more, first_id=first, last_id=last)


class Deleted(Identified):
    object: str
    deleted: Literal[True] = True


@overload
def seconds(moment: datetime) -> int: ...
@overload
def seconds(moment: None) -> None: ...
@overload
def seconds(moment: datetime | None) -> int | None: ...
def seconds(moment: datetime | None) -> int | None:
    """Unix seconds, as OpenAI's API gives every time."""
    return None if moment is None else int(moment.timestamp())
