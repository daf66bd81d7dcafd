"""`compare`: which rows the runs of several arms got right (or how right), in; the verdict, out. JSON both ways.

It loads no torch.
"""

from __future__ import annotations

import argparse
import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from heft_engine.errors import ConfigError
from heft_engine.evaluation.row_values import unpack_correctness, unpack_graded
from heft_engine.studies import Arm, RowValues, compare_arms


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RunOutcome(_Strict):
    """`right`, or `values` of a graded metric: row by row, as `heft_engine.evaluation.row_values` packs them."""

    seed: int
    n: Annotated[int, Field(ge=1)]
    rows_sha256: str
    right: str | None = None
    values: str | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> RunOutcome:
        if (self.right is None) == (self.values is None):
            raise ValueError("give right or values")
        return self

    def outcome(self) -> RowValues:
        """Raises ValueError where there are not `n` rows."""
        rows = (
            unpack_correctness(self.right, self.n)
            if self.right is not None
            else unpack_graded(self.values or "", self.n)
        )
        return RowValues(seed=self.seed, right=rows, rows_sha256=self.rows_sha256)


class ArmOutcomes(_Strict):
    name: str
    seeds: list[int]
    runs: list[RunOutcome]
    task: str | None = None
    method: str | None = None


class Question(_Strict):
    """`baseline`: the arm, or the method, that all others are compared with; None compares every pair."""

    arms: list[ArmOutcomes]
    baseline: str | None = None


def run(options: argparse.Namespace) -> None:
    try:
        question = Question.model_validate_json(options.run_file.read_text())
    except ValidationError as error:
        raise ConfigError(f"no question for compare: {error.errors()[0]['msg']}", param="run-file") from None
    print(json.dumps(answer(question), allow_nan=False))


def answer(question: Question) -> dict[str, Any]:
    arms = [
        Arm(
            name=arm.name,
            seeds=arm.seeds,
            task=arm.task,
            method=arm.method,
            outcomes=[one.outcome() for one in arm.runs],
        )
        for arm in question.arms
    ]
    return compare_arms(arms, baseline=question.baseline)
