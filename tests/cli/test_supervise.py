"""The supervisor with small programs: restarts, pauses and shutdown."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.errors import CommandError
from cli.stack.process import last_lines, wait_until
from cli.stack.supervise import Interrupted, Program, Supervisor, interruptible

#: Prints a line and sleeps.
STAYS = "print('here', flush=True); import time; time.sleep(600)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {STAYS}"


@pytest.fixture
def messages() -> list[str]:
    return []


@pytest.fixture
def supervisor(messages: list[str]) -> Iterator[Supervisor]:
    supervisor = Supervisor(messages.append)
    yield supervisor
    supervisor.stop()


def program(folder: Path, code: str, *, stop_seconds: float = 10) -> Program:
    return Program(
        name="helper",
        command=[sys.executable, "-c", code],
        environment={},
        log=folder / "helper.log",
        stop_seconds=stop_seconds,
    )


def is_there(helper: Program) -> bool:
    return last_lines(helper.log, 1) == "here"


def test_a_dead_process_is_restarted(tmp_path: Path, supervisor: Supervisor, messages: list[str]) -> None:
    helper = program(tmp_path, STAYS)
    supervisor.start(helper)
    assert helper.process is not None
    first = helper.process.pid
    os.kill(first, signal.SIGKILL)
    assert supervisor.watch(
        until=lambda: helper.process is not None and helper.process.pid != first, seconds=20
    )
    assert messages[0] == "helper ended (Killed), restarting in 0.5 s"
    assert messages[1].startswith("helper restarted")


def test_pauses_grow(tmp_path: Path, supervisor: Supervisor, messages: list[str]) -> None:
    supervisor.start(program(tmp_path, "raise SystemExit(3)"))
    assert supervisor.watch(until=lambda: len(messages) >= 5, seconds=20)
    assert [line.removeprefix("helper ended (exit 3), restarting in ") for line in messages[::2]] == [
        "0.5 s",
        "1 s",
        "2 s",
    ]


def test_a_failed_start_is_retried(supervisor: Supervisor, messages: list[str], tmp_path: Path) -> None:
    helper = program(tmp_path, "raise SystemExit(1)")
    supervisor.start(helper)

    def refuse() -> None:
        raise CommandError("not today")

    helper.start = refuse  # type: ignore[method-assign]
    assert supervisor.watch(
        until=lambda: messages[-2:] == ["helper did not start: not today"] * 2, seconds=20
    )


def test_watch_returns_on_timeout(supervisor: Supervisor) -> None:
    assert not supervisor.watch(until=lambda: False, seconds=0.3)


def test_a_process_that_ignores_signals_is_killed_with_its_group(
    tmp_path: Path, supervisor: Supervisor
) -> None:
    child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {STUBBORN!r}]); {STUBBORN}"
    helper = program(tmp_path, child, stop_seconds=0.2)
    supervisor.start(helper)
    assert wait_until(lambda: helper.log.exists() and helper.log.read_text() == "here\n" * 2, seconds=20)
    assert helper.process is not None
    group = helper.process.pid
    supervisor.stop()
    assert wait_until(lambda: not group_lives(group), seconds=20)


def test_a_second_interrupt_kills_the_programs(tmp_path: Path, supervisor: Supervisor) -> None:
    helper = program(tmp_path, STUBBORN, stop_seconds=600)
    supervisor.start(helper)
    assert wait_until(lambda: is_there(helper), seconds=20)
    began = time.monotonic()
    impatient = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
    with interruptible():
        impatient.start()
        supervisor.stop()
    impatient.join()
    assert time.monotonic() - began < 60
    assert helper.process is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_raise_interrupted(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted), interruptible():
        signal.raise_signal(number)
    assert signal.getsignal(number) == before


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    # A zombie still counts for kill(2).
    members = [path for path in Path("/proc").glob("[0-9]*/stat") if _group_and_state(path) == (group, True)]
    return bool(members)


def _group_and_state(path: Path) -> tuple[int, bool]:
    try:
        fields = path.read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0, False
    return int(fields[2]), fields[0] != "Z"


def test_a_signal_blocked_in_the_parent_reaches_the_child(tmp_path: Path) -> None:
    helper = program(tmp_path, STAYS)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        helper.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert wait_until(lambda: is_there(helper), seconds=20)
    process = helper.process
    assert process is not None
    helper.terminate()
    helper.stop()
    assert process.returncode == -signal.SIGTERM
