"""What the user chose for a job, with bounds, as it is stored in JSON.

The stage settings themselves (rank, layers, learning rate, …) are defined once, in `heft_engine.config.train`,
which imports no torch. This module adds what belongs to the service: files, the method as OpenAI's API writes
it, and how that becomes an ordered list of stages.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from heft_engine.config import known_datasets
from heft_engine.config.train import (
    Auto,
    Dtype,
    EarlyStopping,
    LoraStage,
    MethodType,
    ReftStage,
    Settings,
    Stage,
    TaskSettings,
    recipe,
)
from store.errors import InvalidRequest

FILE_FIELDS = ("training_file", "validation_file", "test_file")

#: An alias (`smollm2-135m`), a folder inside HEFT_MODEL_DIR, or a hub id; never a free path (MLflow fell to
#: this six times).
MODEL_REFERENCE = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?(@[A-Za-z0-9._-]{1,64})?"
)
FILE_REFERENCE = re.compile(
    r"file-[A-Za-z0-9_-]{1,64}"
    r"|hub:[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?(:[A-Za-z0-9._\[\]:%+-]{1,64})?"
    r"|sample:[a-z0-9_-]{1,64}(:[a-z]{1,16})?"
)


class Stages(Settings):
    """The settings block of a named method: how its LoRA and its ReFT stages are trained."""

    lora: LoraStage = LoraStage()
    reft: ReftStage = ReftStage()


class RecipeStages(Settings):
    stages: Annotated[list[Stage], Field(min_length=1, max_length=16)]


class Hyperparameters(Settings):
    """OpenAI's three, for callers who know nothing of stages: they go to every stage."""

    n_epochs: Annotated[int, Field(ge=1, le=1_000)] | Auto = "auto"
    batch_size: Annotated[int, Field(ge=1, le=4_096)] | Auto = "auto"
    learning_rate_multiplier: Annotated[float, Field(gt=0, le=1_000)] | Auto = "auto"

    def overrides(self) -> dict[str, Any]:
        return {name: value for name, value in self if value != "auto"}


class Supervised(Settings):
    hyperparameters: Hyperparameters = Hyperparameters()


class Method(Settings):
    """`{"type": "heft", "heft": {…}}`: the type, and that type's settings under its own name."""

    type: Literal["heft", "lora", "reft", "heft_reversed", "heft_interleaved", "recipe", "supervised"] = (
        "heft"
    )
    heft: Stages | None = None
    lora: LoraStage | None = None
    reft: ReftStage | None = None
    heft_reversed: Stages | None = None
    heft_interleaved: Stages | None = None
    recipe: RecipeStages | None = None
    supervised: Supervised | None = None

    @model_validator(mode="after")
    def _settings_of_its_own_type(self) -> Method:
        for name in type(self).model_fields:
            if name not in ("type", self.type) and getattr(self, name) is not None:
                raise ValueError(f"method.{name} does not belong to a method of type {self.type!r}")
        if self.type == "recipe" and self.recipe is None:
            raise ValueError("method.recipe.stages is needed: the list of stages to train, in order")
        return self

    def engine_method(self) -> MethodType:
        return "heft" if self.type == "supervised" else self.type

    def stages(self) -> list[Stage]:
        """The stages in order, every default filled in."""
        if self.type == "recipe":
            assert self.recipe is not None
            return list(self.recipe.stages)
        if self.type == "supervised":
            overrides = (self.supervised or Supervised()).hyperparameters.overrides()
            return recipe("heft", LoraStage(**overrides), ReftStage(**overrides))
        if self.type in ("lora", "reft"):
            return recipe(self.type, self.lora, self.reft)
        block: Stages = getattr(self, self.type) or Stages()
        return recipe(self.type, block.lora, block.reft)


class TrainingSpec(Settings):
    """A job as its user asked for it. Stored whole; `worker.jobs.run_file` turns it into the engine's TrainConfig."""

    model: Annotated[str, Field(min_length=1, max_length=200)]
    training_file: str
    validation_file: str | None = None
    test_file: str | None = None
    suffix: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)]
    method: Method = Method()
    task: TaskSettings = TaskSettings()
    early_stopping: EarlyStopping | None = None
    max_length: Annotated[int, Field(ge=16, le=1_048_576)] | None = None
    dtype: Dtype = "auto"
    #: Whether to start after stages that an equal job of this owner has trained, and to leave this job's own to others.
    reuse: bool = True

    @field_validator("model")
    @classmethod
    def _model_reference(cls, value: str) -> str:
        if not MODEL_REFERENCE.fullmatch(value) or ".." in value:
            raise ValueError(
                "a model is an alias, a folder of the operator's model directory, or a hub id org/name;"
                " not a path or an address"
            )
        return value

    @field_validator(*FILE_FIELDS)
    @classmethod
    def _file_reference(cls, value: str | None) -> str | None:
        if value is not None and not FILE_REFERENCE.fullmatch(value):
            raise ValueError(
                "a file is an uploaded file's id (file-…), hub:<dataset>[:<config>][:<split>] or"
                " sample:<name>[:<split>]"
            )
        return value

    def stages(self) -> list[Stage]:
        return self.method.stages()


def check_known_datasets(spec: TrainingSpec) -> None:
    """Raises InvalidRequest naming the file or the part of the task that a well-known dataset's name shows to be wrong.

    Not a validator of TrainingSpec: jobs that were stored before a dataset was known must still be read.
    """
    try:
        for field in FILE_FIELDS:
            source, _, dataset = (getattr(spec, field) or "").partition(":")
            if source == "hub":
                known_datasets.parse_reference(dataset, field)
        known_datasets.with_dataset_defaults(spec.task, spec.training_file)
    except known_datasets.DatasetError as fault:
        raise InvalidRequest(str(fault), param=fault.param) from fault
