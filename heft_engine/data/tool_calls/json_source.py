"""JSON in generated text, as it is written: numbers that no type holds keep their digits."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection
from typing import Any, NoReturn

from heft_engine.data.tool_rows import ToolCall

_SPACE = re.compile(r"[ \t\n\r]*")
#: What stands between the parts of an array or an object.
_SEPARATORS = re.compile(r"[\s,:]*")
#: Two surrogates that are a character, a lone surrogate (the group), or another escape.
_ESCAPE = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})|\\."
)


class UnterminatedString(ValueError):
    """JSON that ends within a string, so that more text may complete it."""


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


#: Converts every number to float, which takes any number of digits and never fails.
_DECODER = json.JSONDecoder(parse_float=float, parse_int=float, parse_constant=_refuse)


def value_at(text: str, start: int) -> tuple[Any, str, int]:
    """Returns the JSON value after white space at `start`, its source and the position of its end.

    Raises UnterminatedString or another ValueError.
    """
    start = _end_of(_SPACE, text, start)
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        if error.msg.startswith("Unterminated string"):
            raise UnterminatedString(str(error)) from error
        raise
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error
    return value, text[start:end], end


def parts_of(source: str) -> list[str]:
    """Returns the sources of a JSON array's items, or of an object's names and values in turn."""
    parts = []
    at = _end_of(_SEPARATORS, source, 1)
    while source[at] not in "]}":
        _, part, at = value_at(source, at)
        parts.append(part)
        at = _end_of(_SEPARATORS, source, at)
    return parts


def read_call(source: str, tools: Collection[str], *, arguments: str = "arguments") -> tuple[ToolCall, Any]:
    """Returns the call of one of `tools` that a JSON object is, and the object's `id` or None. Its own id is new.

    `arguments` is the name of the field with the arguments, which stay as they are written. Only lone surrogates, which
    no encoding can write, become U+FFFD. Raises ValueError for another value.
    """
    call, _, _ = value_at(source, 0)
    if not isinstance(call, dict) or not isinstance(call.get(arguments), dict):
        raise ValueError("a call is an object with a name and an object of arguments")
    name = call.get("name")
    if not isinstance(name, str) or name not in tools:
        raise ValueError("a call needs the name of one of the tools")
    parts = parts_of(source)
    fields = {value_at(field, 0)[0]: value for field, value in zip(parts[::2], parts[1::2], strict=True)}
    written = _ESCAPE.sub(lambda escape: r"\ufffd" if escape[1] else escape[0], fields[arguments])
    return ToolCall(id=f"call_{secrets.token_hex(12)}", name=name, arguments=written), call.get("id")


def _end_of(pattern: re.Pattern[str], text: str, start: int) -> int:
    """Returns the end of a pattern's match at `start`, which may be empty."""
    match = pattern.match(text, start)
    return match.end() if match is not None else start
