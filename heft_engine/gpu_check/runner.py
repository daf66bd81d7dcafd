"""Runs each part in a process of its own: a part that crashes or hangs costs its own result and no other."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from heft_engine.gpu_check.part import Part

TOTAL_SECONDS = 300.0
#: A part that has less than this left is not begun: the imports alone take some seconds.
_LEAST_SECONDS = 10.0
#: Runs one part and prints its result; `--part` and its name follow.
COMMAND = (sys.executable, "-m", "heft_engine", "gpu-check")


def run_parts(
    parts: Sequence[Part],
    arguments: Sequence[str],
    *,
    total_seconds: float = TOTAL_SECONDS,
    command: Sequence[str] = COMMAND,
) -> Iterator[dict[str, Any]]:
    """Yields the result of each part as it ends. arguments: those of `command` for the device."""
    end = time.monotonic() + total_seconds
    for part in parts:
        left = end - time.monotonic()
        if left < _LEAST_SECONDS:
            yield _result(part, "not run", 0.0, "no time was left")
        else:
            yield _run(part, [*command, "--part", part.name, *arguments], min(part.seconds, left))


def _run(part: Part, command: Sequence[str], seconds: float) -> dict[str, Any]:
    started = time.monotonic()
    try:
        process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return _result(part, "error", seconds, f"ended after {seconds:.0f} s")
    with_result = [line for line in process.stdout.splitlines() if line.startswith("{")]
    if process.returncode == 0 and with_result:
        result: dict[str, Any] = json.loads(with_result[-1])
        return result
    last = "\n".join(process.stderr.strip().splitlines()[-12:])
    return _result(part, "error", time.monotonic() - started, f"exit code {process.returncode}\n{last}")


def _result(part: Part, status: str, seconds: float, error: str) -> dict[str, Any]:
    return {
        "part": part.name,
        "status": status,
        "seconds": round(seconds, 1),
        "figures": {},
        "failures": [],
        "error": error,
    }
