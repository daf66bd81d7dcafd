"""`judge`: which rows the runs of several arms got right, in; the verdict over the arms, out. JSON both ways.

It loads no torch.
"""

from __future__ import annotations

import argparse
import json
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from heft_engine.errors import ConfigError
from heft_engine.row_outcomes import unpack_rows
from heft_engine.statistics import Arm, Outcome, judge


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RunOutcome(_Strict):
    """`right`: row by row, as `heft_engine.row_outcomes` packs it."""

    seed: int
    n: Annotated[int, Field(ge=1)]
    rows_sha256: str
    right: str


class ArmOutcomes(_Strict):
    name: str
    seeds: list[int]
    runs: list[RunOutcome]


class Question(_Strict):
    """`baseline`: the arm that all others are compared with; None compares every pair."""

    arms: list[ArmOutcomes]
    baseline: str | None = None


def run(options: argparse.Namespace) -> None:
    try:
        question = Question.model_validate_json(options.run_file.read_text())
    except ValidationError as error:
        raise ConfigError(f"no question for judge: {error.errors()[0]['msg']}", param="run-file") from None
    arms = [
        Arm(
            name=arm.name,
            seeds=arm.seeds,
            outcomes=[
                Outcome(seed=one.seed, right=unpack_rows(one.right, one.n), rows_sha256=one.rows_sha256)
                for one in arm.runs
            ],
        )
        for arm in question.arms
    ]
    print(json.dumps(judge(arms, baseline=question.baseline), allow_nan=False))
