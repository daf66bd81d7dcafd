"""The verdict over all arms: every arm's accuracy, every comparison with its sentence, Holm's correction over each of
the two kinds of question. It does NOT choose a winner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from statsmodels.stats.multitest import multipletests

from heft_engine.studies import sentences
from heft_engine.studies.accuracy import accuracy_of
from heft_engine.studies.arms import Arm, paired
from heft_engine.studies.mcnemar import ModelComparison, compare_models
from heft_engine.studies.over_tasks import TaskComparison, compare_over_tasks
from heft_engine.studies.paired_seeds import MethodComparison, compare_methods
from heft_engine.studies.sentences import Judged, Needed

ALPHA = 0.05


@dataclass(kw_only=True)
class _Pair:
    """Two arms and what was found; p-values are corrected once all pairs are known."""

    a: Arm
    b: Arm
    same_rows: bool = True
    differences: NDArray[np.float64] | None = None  #: a's rows minus b's, (seeds, rows)
    models: dict[int, ModelComparison] = field(default_factory=dict)  #: by seed
    methods: MethodComparison | None = None


def compare_arms(arms: Sequence[Arm], *, baseline: str | None = None) -> dict[str, Any]:
    """`{"arms": […], "comparisons": […], "over_tasks": […]}`.

    Each pair of arms of one task is compared, or each arm with the one (or the one of the method) named `baseline`. The
    p-values of methods are one family for Holm's correction, those of models, seed by seed, another, and those of
    methods over tasks a third.
    """
    pairs = [_compare(a, b) for a, b in _pairs(arms, baseline)]
    methods = _holm([pair.methods.p_value for pair in pairs if pair.methods is not None])
    models = _holm([found.p_value for pair in pairs for found in pair.models.values()])
    return {
        "arms": [_arm(arm) for arm in arms],
        "comparisons": [_to_json(pair, methods, models) for pair in pairs],
        "over_tasks": _over_tasks(pairs),
    }


def _pairs(arms: Sequence[Arm], baseline: str | None) -> list[tuple[Arm, Arm]]:
    pairs = [(a, b) for a, b in combinations(arms, 2) if a.task == b.task]
    if baseline is None:
        return pairs
    if all(baseline not in (arm.name, arm.method) for arm in arms):
        raise ValueError(f"no arm is called {baseline!r}")
    # Whatever is compared with it stands first.
    return [
        (b, a) if baseline in (a.name, a.method) else (a, b)
        for a, b in pairs
        if baseline in (a.name, a.method, b.name, b.method)
    ]


def _compare(a: Arm, b: Arm) -> _Pair:
    try:
        seeds, differences = paired(a, b)
    except ValueError:
        return _Pair(a=a, b=b, same_rows=False)
    if differences is None:
        return _Pair(a=a, b=b)
    models = {seed: compare_models(row) for seed, row in zip(seeds, differences, strict=True)}
    return _Pair(a=a, b=b, differences=differences, models=models, methods=_methods(differences))


def _methods(differences: NDArray[np.float64]) -> MethodComparison | None:
    return compare_methods(differences) if len(differences) > 1 else None


class _Corrected:
    """p-values of one family, in the order in which they were found."""

    def __init__(self, values: Sequence[float], adjusted: Sequence[float]) -> None:
        self.family = len(values)
        self._left = list(adjusted)

    def next(self) -> Judged:
        p = self._left.pop(0)
        return Judged(p_adjusted=p, family=self.family, separable=p < ALPHA, alpha=ALPHA / self.family)


def _holm(values: Sequence[float]) -> _Corrected:
    if not values:
        return _Corrected([], [])
    adjusted = multipletests(values, alpha=ALPHA, method="holm")[1]
    return _Corrected(values, [float(value) for value in adjusted])


def _arm(arm: Arm) -> dict[str, Any]:
    found = accuracy_of(arm)
    known: dict[str, Any] = {"name": arm.name, "seeds": list(arm.seeds), "missing_seeds": arm.missing}
    if found is None:
        nothing = dict.fromkeys(("accuracy", "interval_95", "interval_covers", "interval_over_seeds_95"))
        return {**known, **nothing, "seed_deviation": None, "per_seed": []}
    return {
        **known,
        "accuracy": found.mean,
        "interval_95": list(found.interval_95),
        "interval_covers": found.covers,
        "interval_over_seeds_95": None if found.over_seeds is None else list(found.over_seeds),
        "seed_deviation": found.deviation,
        "per_seed": found.per_seed,
    }


def _to_json(pair: _Pair, methods: _Corrected, models: _Corrected) -> dict[str, Any]:
    judged_models = {seed: models.next() for seed in pair.models}
    told = {"a": pair.a.name, "b": pair.b.name}
    per_model = [
        {
            "seed": seed,
            **pair.models[seed].to_json(),
            "p_adjusted": judged.p_adjusted,
            "separable": judged.separable,
        }
        for seed, judged in judged_models.items()
    ]
    if pair.methods is not None:
        judged = methods.next()
        return {**told, **_of_methods(pair, pair.methods, judged), "models": per_model}
    if pair.models:
        ((seed, judged),) = judged_models.items()
        return {**told, **_of_models(pair, seed, judged), "models": per_model}
    sentence = sentences.of_nothing if pair.same_rows else sentences.of_other_rows
    empty = dict.fromkeys(("difference", "interval_95", "p_value", "p_adjusted"))
    nothing = {"question": None, **empty, "separable": False, "sentence": sentence(pair.a, pair.b)}
    return {**told, **nothing, "models": []}


def _of_methods(pair: _Pair, found: MethodComparison, judged: Judged) -> dict[str, Any]:
    needed = Needed(seeds=found.seeds_needed(judged.alpha), rows=found.rows_needed(judged.alpha))
    return {
        "question": "methods",
        "difference": found.difference,
        "interval_95": list(found.interval_95),
        "p_value": found.p_value,
        "p_adjusted": judged.p_adjusted,
        "separable": judged.separable,
        "seeds": found.seeds,
        "rows": found.rows,
        "per_seed": found.per_seed,
        "seed_deviation": found.seed_deviation,
        "effect_size": found.cohens_dz,
        "seeds_needed": needed.seeds,
        "rows_needed": needed.rows,
        "sentence": sentences.of_methods(pair.a, pair.b, found, judged, needed),
    }


def _of_models(pair: _Pair, seed: int, judged: Judged) -> dict[str, Any]:
    found = pair.models[seed]
    return {
        "question": "models",
        "difference": found.difference,
        "interval_95": list(found.interval_95),
        "p_value": found.p_value,
        "p_adjusted": judged.p_adjusted,
        "separable": judged.separable,
        "seeds": 1,
        "rows": found.rows,
        "sentence": sentences.of_models(pair.a, pair.b, seed, found, judged),
    }


def _over_tasks(pairs: Sequence[_Pair]) -> list[dict[str, Any]]:
    """One statement for each two methods that were compared on several tasks."""
    by_methods: dict[tuple[str, str], dict[str, NDArray[np.float64]]] = {}
    for pair in pairs:
        a, b, task = pair.a.method, pair.b.method, pair.a.task
        if a is not None and b is not None and task is not None and pair.differences is not None:
            by_methods.setdefault((a, b), {})[task] = pair.differences
    found = {
        methods: compare_over_tasks(differences)
        for methods, differences in by_methods.items()
        if len(differences) > 1
    }
    corrected = _holm([one.p_value for one in found.values()])
    return [_of_tasks(a, b, one, corrected.next()) for (a, b), one in found.items()]


def _of_tasks(a: str, b: str, found: TaskComparison, judged: Judged) -> dict[str, Any]:
    return {
        "a": a,
        "b": b,
        **asdict(found),
        "interval_95": list(found.interval_95),
        "p_adjusted": judged.p_adjusted,
        "separable": judged.separable,
        "sentence": sentences.over_tasks(a, b, found, judged),
    }
