"""Comparison of a study's arms: accuracies, every pair's difference with its sentence, and Holm-corrected p-values."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from statsmodels.stats.multitest import multipletests

from heft_engine.studies import sentences
from heft_engine.studies.accuracy import accuracy_of
from heft_engine.studies.arms import Arm, paired_differences
from heft_engine.studies.mcnemar import ModelComparison, compare_models
from heft_engine.studies.over_tasks import TaskComparison, compare_over_tasks
from heft_engine.studies.paired_seeds import MethodComparison, compare_methods
from heft_engine.studies.sentences import RequiredSize, Significance

ALPHA = 0.05

Key = TypeVar("Key", bound=Hashable)


@dataclass(kw_only=True)
class _Pair:
    """Two arms and their comparisons, whose p-values are corrected once all pairs are known."""

    a: Arm
    b: Arm
    same_rows: bool = True
    differences: NDArray[np.float64] | None = None  #: a's row values minus b's, (seeds, rows)
    models: dict[int, ModelComparison] = field(default_factory=dict)  #: by seed
    methods: MethodComparison | None = None


def compare_arms(arms: Sequence[Arm], *, baseline: str | None = None) -> dict[str, Any]:
    """Returns `{"arms": […], "comparisons": […], "over_tasks": […]}`.

    Compares each pair of arms of a task, or each arm with the `baseline`, an arm or a method. Holm's correction has
    three families: comparisons of methods, of models (one for each seed), and of methods over tasks.
    """
    pairs = [_compare(a, b) for a, b in _pairs(arms, baseline)]
    methods = _holm(
        {index: pair.methods.p_value for index, pair in enumerate(pairs) if pair.methods is not None}
    )
    models = _holm(
        {
            (index, seed): result.p_value
            for index, pair in enumerate(pairs)
            for seed, result in pair.models.items()
        }
    )
    return {
        "arms": [_arm_json(arm) for arm in arms],
        "comparisons": [
            _pair_json(pair, methods.get(index), {seed: models[index, seed] for seed in pair.models})
            for index, pair in enumerate(pairs)
        ],
        "over_tasks": _over_tasks(pairs),
    }


def _pairs(arms: Sequence[Arm], baseline: str | None) -> list[tuple[Arm, Arm]]:
    pairs = [(a, b) for a, b in combinations(arms, 2) if a.task == b.task]
    if baseline is None:
        return pairs
    if all(baseline not in (arm.name, arm.method) for arm in arms):
        raise ValueError(f"baseline {baseline!r} is not an arm or a method")
    # The baseline is the second of its pair.
    return [
        (b, a) if baseline in (a.name, a.method) else (a, b)
        for a, b in pairs
        if baseline in (a.name, a.method, b.name, b.method)
    ]


def _compare(a: Arm, b: Arm) -> _Pair:
    try:
        seeds, differences = paired_differences(a, b)
    except ValueError:
        return _Pair(a=a, b=b, same_rows=False)
    if differences is None:
        return _Pair(a=a, b=b)
    models = {seed: compare_models(row) for seed, row in zip(seeds, differences, strict=True)}
    methods = compare_methods(differences) if len(seeds) > 1 else None
    return _Pair(a=a, b=b, differences=differences, models=models, methods=methods)


def _holm(p_values: Mapping[Key, float]) -> dict[Key, Significance]:
    """Corrects the p-values of one family."""
    if not p_values:
        return {}
    corrected = multipletests(list(p_values.values()), alpha=ALPHA, method="holm")[1]
    family = len(p_values)
    return {
        key: Significance(
            p_adjusted=float(p), family=family, significant=bool(p < ALPHA), alpha=ALPHA / family
        )
        for key, p in zip(p_values, corrected, strict=True)
    }


def _arm_json(arm: Arm) -> dict[str, Any]:
    accuracy = accuracy_of(arm)
    known: dict[str, Any] = {"name": arm.name, "seeds": list(arm.seeds), "missing_seeds": arm.missing_seeds}
    if accuracy is None:
        unknown = dict.fromkeys(("accuracy", "interval_95", "interval_covers", "interval_over_seeds_95"))
        return {**known, **unknown, "seed_deviation": None, "per_seed": []}
    return {
        **known,
        "accuracy": accuracy.mean,
        "interval_95": list(accuracy.interval_95),
        "interval_covers": accuracy.covers,
        "interval_over_seeds_95": None if accuracy.over_seeds is None else list(accuracy.over_seeds),
        "seed_deviation": accuracy.deviation,
        "per_seed": accuracy.per_seed,
    }


def _pair_json(
    pair: _Pair, methods: Significance | None, models: Mapping[int, Significance]
) -> dict[str, Any]:
    names = {"a": pair.a.name, "b": pair.b.name}
    per_model = [
        {
            "seed": seed,
            **pair.models[seed].to_json(),
            "p_adjusted": test.p_adjusted,
            "separable": test.significant,
        }
        for seed, test in models.items()
    ]
    if pair.methods is not None and methods is not None:
        return {**names, **_methods_json(pair, pair.methods, methods), "models": per_model}
    if pair.models:
        return {**names, **_models_json(pair, models), "models": per_model}
    sentence = sentences.without_common_seed if pair.same_rows else sentences.with_different_rows
    unknown = dict.fromkeys(("difference", "interval_95", "p_value", "p_adjusted"))
    return {
        **names,
        "question": None,
        **unknown,
        "separable": False,
        "sentence": sentence(pair.a, pair.b),
        "models": [],
    }


def _methods_json(pair: _Pair, result: MethodComparison, test: Significance) -> dict[str, Any]:
    required = RequiredSize(seeds=result.seeds_needed(test.alpha), rows=result.rows_needed(test.alpha))
    return {
        "question": "methods",
        **_test_json(result, test),
        "seeds": result.seeds,
        "per_seed": result.per_seed,
        "seed_deviation": result.seed_deviation,
        "effect_size": result.cohens_dz,
        "seeds_needed": required.seeds,
        "rows_needed": required.rows,
        "sentence": sentences.of_methods(pair.a, pair.b, result, test, required),
    }


def _models_json(pair: _Pair, models: Mapping[int, Significance]) -> dict[str, Any]:
    """The comparison of two arms with a single common seed."""
    ((seed, test),) = models.items()
    result = pair.models[seed]
    return {
        "question": "models",
        **_test_json(result, test),
        "seeds": 1,
        "sentence": sentences.of_models(pair.a, pair.b, seed, result, test),
    }


def _test_json(result: MethodComparison | ModelComparison, test: Significance) -> dict[str, Any]:
    return {
        "difference": result.difference,
        "interval_95": list(result.interval_95),
        "p_value": result.p_value,
        "p_adjusted": test.p_adjusted,
        "separable": test.significant,
        "rows": result.rows,
    }


def _over_tasks(pairs: Sequence[_Pair]) -> list[dict[str, Any]]:
    """Compares each two methods that were compared on several tasks."""
    by_methods: dict[tuple[str, str], dict[str, NDArray[np.float64]]] = {}
    for pair in pairs:
        a, b, task = pair.a.method, pair.b.method, pair.a.task
        if a is not None and b is not None and task is not None and pair.differences is not None:
            by_methods.setdefault((a, b), {})[task] = pair.differences
    results = {
        methods: compare_over_tasks(differences)
        for methods, differences in by_methods.items()
        if len(differences) > 1
    }
    tests = _holm({methods: result.p_value for methods, result in results.items()})
    return [_tasks_json(*methods, result, tests[methods]) for methods, result in results.items()]


def _tasks_json(a: str, b: str, result: TaskComparison, test: Significance) -> dict[str, Any]:
    return {
        "a": a,
        "b": b,
        **asdict(result),
        "interval_95": list(result.interval_95),
        "p_adjusted": test.p_adjusted,
        "separable": test.significant,
        "sentence": sentences.over_tasks(a, b, result, test),
    }
