"""The check of this machine's GPU: whether the engine's torch can use it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cli.doctor.finding import Finding, ok, warning, wrong

#: There with NVIDIA's driver.
DRIVER = Path("/dev/nvidiactl")
#: A child process: torch takes seconds to import, and the command does not have it.
COMMAND = (sys.executable, "-m", "heft_engine", "devices")
_NAME, _SECONDS = "GPU", 120


def gpu(command: Sequence[str] = COMMAND) -> Finding:
    """Names the GPUs that torch can use, or why it can't use one that is there."""
    if not DRIVER.exists():
        return ok(_NAME, "none on this machine")
    if os.environ.get("HEFT_DEVICE") == "cpu":
        return ok(_NAME, "there is one, HEFT_DEVICE=cpu does without it")
    try:
        process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return wrong(
            _NAME, f"torch did not answer within {_SECONDS} s", "run nvidia-smi: does the driver answer?"
        )
    if process.returncode != 0:
        last = (process.stderr.strip().splitlines() or ["no message"])[-1]
        return warning(
            _NAME, f"there is one, and torch can't be asked: {last}", "install heft-service[worker] here"
        )
    report: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    if report["unusable"]:
        advice = "mend it, or set HEFT_DEVICE=cpu for workers that shall do without it; docs/gpu.md"
        return wrong(_NAME, f"there is one that can't be used: {report['unusable']}", advice)
    if not report["gpus"]:
        return ok(_NAME, "there is one, hidden by CUDA_VISIBLE_DEVICES")
    return ok(_NAME, ", ".join(map(_described, report["gpus"])) + f"; torch for CUDA {report['cuda']}")


def _described(device: dict[str, Any]) -> str:
    memory = f"{device['memory_bytes'] / 1e9:.0f} GB"
    return f"{device['name']} ({memory}, compute capability {device['compute_capability']})"
