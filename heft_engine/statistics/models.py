"""Are these two *models* different? The same rows, asked of both: McNemar's exact test, and a bootstrap interval.

The answer is about two sets of weights and says nothing of the methods that made them: another seed makes others. It
does NOT take seeds into account, and must not be pooled over them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from statsmodels.stats.contingency_tables import mcnemar

from heft_engine.statistics.intervals import LEVEL

RESAMPLES = 9_999


@dataclass(frozen=True, kw_only=True)
class ModelComparison:
    """`only_a` rows are right for a alone. The interval is of a's accuracy minus b's, over the rows."""

    rows: int
    only_a: int
    only_b: int
    difference: float
    interval_95: tuple[float, float]
    p_value: float

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "interval_95": list(self.interval_95)}


def compare_models(differences: NDArray[np.float64], *, seed: int = 0) -> ModelComparison:
    """From a's rows minus b's: 1 where a alone is right, -1 where b alone is, 0 where they agree."""
    rows = len(differences)
    only_a, only_b = int((differences > 0).sum()), int((differences < 0).sum())
    table = [[0, only_a], [only_b, rows - only_a - only_b]]  # the exact test looks at the two that disagree
    return ModelComparison(
        rows=rows,
        only_a=only_a,
        only_b=only_b,
        difference=(only_a - only_b) / rows,
        interval_95=bootstrap(only_a, only_b, rows, seed=seed),
        p_value=float(mcnemar(table, exact=True).pvalue),
    )


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
