"""What the user asked a study for: its arms written out, a grid, a search, or a preset.

What contradicts itself is refused here by its field; what arms come of it, and which of them can't be, is study_plan's.
It does NOT know the database.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from heft_engine.config.search_space import MAX_SETTINGS, Values
from heft_engine.config.train import Dtype, EarlyStopping, Settings, TaskSettings
from store.errors import InvalidRequest
from store.jobs.spec import Method
from store.studies import presets

#: Jobs: they are made in one transaction, while their user waits.
MAX_ARMS, MAX_SEEDS, MAX_JOBS = 200, 50, 300
MAX_TASKS = 20
FILES = ("training_file", "validation_file", "test_file")

Name = Annotated[str, Field(min_length=1, max_length=100)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]


class ArmSpec(Settings):
    """A method, or the study's own with some settings changed: `{"reft.layers": 10, "max_length": 256}`."""

    name: Name
    method: Method | None = None
    set: dict[str, Any] = Field(default_factory=dict)


class SearchSpec(Settings):
    """Trials of the study's method, each chosen by what those before it came to on the validation rows."""

    #: `{"reft.rank": [2, 4, 8], "reft.learning_rate": {"low": 1e-5, "high": 1e-3, "log": true}}`
    space: Annotated[dict[str, Values], Field(min_length=1, max_length=MAX_SETTINGS)]
    #: So many trials, each with every seed.
    budget: Annotated[int, Field(ge=1, le=MAX_ARMS)]
    sampler: Literal["tpe", "random"] = "tpe"
    #: So many at a time. What runs beside each other can't learn from each other.
    parallel: Annotated[int, Field(ge=1, le=50)] = 2


class DataSpec(Settings):
    """One of several tasks that the same methods are run on: its rows, and what is asked of them."""

    name: Annotated[str, Field(min_length=1, max_length=60)]
    training_file: str
    validation_file: str | None = None
    test_file: str | None = None
    #: None: the study's.
    task: TaskSettings | None = None


class StudySpec(Settings):
    """A study as its user asked for it. One of `arms`, `grid`, `search` and `preset` says what is compared."""

    name: Name
    model: str | None = None
    training_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    task: TaskSettings = TaskSettings()
    seeds: Annotated[list[Seed], Field(min_length=1, max_length=MAX_SEEDS)] = Field(default=[1, 2, 3])
    #: What a grid or a search varies, and what arms change that bring no method of their own.
    method: Method = Method()
    arms: Annotated[list[ArmSpec], Field(min_length=1, max_length=MAX_ARMS)] | None = None
    #: `{"reft.layers": [10, 15], "reft.rank": [2, 4]}`: every combination is an arm.
    grid: dict[str, list[Any]] | None = None
    #: So many of the grid's combinations, drawn at random by the first seed, instead of all.
    budget: Annotated[int, Field(ge=1, le=MAX_ARMS)] | None = None
    search: SearchSpec | None = None
    preset: presets.Preset | None = None
    #: Of a preset's epochs: 0.3 makes 6 of 20 and 1 of 3.
    epochs_scale: Annotated[float, Field(gt=0, le=10)] | None = None
    #: What cross_task runs its methods on.
    tasks: Annotated[list[DataSpec], Field(min_length=2, max_length=MAX_TASKS)] | None = None
    #: The arm that all others are compared with. Without one every pair is compared. In a search: the name of an arm
    #: that has the method as it is, which the best trial is compared with. With cross_task: one of the methods.
    baseline: Name | None = None
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
        given = [name for name in ("arms", "grid", "search", "preset") if getattr(self, name) is not None]
        if len(given) != 1:
            told = " and ".join(given) or "none"
            field = given[-1] if given else "arms"
            raise _misplaced(field, f"give one of arms, grid, search and preset, not {told}")
        if self.epochs_scale is not None and self.preset is None:
            raise _misplaced("epochs_scale", "epochs_scale belongs to a preset")
        if self.budget is not None and self.grid is None:
            raise _misplaced("budget", "this budget belongs to a grid; a search has its own")
        return self

    @model_validator(mode="after")
    def _tasks_belong_to_cross_task(self) -> StudySpec:
        if self.preset != "cross_task":
            if self.tasks is not None:
                raise _misplaced("tasks", "tasks belong to the preset cross_task")
            return self
        if self.tasks is None:
            raise _misplaced("tasks", "cross_task needs two tasks or more")
        for name in FILES:
            if getattr(self, name) is not None:
                raise _misplaced(name, "each of the tasks names its own files")
        names = [task.name for task in self.tasks]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise _misplaced(f"tasks[{index}].name", f"two tasks are called {name!r}")
        return self

    def completed(self) -> StudySpec:
        """With the preset's own model and files where none are given. Raises InvalidRequest where some are missing."""
        values = self.model_dump(mode="json") | {
            name: value
            for name, value in presets.defaults(self.preset).items()
            if getattr(self, name) is None
        }
        _needs(values, "model")
        for index, task in enumerate(values["tasks"] or []):
            _rows_to_compare_on(task, f"tasks[{index}].")
        if self.tasks is None:
            _needs(values, "training_file")
            _rows_to_compare_on(values, "")
        if self.search is not None:
            _rows_to_choose_by(values)
        return StudySpec.model_validate(values)


def _misplaced(field: str, reason: str) -> PydanticCustomError:
    """A fault of the whole request, blamed on one field of it."""
    return PydanticCustomError("misplaced", "{reason}", {"path": field, "reason": reason})


def _needs(values: dict[str, Any], name: str) -> None:
    if values[name] is None:
        raise InvalidRequest(f"{name}: this is needed", param=name, code="missing")


def _rows_to_compare_on(values: dict[str, Any], where: str) -> None:
    if values["test_file"] is None and values["validation_file"] is None:
        message = "arms are compared on rows: give a test_file (or a validation_file)"
        raise InvalidRequest(message, param=f"{where}test_file", code="missing")


def _rows_to_choose_by(values: dict[str, Any]) -> None:
    """A search needs both files: rows that it has chosen by say nothing fair of what it found."""
    for name in ("validation_file", "test_file"):
        if values[name] is None:
            message = "a search chooses by the validation_file and reports on the test_file: it needs both"
            raise InvalidRequest(message, param=name, code="missing")
    if values["test_file"] == values["validation_file"]:
        message = "a search reports on rows that it has not chosen by: give another test_file"
        raise InvalidRequest(message, param="test_file")
