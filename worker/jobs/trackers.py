"""Hands a job's metrics to the trackers of its integrations: wandb, mlflow, trackio, TensorBoard.

Each tracker is a process of its own, fed by a thread. One that fails, hangs or can't reach its server costs the job a
warning and nothing else.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from store.jobs import leases
from worker.engine_process.child import child_environment
from worker.jobs.attempt import Attempt, Event

log = logging.getLogger(__name__)

#: The operator's accounts and servers. accelerate would otherwise use a GPU.
_VARIABLES = ("WANDB_", "MLFLOW_", "TRACKIO_", "DATABRICKS_")
_NO_GPU = {"ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": ""}
#: Records that wait for a tracker; further ones are dropped.
_MAX_WAITING = 10_000
_MAX_REASON_CHARS, _MAX_LINE = 300, 8_192
#: Time for a tracker to send what is left, once its job has ended.
_FINISH_SECONDS = 180

_OF_STEP = ("train_loss", "train_mean_token_accuracy", "learning_rate")
_OF_EPOCH = ("valid_loss", "valid_mean_token_accuracy", "full_valid_loss", "full_valid_mean_token_accuracy")


@contextmanager
def trackers_of(attempt: Attempt) -> Iterator[Trackers]:
    """Starts the trackers of a job's integrations. At the end they send what is left, which nobody waits for."""
    trackers = Trackers(attempt)
    for integration in attempt.claim.spec.integrations:
        trackers.start(integration.type, integration.settings().model_dump())
    try:
        yield trackers
    finally:
        trackers.close()


class Trackers:
    """The running trackers of one attempt."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._running: list[_Tracker] = []
        self._step = 0

    def start(self, kind: str, settings: Mapping[str, Any]) -> None:
        """Starts a tracker, or writes a warning."""
        claim, context = self._attempt.claim, self._attempt.context
        folder = context.settings.tracking_dir or context.shared / "tracking"
        spec = claim.spec
        run = {
            **settings,
            "kind": kind,
            "job_id": claim.job_id,
            "owner": claim.owner_id,
            "folder": str(folder),
            "config": {
                "model": spec.model,
                "method": spec.method.type,
                "training_file": spec.training_file,
                "seed": spec.seed,
                "stages": json.dumps([stage.model_dump(mode="json") for stage in spec.stages()]),
            },
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._running.append(_Tracker(kind, run, context.tracker_command, folder))
        except OSError as error:
            self._warn(kind, str(error))

    def handle(self, event: Event) -> None:
        """Sends the numbers of an event to all trackers. Never waits for one."""
        values = _values(event) if self._running else {}
        if not values:
            return
        self._step = event["data"].get("step", self._step)
        for tracker in list(self._running):
            reason = tracker.failure()
            if reason is None:
                tracker.send({"values": values, "step": self._step})
            else:
                self._running.remove(tracker)
                self._warn(tracker.kind, reason)

    def close(self) -> None:
        for tracker in self._running:
            tracker.close()

    def _warn(self, kind: str, reason: str) -> None:
        message = f"Metrics are no longer sent to {kind}, and training goes on: {reason[:_MAX_REASON_CHARS]}"
        data = {"signature": "tracker_failed", "integration": kind}
        self._attempt.write(
            partial(leases.record_event, code="WARNING", message=message, data=data, level="warn")
        )


class _Tracker:
    """One tracker's process, and the threads that write to it and read its errors."""

    def __init__(self, kind: str, run: Mapping[str, Any], command: Sequence[str], folder: Path) -> None:
        self.kind = kind
        self._process = subprocess.Popen(
            command,
            env=_environment(),
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            process_group=0,
        )
        self._records: queue.Queue[Mapping[str, Any] | None] = queue.Queue(_MAX_WAITING)
        self._last_error = ""
        self._reader = threading.Thread(target=self._read_errors, name=f"errors-{kind}", daemon=True)
        self._reader.start()
        threading.Thread(target=self._feed, name=f"tracker-{kind}", daemon=True).start()
        self.send(run)

    def send(self, record: Mapping[str, Any]) -> None:
        """Queues a record; drops it if too many wait."""
        with suppress(queue.Full):
            self._records.put_nowait(record)

    def failure(self) -> str | None:
        """Returns why the process has ended; None while it runs."""
        if self._process.poll() is None:
            return None
        self._reader.join(1.0)  # a process that it has started may still hold the pipe
        return self._last_error or f"its process ended with {self._process.returncode}"

    def close(self) -> None:
        """Ends the process: soon, when all is sent; at once if it does not take its records."""
        try:
            self._records.put_nowait(None)
        except queue.Full:
            self._kill()

    def _feed(self) -> None:
        assert self._process.stdin is not None
        with suppress(OSError), self._process.stdin as pipe:  # a broken pipe: the process has ended
            while (record := self._records.get()) is not None:
                pipe.write(json.dumps(record).encode() + b"\n")
                pipe.flush()
        try:
            self._process.wait(_FINISH_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("the tracker %s did not end in time", self.kind)
            self._kill()

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as pipe:
            while line := pipe.readline(_MAX_LINE):
                self._last_error = line.decode(errors="replace").strip() or self._last_error

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def _values(event: Event) -> dict[str, float]:
    """Returns the numbers of an event by the names that trackers show."""
    data = event["data"]
    match event["code"]:
        case "METRICS":
            names: tuple[str, ...] = _OF_STEP
        case "EPOCH_COMPLETE":
            names = _OF_EPOCH
        case "EVALUATION":
            return {f"evaluation/{data['stage']}": data["accuracy"]}
        case _:
            return {}
    return {name: data[name] for name in names if data.get(name) is not None}


def _environment() -> dict[str, str]:
    accounts = {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)}
    return child_environment(os.environ) | accounts | _NO_GPU
