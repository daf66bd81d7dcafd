"""Writes the events of a training process to the store: event rows, progress, the latest metrics of each stage.

The loss history gets every step. The job gets at most one METRICS event a second: a tiny model takes hundreds of
steps in that time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from store.jobs import leases
from worker.jobs.attempt import Attempt, Event
from worker.jobs.loss_history import LossHistory

#: A METRICS event is written no sooner than this after the last one.
_MIN_SECONDS = 1.0
#: It is written after this time even if few steps were taken since.
_MAX_SECONDS = 10.0
#: Between the two, a run gets this many METRICS events, evenly over its steps.
_METRICS_EVENTS = 500

_STEP_METRICS = ("step", "epoch", "loss", "learning_rate", "tokens", "seconds")
_SCORES = (
    "accuracy",
    "train_loss",
    "train_mean_token_accuracy",
    "eval_loss",
    "eval_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
    "valid_accuracy",
)


class EventRecorder:
    """Handles the events of one attempt, in order.

    save_checkpoint: stores the checkpoint that a CHECKPOINT_SAVED event's data describe.
    fetch_stage_results: answers a STAGE_KEYS event, with which the engine asks for results of earlier jobs.
    """

    def __init__(
        self,
        attempt: Attempt,
        history: LossHistory,
        *,
        save_checkpoint: Callable[[Mapping[str, Any]], None],
        fetch_stage_results: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self._attempt = attempt
        self._history = history
        self._save_checkpoint = save_checkpoint
        self._fetch_stage_results = fetch_stage_results
        self._stage_metrics: dict[str, dict[str, Any]] = {}
        self._progress = ProgressMeter()
        self._last_written: tuple[float, int] | None = None  # of the last METRICS event: when, and its step

    def handle(self, event: Event) -> None:
        """Writes an event, or has its checkpoint saved or its question answered."""
        self._history.add(event)
        code, data = event["code"], event["data"]
        match code:
            case "WORKING":
                pass  # a sign of life, which the supervisor has seen
            case "METRICS":
                self._handle_metrics(event)
            case "CHECKPOINT_SAVED":
                self._save_checkpoint(data)
            case "STAGE_KEYS":
                self._fetch_stage_results(data)
            case "STAGE_REUSED":
                # A meter of its own: these steps took no time, and must not speed up the estimate.
                self._write(event, stage=data["stage"], progress=ProgressMeter().progress(data))
            case _:
                self._write(
                    event,
                    stage=self._stage_after(code, data),
                    resolved=data.get("resolved"),
                    metrics=self._update_metrics(data, _SCORES),
                )

    def _handle_metrics(self, event: Event) -> None:
        data = event["data"]
        progress = self._progress.progress(data)
        metrics = self._update_metrics(data, _STEP_METRICS)
        if self._is_due(data["step"], data["total_steps"]):
            self._write(event, stage=data["stage"], progress=progress, metrics=metrics)
            self._last_written = (time.monotonic(), data["step"])

    def _is_due(self, step: int, total_steps: int) -> bool:
        if self._last_written is None or step >= total_steps:
            return True
        last_time, last_step = self._last_written
        elapsed = time.monotonic() - last_time
        has_moved = step - last_step >= total_steps / _METRICS_EVENTS
        return elapsed >= _MAX_SECONDS or (elapsed >= _MIN_SECONDS and has_moved)

    def _write(self, event: Event, **columns: Any) -> None:
        self._attempt.write(
            partial(
                leases.record_event,
                code=event["code"],
                message=event["message"],
                data=event["data"],
                level=event["level"],
                type=event["type"],
                **columns,
            )
        )

    def _stage_after(self, code: str, data: Mapping[str, Any]) -> str | None:
        """Returns the job's `stage` after this event; None leaves it as it is."""
        match code:
            case "STAGE_STARTED":
                return str(data["stage"])
            case "EPOCH_COMPLETE":
                stage = self._attempt.claim.spec.stages()[data["stage_index"]]
                if data["epoch"] != stage.n_epochs and not data.get("stopped_early"):
                    return None
                return "merge" if stage.type == "lora" else "evaluate"
            case "STARTED" | "MERGE_VERIFIED":
                return "evaluate"
            case _:
                return None

    def _update_metrics(self, data: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any] | None:
        """Returns {stage label: its latest metrics} after this event; None if the event has none of these names."""
        metrics = {name: data[name] for name in names if data.get(name) is not None}
        if "stage" not in data or not metrics:
            return None
        label = self._attempt.claim.spec.stage_label(data["stage"], data.get("stage_index"))
        self._stage_metrics[label] = self._stage_metrics.get(label, {}) | metrics
        return {label: self._stage_metrics[label]}


class ProgressMeter:
    """The progress of a run, and the remaining time at the pace of its last steps."""

    def __init__(self) -> None:
        self._last: tuple[float, int] | None = None
        self._step_seconds: float | None = None

    def progress(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Returns {percent, step, total_steps, epoch, eta_seconds (None at first), updated_at (unix seconds)}."""
        step, total_steps = data["step"], data["total_steps"]
        self._measure(step)
        eta = None if self._step_seconds is None else round((total_steps - step) * self._step_seconds, 1)
        return {
            "percent": round(100 * step / total_steps, 1),
            "step": step,
            "total_steps": total_steps,
            "epoch": data["epoch"],
            "eta_seconds": eta,
            "updated_at": int(time.time()),
        }

    def _measure(self, step: int) -> None:
        now = time.monotonic()
        if self._last is not None and step > self._last[1]:
            seconds = (now - self._last[0]) / (step - self._last[1])
            average = self._step_seconds if self._step_seconds is not None else seconds
            self._step_seconds = 0.9 * average + 0.1 * seconds
        self._last = (now, step)
