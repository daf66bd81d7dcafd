"""The configuration of a training run: base model, task, an ordered list of stages, and the settings of each.

The names are those of the REST API and of `--set`: `lora.rank`, `reft.layers`, `lora.n_epochs`, … Only what needs no
model is validated here; the run finds out whether layer 40 exists.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from heft_engine.config.metric_names import MetricName, TaskType, metrics_error

Auto = Literal["auto"]
Scheduler = Literal["linear", "cosine", "constant"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
BaseQuantization = Literal["nf4"]
LoraInit = Literal["default", "pissa", "pissa_niter_4", "pissa_niter_16", "olora"]
InterventionKind = Literal["loreft", "direft", "consreft", "lobireft", "noreft", "nodireft"]
InterventionInit = Literal["previous", "new"]
StoppingMetric = Literal["valid_loss", "valid_mean_token_accuracy", "valid_accuracy"]
MethodType = Literal["heft", "lora", "reft", "heft_reversed", "heft_interleaved", "recipe"]

MAX_LAYER = 1_000
MAX_STAGES = 16
#: Tokens of a row when neither the user nor the model says otherwise.
DEFAULT_MAX_LENGTH = 2_048
#: A longer line of a JSONL file is refused.
MAX_LINE_BYTES = 8 * 1024**2


class Settings(BaseModel):
    """Base of every settings class: immutable, and an unknown name is an error rather than a silent typo."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SupervisedSettings(Settings):
    """Cross-entropy on the tokens of the right answer."""

    type: Literal["supervised"] = "supervised"


#: What a stage can be trained for; heft_engine.objectives implements each.
ObjectiveSettings = SupervisedSettings


class StageSettings(Settings):
    """Settings that LoRA and ReFT stages share: epochs, batches, optimiser and objective."""

    n_epochs: Annotated[int, Field(ge=1, le=1_000)] = 3
    learning_rate: Annotated[float, Field(gt=0, le=1)] | Auto = "auto"
    #: Multiplies the automatic learning rate; not allowed together with a numeric `learning_rate`.
    learning_rate_multiplier: Annotated[float, Field(gt=0, le=1_000)] = 1.0
    #: Rows of one optimiser step, over all its micro-batches.
    batch_size: Annotated[int, Field(ge=1, le=4_096)] = 16
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.05
    scheduler: Scheduler = "linear"
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0, le=1_000)] = 1.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    #: What the stage is trained for. Dumps leave the default out, as stored settings always did.
    objective: ObjectiveSettings = Field(
        default=SupervisedSettings(), exclude_if=lambda objective: objective == SupervisedSettings()
    )

    @field_validator("n_epochs", "batch_size", "learning_rate_multiplier", mode="before")
    @classmethod
    def _auto_is_the_default(cls, value: Any, info: ValidationInfo) -> Any:
        return cls.model_fields[str(info.field_name)].default if value == "auto" else value

    @field_validator("layers", mode="before", check_fields=False)
    @classmethod
    def _layers_as_list(cls, value: Any) -> Any:
        """Accepts a bare integer for a single layer."""
        return [value] if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _one_learning_rate(self) -> StageSettings:
        if self.learning_rate != "auto" and self.learning_rate_multiplier != 1.0:
            raise ValueError("set learning_rate to a number or learning_rate_multiplier, not both")
        return self


Layer = Annotated[int, Field(ge=0, le=MAX_LAYER)]


class MergeSettings(Settings):
    """Changes to a trained adapter before it is merged."""

    #: Factor for the singular values of intruder dimensions (arXiv 2410.21228); None merges the adapter as trained.
    intruder_scale: Annotated[float, Field(ge=0, le=1)] | None = None


class LoraStage(StageSettings):
    """Stage 1: ΔW = (alpha/rank)·B·A on the target projections (arXiv 2106.09685), merged when the stage ends.

    Variants have peft's names. Each is saved as LoRA or DoRA relative to the weights before the stage.
    """

    type: Literal["lora"] = "lora"
    rank: Annotated[int, Field(ge=1, le=1_024)] = 8
    alpha: Annotated[float, Field(gt=0, le=65_536)] = 32
    #: "auto": the query and value projections, under the model family's names.
    target_modules: Annotated[list[str], Field(min_length=1, max_length=64)] | Auto = "auto"
    #: Layers with an adapter; None: all.
    layers: Annotated[list[Layer], Field(min_length=1, max_length=MAX_LAYER)] | None = None
    #: Rank-stabilised: ΔW = (alpha/√rank)·B·A (arXiv 2312.03732).
    use_rslora: bool = False
    #: A trained magnitude for each output row beside the low-rank direction (DoRA, arXiv 2402.09353).
    use_dora: bool = False
    #: Initial A and B. "default": random A and B = 0, so ΔW = 0. "pissa": the weight's largest singular values and
    #: vectors (arXiv 2404.02948); "pissa_niter_4" computes them by a faster randomised SVD. "olora": the weight's QR
    #: decomposition (arXiv 2406.01775). The weight keeps the residual, so the initial model is unchanged.
    init: LoraInit = "default"
    merge: MergeSettings = MergeSettings()

    @property
    def scaling(self) -> float:
        """The factor of B·A."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @model_validator(mode="after")
    def _no_dropout_with_pissa_or_olora(self) -> LoraStage:
        if self.init != "default" and self.dropout > 0:
            message = "dropout must be 0 with init pissa or olora: it would drop the largest part of the weight itself"
            raise ValueError(message)
        return self


class ReftStage(StageSettings):
    """Stage 2: ReFT on the frozen, merged model of the earlier stages; LoReFT: Φ(h) = h + Rᵀ(Wh + b − Rh).

    arXiv 2404.03592; heft_engine.adapters.reft has the formulas of the other kinds. They have pyreft's names.
    """

    type: Literal["reft"] = "reft"
    #: "auto": the HEFT paper's relative depth, layer 15 of 32, so round(15/32 · n_layers).
    layers: Annotated[list[Layer], Field(min_length=1, max_length=MAX_LAYER)] | Auto = "auto"
    rank: Annotated[int, Field(ge=1, le=1_024)] = 4
    positions: str = "l1"
    kind: InterventionKind = "loreft"
    #: "previous": go on with the intervention of an earlier stage, or of the model that the run started from, where it
    #: has the same layer, positions, kind and rank. "new": leave it as it is, and train another one after it. Dumps
    #: leave the default out, as stored settings always did.
    init: InterventionInit = Field(default="previous", exclude_if=lambda init: init == "previous")

    @field_validator("layers")
    @classmethod
    def _unique_sorted_layers(cls, value: Any) -> Any:
        if isinstance(value, list) and len(set(value)) != len(value):
            raise ValueError("layers must be unique")
        return sorted(value) if isinstance(value, list) else value

    @field_validator("positions")
    @classmethod
    def _valid_positions(cls, value: str) -> str:
        parse_positions(value)
        return value


Stage = Annotated[LoraStage | ReftStage, Field(discriminator="type")]


class TaskSettings(Settings):
    """The task. Type and template are inferred from the rows if they are None."""

    type: TaskType | None = None
    #: `choice` only: the labels of rows without choices of their own.
    labels: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=200)]], Field(min_length=2, max_length=100)
        ]
        | None
    ) = None
    #: The prompt, with {question}, {passage}, {choices} or {prompt}; see heft_engine.data.encoding.
    template: Annotated[str, Field(min_length=1, max_length=20_000)] | None = None
    #: All are reported, and the first is the primary one. None: the task's default (heft_engine.config.metric_names).
    metrics: Annotated[list[MetricName], Field(min_length=1, max_length=8)] | None = None

    @field_validator("metrics")
    @classmethod
    def _metrics_fit(cls, value: list[MetricName] | None, info: ValidationInfo) -> list[MetricName] | None:
        kind: TaskType | None = info.data.get("type") or ("choice" if info.data.get("labels") else None)
        if value is not None and (reason := metrics_error(value, kind)):
            raise ValueError(reason)
        return value

    @model_validator(mode="after")
    def _labels_belong_to_choice(self) -> TaskSettings:
        if self.labels is not None and self.type not in (None, "choice"):
            raise ValueError("labels belong to a task of type choice")
        if self.labels is not None and len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must differ from each other")
        return self


class EarlyStopping(Settings):
    """Ends a stage when a metric of the validation rows has not improved for `patience` epochs. Keeps the best."""

    patience: Annotated[int, Field(ge=1, le=100)] = 2
    #: valid_accuracy: the share of right answers, of tasks with labels. Of two epochs with the same accuracy the one
    #: with the lower loss is better.
    metric: StoppingMetric = "valid_loss"

    def task_error(self, task: TaskType) -> str | None:
        """Returns why a task can't have this metric, or None if it can."""
        if self.metric != "valid_accuracy" or task != "text":
            return None
        return "valid_accuracy is of tasks with labels: for text, stop by valid_loss or valid_mean_token_accuracy"


class TrainConfig(Settings):
    """One training run.

    `model` is a base: an alias (`smollm2-135m`), a directory, or a hub id (`org/name[@revision]`); or a fine-tuned
    model that the run goes on from: a bundle's directory, or a name for that of RunOptions.start.
    """

    model: str
    stages: Annotated[list[Stage], Field(min_length=1, max_length=MAX_STAGES)]
    method: MethodType = "recipe"
    task: TaskSettings = TaskSettings()
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    #: Maximum tokens of a row, prompt and answer together; longer passages are truncated.
    #: None: the model's maximum, at most 2,048.
    max_length: Annotated[int, Field(ge=16, le=1_048_576)] | None = None
    dtype: Dtype = "auto"
    #: Stores the frozen weights of the base's decoder layers in 4 bits (arXiv 2305.14314). Dumps leave None out, as
    #: stored settings always did.
    base_quantization: BaseQuantization | None = Field(default=None, exclude_if=lambda value: value is None)
    early_stopping: EarlyStopping | None = None
    #: Compile decoder layers (torch.compile) in LoRA stages; "auto": on a CPU, if the stage is long enough to pay off.
    compile: bool | Auto = "auto"

    @model_validator(mode="after")
    def _no_compiled_quantised_layers(self) -> TrainConfig:
        if self.base_quantization is not None and self.compile is True:
            raise ValueError(
                "compile must be false or auto with base_quantization: quantised layers run uncompiled"
            )
        return self


def recipe(method: MethodType, lora: LoraStage | None = None, reft: ReftStage | None = None) -> list[Stage]:
    """Returns the stages of a named method, in order. Raises ValueError for `recipe`, which has no fixed list."""
    lora, reft = lora or LoraStage(), reft or ReftStage()
    stages: dict[str, list[Stage]] = {
        "heft": [lora, reft],
        "lora": [lora],
        "reft": [reft],
        "heft_reversed": [reft, lora],
        "heft_interleaved": [lora, reft, lora, reft],
    }
    if method not in stages:
        raise ValueError(f"method {method!r} has no fixed list of stages")
    return stages[method]


def parse_positions(positions: str) -> tuple[int, int]:
    """Returns the numbers of first and last prompt tokens: `"f1+l2"` → (1, 2). Raises ValueError for other forms."""
    match = re.fullmatch(r"(?:f([1-9]\d{0,2}))?(\+)?(?:l([1-9]\d{0,2}))?", positions)
    if match is None or not (match[1] or match[3]) or bool(match[2]) != bool(match[1] and match[3]):
        raise ValueError("positions must have the form f1, l1 or f1+l1 (first and last prompt tokens)")
    return int(match[1] or 0), int(match[3] or 0)
