"""Every step's loss and every score of a run, as rows of a CSV file: what `result_files` names in the end.

The history so far goes along with each checkpoint, so that a run that was resumed elsewhere still has all
its steps. It does NOT know where the file is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLUMNS = (
    *("step", "stage", "stage_index", "epoch", "train_loss", "learning_rate", "tokens"),
    *("valid_loss", "accuracy", "correct", "n", "split"),
)
FILE_NAME = "history.csv"


class LossHistory:
    """Lines in the order in which they became known; nothing but numbers and plain words is in them."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._step = "0"

    @classmethod
    def load(cls, path: Path) -> LossHistory:
        """What `save` wrote; empty if there is no such file."""
        history = cls()
        if path.exists():
            history._lines = path.read_text().splitlines()[1:]
        if history._lines:
            history._step = history._lines[-1].partition(",")[0]
        return history

    def save(self, path: Path) -> None:
        path.write_text("\n".join([",".join(COLUMNS), *self._lines]) + "\n")

    def add(self, event: Mapping[str, Any]) -> None:
        """Keep what an event says of losses and scores; other events say nothing of them."""
        data = event["data"]
        match event["code"]:
            case "METRICS":
                self._append({**data, "train_loss": data["loss"]})
            case "EPOCH_COMPLETE":
                # Its own train_loss is the epoch's mean; the column holds what each step had.
                self._append({**data, "train_loss": None, "valid_loss": data.get("eval_loss")})
            case "EVALUATION":
                self._append(data)

    def _append(self, data: Mapping[str, Any]) -> None:
        self._step = str(data.get("step", self._step))
        known = {**data, "step": self._step}
        values = (known.get(name) for name in COLUMNS)
        self._lines.append(",".join("" if value is None else str(value) for value in values))
