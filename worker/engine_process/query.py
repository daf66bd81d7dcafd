"""A question to the engine, answered by a child: JSON in a file, JSON back. It does NOT know what is asked.

Why a child: statsmodels, pandas and optuna would stay in this process for good, and the API shall start without them.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from worker.context import Context
from worker.engine_process.child import child_environment

_SECONDS = 120.0


def ask(context: Context, command: Sequence[str], verb: str, question: Mapping[str, Any]) -> dict[str, Any]:
    """Raises SubprocessError; ValueError for an answer that is no JSON."""
    with tempfile.TemporaryDirectory(prefix=f"{verb}-", dir=context.scratch) as folder:
        path = Path(folder) / "question.json"
        path.write_text(json.dumps(question))
        done = subprocess.run(
            [*command, verb, "--run-file", str(path)],
            env=child_environment(os.environ),
            cwd=folder,
            capture_output=True,
            timeout=_SECONDS,
            check=True,
        )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
