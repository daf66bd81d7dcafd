"""Keeps the processes of one machine running: starts them in order, starts again what dies, ends them all.

It does NOT know what they do. All of it happens on the main thread: the children's death signal follows that.
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
_LONGEST_PAUSE_SECONDS = 30.0
#: Who ran for so long was healthy: its next pause is a short one again.
_HEALTHY_SECONDS = 60.0


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM arrived."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM raise Interrupted; a shell's `&` may have left SIGINT ignored."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Service(Protocol):
    """A process that is kept running."""

    name: str
    log: Path
    process: subprocess.Popen[bytes] | None

    def start(self) -> None:
        """Return when it runs. Raises CommandError with the end of its log."""

    def stop(self) -> None:
        """Return when it is gone, by force in the end. Nothing to do where it never ran."""


@dataclass(kw_only=True)
class Program:
    """One of the project's own processes: SIGTERM ends it in good order."""

    name: str
    command: Sequence[str | Path]
    environment: Mapping[str, str]
    log: Path
    stop_seconds: float
    keep_open: Sequence[int] = ()
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        # SIGKILL: when its owner was killed its database is going too, and the job's lease hands the job on.
        self.process = spawn(
            self.command,
            log=self.log,
            environment=self.environment,
            death_signal=signal.SIGKILL,
            keep_open=self.keep_open,
        )

    def ask_to_stop(self) -> None:
        # Once only: Celery takes a second SIGTERM for impatience.
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
class _Watched:
    service: Service
    pause: float = _FIRST_PAUSE_SECONDS
    started_at: float = field(default_factory=time.monotonic)
    restart_at: float | None = None


class Supervisor:
    """`say` gets one sentence for each death and each new start."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._watched: list[_Watched] = []

    def start(self, service: Service) -> None:
        """Start it and watch it from now on. Raises CommandError when its first start fails."""
        self._watched.append(_Watched(service=service))
        service.start()

    def watch(self, *, until: Callable[[], bool] = lambda: False, seconds: float = float("inf")) -> bool:
        """Start again what dies, until `until()` or the time is up (then False). Ends by Interrupted else."""
        deadline = time.monotonic() + seconds
        while not until():
            if time.monotonic() >= deadline:
                return False
            for watched in self._watched:
                self._look_at(watched)
            time.sleep(_TICK_SECONDS)
        return True

    def stop(self) -> None:
        """End everything, last started first. Interrupted again: the programs are killed, the servers not."""
        services = [watched.service for watched in reversed(self._watched)]
        self._watched = []
        programs = [service for service in services if isinstance(service, Program)]
        try:
            for program in programs:
                program.ask_to_stop()
            for program in programs:
                program.stop()
        except Interrupted:
            for program in programs:
                program.kill()
        for service in services:
            service.stop()

    def _look_at(self, watched: _Watched) -> None:
        service, now = watched.service, time.monotonic()
        if watched.restart_at is not None:
            if now >= watched.restart_at:
                self._start_again(watched)
            return
        if service.process is None or service.process.poll() is None:
            return
        if now - watched.started_at >= _HEALTHY_SECONDS:
            watched.pause = _FIRST_PAUSE_SECONDS
        self._say(
            f"{service.name} ended ({_how(service.process.returncode)}), starts again in {watched.pause:g} s"
        )
        kill_group(service.process)
        self._postpone(watched)

    def _start_again(self, watched: _Watched) -> None:
        watched.restart_at = None
        try:
            watched.service.start()
        except CommandError as error:
            self._say(f"{watched.service.name} did not start: {error}")
            self._postpone(watched)
            return
        watched.started_at = time.monotonic()
        self._say(f"{watched.service.name} is started again; its log: {watched.service.log}")

    @staticmethod
    def _postpone(watched: _Watched) -> None:
        watched.restart_at = time.monotonic() + watched.pause
        watched.pause = min(2 * watched.pause, _LONGEST_PAUSE_SECONDS)


def _how(status: int) -> str:
    if status >= 0:
        return f"exit {status}"
    return signal.strsignal(-status) or f"signal {-status}"
