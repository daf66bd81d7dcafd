"""Formats of strings, as patterns of a common form of each: `date` has no 29 February, and `ipv6` no `::`."""

from __future__ import annotations

from heft_engine.json_schema.string_patterns import StringPattern, parse_pattern

_FORMATS = {
    "date": r"[12]\d{3}-((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)|02-(0[1-9]|1\d|2[0-8]))",
    "time": r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)",
    "duration": (
        r"P(\d{1,3}D(T\d{1,2}H(\d{1,2}M(\d{1,2}S)?)?)?|T\d{1,4}[HMS]|\d{1,2}M(\d{1,2}D)?"
        r"|\d{1,4}Y(\d{1,2}M(\d{1,2}D)?)?|\d{1,4}W)"
    ),
    "email": r"[a-z0-9]{1,20}([._+-][a-z0-9]{1,20}){0,2}@[a-z0-9]{1,20}(-[a-z0-9]{1,20})?(\.[a-z]{2,10}){1,2}",
    "hostname": r"[a-z0-9]{1,20}(-[a-z0-9]{1,20})?(\.[a-z][a-z0-9]{1,20}){1,3}",
    "ipv4": r"((25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)\.){3}(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)",
    "ipv6": r"([0-9a-f]{1,4}:){7}[0-9a-f]{1,4}",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
}
_FORMATS["date-time"] = f"{_FORMATS['date']}T{_FORMATS['time']}"
#: OpenAI's formats.
FORMATS = tuple(sorted(_FORMATS))


def format_pattern(name: str) -> StringPattern:
    """Returns the pattern of a format. Raises KeyError for one that is not in FORMATS."""
    return parse_pattern(_FORMATS[name])
