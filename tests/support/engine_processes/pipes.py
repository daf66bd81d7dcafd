"""The engine as a process of its own, with pipes."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from typing import IO, Any

import pytest

DEADLINE = 60.0  #: seconds, on a busy machine


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a process with pipes, and ends it with the test."""
    processes: list[subprocess.Popen[str]] = []

    def start(*command: Any) -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen([*map(str, command)], text=True, env=environment, **pipes))  # type: ignore[call-overload]
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def until(stream: IO[str] | None, code: str) -> list[dict[str, Any]]:
    """Reads events up to the first of this code."""
    assert stream is not None
    events = []
    for line in stream:
        events.append(json.loads(line))
        if events[-1]["code"] == code:
            return events
    raise AssertionError(f"the process ended without {code}")
