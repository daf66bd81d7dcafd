"""Runs a command of the engine that reads one JSON question and prints one JSON answer.

A child process, because statsmodels, pandas and optuna would stay in this process's memory for good.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from worker.context import Context
from worker.engine_process.child import child_environment

_TIMEOUT_SECONDS = 120.0


def query_engine(context: Context, command: str, question: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the answer. Raises SubprocessError; ValueError for an answer that is not JSON."""
    with tempfile.TemporaryDirectory(prefix=f"{command}-", dir=context.scratch) as folder:
        path = Path(folder) / "question.json"
        path.write_text(json.dumps(question))
        completed = subprocess.run(
            [*context.engine_command, command, "--run-file", str(path)],
            env=child_environment(os.environ),
            cwd=folder,
            capture_output=True,
            timeout=_TIMEOUT_SECONDS,
            check=True,
        )
    answer: dict[str, Any] = json.loads(completed.stdout)
    return answer
