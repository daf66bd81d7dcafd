"""Events of an engine process: one frozen record each, from a closed list of codes, with a TypedDict of its data.

`python -m heft_engine` prints them as JSON lines; `train()` hands them to its `on_event`.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, TypedDict

Level = Literal["info", "warn", "error"]

#: The service adds VALIDATION_COMPLETE, QUEUED, WAITING_FOR_WORKERS, PAUSED, RESUMED, RESTARTED and CANCELLED.
Code = Literal[
    "STARTED",  #: the run's resolved settings: StartedData
    "STAGE_STARTED",  #: the stage's plan: StageStartedData
    "METRICS",  #: after every optimizer step: MetricsData
    "EPOCH_COMPLETE",  #: EpochCompleteData
    "STAGE_KEYS",  #: a request for results of these stages: StageKeysData, heft_engine.commands.stage_exchange
    "STAGE_REUSED",  #: in place of a stage's training: StageReusedData
    "CHECKPOINT_SAVED",  #: CheckpointSavedData
    "STAGE_COMPLETE",  #: StageCompleteData
    "MERGE_VERIFIED",  #: stage, stage_index and the fields of heft_engine.adapters.parity.Parity
    "EVALUATION",  #: EvaluationData
    "WARNING",  #: WarningData
    "WORKING",  #: a heartbeat, at most every 30 seconds, for the supervisor's stall timeout; no data
    "CHECKING",  #: of `check`: CheckingData
    "CHECKED",  #: the result of `check`: CheckedData
    "SUCCEEDED",  #: the last event of a run that has written its bundle: SucceededData
    "FAILED",  #: the last event of a run or check that failed: FailedData
]


class StageData(TypedDict):
    """`stage`: the type of the stage; `stage_index` counts from 0."""

    stage: str
    stage_index: int


class StartedData(TypedDict):
    method: str
    resolved: dict[
        str, Any
    ]  #: stages, task, dtype, base_quantization, device, max_length, base_model: nothing left on "auto"
    rows: int
    truncated: int  #: rows whose passage was shortened
    total_steps: int


class StageStartedData(StageData):
    learning_rate: float | str
    trained_parameters: int
    cache: dict[str, Any]  #: CachePlan.to_json
    memory_bytes: int  #: predicted peak of the process on its device
    host_memory_bytes: int  #: predicted beside it, in the machine's memory; 0 on a CPU
    token_budget: int  #: tokens of a forward pass, at most
    compiled: bool
    checkpointing: bool  #: gradient checkpointing


class MetricsData(StageData):
    step: int  #: of the run, from 1
    total_steps: int
    epoch: int  #: of the stage, from 1
    loss: float  #: mean over the step's supervised tokens, nats
    train_loss: float  #: the same, by OpenAI's name
    train_mean_token_accuracy: float
    learning_rate: float
    tokens: int  #: of the stage so far
    seconds: float  #: in the stage's steps so far
    loss_scale: NotRequired[float]  #: of a float16 model, after the step
    overflows: NotRequired[int]  #: of the stage so far: steps that were taken again with a lower loss scale


class EpochCompleteData(StageData):
    """By OpenAI's names; of validation if there are validation rows. `full_valid_*` have the values of `valid_*`."""

    step: int  #: of the run
    total_steps: int
    epoch: int
    train_loss: float  #: mean over the epoch's supervised tokens, nats
    train_mean_token_accuracy: float
    eval_loss: NotRequired[float | None]  #: valid_loss; None if infinite
    valid_loss: NotRequired[float]  #: absent if infinite
    valid_mean_token_accuracy: NotRequired[float]
    full_valid_loss: NotRequired[float]
    full_valid_mean_token_accuracy: NotRequired[float]
    valid_accuracy: NotRequired[float]  #: share of right answers, where early stopping goes by it
    stopped_early: NotRequired[bool]  #: True: the stage ends here, before its last epoch


class StageKeysData(TypedDict):
    keys: list[str]


class StageReusedData(StageData):
    step: int  #: the stage's last, of the run
    total_steps: int
    epoch: int
    key: str | None


class CheckpointSavedData(StageData):
    step: int  #: of the run
    kind: str  #: "step" inside a stage, "epoch" for a model inside a stage, "stage" at its end
    path: str  #: of a complete directory, whose manifest was written last
    metrics: dict[str, float]  #: step and, where known, Progress.losses
    key: NotRequired[str]  #: of the stage's result, if later runs may reuse it


class StageCompleteData(StageData):
    seconds: float
    steps: int
    tokens: int
    epochs: int  #: that were trained
    best_epoch: int | None  #: whose parameters the stage ends with; None without early stopping
    general_loss: float
    memory_bytes: int | None  #: peak of the process; None where the system does not report it
    flops: int


class EvaluationData(TypedDict):
    """After a stage ("base": before all stages; "start": the same, of a fine-tuned model) on rows of `split`."""

    stage: str
    stage_index: int | None
    split: str
    n: int
    accuracy: float  #: mean of the metric that counts
    correct: int | None  #: None for a graded metric
    interval_95: list[float]
    metric: str
    metrics: dict[str, Any]
    reused: NotRequired[bool]
    step: NotRequired[int]


class WarningData(TypedDict):
    signature: str
    stage: NotRequired[str]
    stage_index: NotRequired[int]


class CheckingData(TypedDict):
    rows: int


class ErrorData(TypedDict):
    code: str
    message: str
    param: str | None


class CheckedData(TypedDict):
    report: dict[str, Any]
    made: dict[str, str]  #: paths of rows that were written for references, by field
    error: ErrorData | None
    plan: (
        list[dict[str, Any]] | None
    )  #: of each stage, as PlannedStage.to_json; None: not asked for, or faults


class SucceededData(TypedDict):
    bundle: str
    evaluation: dict[str, Any] | None
    parity: dict[str, Any]
    trained_tokens: int
    costs: list[dict[str, Any]]  #: heft_engine.training.costs.stage_cost of each stage
    outcomes: dict[str, Any] | None  #: heft_engine.training.result.row_results


class FailedData(TypedDict):
    error: ErrorData


@dataclass(frozen=True, kw_only=True)
class Event:
    """`data` holds JSON values only."""

    code: Code
    message: str
    data: Mapping[str, Any] = field(default_factory=dict)
    level: Level = "info"
    time: float = field(default_factory=time.time)

    def to_json(self) -> str:
        """Returns one line without its newline. `type` is "metrics" or "message", as in the REST API."""
        kind = "metrics" if self.code in ("METRICS", "EPOCH_COMPLETE") else "message"
        return json.dumps(
            {
                "code": self.code,
                "type": kind,
                "level": self.level,
                "message": self.message,
                "data": self.data,
                "time": self.time,
            },
            allow_nan=False,
        )


OnEvent = Callable[[Event], None]


class Pulse:
    """Emits WORKING at most every `seconds`. Call it with every forward pass."""

    def __init__(self, on_event: OnEvent, seconds: float = 30.0) -> None:
        self._on_event = on_event
        self._seconds = seconds
        self._next = time.monotonic() + seconds
        self._lock = threading.Lock()  # forward passes of several threads call it

    def __call__(self) -> None:
        with self._lock:
            if time.monotonic() < self._next:
                return
            self._next = time.monotonic() + self._seconds
            self._on_event(Event(code="WORKING", message="Computing"))
