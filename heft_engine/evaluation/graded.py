"""The interval of a mean of values between 0 and 1 over rows: for answers that are more or less right.

It does NOT know metrics. It imports no statsmodels, for runs and workers load it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


def mean_interval(values: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """A normal interval after two rows at 0 and two at 1 were added.

    For values that are all 0 or 1 that is Agresti and Coull's (The American Statistician 52, 1998), close to Wilson's;
    without the four rows a handful of equal values would look certain.
    """
    four = np.concatenate([np.asarray(values, dtype=np.float64), [0, 0, 1, 1]])
    half = float(stats.norm.ppf((1 + level) / 2)) * float(four.std()) / len(four) ** 0.5
    mean = float(four.mean())
    return max(0.0, mean - half), min(1.0, mean + half)
