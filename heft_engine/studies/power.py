"""Power analysis: the seeds, or test rows, needed to detect a difference of a given size.

The observed difference and variances stand in for the true ones, so the results are rough estimates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from heft_engine.studies import intervals

POWER = 0.8
MAX_SEEDS, MAX_ROWS = 1_000, 10_000_000
_NEARLY_NORMAL, _CERTAIN = 100, 5.0


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Variance components of a mean difference.

    seed: variance of one seed's difference, including the residual variance of its rows.
    row: variance of one row's difference that all seeds share.
    residual: variance of one row's difference that is independent for each seed.
    """

    rows: int
    seed: float
    row: float
    residual: float

    @staticmethod
    def of(differences: NDArray[np.float64]) -> Noise:
        seeds, rows = differences.shape
        residual = float(intervals.residual_variance(differences))
        row = max(0.0, float(intervals.row_variance(differences.mean(axis=0))) - residual)
        seed = float(intervals.seed_variance(differences))
        return Noise(rows=rows, seed=seed * seeds, row=row * rows, residual=residual * seeds * rows)

    def variance(self, seeds: int) -> float:
        """Variance of the mean over a number of seeds."""
        return self.seed / seeds + self.row / self.rows

    def critical(self, seeds: int, alpha: float) -> float:
        """The smallest mean difference that is significant at level alpha."""
        row_variance = (self.row + self.residual / seeds) / self.rows
        return float(intervals.half_width(self.seed / seeds, row_variance, seeds, self.rows, alpha))


def power(difference: float, noise: Noise, seeds: int, *, alpha: float = 0.05) -> float:
    """The probability that a true difference of this size is significant, with the right sign."""
    deviation = noise.variance(seeds) ** 0.5
    if deviation == 0:
        return float(difference != 0)
    critical, centre = noise.critical(seeds, alpha) / deviation, abs(difference) / deviation
    # scipy's noncentral t is NaN far from the centre; with many seeds it is close to normal.
    if noise.seed == 0 or seeds > _NEARLY_NORMAL or centre - critical > _CERTAIN:
        return float(stats.norm.sf(critical - centre))
    return float(stats.nct.sf(critical, seeds - 1, centre))


def seeds_needed(difference: float, noise: Noise, *, alpha: float = 0.05) -> int | None:
    """Returns the fewest seeds with 80 % power, or None if 1,000 are not enough."""
    if difference == 0 or power(difference, noise, MAX_SEEDS, alpha=alpha) < POWER:
        return None
    low, high = 2, MAX_SEEDS
    while low < high:
        middle = (low + high) // 2
        is_enough = power(difference, noise, middle, alpha=alpha) >= POWER
        low, high = (low, middle) if is_enough else (middle + 1, high)
    return low


def rows_needed(difference: float, noise: Noise, *, alpha: float = 0.05) -> int | None:
    """Returns the rows needed for 80 % power with unlimited seeds; None above ten million or without a difference."""
    if difference == 0:
        return None
    rows = (stats.norm.isf(alpha / 2) + stats.norm.ppf(POWER)) ** 2 * noise.row / difference**2
    return int(np.ceil(rows)) if rows <= MAX_ROWS else None
