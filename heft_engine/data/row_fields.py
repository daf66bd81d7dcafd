"""One field of a row at a time: what a text is, and which names an object may have.

It does NOT know the formats: those are in `heft_engine.data.rows` and `heft_engine.data.chat_rows`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from heft_engine.errors import RowError


def without_nulls(obj: object, what: str, param: str | None = None) -> dict[str, object]:
    """A JSON object's fields; null counts as absent. Raises RowError for anything but an object."""
    if not isinstance(obj, dict):
        raise RowError(f"{what} must be a JSON object, not {json_type(obj)}", param=param)
    return {name: value for name, value in obj.items() if value is not None}


def refuse_unknown(
    fields: Collection[str], known: Collection[str], *, why: Mapping[str, str] | None = None, prefix: str = ""
) -> None:
    """Raise RowError for the first field that is not known; `why` explains those that other services take."""
    for name in fields:
        if name in known:
            continue
        param = prefix + name
        if why and name in why:
            raise RowError(f"{param} is not supported: {why[name]}", param=param)
        raise RowError(f"unknown field {param!r}; this row may have {', '.join(known)}", param=param)


def text(value: object, name: str, *, empty: bool = False) -> str:
    """A string that a tokenizer can take. Raises RowError if missing, no string, blank or broken Unicode."""
    if value is None:
        raise RowError(f"{name} is missing", param=name)
    if not isinstance(value, str):
        raise RowError(f"{name} must be a string, not {json_type(value)}", param=name)
    if not empty and not value.strip():
        raise RowError(f"{name} is empty", param=name)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{name} holds half of a surrogate pair, which is no character", param=name) from error
    return value


def json_type(value: object) -> str:
    """The name that JSON has for a value's type."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
