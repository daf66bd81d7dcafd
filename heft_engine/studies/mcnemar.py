"""Are these two *models* different? The same rows, asked of both: McNemar's exact test, and a bootstrap interval.

Rows that are more or less right are compared by what McNemar's is a case of: under the hypothesis that both models are
alike, each row's difference may as well have the other sign. Up to 16 rows that differ every pattern of signs is
counted; beyond, the sum of the signed differences is taken for normal, less the smallest of them, which is half of the
step in which it moves (for differences of 1 that is McNemar's test with Edwards' correction).

The answer is about two sets of weights and says nothing of the methods that made them: another seed makes others. It
does NOT take seeds into account, and must not be pooled over them.
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
#: Rows that differ up to which every pattern of their signs is counted: 65,536.
_COUNTED = 16
MCNEMAR, SIGN_FLIPS = "McNemar's exact test", "a sign-flip test"


@dataclass(frozen=True, kw_only=True)
class ModelComparison:
    """`only_a` rows are right for a alone, or more right there. The interval is of a's mean minus b's, over the rows.

    `test` is the p-value's.
    """

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
    """From a's rows minus b's: 1 where a alone is right, -1 where b alone is, 0 where they agree; or between those."""
    rows = len(differences)
    only_a, only_b = int((differences > 0).sum()), int((differences < 0).sum())
    if not np.isin(differences, (-1, 0, 1)).all():
        return _compare_graded(differences, only_a, only_b)
    table = [[0, only_a], [only_b, rows - only_a - only_b]]  # the exact test looks at the two that disagree
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
    half = float(stats.norm.ppf((1 + LEVEL) / 2)) * float(row_variance(differences)) ** 0.5
    return ModelComparison(
        rows=len(differences),
        only_a=only_a,
        only_b=only_b,
        difference=difference,
        interval_95=(max(-1.0, difference - half), min(1.0, difference + half)),
        p_value=sign_flips(differences),
        test=SIGN_FLIPS,
    )


def sign_flips(differences: NDArray[np.float64]) -> float:
    """Two-sided p-value of a sum of differences whose signs might as well be others."""
    moved = differences[differences != 0]
    seen = abs(float(moved.sum()))
    if len(moved) <= _COUNTED:
        sums = np.zeros(1)
        for one in moved:
            sums = np.concatenate([sums + one, sums - one])
        return float((np.abs(sums) >= seen - 1e-9).mean())
    spread = float((moved**2).sum()) ** 0.5
    return float(min(1.0, 2 * stats.norm.sf(max(0.0, seen - float(np.abs(moved).min())) / spread)))


def bootstrap(only_a: int, only_b: int, rows: int, *, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the difference over resampled rows.

    A row is one of three kinds, so the resampled counts are a multinomial draw: the same as drawing rows, and a
    thousand times as quick.
    """
    shares = np.array([only_a, only_b, rows - only_a - only_b]) / rows
    drawn = np.random.default_rng(seed).multinomial(rows, shares, size=RESAMPLES)
    differences = (drawn[:, 0] - drawn[:, 1]) / rows
    low, high = np.quantile(differences, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
