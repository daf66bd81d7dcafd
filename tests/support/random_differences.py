"""Differences between the rows of two methods, drawn at random."""

from __future__ import annotations

import numpy as np


def random_differences(seeds: int = 3, rows: int = 300, shift: float = 0.05) -> np.ndarray:
    rng = np.random.default_rng(seeds + rows)
    difficulty = rng.normal(size=rows)
    a = difficulty + 0.4 * rng.normal(size=(seeds, rows)) < 0.8 + shift
    b = difficulty + 0.4 * rng.normal(size=(seeds, rows)) < 0.8
    return a.astype(float) - b
