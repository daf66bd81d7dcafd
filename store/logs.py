"""How every process of the service logs: lines for people, or JSON for programs, with the ids of what is being done.

`with bound(job_id=…, attempt=…)` names what the lines inside are about; a thread that goes on with it is started with
`in_context`. Keys and passwords are blotted out of whatever is logged, should one ever get there.
It does NOT decide what is worth a line.
"""

from __future__ import annotations

import contextvars
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from pythonjsonlogger.json import JsonFormatter

LogFormat = Literal["text", "json"]

_BOUND: contextvars.ContextVar[Mapping[str, str | int]] = contextvars.ContextVar("bound")
#: API keys, whoever's Bearer token, and the user and password of an address.
_SECRETS = re.compile(r"heft_\w+?_[\w-]{8,}|(?<=Bearer )\S+|(?<=://)[^/@\s]*:[^/@\s]*(?=@)")
_BLOT = "***"


@contextmanager
def bound(**ids: str | int) -> Iterator[None]:
    """Lines that the body logs carry these ids: request_id, job_id, attempt, …"""
    token = _BOUND.set({**_BOUND.get({}), **ids})
    try:
        yield
    finally:
        _BOUND.reset(token)


def in_context(do: Callable[[], Any]) -> Callable[[], Any]:
    """`do`, for another thread, with the ids that are bound here and now."""
    context = contextvars.copy_context()
    return lambda: context.run(do)


def configure(log_format: LogFormat, *, level: str | int = "INFO") -> None:
    """Have the whole process log to stderr. Replaces what was configured before."""
    handler = logging.StreamHandler()
    handler.addFilter(add_ids)
    handler.setFormatter(_Json() if log_format == "json" else _Text())
    logging.basicConfig(level=level, handlers=[handler], force=True)


def add_ids(record: logging.LogRecord) -> bool:
    """A handler's filter: the record gets the ids that are bound, as `ids`."""
    record.ids = _BOUND.get({})  # where it is logged, not where it is formatted
    return True


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s%(told)s")

    def format(self, record: logging.LogRecord) -> str:
        ids: Mapping[str, str | int] = getattr(record, "ids", {})
        record.told = "".join(f" {name}={value}" for name, value in ids.items())
        return _SECRETS.sub(_BLOT, super().format(record))


class _Json(JsonFormatter):
    """One object a line: time (RFC 3339), level, logger, message, the ids, and exc_info after a fault."""

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
        return _SECRETS.sub(_BLOT, super().format(record))
