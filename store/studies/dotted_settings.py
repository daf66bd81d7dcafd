"""Settings by dotted names (`reft.rank`): put into a method, and mapped to the request's fields in errors."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from store.errors import InvalidRequest

#: Settings of a job beside its method.
JOB_SETTINGS = ("max_length", "dtype", "base_quantization", "early_stopping")


@dataclass(frozen=True, kw_only=True)
class RequestFields:
    """The request's fields from which an arm's job was made, to name them in errors."""

    arm: str = ""  #: the field with the arm's own settings: `arms[0]`
    arm_settings: tuple[str, ...] = ("method",)  #: the settings of the job that are in it
    changes: str = ""  #: the field with changed settings: `grid`, `arms[0].set`
    changed_settings: tuple[str, ...] = ()  #: the dotted names in it

    def param(self, path: str) -> str:
        """Returns the request's field for the setting `path` of the job."""
        for setting in self.changed_settings:
            if f".{setting}." in f".{path}." or _ends_with_parent(path, setting):
                return f"{self.changes}.{setting}"
        return f"{self.arm}.{path}" if self.arm and path.startswith(self.arm_settings) else path


def _ends_with_parent(path: str, setting: str) -> bool:
    """Returns whether the path ends with a group that the setting is in: `method.heft.reft`, that of `reft.rank`."""
    steps, names = path.split("."), setting.split(".")
    return any(steps[-count:] == names[:count] for count in range(1, min(len(names), len(steps) + 1)))


def apply_settings(method: dict[str, Any], settings: Mapping[str, Any], field: str) -> dict[str, Any]:
    """Returns the settings of a job: `method` changed by dotted settings, and those of JOB_SETTINGS beside it.

    Raises InvalidRequest naming a setting of the request's `field` that can't be set.
    """
    method_type = method["type"]
    method_settings: Any = deepcopy(method.get(method_type, {}))
    job_settings: dict[str, Any] = {}
    for path, value in settings.items():
        first, *rest = path.split(".")
        if first in JOB_SETTINGS:
            job_settings[first] = {rest[0]: value} if rest else value
            continue
        # The methods `lora` and `reft` have their stage's settings without the stage's name.
        names = rest if first == method_type and method_type in ("lora", "reft") else [first, *rest]
        _set(method_settings, names, value, f"{field}.{path}")
    changed_method = {"type": method_type, **({method_type: method_settings} if method_settings else {})}
    return {"method": changed_method, **job_settings}


def _set(settings: Any, names: list[str], value: Any, param: str) -> None:
    for name in names[:-1]:
        if isinstance(settings, list) and name.isdecimal() and int(name) < len(settings):
            settings = settings[int(name)]
        elif isinstance(settings, dict):
            settings = settings.setdefault(name, {})
        else:
            raise InvalidRequest("there is no such setting", param=param)
    if not names or not isinstance(settings, dict):
        raise InvalidRequest("there is no such setting", param=param)
    settings[names[-1]] = value


def label(settings: Mapping[str, Any]) -> str:
    """Returns the name of an arm with these settings."""
    return " ".join(f"{path}={value}" for path, value in settings.items())[:100]
