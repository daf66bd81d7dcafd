"""Values that Postgres can't store, replaced where they are bound to a statement.

The API refuses them in requests. What workers record comes from elsewhere too: field names of a faulty row, messages of
libraries, a loss that is not a number. Nothing of that may keep an outcome from being stored.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from sqlalchemy import Dialect, Text
from sqlalchemy.types import TypeDecorator

#: NUL, which Postgres has in no text, and surrogates, which UTF-8 has none of.
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
_REPLACEMENT = "\ufffd"


class StorableText(TypeDecorator[str]):
    """TEXT, with U+FFFD in place of NUL and of lone surrogates."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else _text(value)


def dumps(value: Any) -> str:
    """Returns JSON for a JSONB column, with U+FFFD as in StorableText and null in place of NaN and infinity."""
    try:
        encoded = json.dumps(value, ensure_ascii=False, allow_nan=False)
        encoded.encode()
    except ValueError:  # also UnicodeEncodeError
        return json.dumps(_json(value), ensure_ascii=False)
    return json.dumps(_json(value), ensure_ascii=False) if "\\u0000" in encoded else encoded


def _json(value: Any) -> Any:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {_json(name): _json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return value


def _text(value: str) -> str:
    return _UNSTORABLE.sub(_REPLACEMENT, value)
