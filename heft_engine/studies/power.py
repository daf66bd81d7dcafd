"""How many seeds, or how many rows, a difference of a given size would need to be told apart.

It does NOT judge the difference at hand: what was seen stands in for the truth, so answers are rough ("about").
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from heft_engine.studies import intervals

POWER = 0.8
MOST_SEEDS, MOST_ROWS = 1_000, 10_000_000
_NEARLY_NORMAL, _CERTAIN = 100, 5.0


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What blurs a mean difference. seed: variance of one seed's difference, with what its rows add to it.

    row: variance of one row's difference, of the kind that every seed shows again. residual: of the kind that no other
    seed shows.
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
        """Of the mean over so many seeds."""
        return self.seed / seeds + self.row / self.rows

    def critical(self, seeds: int, alpha: float) -> float:
        """The difference that counts, as `methods` judges it."""
        of_rows = (self.row + self.residual / seeds) / self.rows
        return float(intervals.half_width(self.seed / seeds, of_rows, seeds, self.rows, alpha))


def power(difference: float, noise: Noise, seeds: int, *, alpha: float = 0.05) -> float:
    """The chance that a true difference of this size is called one, and the right way round, with so many seeds."""
    spread = noise.variance(seeds) ** 0.5
    if spread == 0:
        return float(difference != 0)
    critical, centre = noise.critical(seeds, alpha) / spread, abs(difference) / spread
    # scipy's noncentral t is no number any more far from the centre; with many seeds it is the normal one.
    if noise.seed == 0 or seeds > _NEARLY_NORMAL or centre - critical > _CERTAIN:
        return float(stats.norm.sf(critical - centre))
    return float(stats.nct.sf(critical, seeds - 1, centre))


def seeds_needed(difference: float, noise: Noise, *, alpha: float = 0.05) -> int | None:
    """The fewest seeds that reach the power; None where no number up to 1,000 does."""
    if difference == 0 or power(difference, noise, MOST_SEEDS, alpha=alpha) < POWER:
        return None
    low, high = 2, MOST_SEEDS
    while low < high:
        middle = (low + high) // 2
        enough = power(difference, noise, middle, alpha=alpha) >= POWER
        low, high = (low, middle) if enough else (middle + 1, high)
    return low


def rows_needed(difference: float, noise: Noise, *, alpha: float = 0.05) -> int | None:
    """Rows that would be needed however many seeds there are; None beyond ten million, or without a difference."""
    if difference == 0:
        return None
    needed = (stats.norm.isf(alpha / 2) + stats.norm.ppf(POWER)) ** 2 * noise.row / difference**2
    return int(np.ceil(needed)) if needed <= MOST_ROWS else None
