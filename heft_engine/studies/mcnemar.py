"""Comparison of two *models* on the same rows: McNemar's exact test and a bootstrap interval.

Graded metrics use the sign-flip test, of which McNemar's is a special case: under the null hypothesis each row's
difference has either sign with equal probability. With up to 16 rows that differ, all patterns of signs are enumerated;
with more, the sum of signed differences is taken as normal, with the smallest difference as a continuity correction
(for differences of 1 this is McNemar's test with Edwards' correction).

The result is about two sets of weights, not about the methods that trained them, and must not be pooled over seeds.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from heft_engine.studies.intervals import LEVEL, row_variance

RESAMPLES = 9_999
#: Rows that differ, up to which all patterns of signs (65,536) are enumerated.
_MAX_ENUMERATED = 16
MCNEMAR, SIGN_FLIPS = "McNemar's exact test", "a sign-flip test"


@dataclass(frozen=True, kw_only=True)
class ModelComparison:
    """a's mean minus b's, with its interval over the rows. `only_a`: rows where a's value is higher."""

    rows: int
    only_a: int
    only_b: int
    difference: float
    interval_95: tuple[float, float]
    p_value: float
    test: str = MCNEMAR

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "interval_95": list(self.interval_95)}


def compare_models(differences: NDArray[np.float64], *, seed: int = 0) -> ModelComparison:
    """Compares two models by a's row values minus b's: -1, 0 or 1 for right and wrong, else any value between."""
    rows = len(differences)
    only_a, only_b = int((differences > 0).sum()), int((differences < 0).sum())
    if not np.isin(differences, (-1, 0, 1)).all():
        return _compare_graded(differences, only_a, only_b)
    table = [[0, only_a], [only_b, rows - only_a - only_b]]  # the exact test uses the off-diagonal cells only
    return ModelComparison(
        rows=rows,
        only_a=only_a,
        only_b=only_b,
        difference=(only_a - only_b) / rows,
        interval_95=bootstrap(only_a, only_b, rows, seed=seed),
        p_value=float(mcnemar(table, exact=True).pvalue),
    )


def _compare_graded(differences: NDArray[np.float64], only_a: int, only_b: int) -> ModelComparison:
    difference = float(differences.mean())
    half_width = float(stats.norm.ppf((1 + LEVEL) / 2)) * float(row_variance(differences)) ** 0.5
    return ModelComparison(
        rows=len(differences),
        only_a=only_a,
        only_b=only_b,
        difference=difference,
        interval_95=(max(-1.0, difference - half_width), min(1.0, difference + half_width)),
        p_value=sign_flips(differences),
        test=SIGN_FLIPS,
    )


def sign_flips(differences: NDArray[np.float64]) -> float:
    """Two-sided p-value of the sum of differences under random signs."""
    nonzero = differences[differences != 0]
    observed = abs(float(nonzero.sum()))
    if len(nonzero) <= _MAX_ENUMERATED:
        sums = np.zeros(1)
        for difference in nonzero:
            sums = np.concatenate([sums + difference, sums - difference])
        return float((np.abs(sums) >= observed - 1e-9).mean())
    deviation = float((nonzero**2).sum()) ** 0.5
    return float(min(1.0, 2 * stats.norm.sf(max(0.0, observed - float(np.abs(nonzero).min())) / deviation)))


def bootstrap(only_a: int, only_b: int, rows: int, *, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the difference over rows.

    A row is one of three kinds, so the counts of resampled rows are multinomial: the same as resampling rows, and a
    thousand times faster.
    """
    shares = np.array([only_a, only_b, rows - only_a - only_b]) / rows
    counts = np.random.default_rng(seed).multinomial(rows, shares, size=RESAMPLES)
    differences = (counts[:, 0] - counts[:, 1]) / rows
    low, high = np.quantile(differences, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
