"""What a run is: base model, task, an ordered list of stages, and how each is trained.

This module imports pydantic and nothing heavier, so that the service can check a request without torch.
The names are those of the REST API and of `--set`: `lora.rank`, `reft.layers`, `lora.n_epochs`, …
It does NOT know models, tokenizers or files: whether layer 40 exists is for the run to find out.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from heft_engine.config.metric_names import MetricName, TaskType, metrics_error

Auto = Literal["auto"]
Scheduler = Literal["linear", "cosine", "constant"]
Dtype = Literal["auto", "float32", "bfloat16"]
LoraInit = Literal["default", "pissa", "pissa_niter_4", "pissa_niter_16", "olora"]
InterventionKind = Literal["loreft", "direft", "consreft", "lobireft", "noreft", "nodireft"]
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


class StageSettings(Settings):
    """What LoRA and ReFT stages have in common: how long and with which optimiser."""

    n_epochs: Annotated[int, Field(ge=1, le=1_000)] = 3
    learning_rate: Annotated[float, Field(gt=0, le=1)] | Auto = "auto"
    #: Multiplies the automatic learning rate; refused beside a rate given as a number.
    learning_rate_multiplier: Annotated[float, Field(gt=0, le=1_000)] = 1.0
    #: Rows in one optimiser step, however the step is cut into micro-batches.
    batch_size: Annotated[int, Field(ge=1, le=4_096)] = 16
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.05
    scheduler: Scheduler = "linear"
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0, le=1_000)] = 1.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @field_validator("n_epochs", mode="before")
    @classmethod
    def _auto_epochs(cls, value: Any) -> Any:
        return 3 if value == "auto" else value

    @field_validator("batch_size", mode="before")
    @classmethod
    def _auto_batch_size(cls, value: Any) -> Any:
        return 16 if value == "auto" else value

    @field_validator("learning_rate_multiplier", mode="before")
    @classmethod
    def _auto_multiplier(cls, value: Any) -> Any:
        return 1.0 if value == "auto" else value

    @model_validator(mode="after")
    def _one_learning_rate(self) -> StageSettings:
        if self.learning_rate != "auto" and self.learning_rate_multiplier != 1.0:
            raise ValueError("give learning_rate as a number or learning_rate_multiplier, not both")
        return self


Layer = Annotated[int, Field(ge=0, le=MAX_LAYER)]


class MergeSettings(Settings):
    """What happens to an adapter's change between its training and its merge."""

    #: Scales the singular values of intruder dimensions (arXiv 2410.21228); None leaves the change as it was trained.
    intruder_scale: Annotated[float, Field(ge=0, le=1)] | None = None


class LoraStage(StageSettings):
    """Stage 1: ΔW = (alpha/rank)·B·A on the target projections (arXiv 2106.09685), merged when the stage ends.

    Variants by peft's names; each ends as LoRA or DoRA on the weights that the stage found.
    """

    type: Literal["lora"] = "lora"
    rank: Annotated[int, Field(ge=1, le=1_024)] = 8
    alpha: Annotated[float, Field(gt=0, le=65_536)] = 32
    #: "auto" is the query and value projections under the family's own names.
    target_modules: Annotated[list[str], Field(min_length=1, max_length=64)] | Auto = "auto"
    #: The layers that get an adapter; None is all of them.
    layers: Annotated[list[Layer], Field(min_length=1, max_length=MAX_LAYER)] | None = None
    #: Rank-stabilised: ΔW = (alpha/√rank)·B·A (arXiv 2312.03732).
    use_rslora: bool = False
    #: A trained magnitude for each row beside the low-rank direction (DoRA, arXiv 2402.09353).
    use_dora: bool = False
    #: Where A and B begin: "default" at ΔW = 0 with random A; "pissa" at the weight's largest singular values
    #: (arXiv 2404.02948; "pissa_niter_4" finds them by a faster randomised method); "olora" at its QR decomposition
    #: (arXiv 2406.01775). The weight keeps the rest, so the model begins as it was.
    init: LoraInit = "default"
    merge: MergeSettings = MergeSettings()

    @property
    def scaling(self) -> float:
        """What B·A is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @field_validator("layers", mode="before")
    @classmethod
    def _one_layer(cls, value: Any) -> Any:
        return [value] if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _no_dropout_of_the_model(self) -> LoraStage:
        if self.init != "default" and self.dropout > 0:
            message = (
                "dropout must be 0 with init pissa or olora: it would drop the weight's own largest part"
            )
            raise ValueError(message)
        return self


class ReftStage(StageSettings):
    """Stage 2: ReFT, as LoReFT Φ(h) = h + Rᵀ(Wh + b − Rh) (arXiv 2404.03592), on the frozen result of what came before.

    The other kinds, by pyreft's names, are written down in heft_engine.adapters.reft.
    """

    type: Literal["reft"] = "reft"
    #: "auto" is the paper's relative depth, layer 15 of 32: round(15/32 · n_layers).
    layers: Annotated[list[Layer], Field(min_length=1, max_length=MAX_LAYER)] | Auto = "auto"
    rank: Annotated[int, Field(ge=1, le=1_024)] = 4
    positions: str = "l1"
    kind: InterventionKind = "loreft"

    @field_validator("layers", mode="before")
    @classmethod
    def _one_layer(cls, value: Any) -> Any:
        return [value] if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("layers")
    @classmethod
    def _sorted_layers(cls, value: Any) -> Any:
        if isinstance(value, list) and len(set(value)) != len(value):
            raise ValueError("each layer once")
        return sorted(value) if isinstance(value, list) else value

    @field_validator("positions")
    @classmethod
    def _positions(cls, value: str) -> str:
        parse_positions(value)
        return value


Stage = Annotated[LoraStage | ReftStage, Field(discriminator="type")]


class TaskSettings(Settings):
    """What the model is asked. A type of None is inferred from the rows; so is a template."""

    type: TaskType | None = None
    #: `choice` only: the labels every row shares, for rows that bring no choices of their own.
    labels: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=200)]], Field(min_length=2, max_length=100)
        ]
        | None
    ) = None
    #: The prompt, with {question}, {passage}, {choices} or {prompt}; see heft_engine.data.encoding.
    template: Annotated[str, Field(min_length=1, max_length=20_000)] | None = None
    #: What answers are measured by, all of it reported; the first is what counts. None:
    #: heft_engine.config.metric_names says.
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
    """End a stage when the loss on the validation rows has not improved for `patience` epochs; keep the best."""

    patience: Annotated[int, Field(ge=1, le=100)] = 2


class TrainConfig(Settings):
    """One run of the engine. `model` is an alias (`smollm2-135m`), a directory, or a hub id (`org/name[@revision]`)."""

    model: str
    stages: Annotated[list[Stage], Field(min_length=1, max_length=MAX_STAGES)]
    method: MethodType = "recipe"
    task: TaskSettings = TaskSettings()
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    #: Tokens a row may have, prompt and answer together; the passage is shortened to fit.
    #: None: what the model takes, at most 2,048.
    max_length: Annotated[int, Field(ge=16, le=1_048_576)] | None = None
    dtype: Dtype = "auto"
    early_stopping: EarlyStopping | None = None
    #: Whether decoder layers are compiled while stage 1 trains; "auto": on a CPU, where the stage is long enough.
    compile: bool | Auto = "auto"


def recipe(method: MethodType, lora: LoraStage | None = None, reft: ReftStage | None = None) -> list[Stage]:
    """The stages of a named method, in order. Raises ValueError for `recipe`, which has no fixed list."""
    lora, reft = lora or LoraStage(), reft or ReftStage()
    lists: dict[str, list[Stage]] = {
        "heft": [lora, reft],
        "lora": [lora],
        "reft": [reft],
        "heft_reversed": [reft, lora],
        "heft_interleaved": [lora, reft, lora, reft],
    }
    if method not in lists:
        raise ValueError(f"method {method!r} has no fixed list of stages")
    return lists[method]


def parse_positions(positions: str) -> tuple[int, int]:
    """`"f1+l2"` → (1, 2): how many first and last prompt tokens. Raises ValueError with the accepted forms."""
    match = re.fullmatch(r"(?:f([1-9]\d{0,2}))?(\+)?(?:l([1-9]\d{0,2}))?", positions)
    if match is None or not (match[1] or match[3]) or bool(match[2]) != bool(match[1] and match[3]):
        raise ValueError("positions are written l1, f1 or f1+l1: the first and the last prompt tokens")
    return int(match[1] or 0), int(match[3] or 0)
