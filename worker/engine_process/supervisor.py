"""The watch over one attempt: lease, cancel, pause, shutdown, stalls; and how long its child may take to end.

It runs on a thread of its own from the claim to the last write, so that no download, upload or slow write
can delay a heartbeat or a kill.

It does NOT read events, and it does not decide what becomes of the job: `worker.jobs.attempt` does, from `reason`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType

from store.errors import LostFence, Unavailable
from store.jobs.fence import StopRequest
from store.logs import in_context
from store.settings import StoreSettings
from worker.engine_process.child import Child

log = logging.getLogger(__name__)


class StopReason(StrEnum):
    """Why an attempt shall end, the lightest first: a graver one replaces it, so whoever pauses may still
    cancel."""

    SHUTDOWN = "shutdown"  #: The worker ends: a checkpoint, then back to the queue.
    PAUSED = "paused"  #: Its user wants to go on later: a checkpoint, if it comes in time.
    STALLED = "stalled"  #: No sign of life for too long: counts as a death of the trainer.
    CANCELLED = "cancelled"  #: Its user ended the job: no checkpoint.
    LOST = "lost"  #: The attempt is no longer the current one: killed at once, nothing more is written.


_PRIORITY = list(StopReason)


#: A child that has yet to say a word may be downloading its model: it gets so many times the patience.
_STARTUP_FACTOR = 4


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Seconds between two looks at what is wanted, between two renewals of the lease, and without a sign of
    life."""

    control: float
    heartbeat: float
    stall: float
    #: From SIGTERM to SIGKILL. A stalled child gets SIGUSR1 instead, and the time to write its stacks.
    cancel_grace: float
    checkpoint_grace: float
    dump_grace: float = 2.0

    @classmethod
    def of(cls, settings: StoreSettings) -> Limits:
        return cls(
            control=settings.control_seconds,
            heartbeat=settings.heartbeat_seconds,
            stall=settings.stall_seconds,
            cancel_grace=settings.cancel_grace_seconds,
            checkpoint_grace=settings.checkpoint_grace_seconds,
        )

    def grace(self, reason: StopReason) -> float:
        return {
            StopReason.LOST: 0.0,
            StopReason.CANCELLED: self.cancel_grace,
            StopReason.STALLED: self.dump_grace,
        }.get(reason, self.checkpoint_grace)


class Supervisor:
    """A context manager around an attempt. `reason` says why it shall end, None while nothing is in its
    way."""

    def __init__(
        self,
        *,
        renew: Callable[[], StopRequest],
        wishes: Callable[[], StopRequest],
        stopping: threading.Event,
        limits: Limits,
    ) -> None:
        self.reason: StopReason | None = None
        self._renew = renew
        self._wishes = wishes
        self._stopping = stopping
        self._limits = limits
        self._lock = threading.Lock()
        self._child: Child | None = None
        self._kill_at = float("inf")
        self._over = threading.Event()
        self._thread = threading.Thread(target=in_context(self._run), name="watch", daemon=True)

    def __enter__(self) -> Supervisor:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    @contextmanager
    def supervising(self, child: Child) -> Iterator[None]:
        """While the body runs, `child` is ended when the attempt shall end; at once if that is so already."""
        with self._lock:
            self._child = child
            if self.reason is not None:
                self._begin_to_end(child, self.reason)
        try:
            yield
        finally:
            with self._lock:
                self._child, self._kill_at = None, float("inf")

    def _run(self) -> None:
        try:
            self._watch()
        except Exception:
            log.exception("the watch has failed: nobody renews the lease or hears a cancel any more")
            self._end(StopReason.LOST)

    def _watch(self) -> None:
        renew_at = 0.0
        while not self._over.wait(self._pause()):
            now = time.monotonic()
            due = now >= renew_at
            if due:
                renew_at = now + self._limits.heartbeat
            self._look(self._renew if due else self._wishes)
            with self._lock:
                if self._child is not None and time.monotonic() >= self._kill_at:
                    self._child.kill()

    def _pause(self) -> float:
        return min(self._limits.control, max(self._kill_at - time.monotonic(), 0.02))

    def _look(self, ask: Callable[[], StopRequest]) -> None:
        try:
            wishes = ask()
        except LostFence:
            self._end(StopReason.LOST)
            return
        except Unavailable as fault:
            # Training goes on: whether the lease was kept is for the fence to say, once the database is back.
            log.warning("the database is away, the attempt goes on: %s", fault)
            wishes = StopRequest(cancel=False, pause=False)
        if self._stopping.is_set():
            self._end(StopReason.SHUTDOWN)
        if wishes.pause:
            self._end(StopReason.PAUSED)
        if self._stalls():
            self._end(StopReason.STALLED)
        if wishes.cancel:
            self._end(StopReason.CANCELLED)

    def _stalls(self) -> bool:
        child = self._child
        if child is None:
            return False
        patience = self._limits.stall * (1 if child.has_spoken else _STARTUP_FACTOR)
        return time.monotonic() - child.last_line_at > patience

    def _end(self, reason: StopReason) -> None:
        with self._lock:
            if self.reason is not None and _PRIORITY.index(reason) <= _PRIORITY.index(self.reason):
                return
            self.reason = reason
            if self._child is not None:
                self._begin_to_end(self._child, reason)

    def _begin_to_end(self, child: Child, reason: StopReason) -> None:
        log.info("ending child %d: %s", child.pid, reason)
        self._kill_at = min(self._kill_at, time.monotonic() + self._limits.grace(reason))
        if reason is StopReason.STALLED:
            child.dump_stacks()
        elif reason is StopReason.LOST:
            child.kill()
        else:
            child.terminate()
