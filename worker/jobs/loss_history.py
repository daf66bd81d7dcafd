"""The losses and scores of a run as a CSV file, which becomes the job's result file.

Each checkpoint carries the history so far: a run that is resumed on another machine still has all of its steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLUMNS = (
    "step",
    "stage",
    "stage_index",
    "epoch",
    "train_loss",
    "learning_rate",
    "tokens",
    "valid_loss",
    "accuracy",
    "correct",
    "n",
    "split",
)
FILE_NAME = "history.csv"


class LossHistory:
    """Lines in the order of their events. Values are numbers and names of stages: nothing needs quoting."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._step = "0"

    @classmethod
    def load(cls, path: Path) -> LossHistory:
        """Reads a file that `save` wrote; an empty history if there is none."""
        history = cls()
        if path.exists():
            history._lines = path.read_text().splitlines()[1:]
        if history._lines:
            history._step = history._lines[-1].partition(",")[0]
        return history

    def save(self, path: Path) -> None:
        path.write_text("\n".join([",".join(COLUMNS), *self._lines]) + "\n")

    def add(self, event: Mapping[str, Any]) -> None:
        """Adds the losses or scores of an event; ignores events that have none."""
        data = event["data"]
        match event["code"]:
            case "METRICS":
                self._append({**data, "train_loss": data["loss"]})
            case "EPOCH_COMPLETE":
                # Its own train_loss is the mean of the epoch; the column has the loss of each step.
                self._append({**data, "train_loss": None, "valid_loss": data.get("eval_loss")})
            case "EVALUATION":
                self._append(data)

    def _append(self, data: Mapping[str, Any]) -> None:
        self._step = str(data.get("step", self._step))
        row = {**data, "step": self._step}
        values = [row.get(column) for column in COLUMNS]
        self._lines.append(",".join("" if value is None else str(value) for value in values))
