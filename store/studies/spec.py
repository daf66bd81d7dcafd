"""A study's settings as its user chose them: explicit arms, a grid, a search, or a preset.

Contradictions are refused here, invalid settings of arms in store.studies.plan.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from heft_engine.config.search_space import MAX_CHOICES, MAX_SETTINGS, Values
from heft_engine.config.train import BaseQuantization, Dtype, EarlyStopping, Settings, TaskSettings
from store.errors import InvalidRequest
from store.jobs.spec import Method, Reference
from store.storage.files import FILE_FIELDS
from store.studies import presets

#: Jobs are created in one transaction, while the request waits.
MAX_ARMS, MAX_SEEDS, MAX_JOBS = 200, 50, 300
MAX_TASKS = 20

#: Settings that one arm or a grid changes.
MAX_CHANGES = 100
#: Characters of one setting's value in JSON. A list of all layers of a large model has a few hundred.
MAX_VALUE_CHARS = 10_000


def _short(value: Any) -> Any:
    if len(json.dumps(value)) > MAX_VALUE_CHARS:
        raise ValueError(f"a setting's value may have at most {MAX_VALUE_CHARS:,} characters")
    return value


SettingName = Annotated[str, Field(max_length=200)]
SettingValue = Annotated[Any, AfterValidator(_short)]
Name = Annotated[str, Field(min_length=1, max_length=100)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]


class ArmSpec(Settings):
    """A method (default: the study's) with changed settings: `{"reft.layers": 10, "max_length": 256}`."""

    name: Name
    method: Method | None = None
    set: Annotated[dict[SettingName, SettingValue], Field(max_length=MAX_CHANGES)] = Field(
        default_factory=dict
    )


class SearchSpec(Settings):
    """A search: trials of the study's method, suggested from the results of earlier ones on the validation rows."""

    #: `{"reft.rank": [2, 4, 8], "reft.learning_rate": {"low": 1e-5, "high": 1e-3, "log": true}}`
    space: Annotated[dict[SettingName, Values], Field(min_length=1, max_length=MAX_SETTINGS)]
    #: The number of trials, each with every seed.
    budget: Annotated[int, Field(ge=1, le=MAX_ARMS)]
    sampler: Literal["tpe", "random"] = "tpe"
    #: Trials at a time. A trial is suggested without the results of those beside it.
    parallel: Annotated[int, Field(ge=1, le=50)] = 2


class DataSpec(Settings):
    """One of several tasks with the same methods: its files and its task settings."""

    name: Annotated[str, Field(min_length=1, max_length=60)]
    training_file: Reference
    validation_file: Reference | None = None
    test_file: Reference | None = None
    #: None: the study's.
    task: TaskSettings | None = None


class StudySpec(Settings):
    """A study's settings. Exactly one of `arms`, `grid`, `search` and `preset` defines its arms."""

    name: Name
    model: Reference | None = None
    training_file: Reference | None = None
    validation_file: Reference | None = None
    test_file: Reference | None = None
    task: TaskSettings = TaskSettings()
    seeds: Annotated[list[Seed], Field(min_length=1, max_length=MAX_SEEDS)] = Field(default=[1, 2, 3])
    #: The method that a grid or a search varies, and that of arms without their own.
    method: Method = Method()
    arms: Annotated[list[ArmSpec], Field(min_length=1, max_length=MAX_ARMS, fail_fast=True)] | None = None
    #: `{"reft.layers": [10, 15], "reft.rank": [2, 4]}`: each combination is an arm.
    grid: (
        Annotated[
            dict[SettingName, Annotated[list[SettingValue], Field(max_length=MAX_CHOICES)]],
            Field(max_length=MAX_CHANGES),
        ]
        | None
    ) = None
    #: So many combinations of the grid, drawn at random with the first seed, instead of all.
    budget: Annotated[int, Field(ge=1, le=MAX_ARMS)] | None = None
    search: SearchSpec | None = None
    preset: presets.Preset | None = None
    #: A factor of the preset's epochs: 0.3 makes 6 of 20 and 1 of 3.
    epochs_scale: Annotated[float, Field(gt=0, le=10)] | None = None
    #: The tasks of cross_task.
    tasks: Annotated[list[DataSpec], Field(min_length=2, max_length=MAX_TASKS)] | None = None
    #: The arm that all others are compared with; without it all pairs are. In a search: the name of an added arm with
    #: the study's method unchanged, which the best trial is compared with. With cross_task: one of the methods.
    baseline: Name | None = None
    early_stopping: EarlyStopping | None = None
    max_length: Annotated[int, Field(ge=16, le=1_048_576)] | None = None
    dtype: Dtype = "auto"
    base_quantization: BaseQuantization | None = Field(default=None, exclude_if=lambda value: value is None)
    reuse: bool = True

    @field_validator("seeds")
    @classmethod
    def _unique_seeds(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError("seeds must be unique")
        return value

    @field_validator("grid")
    @classmethod
    def _grid_has_values(cls, value: dict[str, list[Any]] | None) -> dict[str, list[Any]] | None:
        if value is not None and not value:
            raise ValueError("grid must not be empty")
        return value

    @model_validator(mode="after")
    def _one_source_of_arms(self) -> StudySpec:
        sources = [name for name in ("arms", "grid", "search", "preset") if getattr(self, name) is not None]
        if len(sources) != 1:
            field = sources[-1] if sources else "arms"
            reason = (
                f"set exactly one of arms, grid, search and preset, not {' and '.join(sources) or 'none'}"
            )
            raise _field_error(field, reason)
        if self.epochs_scale is not None and self.preset is None:
            raise _field_error("epochs_scale", "epochs_scale can only be set with a preset")
        if self.budget is not None and self.grid is None:
            raise _field_error("budget", "budget can only be set with a grid; a search has its own")
        return self

    @model_validator(mode="after")
    def _tasks_belong_to_cross_task(self) -> StudySpec:
        if self.preset != "cross_task":
            if self.tasks is not None:
                raise _field_error("tasks", "tasks can only be set with the preset cross_task")
            return self
        if self.tasks is None:
            raise _field_error("tasks", "cross_task needs at least two tasks")
        for field in FILE_FIELDS:
            if getattr(self, field) is not None:
                raise _field_error(field, f"with cross_task, set {field} in each of the tasks")
        names = [task.name for task in self.tasks]
        for index, name in enumerate(names):
            if name in names[:index]:
                reason = f"names of tasks must be unique: {name!r} is there twice"
                raise _field_error(f"tasks[{index}].name", reason)
        return self

    def completed(self) -> StudySpec:
        """Returns the spec with the preset's defaults. Raises InvalidRequest for a missing model or file."""
        defaults = presets.defaults(self.preset)
        values = self.model_dump(mode="json")
        values |= {name: value for name, value in defaults.items() if values[name] is None}
        _require(values, "model")
        for index, task in enumerate(values["tasks"] or []):
            _require_scored_rows(task, f"tasks[{index}].")
        if self.tasks is None:
            _require(values, "training_file")
            _require_scored_rows(values, "")
        if self.search is not None:
            _require_search_files(values)
        return StudySpec.model_validate(values)


def _field_error(field: str, reason: str) -> PydanticCustomError:
    """Returns a validation error of the whole request that names one field."""
    return PydanticCustomError("misplaced", "{reason}", {"path": field, "reason": reason})


def _require(values: dict[str, Any], name: str) -> None:
    if values[name] is None:
        raise InvalidRequest(f"{name} is required", param=name, code="missing")


def _require_scored_rows(values: dict[str, Any], prefix: str) -> None:
    if values["test_file"] is None and values["validation_file"] is None:
        message = "arms are compared on held-out rows: set a test_file or a validation_file"
        raise InvalidRequest(message, param=f"{prefix}test_file", code="missing")


def _require_search_files(values: dict[str, Any]) -> None:
    """Raises InvalidRequest unless both files are set: results on the rows that a search chooses by are biased."""
    for name in ("validation_file", "test_file"):
        if values[name] is None:
            message = "a search chooses by the validation_file and reports on the test_file: set both"
            raise InvalidRequest(message, param=name, code="missing")
    if values["test_file"] == values["validation_file"]:
        message = "a search must report on other rows than it chooses by: set a different test_file"
        raise InvalidRequest(message, param="test_file")
