"""Bounds of a JSON text's depth and number of values, checked in its bytes before anything is parsed.

One pass at the speed of a regular expression. A text that is not JSON passes: the parser refuses it.
"""

from __future__ import annotations

import re

from starlette.exceptions import HTTPException

from store.errors import TooLarge

MAX_DEPTH = 32

#: A string, closed or running on to the end. Possessive, so that no byte is looked at twice.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.?[^"\\]*+)*+(?:"|\Z)', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_OTHER_ENCODINGS = (b"\xff\xfe", b"\xfe\xff")  # the byte order marks of UTF-16 and UTF-32


def check_json(body: bytes, *, max_values: int) -> None:
    """Raises HTTPException (400) for another encoding than UTF-8 or deep nesting, TooLarge above `max_values`."""
    if b"\0" in body[:4] or body.startswith(_OTHER_ENCODINGS):
        raise HTTPException(400, "the body must be JSON in UTF-8")
    if _values(body) <= min(max_values, MAX_DEPTH):
        return  # commas and brackets within strings are counted here, so there are no more than this
    structure = _STRING.sub(b"", body)
    # Each value has at most two brackets.
    if _is_deep(structure.translate(None, _NOT_BRACKETS)[: 2 * max_values]):
        raise HTTPException(400, f"the body is nested more than {MAX_DEPTH} levels deep")
    if _values(structure) > max_values:
        raise TooLarge(f"the body has more than {max_values:,} values")


def _is_deep(brackets: bytes) -> bool:
    depth = 0
    for bracket in brackets:
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            return True
        if depth < 0:
            return False  # not JSON from here on
    return False


def _values(text: bytes) -> int:
    """Returns an upper bound of the number of values: every value but the first follows a bracket or a comma."""
    return text.count(b",") + text.count(b"[") + text.count(b"{")
