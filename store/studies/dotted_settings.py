"""Settings of a study's arms by dotted names, `reft.rank`: put into a method, and found again in what is refused.

It does NOT know which settings there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from store.errors import InvalidRequest

#: Of the job, beside its method.
JOB_SETTINGS = ("max_length", "dtype", "early_stopping")


@dataclass(frozen=True, kw_only=True)
class Where:
    """Which field of the request a fault in an arm's job is blamed on."""

    field: str = ""  #: what holds the settings that are the arm's own
    own: tuple[str, ...] = ("method",)  #: those, by how they begin
    changed: str = ""  #: of the settings that were changed
    settings: tuple[str, ...] = ()  #: those, dotted

    def of(self, path: str) -> str:
        for setting in self.settings:
            steps = setting.split(".")
            heads = [".".join(steps[:count]) for count in range(1, len(steps))]
            if f".{setting}." in f".{path}." or any(f".{path}".endswith(f".{head}") for head in heads):
                return f"{self.changed}.{setting}"
        return f"{self.field}.{path}" if self.field and path.startswith(self.own) else path


def changed(method: dict[str, Any], settings: Mapping[str, Any], field: str) -> dict[str, Any]:
    """The method with dotted settings changed, `reft.rank` in its own block; and settings of the job beside it."""
    kind = method["type"]
    block: Any = _copy(method.get(kind, {}))
    changes: dict[str, Any] = {}
    for path, value in settings.items():
        first, *rest = path.split(".")
        if first in JOB_SETTINGS:
            changes[first] = {rest[0]: value} if rest else value
            continue
        # The methods of one stage hold its settings without the stage's name.
        steps = rest if first == kind and kind in ("lora", "reft") else [first, *rest]
        _put(block, steps, value, f"{field}.{path}")
    return {"method": {"type": kind, **({kind: block} if block else {})}, **changes}


def _put(block: Any, steps: list[str], value: Any, param: str) -> None:
    for step in steps[:-1]:
        block = (
            block[int(step)]
            if isinstance(block, list) and _is_index(step, block)
            else _inside(block, step, param)
        )
    if not steps or not isinstance(block, dict):
        raise InvalidRequest("there is no such setting", param=param)
    block[steps[-1]] = value


def _inside(block: Any, step: str, param: str) -> Any:
    if not isinstance(block, dict):
        raise InvalidRequest("there is no such setting", param=param)
    return block.setdefault(step, {})


def _is_index(step: str, block: list[Any]) -> bool:
    return step.isdecimal() and int(step) < len(block)


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(part) for key, part in value.items()}
    return [_copy(part) for part in value] if isinstance(value, list) else value


def label(point: Mapping[str, Any]) -> str:
    """The name of an arm that has these settings."""
    return " ".join(f"{path}={value}" for path, value in point.items())[:100]
