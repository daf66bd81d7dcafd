"""`suggest`: the trials of a search so far, in; the points to try next, out. JSON both ways. It loads no torch."""

from __future__ import annotations

import argparse
import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from heft_engine.config.search_space import Values
from heft_engine.errors import ConfigError
from heft_engine.studies.suggest import Sampler, Search, State, Trial, suggest


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PastTrial(_Strict):
    point: dict[str, Any]
    state: State
    value: float | None = None


class Question(_Strict):
    """`count`: how many points are asked for."""

    space: dict[str, Values]
    budget: Annotated[int, Field(ge=1)]
    sampler: Sampler
    seed: int
    trials: list[PastTrial]
    count: Annotated[int, Field(ge=1)]


def run(options: argparse.Namespace) -> None:
    try:
        question = Question.model_validate_json(options.run_file.read_text())
    except ValidationError as error:
        raise ConfigError(f"no question for suggest: {error.errors()[0]['msg']}", param="run-file") from None
    print(json.dumps(answer(question), allow_nan=False))


def answer(question: Question) -> dict[str, Any]:
    search = Search(
        space=question.space, budget=question.budget, sampler=question.sampler, seed=question.seed
    )
    trials = [Trial(point=one.point, state=one.state, value=one.value) for one in question.trials]
    return {"points": suggest(search, trials, question.count)}
