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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import copy_context
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
_MAX_LINE = 8_192
#: Time for a tracker to take and send what is left, once its job has ended.
_FINISH_SECONDS = 180
#: Time for the last lines of stderr, once a tracker has ended: a process outside its group may keep the pipe open.
_LAST_LINES_SECONDS = 1.0

_OF_STEP = ("train_loss", "train_mean_token_accuracy", "learning_rate")
_OF_EPOCH = (
    "valid_loss",
    "valid_mean_token_accuracy",
    "full_valid_loss",
    "full_valid_mean_token_accuracy",
    "valid_accuracy",
)


@contextmanager
def trackers_of(attempt: Attempt) -> Iterator[Trackers]:
    """Starts the trackers of a job's integrations. At the end they send what is left, which nobody waits for."""
    trackers = Trackers(attempt)
    try:
        for integration in attempt.claim.spec.integrations:
            trackers.start(integration.type, integration.settings().model_dump())
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
        """Starts a tracker, or writes a warning: it can't be started, or this worker's settings don't enable it."""
        claim, context = self._attempt.claim, self._attempt.context
        if kind not in context.settings.enabled_integrations:
            # The API has other settings, or the job is older than these.
            reason = f"the worker that trains the job does not have {kind} in its HEFT_INTEGRATIONS"
            self._warn(kind, reason, signature="tracker_not_enabled")
            return
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
            log.warning("the tracker %s can't be started: %s", kind, error)
            self._warn(kind, "its process could not be started; the worker's log says why")

    def handle(self, event: Event) -> None:
        """Sends the numbers of an event to all trackers. Never waits for one."""
        values = _values(event) if self._running else {}
        if not values:
            return
        self._step = event["data"].get("step", self._step)
        for tracker in list(self._running):
            code = tracker.exit_code()
            if code is None:
                tracker.send({"values": values, "step": self._step})
            else:
                self._running.remove(tracker)
                self._warn(
                    tracker.kind, f"its process ended with exit code {code}; the worker's log says why"
                )

    def close(self) -> None:
        for tracker in self._running:
            tracker.close()

    def _warn(self, kind: str, reason: str, signature: str = "tracker_failed") -> None:
        """Writes an event. A user reads it: a tracker's own words may hold the operator's hosts and passwords."""
        message = f"Metrics are not sent to {kind}, and training goes on: {reason}."
        data = {"signature": signature, "integration": kind}
        self._attempt.write(
            partial(leases.record_event, code="WARNING", message=message, data=data, level="warn")
        )


class _Tracker:
    """The process group of one tracker, and the threads that write to it, read its errors and wait for its end."""

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
        self._reap_lock = threading.Lock()
        self._records: queue.Queue[Mapping[str, Any] | None] = queue.Queue(_MAX_WAITING)
        self._last_error = ""
        self._deadline = threading.Timer(_FINISH_SECONDS, copy_context().run, args=(self._kill_late,))
        self._deadline.daemon = True
        self._reader = self._thread("errors", self._read_errors)
        self._thread("tracker", self._feed)
        self._thread("end", self._end)
        self.send(run)

    def send(self, record: Mapping[str, Any]) -> None:
        """Queues a record; drops it if too many wait."""
        with suppress(queue.Full):
            self._records.put_nowait(record)

    def exit_code(self) -> int | None:
        """Returns None while the process runs. A negative code is the signal that ended it."""
        with self._reap_lock:
            return self._process.returncode

    def close(self) -> None:
        """Ends the process: when all is sent or the time is over; at once if it does not take its records."""
        self._deadline.start()
        try:
            self._records.put_nowait(None)
        except queue.Full:
            self._kill()

    def _thread(self, name: str, target: Callable[[], None]) -> threading.Thread:
        """Starts a thread that logs with the ids of the job and its attempt."""
        thread = threading.Thread(
            target=copy_context().run, args=(target,), name=f"{name}-{self.kind}", daemon=True
        )
        thread.start()
        return thread

    def _feed(self) -> None:
        assert self._process.stdin is not None
        with suppress(OSError), self._process.stdin as pipe:  # a broken pipe: the process has ended
            while (record := self._records.get()) is not None:
                pipe.write(json.dumps(record).encode() + b"\n")
                pipe.flush()

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as pipe:
            while line := pipe.readline(_MAX_LINE):
                self._last_error = line.decode(errors="replace").strip() or self._last_error

    def _end(self) -> None:
        """Waits for the end of the process, kills what it has left, and logs why it failed."""
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        with self._reap_lock:
            os.killpg(self._process.pid, signal.SIGKILL)
            code = self._process.wait()
        self._deadline.cancel()
        with suppress(queue.Full):  # then the feeder is writing, into a broken pipe
            self._records.put_nowait(None)
        self._reader.join(_LAST_LINES_SECONDS)
        log.log(
            logging.WARNING if code else logging.INFO,
            "the tracker %s ended with exit code %d: %s",
            self.kind,
            code,
            self._last_error or "it wrote nothing to stderr",
        )

    def _kill_late(self) -> None:
        log.warning("the tracker %s did not send all in %d seconds and is killed", self.kind, _FINISH_SECONDS)
        self._kill()

    def _kill(self) -> None:
        # Until it is reaped, the pid belongs to the process and its group alone.
        with self._reap_lock:
            if self._process.returncode is None:
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
