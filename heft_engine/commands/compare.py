"""`compare`: compares the arms of a study. Reads their runs' row values as JSON, prints the comparison as JSON.

Imports no torch.
"""

from __future__ import annotations

import argparse
import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from heft_engine.errors import ConfigError
from heft_engine.evaluation.row_values import unpack_correctness, unpack_graded
from heft_engine.studies.arms import Arm, RowValues
from heft_engine.studies.compare import compare_arms


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RunInput(_Strict):
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


class ArmInput(_Strict):
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


class Question(_Strict):
    """`baseline`: the arm or method that all others are compared with; None compares every pair."""

    arms: list[ArmInput]
    baseline: str | None = None


def run(options: argparse.Namespace) -> None:
    try:
        question = Question.model_validate_json(options.run_file.read_text())
    except ValidationError as error:
        raise ConfigError(
            f"the run file is not valid: {error.errors()[0]['msg']}", param="run-file"
        ) from None
    print(json.dumps(answer(question), allow_nan=False))


def answer(question: Question) -> dict[str, Any]:
    return compare_arms([arm.arm() for arm in question.arms], baseline=question.baseline)
