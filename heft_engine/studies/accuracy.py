"""An arm's accuracy with an interval: over the rows by Wilson's score, over the seeds by t, both where there are both.

Where rows are more or less right it is the mean of their metric, with heft_engine.evaluation.row_values's interval
over the rows. It
does NOT compare arms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from heft_engine.evaluation.row_values import mean_interval
from heft_engine.studies.arms import Arm, RowValues
from heft_engine.studies.intervals import LEVEL

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """The mean over the seeds there are. One seed tells nothing of others: its interval covers the rows alone."""

    mean: float
    interval_95: Interval
    covers: str  #: "rows" or "rows and seeds"
    over_seeds: Interval | None  #: t alone: of this method on these very rows
    deviation: float | None  #: from seed to seed
    per_seed: list[dict[str, Any]]


def accuracy_of(arm: Arm) -> Accuracy | None:
    """None for an arm of which nothing has succeeded."""
    if not arm.outcomes:
        return None
    values = [outcome.accuracy for outcome in arm.outcomes]
    mean, seeds = float(np.mean(values)), len(values)
    low, high = _over_rows(arm, mean)
    per_seed = [_of_seed(outcome) for outcome in arm.outcomes]
    if seeds == 1:
        return Accuracy(
            mean=mean,
            interval_95=(low, high),
            covers="rows",
            over_seeds=None,
            deviation=None,
            per_seed=per_seed,
        )
    deviation = float(np.std(values, ddof=1))
    half = float(stats.t.ppf((1 + LEVEL) / 2, seeds - 1)) * deviation / seeds**0.5
    return Accuracy(
        mean=mean,
        interval_95=_within(mean - _add(mean - low, half), mean + _add(high - mean, half)),
        covers="rows and seeds",
        over_seeds=_within(mean - half, mean + half),
        deviation=deviation,
        per_seed=per_seed,
    )


def wilson(correct: float, rows: int) -> Interval:
    low, high = proportion_confint(correct, rows, alpha=1 - LEVEL, method="wilson")
    return float(low), float(high)


def _over_rows(arm: Arm, mean: float) -> Interval:
    """Of the mean over the seeds. A graded row counts by its mean over the seeds."""
    rows = min(len(outcome.right) for outcome in arm.outcomes)
    if not any(outcome.is_graded for outcome in arm.outcomes):
        return wilson(mean * rows, rows)
    found = np.mean([outcome.right[:rows].astype(float) for outcome in arm.outcomes], axis=0)
    low, high = mean_interval(found, LEVEL)
    return min(low, mean), max(high, mean)


def _of_seed(outcome: RowValues) -> dict[str, Any]:
    right, rows = float(outcome.right.sum()), len(outcome.right)
    interval = mean_interval(outcome.right, LEVEL) if outcome.is_graded else wilson(right, rows)
    return {
        "seed": outcome.seed,
        "accuracy": right / rows,
        "correct": None if outcome.is_graded else int(right),
        "n": rows,
        "interval_95": list(interval),
    }


def _add(one: float, other: float) -> float:
    return float(np.hypot(one, other))


def _within(low: float, high: float) -> Interval:
    return max(0.0, low), min(1.0, high)
