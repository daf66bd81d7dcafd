"""What the user asked a study for, and the arms that come of it: written out, a grid, or a preset.

An arm becomes one ordinary job a seed. Whatever can't be is refused here with the field's name, before anything is
queued. It does NOT know the database: what is known of the base model is handed in.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from heft_engine.config import Dtype, EarlyStopping, Settings, TaskSettings
from store import presets
from store.errors import InvalidRequest
from store.spec import Method, TrainingSpec

#: Jobs: they are made in one transaction, while their user waits.
MAX_ARMS, MAX_SEEDS, MAX_JOBS = 200, 50, 300
#: Points of a grid that a budget may draw from.
MOST_POINTS = 10**12
#: Arms that are all compared with one another: 190 pairs. More are compared with a baseline.
MOST_PAIRWISE = 20
_JOB_SETTINGS = ("max_length", "dtype", "early_stopping")

Name = Annotated[str, Field(min_length=1, max_length=100)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]


class ArmSpec(Settings):
    """A method, or the study's own with some settings changed: `{"reft.layers": 10, "max_length": 256}`."""

    name: Name
    method: Method | None = None
    set: dict[str, Any] = Field(default_factory=dict)


class StudySpec(Settings):
    """A study as its user asked for it. One of `arms`, `grid` and `preset` says what is compared."""

    name: Name
    model: str | None = None
    training_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    task: TaskSettings = TaskSettings()
    seeds: Annotated[list[Seed], Field(min_length=1, max_length=MAX_SEEDS)] = Field(default=[1, 2, 3])
    #: What a grid varies, and what arms change that bring no method of their own.
    method: Method = Method()
    arms: Annotated[list[ArmSpec], Field(min_length=1, max_length=MAX_ARMS)] | None = None
    #: `{"reft.layers": [10, 15], "reft.rank": [2, 4]}`: every combination is an arm.
    grid: dict[str, list[Any]] | None = None
    #: So many of the grid's combinations, drawn at random by the first seed, instead of all.
    budget: Annotated[int, Field(ge=1, le=MAX_ARMS)] | None = None
    preset: presets.Preset | None = None
    #: Of a preset's epochs: 0.3 makes 6 of 20 and 1 of 3.
    epochs_scale: Annotated[float, Field(gt=0, le=10)] | None = None
    #: The arm that all others are compared with. Without one every pair is compared.
    baseline: str | None = None
    early_stopping: EarlyStopping | None = None
    max_length: Annotated[int, Field(ge=16, le=1_048_576)] | None = None
    dtype: Dtype = "auto"
    reuse: bool = True

    @field_validator("seeds")
    @classmethod
    def _each_seed_once(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError("each seed once")
        return value

    @field_validator("grid")
    @classmethod
    def _grid_has_values(cls, value: dict[str, list[Any]] | None) -> dict[str, list[Any]] | None:
        if value is not None and not value:
            raise ValueError("an empty grid has no arms")
        return value

    @model_validator(mode="after")
    def _one_source_of_arms(self) -> StudySpec:
        given = [name for name in ("arms", "grid", "preset") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of arms, grid and preset, not {' and '.join(given) or 'none'}")
        if self.epochs_scale is not None and self.preset is None:
            raise ValueError("epochs_scale belongs to a preset")
        if self.budget is not None and self.grid is None:
            raise ValueError("budget belongs to a grid")
        return self

    def completed(self) -> StudySpec:
        """With the preset's own model and files where none are given. Raises InvalidRequest where some are missing."""
        values = self.model_dump(mode="json") | {
            name: value
            for name, value in presets.defaults(self.preset).items()
            if getattr(self, name) is None
        }
        for name in ("model", "training_file"):
            if values[name] is None:
                raise InvalidRequest(f"{name}: this is needed", param=name, code="missing")
        if values["test_file"] is None and values["validation_file"] is None:
            message = "arms are compared on rows: give a test_file (or a validation_file)"
            raise InvalidRequest(message, param="test_file", code="missing")
        return StudySpec.model_validate(values)


@dataclass(frozen=True, kw_only=True)
class BaseFacts:
    """What a worker has said of the base model."""

    n_layers: int
    hidden_size: int


@dataclass(frozen=True, kw_only=True)
class PlannedArm:
    name: str
    spec: TrainingSpec  #: with the first seed
    #: The arm whose arithmetic it shall take; its epochs are chosen, and its jobs made, when that is known.
    like: str | None = None

    def with_seed(self, seed: int) -> TrainingSpec:
        return self.spec.model_copy(update={"seed": seed})


def plan(spec: StudySpec, base: BaseFacts | None = None) -> list[PlannedArm]:
    """The arms of a completed spec. Raises InvalidRequest naming the field of the first one that can't be."""
    made = list(_arms(spec, base))
    arms = [PlannedArm(name=name, spec=_training_spec(spec, changes, where)) for name, changes, where in made]
    like = presets.likened(spec.preset, [arm.name for arm in arms])
    arms = [replace(arm, like=like.get(arm.name)) for arm in arms]
    _check_names([arm.name for arm in arms], spec)
    if len(arms) * len(spec.seeds) > MAX_JOBS:
        message = f"{len(arms)} arms with {len(spec.seeds)} seeds are more than {MAX_JOBS} jobs"
        raise InvalidRequest(message, param="seeds")
    if spec.baseline is None and len(arms) > MOST_PAIRWISE:
        message = f"more than {MOST_PAIRWISE} arms are compared with one of them: name it"
        raise InvalidRequest(message, param="baseline")
    if base is not None:
        for arm, (_, _, where) in zip(arms, made, strict=True):
            _check_fits(arm, base, where)
    return arms


# -- what the arms are ------------------------------------------------------------------------------------------------

#: A name, the arm's own part of the job, and how the request calls a path in it.
_Arm = tuple[str, dict[str, Any], "_Where"]


@dataclass(frozen=True, kw_only=True)
class _Where:
    """Which field of the request a fault in an arm's job is blamed on."""

    field: str = ""  #: of the arm, if it brings a method of its own
    changed: str = ""  #: of the settings that were changed
    settings: tuple[str, ...] = ()  #: those, dotted

    def of(self, path: str) -> str:
        for setting in self.settings:
            steps = setting.split(".")
            heads = [".".join(steps[:count]) for count in range(1, len(steps))]
            if f".{setting}." in f".{path}." or any(f".{path}".endswith(f".{head}") for head in heads):
                return f"{self.changed}.{setting}"
        return f"{self.field}.{path}" if self.field and path.startswith("method") else path


def _arms(spec: StudySpec, base: BaseFacts | None) -> Iterable[_Arm]:
    if spec.preset is not None:
        made = presets.arms(
            spec.preset, scale=spec.epochs_scale or 1.0, layers=base.n_layers if base else None
        )
        return [(name, {"method": method}, _Where()) for name, method in made]
    method = spec.method.model_dump(mode="json", exclude_none=True)
    if spec.grid is not None:
        return [
            (
                _label(point),
                _changed(method, point, "grid"),
                _Where(changed="grid", settings=tuple(point)),
            )
            for point in _points(spec)
        ]
    arms: list[_Arm] = []
    for index, arm in enumerate(spec.arms or []):
        own = method if arm.method is None else arm.method.model_dump(mode="json", exclude_none=True)
        field = f"arms[{index}]"
        where = _Where(
            field=field if arm.method is not None else "", changed=f"{field}.set", settings=tuple(arm.set)
        )
        arms.append((arm.name, _changed(own, arm.set, f"{field}.set"), where))
    return arms


def _points(spec: StudySpec) -> list[dict[str, Any]]:
    grid = spec.grid or {}
    for path, values in grid.items():
        if not values:
            raise InvalidRequest("an empty list has no values to try", param=f"grid.{path}")
    size = prod(len(values) for values in grid.values())
    if size > MOST_POINTS:
        message = f"a grid of {size:,} points is too large to draw from: at most {MOST_POINTS:,}"
        raise InvalidRequest(message, param="grid")
    if spec.budget is None and size > MAX_ARMS:
        message = (
            f"a grid of {size:,} arms needs a budget: so many of them, drawn at random, at most {MAX_ARMS}"
        )
        raise InvalidRequest(message, param="grid")
    chosen: Iterable[int] = range(size)
    if spec.budget is not None and spec.budget < size:
        chosen = sorted(random.Random(spec.seeds[0]).sample(range(size), spec.budget))
    return [_point(grid, number) for number in chosen]


def _point(grid: Mapping[str, list[Any]], number: int) -> dict[str, Any]:
    """The combination of this number; the last setting varies first."""
    found: dict[str, Any] = {}
    for path in reversed(list(grid)):
        number, index = divmod(number, len(grid[path]))
        found[path] = grid[path][index]
    return {path: found[path] for path in grid}


def _label(point: Mapping[str, Any]) -> str:
    return " ".join(f"{path}={value}" for path, value in point.items())[:100]


def _changed(method: dict[str, Any], settings: Mapping[str, Any], field: str) -> dict[str, Any]:
    """The method with dotted settings changed, `reft.rank` in its own block; and settings of the job beside it."""
    kind = method["type"]
    block: Any = _copy(method.get(kind, {}))
    changes: dict[str, Any] = {}
    for path, value in settings.items():
        first, *rest = path.split(".")
        if first in _JOB_SETTINGS:
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


# -- what can't be ----------------------------------------------------------------------------------------------------


def _training_spec(spec: StudySpec, changes: Mapping[str, Any], where: _Where) -> TrainingSpec:
    shared = ("model", "training_file", "validation_file", "test_file", "reuse", *_JOB_SETTINGS)
    values = {
        name: value
        for name, value in spec.model_dump(mode="json", include=set(shared)).items()
        if value is not None
    }
    task = spec.task.model_dump(mode="json")
    try:
        return TrainingSpec.model_validate({**values, "task": task, "seed": spec.seeds[0], **changes})
    except ValidationError as error:
        fault = error.errors()[0]
        path = ".".join(str(step) for step in fault["loc"])
        reason = "there is no such setting" if fault["type"] == "extra_forbidden" else fault["msg"]
        raise InvalidRequest(reason.removeprefix("Value error, "), param=where.of(path)) from None


def _check_names(names: list[str], spec: StudySpec) -> None:
    seen: set[str] = set()
    for index, name in enumerate(names):
        if name in seen:
            field = f"arms[{index}].name" if spec.arms is not None else "grid"
            raise InvalidRequest(f"two arms are called {name!r}", param=field)
        seen.add(name)
    if spec.baseline is not None and spec.baseline not in seen:
        raise InvalidRequest(f"no arm is called {spec.baseline!r}", param="baseline")


def _check_fits(arm: PlannedArm, base: BaseFacts, where: _Where) -> None:
    for stage in arm.spec.stages():
        layers = stage.layers if isinstance(stage.layers, list) else []
        if any(layer >= base.n_layers for layer in layers):
            message = f"arm {arm.name!r} names layer {max(layers)}, but the model has layers 0 to {base.n_layers - 1}"
            raise InvalidRequest(message, param=where.of(f"method.{stage.type}.layers"))
        if stage.type == "reft" and stage.rank > base.hidden_size:
            message = f"arm {arm.name!r}: the model's hidden states have {base.hidden_size} dimensions"
            raise InvalidRequest(message, param=where.of("method.reft.rank"))
