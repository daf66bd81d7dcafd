"""Supervises one attempt on a thread of its own: lease, cancel, pause, shutdown, stalls, and the end of its child.

It runs from the claim to the last write, so that no download, upload or slow write delays a heartbeat or a kill.
`worker.jobs.attempt` decides from `stop_reason` what becomes of the job.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType

from store.errors import LostFence, Unavailable
from store.jobs.fence import StopRequest
from store.settings import StoreSettings
from worker.engine_process.child import Child

log = logging.getLogger(__name__)


class StopReason(StrEnum):
    """Why an attempt must end, by rising priority: a later reason replaces an earlier one of lower priority."""

    SHUTDOWN = "shutdown"  #: The worker shuts down: a checkpoint, then back to the queue.
    PAUSED = "paused"  #: The user paused the job: a checkpoint, if it comes in time.
    STALLED = "stalled"  #: The child wrote nothing for too long: counts as a crash.
    MEMBER_LOST = "member_lost"  #: Another worker that trains the job was lost: counts as a crash.
    CANCELLED = "cancelled"  #: The user cancelled the job: no checkpoint.
    LOST = "lost"  #: The attempt is no longer the current one: killed at once, nothing more is written.


_PRIORITY = list(StopReason)

#: The first line of a child may take this many stall times: it may be downloading its model.
_STARTUP_FACTOR = 4


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Intervals and timeouts in seconds."""

    control: float  #: between two reads of what the user requests
    heartbeat: float  #: between two renewals of the lease
    stall: float  #: without a line on the child's stdout
    #: From SIGTERM to SIGKILL. A stalled child gets SIGUSR1 instead, and the time to write its stacks.
    cancel_grace: float
    checkpoint_grace: float
    dump_grace: float = 2.0

    @classmethod
    def from_settings(cls, settings: StoreSettings) -> Limits:
        return cls(
            control=settings.control_seconds,
            heartbeat=settings.heartbeat_seconds,
            stall=settings.stall_seconds,
            cancel_grace=settings.cancel_grace_seconds,
            checkpoint_grace=settings.checkpoint_grace_seconds,
        )

    def grace(self, reason: StopReason) -> float:
        match reason:
            case StopReason.LOST | StopReason.MEMBER_LOST:
                return 0.0
            case StopReason.CANCELLED:
                return self.cancel_grace
            case StopReason.STALLED:
                return self.dump_grace
            case _:
                return self.checkpoint_grace


class Supervisor:
    """A context manager around an attempt. `stop_reason` is None until the attempt must end.

    `renew_lease` and `read_stop_request` return what the user requests. They may raise LostFence, which ends the
    attempt, and Unavailable, which does not.
    """

    def __init__(
        self,
        *,
        renew_lease: Callable[[], StopRequest],
        read_stop_request: Callable[[], StopRequest],
        stopping: threading.Event,
        limits: Limits,
    ) -> None:
        self.stop_reason: StopReason | None = None
        self._renew_lease = renew_lease
        self._read_stop_request = read_stop_request
        self._stopping = stopping
        self._limits = limits
        self._lock = threading.Lock()
        self._child: Child | None = None
        self._kill_at = float("inf")
        self._over = threading.Event()
        self._thread = threading.Thread(
            target=copy_context().run, args=(self._run,), name="supervisor", daemon=True
        )

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
        """Ends `child` when the attempt must end while the body runs; at once if it must end already."""
        with self._lock:
            self._child = child
            if self.stop_reason is not None:
                self._end_child(child, self.stop_reason)
        try:
            yield
        finally:
            with self._lock:
                self._child, self._kill_at = None, float("inf")

    def _run(self) -> None:
        try:
            self._loop()
        except Exception:
            log.exception("the supervisor failed: without it nobody renews the lease, so the attempt ends")
            self._stop(StopReason.LOST)

    def _loop(self) -> None:
        renew_at = 0.0
        while not self._over.wait(self._next_wait()):
            now = time.monotonic()
            is_due = now >= renew_at
            if is_due:
                renew_at = now + self._limits.heartbeat
            self._check(self._renew_lease if is_due else self._read_stop_request)
            with self._lock:
                if self._child is not None and time.monotonic() >= self._kill_at:
                    self._child.kill()

    def _next_wait(self) -> float:
        return min(self._limits.control, max(self._kill_at - time.monotonic(), 0.02))

    def _check(self, read_request: Callable[[], StopRequest]) -> None:
        try:
            request = read_request()
        except LostFence:
            self._stop(StopReason.LOST)
            return
        except Unavailable as error:
            # Training goes on: the fence decides whether the lease was kept, once the database is back.
            log.warning("the database is not reachable, the attempt goes on: %s", error)
            request = StopRequest(cancel=False, pause=False)
        if self._stopping.is_set():
            self._stop(StopReason.SHUTDOWN)
        if request.pause:
            self._stop(StopReason.PAUSED)
        if self._is_stalled():
            self._stop(StopReason.STALLED)
        if request.member_lost:
            self._stop(StopReason.MEMBER_LOST)
        if request.cancel:
            self._stop(StopReason.CANCELLED)

    def _is_stalled(self) -> bool:
        child = self._child
        if child is None:
            return False
        timeout = self._limits.stall * (1 if child.has_output else _STARTUP_FACTOR)
        return time.monotonic() - child.last_line_at > timeout

    def _stop(self, reason: StopReason) -> None:
        with self._lock:
            if self.stop_reason is not None and _PRIORITY.index(reason) <= _PRIORITY.index(self.stop_reason):
                return
            self.stop_reason = reason
            if self._child is not None:
                self._end_child(self._child, reason)

    def _end_child(self, child: Child, reason: StopReason) -> None:
        log.info("ending child %d: %s", child.pid, reason)
        self._kill_at = min(self._kill_at, time.monotonic() + self._limits.grace(reason))
        if reason is StopReason.STALLED:
            child.dump_stacks()
        elif reason in (StopReason.LOST, StopReason.MEMBER_LOST):
            child.kill()
        else:
            child.terminate()
