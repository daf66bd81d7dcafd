"""`suggest`: suggests a search's next points. Reads its trials so far as JSON, prints the points as JSON.

Imports no torch.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from heft_engine.commands.json_file import read_json_file
from heft_engine.config.search_space import Values
from heft_engine.config.train import Settings
from heft_engine.studies.suggest import Sampler, Search, Trial, suggest


class Question(Settings):
    """`count`: the number of points to suggest."""

    space: dict[str, Values]
    budget: Annotated[int, Field(ge=1)]
    sampler: Sampler
    seed: int
    trials: list[Trial]
    count: Annotated[int, Field(ge=1)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run-file", type=Path, required=True, help="see Question in this module")


def run(args: argparse.Namespace) -> None:
    print(json.dumps(answer(read_json_file(args.run_file, Question)), allow_nan=False))


def answer(question: Question) -> dict[str, Any]:
    search = Search(
        space=question.space, budget=question.budget, sampler=question.sampler, seed=question.seed
    )
    return {"points": suggest(search, question.trials, question.count)}
