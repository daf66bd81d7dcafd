"""The value of every row (right or wrong, or a graded metric's) as short base64 text, and the interval of their mean.

Right and wrong take one bit a row, a graded value 16 bits. No statsmodels here: runs and workers import this module.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Correctness = NDArray[np.bool_]
GradedValues = NDArray[np.float64]
_MAX_UINT16 = 65_535


def pack_correctness(correct: Sequence[bool]) -> str:
    """One bit a row: 3,270 rows take 548 characters."""
    return base64.b64encode(np.packbits(np.asarray(correct, dtype=bool)).tobytes()).decode()


def unpack_correctness(text: str, rows: int) -> Correctness:
    """The inverse of `pack_correctness`. Raises ValueError unless the text holds `rows` rows."""
    packed = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    if len(packed) != -(-rows // 8):
        raise ValueError(f"{len(packed)} bytes don't hold {rows} rows")
    return np.unpackbits(packed, count=rows).astype(bool)


def pack_graded(values: Sequence[float]) -> str:
    """Values from 0 to 1, rounded to 1 / 65,535: 3,270 rows take 8,720 characters."""
    return base64.b64encode(np.rint(np.asarray(values) * _MAX_UINT16).astype("<u2").tobytes()).decode()


def unpack_graded(text: str, rows: int) -> GradedValues:
    """The inverse of `pack_graded`. Raises ValueError unless the text holds `rows` rows."""
    packed = np.frombuffer(base64.b64decode(text, validate=True), dtype="<u2")
    if len(packed) != rows:
        raise ValueError(f"{len(packed)} values don't belong to {rows} rows")
    return packed.astype(np.float64) / _MAX_UINT16


def mean_interval(values: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Confidence interval of the mean of values in [0, 1]: a normal interval after adding two rows at 0 and two at 1.

    For values that are all 0 or 1 it is the interval of Agresti and Coull (The American Statistician 52, 1998), close
    to Wilson's. Without the four rows, a handful of equal values would have an interval of width 0.
    """
    padded = np.concatenate([np.asarray(values, dtype=np.float64), [0, 0, 1, 1]])
    half_width = float(stats.norm.ppf((1 + level) / 2)) * float(padded.std()) / len(padded) ** 0.5
    mean = float(padded.mean())
    return max(0.0, mean - half_width), min(1.0, mean + half_width)
