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


def ok(name: str, found: str) -> Finding:
    return Finding(name=name, state=State.OK, found=found)


def warning(name: str, found: str, advice: str) -> Finding:
    return Finding(name=name, state=State.WARNING, found=found, advice=advice)


def wrong(name: str, found: str, advice: str) -> Finding:
    return Finding(name=name, state=State.WRONG, found=found, advice=advice)
