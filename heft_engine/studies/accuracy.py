"""An arm's mean accuracy with a confidence interval over rows and seeds.

Over the rows it is Wilson's interval, or heft_engine.evaluation.row_values.mean_interval for graded metrics; over the
seeds Student's t. With several seeds the squares of both half-widths add, as in `intervals`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    """The mean over an arm's runs. With one run the interval covers the rows only."""

    mean: float
    interval_95: Interval
    covers: str  #: "rows" or "rows and seeds"
    over_seeds: Interval | None  #: Student's t interval: of this method on these very rows
    deviation: float | None  #: standard deviation over the seeds
    per_seed: list[dict[str, Any]]


def accuracy_of(arm: Arm) -> Accuracy | None:
    """Returns the accuracy of an arm, or None if it has no runs."""
    if not arm.runs:
        return None
    accuracies = [run.accuracy for run in arm.runs]
    mean, seeds = float(np.mean(accuracies)), len(accuracies)
    low, high = _interval_over_rows(arm, mean)
    over_rows = Accuracy(
        mean=mean,
        interval_95=(low, high),
        covers="rows",
        over_seeds=None,
        deviation=None,
        per_seed=[_of_seed(run) for run in arm.runs],
    )
    if seeds == 1:
        return over_rows
    deviation = float(np.std(accuracies, ddof=1))
    half_width = float(stats.t.ppf((1 + LEVEL) / 2, seeds - 1)) * deviation / seeds**0.5
    below, above = np.hypot([mean - low, high - mean], half_width)
    return replace(
        over_rows,
        interval_95=_clip(mean - float(below), mean + float(above)),
        covers="rows and seeds",
        over_seeds=_clip(mean - half_width, mean + half_width),
        deviation=deviation,
    )


def wilson(correct: float, rows: int) -> Interval:
    """Wilson's interval of a proportion."""
    low, high = proportion_confint(correct, rows, alpha=1 - LEVEL, method="wilson")
    return float(low), float(high)


def _interval_over_rows(arm: Arm, mean: float) -> Interval:
    """The interval of the mean over the seeds. The value of a graded row is its mean over the seeds."""
    rows = min(len(run.values) for run in arm.runs)
    if not any(run.is_graded for run in arm.runs):
        return wilson(mean * rows, rows)
    row_means = np.mean([run.values[:rows].astype(float) for run in arm.runs], axis=0)
    low, high = mean_interval(row_means, LEVEL)
    return min(low, mean), max(high, mean)


def _of_seed(run: RowValues) -> dict[str, Any]:
    total, rows = float(run.values.sum()), len(run.values)
    interval = mean_interval(run.values, LEVEL) if run.is_graded else wilson(total, rows)
    return {
        "seed": run.seed,
        "accuracy": total / rows,
        "correct": None if run.is_graded else int(total),
        "n": rows,
        "interval_95": list(interval),
    }


def _clip(low: float, high: float) -> Interval:
    return max(0.0, low), min(1.0, high)
