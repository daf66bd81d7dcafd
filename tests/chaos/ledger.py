"""Results of runs as JSON lines, each with its time and commit."""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


def stamp() -> dict[str, str]:
    command = ["git", "-C", str(FOLDER.parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return {"at": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit}


def add(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(result) + "\n")
    print(json.dumps(result, indent=1))
