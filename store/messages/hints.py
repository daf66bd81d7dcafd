"""Hints: messages that tell workers to look for work. They never block their sender, and may get lost.

Postgres alone says what is to be done: a lost hint is sent again by the reconciler, and a doubled one loses the claim.
So hints are sent after the commit, from a thread of their own, behind a circuit breaker, and are dropped while the
broker is away.
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

Purpose = Literal["prepare", "train"]


class Hints:
    """Sends hints from one daemon thread. `send` returns at once and never raises, whatever the broker does.

    After a failed publish the breaker is open for `pause_seconds`: hints are dropped instead of piling up,
    and the reconciler sends what was missed.
    """

    def __init__(self, app: Celery, *, capacity: int = 10_000, pause_seconds: float = 5.0) -> None:
        self._app = app
        self._pause = pause_seconds
        self._open_until = 0.0
        self._waiting: queue.Queue[tuple[Task, tuple[str, ...]] | None] = queue.Queue(capacity)
        self._thread = threading.Thread(target=self._publish_all, name="hints", daemon=True)
        self._thread.start()

    @property
    def broker_is_away(self) -> bool:
        """Whether the last publish failed less than `pause_seconds` ago."""
        return time.monotonic() < self._open_until

    def hint(self, job_id: str, purpose: Purpose) -> None:
        """Tell the workers that this job waits to be prepared or trained. Call it after the commit."""
        self.send(Task(f"heft.{purpose}"), job_id)

    def export(self, model_id: str, export_format: str) -> None:
        """Tell the workers that this archive is wanted. Call it after the commit."""
        self.send(Task.EXPORT, model_id, export_format)

    def send(self, task: Task, *args: str) -> None:
        if self.broker_is_away:
            return
        try:
            self._waiting.put_nowait((task, args))
        except queue.Full:
            log.warning("hint dropped, %d wait already: %s %s", self._waiting.maxsize, task, args)

    def close(self, timeout: float = 4.0) -> None:
        """Send what waits, for at most `timeout` seconds."""
        try:
            self._waiting.put(None, timeout=timeout)
        except queue.Full:
            return
        self._thread.join(timeout)

    def _publish_all(self) -> None:
        while (item := self._waiting.get()) is not None:
            if self.broker_is_away:
                continue
            task, args = item
            try:
                self._app.send_task(task.value, args=list(args), retry=False)
            except (OperationalError, OSError) as fault:
                self._open_until = time.monotonic() + self._pause
                log.warning("broker away, hints pause for %g s: %s", self._pause, fault)
