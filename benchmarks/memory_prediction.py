"""What a stage's memory was estimated at before it started, beside what it came to: whole runs, their own events."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from heft_engine.config.run_file import RunOptions
from heft_engine.config.train import LoraStage, ReftStage, TrainConfig
from heft_engine.data.rows import Row
from heft_engine.events import Event
from heft_engine.training.run import train

#: By the level that a budget leaves for rows of passages: see `budget`.
BYTES_A_ROW = {"keys_values": 1 << 40, "states": 400_000, "nothing": 0}
#: A token has at most so many characters, in passages of English.
_CHARACTERS = 8

#: What each case changes; rows are few, because what is held is decided by single passes and by how many there are.
CASES: dict[str, dict[str, Any]] = {
    "batch of 8": {},
    "batch of 8, layers compiled": {"compile": "yes"},
    "batch of 4": {"batch-size": 4},
    "batch of 16": {"batch-size": 16},
    "20 epochs": {"epochs": 20},
    "20 epochs, layers compiled": {"epochs": 20, "compile": "yes"},
    "rows of 256 tokens": {"length": 256},
    "rows of 512 tokens": {"length": 512},
    "rows of 1,024 tokens": {"length": 1_024, "rows": 8},
    "rows of 1,024 tokens, states alone": {"length": 1_024, "rows": 8, "rung": "states"},
    "states alone": {"rung": "states"},
    "no cache": {"rung": "nothing"},
}


def job(
    model: str, stages: list[LoraStage | ReftStage], rows: Sequence[Row], settings: dict[str, Any], level: str
) -> list[dict[str, Any]]:
    """Of each stage: its type, the level of its cache, bytes as estimated and as held."""
    told: list[Event] = []
    length = settings.get("max_length")
    if length is not None:
        rows = _long(rows, length)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(model=model, method="heft", stages=stages, **settings)
        cache_bytes = min(BYTES_A_ROW[level] * len(rows) * (length or 200) // 200, 1 << 33)
        options = RunOptions(cache_memory_bytes=cache_bytes)
        train(config, rows, [], Path(folder) / "out", told.append, options=options)
    begun = [event.data for event in told if event.code == "STAGE_STARTED"]
    ended = [event.data for event in told if event.code == "STAGE_COMPLETE"]
    return [
        {
            "type": one["stage"],
            "rung": one["cache"]["rung"],
            "compiled": one["compiled"],
            "estimated": one["memory_bytes"],
            "held": other["memory_bytes"],
        }
        for one, other in zip(begun, ended, strict=True)
    ]


def _long(rows: Sequence[Row], tokens: int) -> list[Row]:
    """Passages of all rows, one behind the other, cut into ones that are at least so long; max_length cuts the rest."""
    size = tokens * _CHARACTERS
    pool = "\n".join(row.passage or "" for row in rows)
    pool *= 1 + size * len(rows) // max(1, len(pool))
    return [replace(row, passage=pool[i * size : (i + 1) * size]) for i, row in enumerate(rows)]
