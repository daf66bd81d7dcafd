"""A job's settings as its user chose them and as they are stored in JSON.

The settings of stages (rank, layers, learning rate, …) are defined in `heft_engine.config.train`. This module adds
those of the service: files, the method in the form of OpenAI's API, and the list of stages that it stands for.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from heft_engine.config import known_datasets
from heft_engine.config.run_file import FileField
from heft_engine.config.train import (
    Auto,
    BaseQuantization,
    Dtype,
    EarlyStopping,
    LoraStage,
    MethodType,
    ReftStage,
    Settings,
    Stage,
    StoppingMetric,
    TaskSettings,
    recipe,
)
from store.errors import InvalidRequest
from store.ids import base_of, is_fine_tuned
from store.settings import INTEGRATIONS, IntegrationType
from store.storage.files import FILE_FIELDS

#: An alias (`smollm2-135m`), a folder inside HEFT_MODEL_DIR, or a hub id; never a path, which could leave that folder.
MODEL_REFERENCE = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?(@[A-Za-z0-9._-]{1,64})?"
)
FILE_REFERENCE = re.compile(
    r"file-[A-Za-z0-9_-]{1,64}"
    r"|hub:[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?(:[A-Za-z0-9._\[\]:%+-]{1,64})?"
    r"|sample:[a-z0-9_-]{1,64}(:[a-z]{1,16})?"
)

#: Part of paths and filters.
_TRACKER_NAME = r"^[A-Za-z0-9][A-Za-z0-9._ -]{0,127}$"

Reference = Annotated[str, Field(max_length=300)]

#: Epochs of all stages of a job together.
MAX_JOB_EPOCHS = 2_000


class Stages(Settings):
    """The settings of a method that is made of LoRA and ReFT stages."""

    lora: LoraStage = LoraStage()
    reft: ReftStage = ReftStage()


class RecipeStages(Settings):
    stages: Annotated[list[Stage], Field(min_length=1, max_length=16)]


class Hyperparameters(Settings):
    """OpenAI's three hyperparameters, which apply to every stage."""

    n_epochs: Annotated[int, Field(ge=1, le=1_000)] | Auto = "auto"
    batch_size: Annotated[int, Field(ge=1, le=4_096)] | Auto = "auto"
    learning_rate_multiplier: Annotated[float, Field(gt=0, le=1_000)] | Auto = "auto"

    def overrides(self) -> dict[str, Any]:
        """Returns the values that are not "auto"."""
        return {name: value for name, value in self if value != "auto"}


class Supervised(Settings):
    hyperparameters: Hyperparameters = Hyperparameters()


class Method(Settings):
    """A method in OpenAI's form: its type, and that type's settings under its name (`{"type": "heft", "heft":
    {…}}`).
    """

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
            raise ValueError("method.recipe.stages is required: the stages to train, in order")
        return self

    def engine_method(self) -> MethodType:
        """Returns the engine's name of this method: OpenAI's `supervised` is `heft`."""
        return "heft" if self.type == "supervised" else self.type

    def stages(self) -> list[Stage]:
        """Returns the stages in order, with all defaults."""
        if self.type == "recipe":
            assert self.recipe is not None
            return list(self.recipe.stages)
        if self.type == "supervised":
            overrides = (self.supervised or Supervised()).hyperparameters.overrides()
            return recipe("heft", LoraStage(**overrides), ReftStage(**overrides))
        if self.type in ("lora", "reft"):
            return recipe(self.type, self.lora, self.reft)
        settings: Stages = getattr(self, self.type) or Stages()
        return recipe(self.type, settings.lora, settings.reft)


class TrackerSettings(Settings):
    """The settings of an integration: where its run appears."""

    project: Annotated[str, Field(pattern=_TRACKER_NAME)]
    name: Annotated[str, Field(pattern=_TRACKER_NAME)] | None = None  #: None: the job's id
    entity: Annotated[str, Field(pattern=_TRACKER_NAME)] | None = None  #: of wandb
    tags: Annotated[list[Annotated[str, Field(pattern=_TRACKER_NAME)]], Field(max_length=16)] = Field(
        default_factory=list
    )


class Integration(Settings):
    """A tracker that gets the job's metrics, in OpenAI's form: `{"type": "wandb", "wandb": {"project": …}}`."""

    type: IntegrationType
    wandb: TrackerSettings | None = None
    mlflow: TrackerSettings | None = None
    trackio: TrackerSettings | None = None
    tensorboard: TrackerSettings | None = None

    @model_validator(mode="after")
    def _settings_of_its_own_type(self) -> Integration:
        for name in INTEGRATIONS:
            if (name == self.type) != (getattr(self, name) is not None):
                raise ValueError(
                    f"an integration of type {self.type!r} needs the field {self.type}, and no other"
                )
        return self

    def settings(self) -> TrackerSettings:
        settings = getattr(self, self.type)
        assert isinstance(settings, TrackerSettings)
        return settings


class TrainingSpec(Settings):
    """A job's settings. `worker.jobs.run_file` makes the engine's TrainConfig of them."""

    #: A base, or a fine-tuned model of this owner's or a checkpoint of one, which the job goes on from.
    model: Annotated[str, Field(min_length=1, max_length=300)]
    training_file: Reference
    validation_file: Reference | None = None
    test_file: Reference | None = None
    suffix: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)]
    method: Method = Method()
    task: TaskSettings = TaskSettings()
    early_stopping: EarlyStopping | None = None
    max_length: Annotated[int, Field(ge=16, le=1_048_576)] | None = None
    dtype: Dtype = "auto"
    #: Models at the ends of epochs that are kept beside those at the ends of stages: the newest, and the best one.
    n_checkpoints: Annotated[int, Field(ge=0, le=100)] = 3
    integrations: Annotated[list[Integration], Field(max_length=4)] = Field(default_factory=list)
    base_quantization: BaseQuantization | None = Field(default=None, exclude_if=lambda value: value is None)
    #: Start from stage results of this owner's jobs with equal settings, and store this job's for others.
    reuse: bool = True
    #: Ends when its files have been checked, with an estimate of what training would take.
    dry_run: bool = Field(default=False, exclude_if=lambda value: not value)

    @field_validator("model")
    @classmethod
    def _model_reference(cls, value: str) -> str:
        if is_fine_tuned(value):
            return value  # looked up when the job is created (store.jobs.start_models)
        if not MODEL_REFERENCE.fullmatch(value) or ".." in value:
            raise ValueError(
                "a model must be an alias, a folder of the operator's model directory, a hub id org/name, or the id"
                " of a fine-tuned model or checkpoint (ft:…); paths and URLs are not accepted"
            )
        return value

    @property
    def goes_on(self) -> bool:
        """True if the job goes on from a fine-tuned model."""
        return is_fine_tuned(self.model)

    @property
    def base_model(self) -> str:
        """The base of `model`."""
        return base_of(self.model)

    @field_validator(*FILE_FIELDS)
    @classmethod
    def _file_reference(cls, value: str | None) -> str | None:
        if value is not None and not FILE_REFERENCE.fullmatch(value):
            raise ValueError(
                "a file must be an uploaded file's id (file-…), hub:<dataset>[:<config>][:<split>] or"
                " sample:<name>[:<split>]"
            )
        return value

    @property
    def best_by(self) -> StoppingMetric | None:
        """The metric that early stopping goes by; None without early stopping."""
        return None if self.early_stopping is None else self.early_stopping.metric

    def stages(self) -> list[Stage]:
        """Returns the stages in order, with all defaults."""
        return self.method.stages()

    def stage_label(self, stage: str, index: int | None) -> str:
        """Returns `lora`; `lora-3` for the third stage of a recipe with more than one of that type."""
        is_only = sum(settings.type == stage for settings in self.stages()) <= 1
        return stage if is_only or index is None else f"{stage}-{index + 1}"

    def files(self) -> dict[FileField, str]:
        """Returns {field: reference} of the files that are set."""
        return {field: value for field in FILE_FIELDS if (value := getattr(self, field)) is not None}


def check_new(spec: TrainingSpec) -> None:
    """Checks the number of epochs, and hub datasets and the task against what is known of well-known datasets.

    Raises InvalidRequest naming the field. This is no validator of TrainingSpec: jobs that were stored before must
    still load.
    """
    epochs = sum(stage.n_epochs for stage in spec.stages())
    if epochs > MAX_JOB_EPOCHS:
        message = f"all stages together have {epochs:,} epochs: a job may have at most {MAX_JOB_EPOCHS:,}"
        raise InvalidRequest(message, param="method")
    try:
        for field, reference in spec.files().items():
            source, _, dataset = reference.partition(":")
            if source == "hub":
                known_datasets.parse_reference(dataset, field)
        known_datasets.with_dataset_defaults(spec.task, spec.training_file)
    except known_datasets.DatasetError as fault:
        raise InvalidRequest(str(fault), param=fault.param) from fault
