"""Finds the processes, locks and temporary files that a stopped stack has left behind."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import psutil

from cli.errors import CommandError
from cli.stack.home import Home
from cli.stack.process import locked

_LOCKS = ("heft.lock", "postgres.lock", "valkey.lock", "cache/workers/*/lock", "cache/workers/lock")
#: Files of attempts and exports, of uploads, and of writes that were not renamed.
_TEMPORARY = ("cache/workers/*/files", "artifacts/.incomplete/*", "**/*.partial", "**/*.tmp", "**/*.new")


def left_behind(
    home: Home,
    folder: Path,
    seen: Iterable[psutil.Process],
    *,
    exempt: Collection[int] = (),
    timeout: float = 15.0,
) -> list[str]:
    """Returns a sentence for each leftover.

    seen: processes that were seen in the stack. Others are found by `folder`: they work there, or their command line
    names it.
    """
    processes = {process.pid: process for process in [*seen, *_processes_of(folder)]}
    expected_gone = [process for pid, process in processes.items() if pid not in exempt]
    _, alive = psutil.wait_procs(expected_gone, timeout=timeout)
    left = [f"process {process.pid}: {_command(process)}" for process in alive]
    left += [str(path) for pattern in _TEMPORARY for path in home.path.glob(pattern)]
    left += [str(path) for path in (home.run, home.state_file) if path.exists()]
    for path in [path for pattern in _LOCKS for path in home.path.glob(pattern)]:
        try:
            with locked(path, wait_seconds=timeout / 3, busy="held"):
                pass
        except CommandError as error:
            left.append(f"lock {path}: {error}")
    return left


def _processes_of(folder: Path) -> Iterator[psutil.Process]:
    inside = f"{folder}{os.sep}"
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            words = [*process.cmdline(), process.cwd() + os.sep]
        except psutil.Error:
            continue  # it has ended, or belongs to another user
        if any(inside in word for word in words):
            yield process


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return "gone"
