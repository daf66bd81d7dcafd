"""Suggestions of the next points of a search, by optuna, from all trials so far.

Nothing is stored: the optuna study is rebuilt from the trials each time, and each suggestion's sampler is seeded with
the search's seed and the trial's number, so equal trials give equal suggestions on every machine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState, create_trial

from heft_engine.config.search_space import Point, Range, Space, draw, point_key, size

Sampler = Literal["tpe", "random"]
State = Literal["running", "complete", "failed", "pruned"]

#: TPE starts with random points: half of the budget, at most optuna's default number.
_MAX_STARTUP_TRIALS = 10
#: Samples of a known point before random points are drawn instead.
_MAX_SAMPLES = 20
#: Random draws of known points before the space counts as exhausted: two adjacent floats are a range of infinite size.
_MAX_DRAWS = 10_000
_STATES = {
    "running": TrialState.RUNNING,
    "complete": TrialState.COMPLETE,
    "failed": TrialState.FAIL,
    "pruned": TrialState.PRUNED,
}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A tried point. `value`: its result if complete; higher is better."""

    point: Point
    state: State
    value: float | None = None


@dataclass(frozen=True, kw_only=True)
class Search:
    """The settings of a search. `budget`: its number of trials."""

    space: Space
    budget: int
    sampler: Sampler = "tpe"
    seed: int = 0


def suggest(search: Search, trials: Sequence[Trial], count: int) -> list[Point]:
    """Returns `count` points that differ from all trials; fewer if the space has no more."""
    known, points = list(trials), []
    for _ in range(count):
        point = _next_point(search, known)
        if point is None:
            break
        points.append(point)
        known.append(Trial(point=point, state="running"))
    return points


def _next_point(search: Search, trials: Sequence[Trial]) -> Point | None:
    known = {point_key(trial.point) for trial in trials}
    if len(known) >= size(search.space):
        return None
    for sample in range(_MAX_SAMPLES):
        point = _sample(search, trials, seed=_seed(search, len(trials), sample))
        if point_key(point) not in known:
            return point
    # Few points are left, and the sampler does not prefer them.
    random = Random(_seed(search, len(trials), _MAX_SAMPLES))
    for _ in range(_MAX_DRAWS):
        point = draw(search.space, random)
        if point_key(point) not in known:
            return point
    return None


def _seed(search: Search, number: int, sample: int) -> int:
    return Random(f"{search.seed} {number} {sample}").getrandbits(32)


def _sample(search: Search, trials: Sequence[Trial], *, seed: int) -> Point:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {name: _distribution(values) for name, values in search.space.items()}
    study = optuna.create_study(direction="maximize", sampler=_sampler(search, seed))
    study.add_trials([_frozen_trial(trial, search.space, distributions) for trial in trials])
    params = study.ask(distributions).params
    return {name: _from_param(search.space[name], params[name]) for name in search.space}


def _sampler(search: Search, seed: int) -> optuna.samplers.BaseSampler:
    if search.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    # constant_liar: running trials count as bad ones, so that points suggested meanwhile lie elsewhere.
    startup_trials = min(_MAX_STARTUP_TRIALS, max(1, search.budget // 2))
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup_trials, constant_liar=True)


def _frozen_trial(trial: Trial, space: Space, distributions: dict[str, BaseDistribution]) -> FrozenTrial:
    params = {name: _to_param(space[name], value) for name, value in trial.point.items()}
    return create_trial(
        state=_STATES[trial.state],
        value=trial.value if trial.state == "complete" else None,
        params=params,
        distributions=distributions,
    )


def _distribution(values: list[Any] | Range) -> BaseDistribution:
    """A list's values are represented by their indices, because optuna takes no lists as values."""
    if not isinstance(values, Range):
        return CategoricalDistribution(tuple(range(len(values))))
    if values.is_integer:
        return IntDistribution(int(values.low), int(values.high), log=values.log)
    return FloatDistribution(float(values.low), float(values.high), log=values.log)


def _from_param(values: list[Any] | Range, param: Any) -> Any:
    return param if isinstance(values, Range) else values[param]


def _to_param(values: list[Any] | Range, value: Any) -> Any:
    if isinstance(values, Range):
        return value
    keys = [json.dumps(choice, sort_keys=True) for choice in values]
    return keys.index(json.dumps(value, sort_keys=True))
