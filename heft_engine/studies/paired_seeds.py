"""Are two *methods* different? Their seeds are paired, and the differences' mean gets an interval over seeds and rows.

With seeds that vary by one to two points, rows pooled over seeds call equal methods different in 16 to 38 of 100 cases;
a single seed says nothing of methods at all. It does NOT compare single models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from heft_engine.studies import intervals
from heft_engine.studies.power import Noise, rows_needed, seeds_needed


@dataclass(frozen=True, kw_only=True)
class MethodComparison:
    """cohens_dz: the mean difference in deviations of the seeds' differences; None where those are all equal."""

    seeds: int
    rows: int
    per_seed: list[float]
    difference: float
    interval_95: tuple[float, float]
    p_value: float
    seed_deviation: float
    cohens_dz: float | None
    noise: Noise

    def seeds_needed(self, alpha: float) -> int | None:
        """How many seeds would tell a true difference of this size apart, at 80 % power; None: no number would."""
        return seeds_needed(self.difference, self.noise, alpha=alpha)

    def rows_needed(self, alpha: float) -> int | None:
        """How many test rows would be needed even with endless seeds; None without a difference."""
        return rows_needed(self.difference, self.noise, alpha=alpha)


def compare_methods(differences: NDArray[np.float64]) -> MethodComparison:
    """From a's rows minus b's, (seeds, rows). Raises ValueError for one seed, which can't tell methods apart."""
    seeds, rows = differences.shape
    if seeds < 2:
        raise ValueError("methods are compared over two seeds or more")
    per_seed = differences.mean(axis=1)
    difference = float(per_seed.mean())
    of_seeds = float(intervals.seed_variance(differences))
    of_rows = float(intervals.row_variance(differences.mean(axis=0)))
    half = float(intervals.half_width(of_seeds, of_rows, seeds, rows))
    deviation = float(per_seed.std(ddof=1))
    # Means of equal differences differ in their last bit.
    deviation = 0.0 if deviation < 1e-12 else deviation
    return MethodComparison(
        seeds=seeds,
        rows=rows,
        per_seed=[float(value) for value in per_seed],
        difference=difference,
        interval_95=(max(-1.0, difference - half), min(1.0, difference + half)),
        p_value=intervals.p_value(difference, of_seeds, of_rows, seeds, rows),
        seed_deviation=deviation,
        cohens_dz=difference / deviation if deviation else None,
        noise=Noise.of(differences),
    )
