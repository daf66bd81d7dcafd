"""Events of a run, and the closed list of their codes. `python -m heft_engine train` prints them as JSON lines."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Level = Literal["info", "warn", "error"]

#: The codes of the engine; the service adds VALIDATION_COMPLETE, QUEUED, PAUSED, RESUMED, RESTARTED and CANCELLED.
Code = Literal[
    "STARTED",  #: data: method, stages as resolved (learning rate, layers, modules), device, dtype, rows, total_steps
    "STAGE_STARTED",  #: data: stage, stage_index, learning_rate, trained_parameters, cache
    "METRICS",  #: data: stage, stage_index, step, epoch, loss, learning_rate, tokens, seconds; total_steps of the run
    "EPOCH_COMPLETE",  #: data: stage, stage_index, epoch, train_loss; eval_loss with validation rows
    "STAGE_KEYS",  #: data: keys of the stages' results, in order; see heft_engine.commands.stage_exchange
    "STAGE_REUSED",  #: a stored result replaced training. data: stage, stage_index, step, total_steps, epoch, key
    #: data: stage, stage_index, step, kind, path (a complete directory, manifest written last); metrics (step and,
    #: where known, train_loss and valid_loss); key, if later runs may start from it
    "CHECKPOINT_SAVED",
    "STAGE_COMPLETE",  #: data: stage, stage_index, seconds, steps, tokens, general_loss, flops
    "MERGE_VERIFIED",  #: data: the parity record of this merge
    "EVALUATION",  #: data: stage ("base", "lora", "reft"), accuracy, correct, n, interval_95, split
    "WARNING",  #: data: signature (a name), and what to do in the message
    "WORKING",  #: a heartbeat, at most every 30 seconds, for the supervisor's stall timeout. No data
    "CHECKING",  #: of `check`. data: rows read so far
    "CHECKED",  #: of `check`. data: report, made (paths of the files written for references), error (or None)
    "SUCCEEDED",  #: data: bundle (path), evaluation, parity, costs and outcomes (heft_engine.training.costs)
    "FAILED",  #: data: error {code, message, param}
]


@dataclass(frozen=True, kw_only=True)
class Event:
    """An event. `data` has JSON values only."""

    code: Code
    message: str
    data: dict[str, Any] = field(default_factory=dict)
    level: Level = "info"
    time: float = field(default_factory=time.time)

    def to_json(self) -> str:
        """Returns the event as one line of JSON. `type` is "metrics" or "message", as in the REST API."""
        kind = "metrics" if self.code == "METRICS" else "message"
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
    """Called with every forward pass; emits WORKING at most every `seconds`."""

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
