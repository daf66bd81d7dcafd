"""Intervals of a mean that two things move: the seeds that were drawn and the rows that were drawn.

Each has an interval of its own, and the squares of their half-widths add (MOVER, the method of variance estimates
recovery: Zou and Donner, Statistics in Medicine 27, 2008). So it is Student's t where the seeds vary and the rows don't
matter, and a normal interval over the rows where every seed gives the same. The t over the seeds alone takes runs that
hardly differ between seeds for certain: with equal seeds it called 97 of 100 equal methods different.

What both see (a row that is right with one seed and wrong with the next) is counted twice. That costs a little power
and keeps false alarms under 5 % whatever the shares are; see tests/heft_engine/studies/test_false_alarm_rates.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import brentq

Array = NDArray[np.float64]
LEVEL = 0.95
_SMALLEST_P = 1e-12


def half_width(
    seed_variance: Any, row_variance: Any, seeds: int, rows: float, alpha: float = 1 - LEVEL
) -> Any:
    """Half of the interval's width. The variances are those of the mean over all seeds and rows; arrays may go in.

    Half a row is added to the rows' part, because whole rows are right or wrong (Yates).
    """
    t = stats.t.ppf(1 - alpha / 2, seeds - 1)
    z = stats.norm.ppf(1 - alpha / 2)
    of_rows = z * np.sqrt(np.asarray(row_variance)) + 0.5 / rows
    return np.sqrt(t**2 * np.asarray(seed_variance) + of_rows**2)


def p_value(difference: float, seed_variance: float, row_variance: float, seeds: int, rows: float) -> float:
    """The level at which the interval just touches zero, two-sided; never below 1e-12."""

    def beyond(log_alpha: float) -> float:
        width = half_width(seed_variance, row_variance, seeds, rows, np.exp(log_alpha))
        return abs(difference) - float(width)

    lowest = np.log(_SMALLEST_P)
    if beyond(0.0) <= 0:
        return 1.0
    if beyond(lowest) >= 0:
        return _SMALLEST_P
    return float(np.exp(brentq(beyond, lowest, 0.0, xtol=1e-9)))


def row_variance(differences: Array) -> Any:
    """Variance of the mean over rows of the last axis, values within -1 and 1, by Bonett and Price's adjustment.

    One more row at +1 and one at -1: without them a handful of rows that differ, all one way, look certain (Bonett and
    Price, Journal of Educational and Behavioral Statistics 37, 2012).
    """
    n = differences.shape[-1] + 2
    squares = (differences**2).sum(axis=-1) + 2
    return squares / n**2 - differences.sum(axis=-1) ** 2 / n**3


def seed_variance(differences: Array) -> Any:
    """Variance of the mean over seeds, from (…, seeds, rows); 0 where all seeds agree, as they may."""
    per_seed = differences.mean(axis=-1)
    return per_seed.var(axis=-1, ddof=1) / differences.shape[-2]


def residual_variance(differences: Array) -> Any:
    """What seeds and rows have in common, as a variance of the mean: the part of the rows' that more seeds reduce.

    0 with a single row, of which nothing can be told.
    """
    seeds, rows = differences.shape[-2:]
    by_seed, by_row = differences.mean(axis=-1, keepdims=True), differences.mean(axis=-2, keepdims=True)
    rest = differences - by_seed - by_row + differences.mean(axis=(-2, -1), keepdims=True)
    return (rest**2).sum(axis=(-2, -1)) / ((seeds - 1) * max(1, rows - 1)) / (seeds * rows)
