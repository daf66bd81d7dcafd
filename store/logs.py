"""Logging of every process: text lines, or JSON, with the ids of the request or job at hand.

`with bound(job_id=…, attempt=…)` adds ids to the lines inside; a thread that is started with
`contextvars.copy_context().run` has them, too. API keys and passwords are replaced by *** in every line.
"""

from __future__ import annotations

import contextvars
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from pythonjsonlogger.json import JsonFormatter

LogFormat = Literal["text", "json"]

_BOUND: contextvars.ContextVar[Mapping[str, str | int]] = contextvars.ContextVar("bound")
#: API keys, Bearer tokens, and the user and password of a URL. Possessive: any line costs one pass.
_SECRETS = re.compile(r"heft_\w+?_[\w-]{8,}|(?<=Bearer )\S+|(?<=://)[^/@:\s]*+:[^/@\s]*+(?=@)")
_REDACTED = "***"


@contextmanager
def bound(**ids: str | int) -> Iterator[None]:
    """Adds these ids to the lines that the body logs: request_id, job_id, attempt, …"""
    token = _BOUND.set({**_BOUND.get({}), **ids})
    try:
        yield
    finally:
        _BOUND.reset(token)


def configure(log_format: LogFormat, *, level: str | int = "INFO") -> None:
    """Makes the whole process log to stderr, in place of any earlier configuration."""
    handler = logging.StreamHandler()
    handler.addFilter(add_ids)
    handler.setFormatter(_Json() if log_format == "json" else _Text())
    logging.basicConfig(level=level, handlers=[handler], force=True)


def add_ids(record: logging.LogRecord) -> bool:
    """A filter for handlers: sets the bound ids as `record.ids`."""
    record.ids = _BOUND.get({})  # in the thread that logs, not in the one that formats
    return True


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s%(id_suffix)s")

    def format(self, record: logging.LogRecord) -> str:
        ids: Mapping[str, str | int] = getattr(record, "ids", {})
        record.id_suffix = "".join(f" {name}={value}" for name, value in ids.items())
        return _SECRETS.sub(_REDACTED, super().format(record))


class _Json(JsonFormatter):
    """One object a line: time (RFC 3339), level, logger, message, the ids, and exc_info with an exception."""

    def __init__(self) -> None:
        names = {"levelname": "level", "name": "logger", "timestamp": "time"}
        super().__init__(["levelname", "name", "message"], timestamp=True, rename_fields=names)

    def add_fields(
        self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]
    ) -> None:
        super().add_fields(log_data, record, message_dict)
        log_data.pop("ids", None)
        log_data.update(getattr(record, "ids", {}))

    def format(self, record: logging.LogRecord) -> str:
        return _SECRETS.sub(_REDACTED, super().format(record))
