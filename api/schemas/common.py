"""Base classes of requests and responses, lists, and times in unix seconds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar, overload

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

#: Fields of one JSON object. The largest object is a bias for tokens.
MAX_FIELDS = 1_024

#: Characters of a text that a model reads: several times the longest context.
MAX_TEXT_CHARS = 1_000_000
MAX_MESSAGES = 2_048

Text = Annotated[str, Field(max_length=MAX_TEXT_CHARS)]
NonEmptyText = Annotated[str, Field(min_length=1, max_length=MAX_TEXT_CHARS)]
Item = TypeVar("Item", bound="Identified")


class Identified(BaseModel):
    """Base class of objects with an id, which lists can hold."""

    id: str


class RequestPart(BaseModel):
    """Base class of objects within JSON bodies. Refuses unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


#: The configuration of objects whose unknown fields are ignored. `ignored_fields` names them.
LENIENT = ConfigDict(extra="allow", json_schema_extra={"maxProperties": MAX_FIELDS})


class LenientPart(RequestPart):
    """Base class of objects within the JSON bodies of OpenAI's clients, whose unknown fields are ignored."""

    model_config = LENIENT


def ignored_fields(body: BaseModel) -> list[str]:
    """Returns the paths of the fields that are ignored, at any depth."""
    paths: list[str] = []

    def visit(value: Any, steps: tuple[str | int, ...]) -> None:
        if isinstance(value, BaseModel):
            paths.extend(dotted([*steps, name]) for name in value.model_extra or {})
            for name in type(value).model_fields:
                visit(getattr(value, name), (*steps, name))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                visit(item, (*steps, index))

    visit(body, ())
    return paths


class RequestBody(RequestPart):
    """Base class of JSON bodies. Refuses large objects and values that Postgres can't store, at any depth."""

    @model_validator(mode="before")
    @classmethod
    def _storable(cls, body: Any) -> Any:
        fault = find_unstorable(body)
        if fault is not None:
            path, reason = fault
            raise PydanticCustomError("unstorable", "{reason}", {"path": path, "reason": reason})
        return body


def dotted(steps: Sequence[str | int]) -> str:
    """Returns a path as callers write it: `method.recipe.stages[0].rank`."""
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    return path.removeprefix(".")


def find_unstorable(body: Any) -> tuple[str, str] | None:
    """Returns the path of a value that can't be stored and the reason, or None.

    Linear in the number of values, whatever their depth: the path is that of the containers being visited.
    """
    path: list[str | int] = []
    visited: list[Iterator[tuple[str | int, Any]]] = [iter([("", body)])]
    while visited:
        step, value = next(visited[-1], (None, None))
        if step is None:
            visited.pop()
            del path[-1:]
            continue
        if isinstance(value, dict):
            reason = _object_error(value)
            visited.append(iter(value.items()))
            path.append(step)
        elif isinstance(value, list):
            reason = None
            visited.append(enumerate(value))
            path.append(step)
        elif (reason := _storage_error(value)) is not None:
            path.append(step)
        if reason is not None:
            return dotted(path[1:]), reason
    return None


def _object_error(value: dict[str, Any]) -> str | None:
    """Checks the names of an object's fields, so that no path contains a faulty one."""
    if len(value) > MAX_FIELDS:
        return f"an object may have at most {MAX_FIELDS:,} fields"
    return next((reason for name in value if (reason := _storage_error(name)) is not None), None)


def _storage_error(value: Any) -> str | None:
    if isinstance(value, str):
        if "\0" in value:
            return "text must not contain NUL"
        try:
            value.encode()
        except UnicodeEncodeError:
            return "text must not contain a lone surrogate"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "integers must fit into 64 bits"
    if isinstance(value, float) and not math.isfinite(value):
        return "numbers must be finite"
    return None


class Listing(BaseModel, Generic[Item]):
    """A page of a list, newest first. `?after=<last_id>` returns the next page if `has_more`."""

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
    """Unix seconds, as all times in OpenAI's API."""
    return None if moment is None else int(moment.timestamp())
