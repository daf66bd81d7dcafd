"""The watch over one child: lease, cancel, pause, shutdown, stalls; and how long each may take to end.

It runs on a thread of its own, so that no upload and no slow write can delay a heartbeat or a kill. It is
the only one who ends a child, but for the thread that reads the events and finds the fence lost.

It does NOT read events, and it does not decide what becomes of the job: `worker.run_job` does, from `reason`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from store.leases import Wishes

from store.errors import LostFence, Unavailable
from worker.child import Child

log = logging.getLogger(__name__)


class Reason(StrEnum):
    """Why a child was told to end."""

    LOST = "lost"  #: The attempt is no longer the current one: killed at once, nothing more is written.
    CANCELLED = "cancelled"  #: Its user ended the job: no checkpoint.
    STALLED = "stalled"  #: No sign of life for too long: counts as a death of the trainer.
    PAUSED = "paused"  #: Its user wants to go on later: a checkpoint, if it comes in time.
    SHUTDOWN = "shutdown"  #: The worker ends: a checkpoint, then back to the queue.


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Seconds: between two looks, between two renewals of the lease, without a sign of life, and from
    SIGTERM to SIGKILL."""

    control: float
    heartbeat: float
    stall: float
    cancel_grace: float = 5.0
    checkpoint_grace: float = 30.0
    dump_grace: float = 2.0

    def grace(self, reason: Reason) -> float:
        return {
            Reason.LOST: 0.0,
            Reason.CANCELLED: self.cancel_grace,
            Reason.STALLED: self.dump_grace,
            Reason.PAUSED: self.checkpoint_grace,
            Reason.SHUTDOWN: self.checkpoint_grace,
        }[reason]


#: A later reason replaces an earlier one only if it is graver: whoever pauses may still cancel.
GRAVITY = [Reason.SHUTDOWN, Reason.PAUSED, Reason.STALLED, Reason.CANCELLED, Reason.LOST]


class Watch:
    """Watches `child` from `start` until `stop`. `reason` says why it was ended, None if it ended by
    itself."""

    def __init__(
        self,
        child: Child,
        *,
        renew: Callable[[], Wishes],
        wishes: Callable[[], Wishes],
        stopping: threading.Event,
        limits: Limits,
    ) -> None:
        self.reason: Reason | None = None
        self._child = child
        self._renew = renew
        self._wishes = wishes
        self._stopping = stopping
        self._limits = limits
        self._kill_at: float | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"watch-{child.pid}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        renew_at = 0.0
        while not self._ended.wait(self._pause()):
            now = time.monotonic()
            due = now >= renew_at
            if due:
                renew_at = now + self._limits.heartbeat
            self._look(self._renew if due else self._wishes)
            if self._kill_at is not None and now >= self._kill_at:
                self._child.kill()

    def _pause(self) -> float:
        if self._kill_at is None:
            return self._limits.control
        return min(self._limits.control, max(self._kill_at - time.monotonic(), 0.02))

    def _look(self, ask: Callable[[], Wishes]) -> None:
        try:
            wishes = ask()
        except LostFence:
            self._end(Reason.LOST)
            return
        except Unavailable as fault:
            # Training goes on: whether the lease was kept is for the fence to say, once the database is back.
            log.warning("database away, the trainer goes on: %s", fault)
            wishes = Wishes(cancel=False, pause=False)
        if wishes.cancel:
            self._end(Reason.CANCELLED)
        elif wishes.pause:
            self._end(Reason.PAUSED)
        if self._stopping.is_set():
            self._end(Reason.SHUTDOWN)
        if time.monotonic() - self._child.last_line_at > self._limits.stall:
            self._end(Reason.STALLED)

    def _end(self, reason: Reason) -> None:
        """Begin to end the child, once for each graver reason."""
        if self.reason is not None and GRAVITY.index(reason) <= GRAVITY.index(self.reason):
            return
        log.info("ending child %d: %s", self._child.pid, reason)
        self.reason = reason
        kill_at = time.monotonic() + self._limits.grace(reason)
        self._kill_at = kill_at if self._kill_at is None else min(kill_at, self._kill_at)
        if reason is Reason.LOST:
            self._child.kill()
        elif reason is Reason.STALLED:
            self._child.dump_stacks()
        else:
            self._child.terminate()
