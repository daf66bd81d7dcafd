"""Numbers with bounds: as xgrammar writes them exactly, or refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from heft_engine.json_schema.schema_error import Path, SchemaError

#: Largest bound of an integer: floats tell all integers up to it apart.
MAX_INTEGER = 2**53
#: Largest bound of a number, and the decimals that xgrammar writes of one with bounds: 15 digits, which a float holds.
MAX_NUMBER = 10**9
DECIMALS = 6
#: xgrammar's largest `multipleOf` without bounds, and our most multiples between two bounds, which are listed.
MAX_MULTIPLE_OF = 1_024
MAX_MULTIPLES = 1_000


def integer_schema(schema: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Returns a schema of `type: integer` with inclusive bounds, or the list of its values. Raises SchemaError."""
    lower, upper = _bound(schema, path, "minimum", math.ceil), _bound(schema, path, "maximum", math.floor)
    above = _bound(schema, path, "exclusiveMinimum", lambda value: math.floor(value) + 1)
    below = _bound(schema, path, "exclusiveMaximum", lambda value: math.ceil(value) - 1)
    lower = max((bound for bound in (lower, above) if bound is not None), default=None)
    upper = min((bound for bound in (upper, below) if bound is not None), default=None)
    if lower is not None and upper is not None and lower > upper:
        raise SchemaError(path, "no integer lies between its bounds")
    multiple = _multiple_of(schema, path)
    if multiple > 1 and (lower is not None or upper is not None):
        return _multiples(lower, upper, multiple, path)
    bounds = {"minimum": lower, "maximum": upper, "multipleOf": multiple if multiple > 1 else None}
    return {"type": "integer"} | {name: bound for name, bound in bounds.items() if bound is not None}


def _bound(schema: Mapping[str, Any], path: Path, name: str, rounded: Any) -> int | None:
    value = _number(schema, path, name)
    if value is None:
        return None
    if abs(value) > MAX_INTEGER:
        raise SchemaError(
            (*path, name), f"an integer's bound lies between -{MAX_INTEGER:,} and {MAX_INTEGER:,}"
        )
    return int(rounded(value))


def _multiple_of(schema: Mapping[str, Any], path: Path) -> int:
    multiple = _number(schema, path, "multipleOf")
    if multiple is None:
        return 1
    if multiple != int(multiple) or not 1 <= multiple <= MAX_MULTIPLE_OF:
        raise SchemaError(
            (*path, "multipleOf"), f"multipleOf must be an integer from 1 to {MAX_MULTIPLE_OF:,}"
        )
    return int(multiple)


def _multiples(lower: int | None, upper: int | None, multiple: int, path: Path) -> dict[str, Any]:
    if lower is None or upper is None:
        raise SchemaError((*path, "multipleOf"), "multipleOf needs both minimum and maximum, or neither")
    values = range(-(-lower // multiple) * multiple, upper + 1, multiple)
    if not values:
        raise SchemaError((*path, "multipleOf"), "no multiple lies between the bounds")
    if len(values) > MAX_MULTIPLES:
        reason = f"more than {MAX_MULTIPLES:,} multiples lie between the bounds: move them closer"
        raise SchemaError((*path, "multipleOf"), reason)
    return {"enum": list(values)}


def number_schema(schema: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Returns a schema of `type: number`, whose bounds are such that there is a number with six decimals between them.

    Raises SchemaError.
    """
    if schema.get("multipleOf") is not None:
        raise SchemaError(
            (*path, "multipleOf"), "multipleOf is supported for integers alone: use type integer"
        )
    bounds: dict[str, float] = {}
    for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        value = _number(schema, path, name)
        if value is None:
            continue
        if abs(value) > MAX_NUMBER or round(value, DECIMALS) != value:
            reason = (
                f"a number's bound has up to {DECIMALS} decimals, between -{MAX_NUMBER:,} and {MAX_NUMBER:,}"
            )
            raise SchemaError((*path, name), reason)
        bounds[name] = value
    lower = max(bounds.get("minimum", -math.inf), bounds.get("exclusiveMinimum", -math.inf))
    upper = min(bounds.get("maximum", math.inf), bounds.get("exclusiveMaximum", math.inf))
    is_exclusive = "exclusiveMinimum" in bounds or "exclusiveMaximum" in bounds
    if lower > upper or (is_exclusive and upper - lower < 10 * 10**-DECIMALS):
        raise SchemaError(path, f"no number with {DECIMALS} decimals lies between its bounds")
    return {"type": "number", **bounds}


def _number(schema: Mapping[str, Any], path: Path, name: str) -> float | None:
    value = schema.get(name)
    if value is None and name not in schema:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SchemaError((*path, name), "must be a number")
    return value
