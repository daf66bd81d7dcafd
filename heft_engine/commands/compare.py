"""`compare`: compares the arms of a study. Reads their runs' row values as JSON, prints the comparison as JSON.

Imports no torch.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from heft_engine.commands.json_file import read_json_file
from heft_engine.config.train import Settings
from heft_engine.evaluation.row_values import unpack_correctness, unpack_graded
from heft_engine.studies.arms import Arm, RowValues
from heft_engine.studies.compare import compare_arms


class RunInput(Settings):
    """The row values of a run, packed by heft_engine.evaluation.row_values: `right`, or `values` of a graded metric."""

    seed: int
    n: Annotated[int, Field(ge=1)]
    rows_sha256: str
    right: str | None = None
    values: str | None = None

    @model_validator(mode="after")
    def _right_or_values(self) -> RunInput:
        if (self.right is None) == (self.values is None):
            raise ValueError("a run must have either right or values")
        return self

    def row_values(self) -> RowValues:
        """Unpacks the values. Raises ValueError unless there are `n`."""
        if self.right is not None:
            values: Any = unpack_correctness(self.right, self.n)
        else:
            values = unpack_graded(self.values or "", self.n)
        return RowValues(seed=self.seed, values=values, rows_sha256=self.rows_sha256)


class ArmInput(Settings):
    name: str
    seeds: list[int]
    runs: list[RunInput]
    task: str | None = None
    method: str | None = None

    def arm(self) -> Arm:
        return Arm(
            name=self.name,
            seeds=self.seeds,
            task=self.task,
            method=self.method,
            runs=[run.row_values() for run in self.runs],
        )


class Question(Settings):
    """`baseline`: the arm or method that all others are compared with; None compares every pair."""

    arms: list[ArmInput]
    baseline: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run-file", type=Path, required=True, help="see Question in this module")


def run(args: argparse.Namespace) -> None:
    print(json.dumps(answer(read_json_file(args.run_file, Question)), allow_nan=False))


def answer(question: Question) -> dict[str, Any]:
    return compare_arms([arm.arm() for arm in question.arms], baseline=question.baseline)
