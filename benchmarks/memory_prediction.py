"""Estimated against actual memory of stages, from the events of whole runs."""

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

#: Cache budgets, in bytes per row of 200 tokens, that allow each cache level.
BYTES_PER_ROW = {"keys_values": 1 << 40, "states": 400_000, "nothing": 0}
#: Characters per token at most, in English passages.
_CHARACTERS_PER_TOKEN = 8

#: Settings of each case. Few rows suffice: memory depends on the sizes of micro-batches and their number.
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
    "rows of 1,024 tokens, hidden states only": {"length": 1_024, "rows": 8, "cache-level": "states"},
    "hidden states only": {"cache-level": "states"},
    "no cache": {"cache-level": "nothing"},
}


def job(
    model: str, stages: list[LoraStage | ReftStage], rows: Sequence[Row], settings: dict[str, Any], level: str
) -> list[dict[str, Any]]:
    """Returns each stage's type, cache level, and estimated and actual bytes."""
    events: list[Event] = []
    length = settings.get("max_length")
    if length is not None:
        rows = _long(rows, length)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(model=model, method="heft", stages=stages, **settings)
        cache_bytes = min(BYTES_PER_ROW[level] * len(rows) * (length or 200) // 200, 1 << 33)
        options = RunOptions(cache_memory_bytes=cache_bytes)
        train(config, rows, [], Path(folder) / "out", events.append, options=options)
    started = [event.data for event in events if event.code == "STAGE_STARTED"]
    completed = [event.data for event in events if event.code == "STAGE_COMPLETE"]
    return [
        {
            "type": start["stage"],
            "rung": start["cache"]["rung"],
            "compiled": start["compiled"],
            "estimated": start["memory_bytes"],
            "held": end["memory_bytes"],
        }
        for start, end in zip(started, completed, strict=True)
    ]


def _long(rows: Sequence[Row], tokens: int) -> list[Row]:
    """Gives rows passages of at least `tokens` tokens, cut from all passages; max_length truncates them."""
    size = tokens * _CHARACTERS_PER_TOKEN
    pool = "\n".join(row.passage or "" for row in rows)
    pool *= 1 + size * len(rows) // max(1, len(pool))
    return [replace(row, passage=pool[i * size : (i + 1) * size]) for i, row in enumerate(rows)]
