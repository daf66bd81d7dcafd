"""Supervises the processes of a machine: starts them in order, restarts those that die, stops them all.

Everything runs on the main thread, whose end sends the children's death signal.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Protocol

from cli.errors import CommandError
from cli.stack.process import end, kill_group, spawn, wait_until

_TICK_SECONDS = 0.1
_FIRST_PAUSE_SECONDS = 0.5
_MAX_PAUSE_SECONDS = 30.0
#: After running this long, a process is restarted with the first pause again.
_HEALTHY_SECONDS = 60.0


class Interrupted(BaseException):
    """Raised by Ctrl-C and SIGTERM."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Raises Interrupted on SIGINT and SIGTERM, also if a shell's `&` has ignored SIGINT."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Service(Protocol):
    """A supervised process."""

    name: str
    log: Path
    process: subprocess.Popen[bytes] | None

    def start(self) -> None:
        """Starts it and returns when it runs. Raises CommandError with the end of its log."""

    def stop(self) -> None:
        """Stops it, by SIGKILL in the end. Does nothing if it has not been started."""


@dataclass(kw_only=True)
class Program:
    """A process of the project, which SIGTERM shuts down gracefully."""

    name: str
    command: Sequence[str | Path]
    environment: Mapping[str, str]
    log: Path
    stop_seconds: float
    keep_open: Sequence[int] = ()
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        # SIGKILL, because the database ends too when the parent is killed; the lease returns the job to the queue.
        self.process = spawn(
            self.command,
            log=self.log,
            environment=self.environment,
            death_signal=signal.SIGKILL,
            keep_open=self.keep_open,
        )

    def terminate(self) -> None:
        # Once only: a second SIGTERM is a cold shutdown for Celery.
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def stop(self) -> None:
        if self.process is not None:
            wait_until(
                lambda: self.process is None or self.process.poll() is not None, seconds=self.stop_seconds
            )
            end(self.process, ())
            self.process = None

    def kill(self) -> None:
        if self.process is not None:
            kill_group(self.process)


@dataclass(kw_only=True)
class _Supervised:
    service: Service
    pause: float = _FIRST_PAUSE_SECONDS
    started_at: float = field(default_factory=time.monotonic)
    restart_at: float | None = None


class Supervisor:
    """`report` is called with a message for each death and restart."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._supervised: list[_Supervised] = []

    def start(self, service: Service) -> None:
        """Starts a service and supervises it. Raises CommandError if this start fails."""
        self._supervised.append(_Supervised(service=service))
        service.start()

    def watch(self, *, until: Callable[[], bool] = lambda: False, seconds: float = float("inf")) -> bool:
        """Restarts services that die, until `until()` (True) or a timeout (False). Raises Interrupted."""
        deadline = time.monotonic() + seconds
        while not until():
            if time.monotonic() >= deadline:
                return False
            for supervised in self._supervised:
                self._check(supervised)
            time.sleep(_TICK_SECONDS)
        return True

    def stop(self) -> None:
        """Stops all services in reverse order. If interrupted again, kills the programs, but not the servers."""
        services = [supervised.service for supervised in reversed(self._supervised)]
        self._supervised = []
        programs = [service for service in services if isinstance(service, Program)]
        try:
            for program in programs:
                program.terminate()
            for program in programs:
                program.stop()
        except Interrupted:
            for program in programs:
                program.kill()
        for service in services:
            service.stop()

    def _check(self, supervised: _Supervised) -> None:
        service, now = supervised.service, time.monotonic()
        if supervised.restart_at is not None:
            if now >= supervised.restart_at:
                self._restart(supervised)
            return
        if service.process is None or service.process.poll() is None:
            return
        if now - supervised.started_at >= _HEALTHY_SECONDS:
            supervised.pause = _FIRST_PAUSE_SECONDS
        status = _exit_text(service.process.returncode)
        self._report(f"{service.name} ended ({status}), restarting in {supervised.pause:g} s")
        kill_group(service.process)
        self._schedule_restart(supervised)

    def _restart(self, supervised: _Supervised) -> None:
        supervised.restart_at = None
        try:
            supervised.service.start()
        except CommandError as error:
            self._report(f"{supervised.service.name} did not start: {error}")
            self._schedule_restart(supervised)
            return
        supervised.started_at = time.monotonic()
        self._report(f"{supervised.service.name} restarted; its log is {supervised.service.log}")

    @staticmethod
    def _schedule_restart(supervised: _Supervised) -> None:
        supervised.restart_at = time.monotonic() + supervised.pause
        supervised.pause = min(2 * supervised.pause, _MAX_PAUSE_SECONDS)


def _exit_text(status: int) -> str:
    if status >= 0:
        return f"exit {status}"
    return signal.strsignal(-status) or f"signal {-status}"
