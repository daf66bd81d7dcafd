"""A TrainConfig from `--set NAME=VALUE` arguments."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from heft_engine.config.train import (
    EarlyStopping,
    LoraStage,
    MethodType,
    ReftStage,
    TaskSettings,
    TrainConfig,
    recipe,
)
from heft_engine.errors import ConfigError

M = TypeVar("M", bound=BaseModel)
_GROUPS = ("lora", "reft", "task", "early_stopping", "")
#: Fields of TrainConfig that have arguments or groups of their own.
_NOT_SETTINGS = ("model", "method", "stages", "seed", "task", "early_stopping")


def config_from_settings(model: str, method: MethodType, settings: Sequence[str], seed: int) -> TrainConfig:
    """Raises ConfigError that names the setting at fault."""
    groups = _parse(settings)
    for kind in {"lora", "reft"} - {stage.type for stage in recipe(method)}:
        for field in groups[kind]:
            name = f"{kind}.{field}"
            raise ConfigError(f"--set {name}: method {method} has no {kind} stage", param=name)
    lora = _validate(LoraStage, groups["lora"], "lora.")
    reft = _validate(ReftStage, groups["reft"], "reft.")
    values: dict[str, Any] = {
        "model": model,
        "method": method,
        "stages": recipe(method, lora, reft),
        "seed": seed,
        **groups[""],
        "task": _validate(TaskSettings, groups["task"], "task."),
    }
    if groups["early_stopping"]:
        values["early_stopping"] = _validate(EarlyStopping, groups["early_stopping"], "early_stopping.")
    return _validate(TrainConfig, values, "")


def _parse(settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns the values by group and field: "lora.rank=8" is {"lora": {"rank": 8}}."""
    groups: dict[str, dict[str, Any]] = {name: {} for name in _GROUPS}
    for setting in settings:
        name, equals, value = setting.partition("=")
        group, _, field = name.rpartition(".")
        if not equals or group not in groups or name in _NOT_SETTINGS:
            message = f"--set {setting}: write it as lora.rank=8, reft.layers=15 or max_length=512"
            raise ConfigError(message, param=name)
        groups[group][field] = _value(value)
    return groups


def _validate(model: type[M], values: dict[str, Any], prefix: str) -> M:
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = prefix + str(first["loc"][0]) if first["loc"] else prefix.rstrip(".")
        known = f"; there are {', '.join(model.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise ConfigError(f"--set {name}: {first['msg']}{known}", param=name) from error


def _value(text: str) -> Any:
    """Returns the JSON value, or the text itself where it is not JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text
