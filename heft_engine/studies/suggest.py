"""Which points a search shall try next, by optuna, from all that have been tried before.

Nothing is kept: the optuna study is built anew from the trials each time, and each proposal's sampler is seeded with
the search's seed and the trial's number, so the same past gives the same proposals, wherever and whenever they are
made. It does NOT know what a trial is: points and values go in, points come out.
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

#: TPE begins with points at random: half of the budget, at most optuna's own number.
_MOST_RANDOM = 10
#: How often a point that was tried before is drawn again before those that are left are looked for.
_TRIES = 20
#: And in the end: a range of two neighbouring numbers counts as endless, and is not.
_LAST_TRIES = 10_000
_STATES = {
    "running": TrialState.RUNNING,
    "complete": TrialState.COMPLETE,
    "failed": TrialState.FAIL,
    "pruned": TrialState.PRUNED,
}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """value: what came of it, higher is better; of complete ones alone."""

    point: Point
    state: State
    value: float | None = None


@dataclass(frozen=True, kw_only=True)
class Search:
    space: Space
    budget: int
    sampler: Sampler = "tpe"
    seed: int = 0


def suggest(search: Search, trials: Sequence[Trial], count: int) -> list[Point]:
    """So many points that are not among the trials; fewer where the space has no more."""
    known, new = list(trials), []
    for _ in range(count):
        point = _next(search, known)
        if point is None:
            break
        new.append(point)
        known.append(Trial(point=point, state="running"))
    return new


def _next(search: Search, known: Sequence[Trial]) -> Point | None:
    seen = {point_key(trial.point) for trial in known}
    if len(seen) >= size(search.space):
        return None
    for again in range(_TRIES):
        point = _ask(search, known, seed=_seed(search, len(known), again))
        if point_key(point) not in seen:
            return point
    # Few are left, and the sampler does not care for them.
    random = Random(_seed(search, len(known), _TRIES))
    for _ in range(_LAST_TRIES):
        if point_key(point := draw(search.space, random)) not in seen:
            return point
    return None


def _seed(search: Search, number: int, again: int) -> int:
    return Random(f"{search.seed} {number} {again}").getrandbits(32)


def _ask(search: Search, known: Sequence[Trial], *, seed: int) -> Point:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {name: _distribution(values) for name, values in search.space.items()}
    study = optuna.create_study(direction="maximize", sampler=_sampler(search, seed))
    study.add_trials([_frozen(trial, search.space, distributions) for trial in known])
    asked = study.ask(distributions).params
    return {name: _value(search.space[name], asked[name]) for name in search.space}


def _sampler(search: Search, seed: int) -> optuna.samplers.BaseSampler:
    if search.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    # Trials that run count as bad ones: those that run beside them shall lie elsewhere.
    at_random = min(_MOST_RANDOM, max(1, search.budget // 2))
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=at_random, constant_liar=True)


def _frozen(trial: Trial, space: Space, distributions: dict[str, BaseDistribution]) -> FrozenTrial:
    params = {name: _stored(space[name], value) for name, value in trial.point.items()}
    return create_trial(
        state=_STATES[trial.state],
        value=trial.value if trial.state == "complete" else None,
        params=params,
        distributions=distributions,
    )


def _distribution(values: list[Any] | Range) -> BaseDistribution:
    """A list's values are known to optuna by their places: they may be lists themselves."""
    if not isinstance(values, Range):
        return CategoricalDistribution(tuple(range(len(values))))
    if values.is_integer:
        return IntDistribution(int(values.low), int(values.high), log=values.log)
    return FloatDistribution(float(values.low), float(values.high), log=values.log)


def _value(values: list[Any] | Range, stored: Any) -> Any:
    return stored if isinstance(values, Range) else values[stored]


def _stored(values: list[Any] | Range, value: Any) -> Any:
    if isinstance(values, Range):
        return value
    return [json.dumps(one, sort_keys=True) for one in values].index(json.dumps(value, sort_keys=True))
