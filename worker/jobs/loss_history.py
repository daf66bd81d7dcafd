"""The losses and scores of a run as a CSV file, which becomes the job's result file.

Each checkpoint carries the history so far: a run that is resumed on another machine still has all of its steps.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLUMNS = (
    # OpenAI's, in its order.
    "step",
    "train_loss",
    "train_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
    # HEFT's own.
    "valid_accuracy",
    "stage",
    "stage_index",
    "epoch",
    "learning_rate",
    "tokens",
    "accuracy",
    "correct",
    "n",
    "split",
)
_OF_EPOCH = (
    "stage",
    "stage_index",
    "epoch",
    "valid_loss",
    "valid_mean_token_accuracy",
    "valid_accuracy",
)
FILE_NAME = "history.csv"


class LossHistory:
    """Lines in the order of their events. Values are numbers and names of stages: nothing needs quoting."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._step = "0"

    @classmethod
    def load(cls, path: Path) -> LossHistory:
        """Reads a file that `save` wrote, maybe with the columns of an earlier version.

        Returns an empty history if there is none.
        """
        history = cls()
        if path.exists():
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    history._append(row)
        return history

    def save(self, path: Path) -> None:
        path.write_text("\n".join([",".join(COLUMNS), *self._lines]) + "\n")

    def add(self, event: Mapping[str, Any]) -> None:
        """Adds the losses or scores of an event; ignores events that have none."""
        data = event["data"]
        match event["code"]:
            case "METRICS":
                values = {"train_loss": data["loss"], "train_accuracy": data.get("train_mean_token_accuracy")}
                self._append({**data, **values})
            case "EPOCH_COMPLETE":
                # Without its train_loss, the mean of the epoch: the column has the loss of each step.
                self._append({**self._take_step(), **{name: data.get(name) for name in _OF_EPOCH}})
            case "EVALUATION":
                self._append(data)

    def _take_step(self) -> dict[str, str]:
        """Removes and returns the last row if it is that of a step: its epoch's validation goes into the same row."""
        if not self._lines:
            return {}
        row = dict(zip(COLUMNS, self._lines[-1].split(","), strict=True))
        if not row["train_loss"]:
            return {}
        del self._lines[-1]
        return row

    def _append(self, data: Mapping[str, Any]) -> None:
        self._step = str(data.get("step", self._step))
        row = {**data, "step": self._step}
        values = [row.get(column) for column in COLUMNS]
        self._lines.append(",".join("" if value is None else str(value) for value in values))
