"""Hints: messages that tell workers of new work. They never block their sender, and may get lost.

Postgres alone decides what is to be done: the reconciler sends a lost hint again, and a duplicate finds nothing to
claim. So hints are sent after the commit, by a thread of their own, behind a circuit breaker.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import Literal

from celery import Celery
from kombu.exceptions import OperationalError

from store.messages.broker import Task

log = logging.getLogger(__name__)


class Hints:
    """Sends hints from a daemon thread. `send` returns at once and never raises.

    After a failed publish the circuit breaker is open for `pause_seconds`: hints are dropped instead of piling up, and
    the reconciler sends them again.
    """

    def __init__(self, app: Celery, *, capacity: int = 10_000, pause_seconds: float = 5.0) -> None:
        self._app = app
        self._pause = pause_seconds
        self._open_until = 0.0
        self._queue: queue.Queue[tuple[Task, tuple[str, ...]] | None] = queue.Queue(capacity)
        self._thread = threading.Thread(target=self._publish_all, name="hints", daemon=True)
        self._thread.start()

    @property
    def broker_is_away(self) -> bool:
        """True for `pause_seconds` after a failed publish."""
        return time.monotonic() < self._open_until

    def hint(self, job_id: str, purpose: Literal["prepare", "train"]) -> None:
        """Tells workers that a job waits to be prepared or trained. Call it after the commit."""
        self.send(Task(f"heft.{purpose}"), job_id)

    def export(self, model_id: str, export_format: str) -> None:
        """Tells workers that an archive waits to be built. Call it after the commit."""
        self.send(Task.EXPORT, model_id, export_format)

    def send(self, task: Task, *args: str) -> None:
        """Queues a hint for the thread, or drops it."""
        if self.broker_is_away:
            return
        try:
            self._queue.put_nowait((task, args))
        except queue.Full:
            log.warning("hint dropped, %d are queued already: %s %s", self._queue.maxsize, task, args)

    def close(self, timeout: float = 4.0) -> None:
        """Sends the queued hints, for at most `timeout` seconds."""
        try:
            self._queue.put(None, timeout=timeout)
        except queue.Full:
            return
        self._thread.join(timeout)

    def _publish_all(self) -> None:
        while (item := self._queue.get()) is not None:
            if self.broker_is_away:
                continue
            task, args = item
            try:
                self._app.send_task(task.value, args=list(args), retry=False)
            except (OperationalError, OSError) as error:
                self._open_until = time.monotonic() + self._pause
                log.warning("the broker does not answer, hints are dropped for %g s: %s", self._pause, error)
