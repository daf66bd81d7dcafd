"""What a trainer says, written to the store: events, progress, the latest metrics of each stage.

Every step's losses go into the history; the job's events get at most one METRICS a second, for a tiny model
takes hundreds of steps in that time.

It does NOT know why a trainer is ended, nor how artifacts are stored.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from store.jobs import leases
from store.jobs.spec import TrainingSpec
from worker.jobs.attempt import Attempt
from worker.jobs.loss_history import LossHistory

#: Seconds between two METRICS events of a job: at least, and at most unless its steps take longer.
_METRICS_SECONDS = (1.0, 10.0)
#: In between: so many in a run, evenly over its steps.
_METRICS_EVENTS = 500
_FINAL_CODES = ("SUCCEEDED", "FAILED")


class EventRecorder:
    """Hears the events of one attempt, in order. `save_checkpoint` makes the one that an event's data names
    durable; `fetch_stage_results` answers the engine that asks what stages of earlier jobs ended with."""

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
        self._bring_results = fetch_stage_results
        self._latest: dict[str, dict[str, Any]] = {}
        self._pace = ProgressMeter()
        self._last_written: tuple[float, int] | None = (
            None  # when the last METRICS event was written, and its step
        )

    def hear(self, event: dict[str, Any]) -> bool:
        """Write down what is worth it; True for the last word, which is for `train_job` to act on."""
        self._history.add(event)
        code, data = event["code"], event["data"]
        if code in _FINAL_CODES:
            return True
        if code == "WORKING":
            return False  # its arrival was the news: see worker.engine_process.supervisor
        if code == "METRICS":
            self._hear_metrics(event)
        elif code == "CHECKPOINT_SAVED":
            self._save_checkpoint(data)
        elif code == "STAGE_KEYS":
            self._bring_results(data)
        elif code == "STAGE_REUSED":
            # A pace of its own: no step took the time since the last event.
            self._record(event, stage=data["stage"], progress=ProgressMeter().progress(data))
        else:
            self._record(
                event,
                stage=self._stage_after(code, data),
                resolved=data.get("resolved"),
                metrics=self._metrics(data, ("accuracy", "train_loss", "eval_loss", "eval_accuracy")),
            )
        return False

    def _hear_metrics(self, event: Mapping[str, Any]) -> None:
        data = event["data"]
        progress = self._pace.progress(data)
        metrics = self._metrics(data, ("step", "epoch", "loss", "learning_rate", "tokens", "seconds"))
        if self._is_worth_telling(data["step"], data["total_steps"]):
            self._record(event, stage=data["stage"], progress=progress, metrics=metrics)
            self._last_written = (time.monotonic(), data["step"])

    def _is_worth_telling(self, step: int, total: int) -> bool:
        if self._last_written is None or step >= total:
            return True
        at_least, at_most = _METRICS_SECONDS
        since = time.monotonic() - self._last_written[0]
        return since >= at_most or (
            since >= at_least and step - self._last_written[1] >= total / _METRICS_EVENTS
        )

    def _record(self, event: Mapping[str, Any], **columns: Any) -> None:
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
        """What the job's `stage` shows after this event; None: what it showed before."""
        if code == "STAGE_STARTED":
            return str(data["stage"])
        if code == "EPOCH_COMPLETE":
            stage = self._attempt.claim.spec.stages()[data["stage_index"]]
            after = "merge" if stage.type == "lora" else "evaluate"
            return after if data["epoch"] == stage.n_epochs else None
        return "evaluate" if code in ("STARTED", "MERGE_VERIFIED") else None

    def _metrics(self, data: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any] | None:
        """The latest numbers of the stage that `data` speaks of, as the job shows them; None if it has
        none."""
        found = {name: data[name] for name in names if data.get(name) is not None}
        if "stage" not in data or not found:
            return None
        label = stage_label(self._attempt.claim.spec, data)
        self._latest[label] = self._latest.get(label, {}) | found
        return {label: self._latest[label]}


class ProgressMeter:
    """How far a run is, and how long the rest takes at the pace of its last steps."""

    def __init__(self) -> None:
        self._last: tuple[float, int] | None = None
        self._step_seconds: float | None = None

    def progress(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """{percent, step, total_steps, epoch, eta_seconds (None at first), updated_at (unix seconds)}."""
        step, total = data["step"], data["total_steps"]
        self._note(step)
        left = None if self._step_seconds is None else round((total - step) * self._step_seconds, 1)
        return {
            "percent": round(100 * step / total, 1),
            "step": step,
            "total_steps": total,
            "epoch": data["epoch"],
            "eta_seconds": left,
            "updated_at": int(time.time()),
        }

    def _note(self, step: int) -> None:
        now = time.monotonic()
        if self._last is not None and step > self._last[1]:
            seconds = (now - self._last[0]) / (step - self._last[1])
            before = self._step_seconds if self._step_seconds is not None else seconds
            self._step_seconds = 0.9 * before + 0.1 * seconds
        self._last = (now, step)


def stage_label(spec: TrainingSpec, data: Mapping[str, Any]) -> str:
    """`lora`; `lora-3` where the recipe has more than one stage of that type (counted from 1)."""
    stage: str = data["stage"]
    alone = sum(one.type == stage for one in spec.stages()) <= 1
    return stage if alone or "stage_index" not in data else f"{stage}-{data['stage_index'] + 1}"
