"""Every step's loss and every score of a run, as rows of a CSV file: what `result_files` names in the end.

The history so far goes along with each checkpoint, so that a run that was resumed elsewhere still has all
its steps. It does NOT know where the file is kept.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLUMNS = (
    *("step", "stage", "stage_index", "epoch", "train_loss", "learning_rate", "tokens"),
    *("valid_loss", "accuracy", "correct", "n", "split"),
)
FILE_NAME = "history.csv"


class History:
    """Rows in the order in which they became known."""

    def __init__(self) -> None:
        self._rows: list[dict[str, str]] = []

    @classmethod
    def load(cls, path: Path) -> History:
        """What `save` wrote; empty if there is no such file."""
        history = cls()
        if path.exists():
            with path.open(newline="") as file:
                history._rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
        return history

    def save(self, path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="")
            writer.writeheader()
            writer.writerows(self._rows)

    def add(self, event: Mapping[str, Any]) -> None:
        """Keep what an event says of losses and scores; other events say nothing of them."""
        data = event["data"]
        match event["code"]:
            case "METRICS":
                self._append(data, train_loss=data["loss"])
            case "EPOCH_COMPLETE":
                # Its own train_loss is the epoch's mean; the column holds what each step had.
                means = {"train_loss": None, "valid_loss": data.get("eval_loss")}
                self._append(data, **means, accuracy=data.get("eval_accuracy"))
            case "EVALUATION":
                self._append(data)

    def _append(self, data: Mapping[str, Any], **values: Any) -> None:
        known = {"step": self._last_step(), **data, **values}
        row = {name: str(known[name]) for name in COLUMNS if known.get(name) is not None}
        # A run that goes on from a checkpoint may evaluate the base again.
        if self._rows[-1:] != [row] and ("accuracy" not in row or row not in self._rows):
            self._rows.append(row)

    def _last_step(self) -> str:
        return self._rows[-1]["step"] if self._rows else "0"
