"""The result of a check of `heft doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    OK = "ok"
    WARNING = "warning"  #: works, but needs attention
    WRONG = "wrong"  #: does not work; exit code 1


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A result. `advice` is empty if the state is ok."""

    name: str
    state: State
    found: str
    advice: str = ""


def ok(name: str, result: str) -> Finding:
    return Finding(name=name, state=State.OK, found=result)


def warning(name: str, result: str, advice: str) -> Finding:
    return Finding(name=name, state=State.WARNING, found=result, advice=advice)


def wrong(name: str, result: str, advice: str) -> Finding:
    return Finding(name=name, state=State.WRONG, found=result, advice=advice)
