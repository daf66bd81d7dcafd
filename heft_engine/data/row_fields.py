"""Validation of single fields of a row, for all row formats."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from heft_engine.errors import RowError

#: Levels of objects and arrays within a field: chat templates and grammars visit them recursively.
MAX_DEPTH = 64


def without_nulls(obj: object, what: str, param: str | None = None) -> dict[str, object]:
    """Returns the fields of a JSON object that are not null. Raises RowError for anything but an object."""
    if not isinstance(obj, dict):
        raise RowError(f"{what} must be a JSON object, not {json_type(obj)}", param=param)
    return {name: value for name, value in obj.items() if value is not None}


def refuse_unknown(
    fields: Collection[str], known: Collection[str], *, why: Mapping[str, str] | None = None, prefix: str = ""
) -> None:
    """Raises RowError for the first unknown field; `why` explains fields that other services support."""
    for name in fields:
        if name in known:
            continue
        param = prefix + printable(name)
        if why and name in why:
            raise RowError(f"{param} is not supported: {why[name]}", param=param)
        raise RowError(f"unknown field {param!r}; the allowed fields are {', '.join(known)}", param=param)


def text(value: object, name: str, *, empty: bool = False) -> str:
    """Returns the value as a string. Raises RowError if it is missing, not a string, blank or not valid Unicode."""
    if value is None:
        raise RowError(f"{name} is missing", param=name)
    if not isinstance(value, str):
        raise RowError(f"{name} must be a string, not {json_type(value)}", param=name)
    if not empty and not value.strip():
        raise RowError(f"{name} is empty", param=name)
    check_json(value, name)
    return value


def boolean(fields: Mapping[str, object], name: str, *, default: bool, path: str | None = None) -> bool:
    """Returns a field that is true or false. Raises RowError for any other value."""
    value = fields.get(name, default)
    if not isinstance(value, bool):
        path = path or name
        raise RowError(f"{path} must be true or false, not {json_type(value)}", param=path)
    return value


def check_json(value: object, path: str, depth: int = MAX_DEPTH) -> None:
    """Raises RowError for a JSON value that can't be written: with a lone surrogate, which no encoding holds, a number
    that isn't finite, such as 1e999, or more than `depth` levels."""
    if depth == 0:
        raise RowError(f"{path} is nested too deeply: at most {MAX_DEPTH} levels are allowed", param=path)
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowError(
                f"{path} is not valid Unicode: it contains a lone surrogate", param=path
            ) from error
    elif isinstance(value, float) and not math.isfinite(value):
        raise RowError(f"{path} is not a finite number: JSON has no {value}", param=path)
    elif isinstance(value, dict):
        for name, item in value.items():
            check_json(name, path)
            check_json(item, f"{path}.{printable(name)}", depth - 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check_json(item, f"{path}[{index}]", depth - 1)


def printable(name: str) -> str:
    """Returns a field's name with NUL and lone surrogates as escapes: neither can be stored with the job's errors."""
    return name.replace("\0", "\\x00").encode(errors="backslashreplace").decode()


def json_type(value: object) -> str:
    """Returns JSON's name of a value's type, with its article."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
