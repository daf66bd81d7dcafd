"""Values of rows as text, and the interval of their mean."""

from __future__ import annotations

import numpy as np
import pytest

from heft_engine.evaluation.row_values import (
    mean_interval,
    pack_correctness,
    pack_graded,
    unpack_correctness,
    unpack_graded,
)


def test_rows_survive_being_packed() -> None:
    right = [True, False, True] * 7
    assert unpack_correctness(pack_correctness(right), 21).tolist() == right
    with pytest.raises(ValueError, match="don't hold 25 rows"):
        unpack_correctness(pack_correctness(right), 25)


def test_intervals_of_graded_means() -> None:
    """The interval of 0 and 1 is the plus-four interval; equal values still have a width."""
    low, high = mean_interval([1.0] * 30 + [0.0] * 10)
    share = 32 / 44
    half = 1.959964 * (share * (1 - share) / 44) ** 0.5
    assert (low, high) == pytest.approx((share - half, share + half))
    assert mean_interval([0.0] * 20)[1] > 0.1
    values = np.random.default_rng(0).beta(2, 5, size=400)
    low, high = mean_interval(values)
    plain = 1.959964 * values.std() / 20
    assert low < values.mean() < high
    assert 1 < (high - low) / 2 / plain < 1.2


def test_values_come_back_from_text() -> None:
    values = [0.0, 1.0, 0.3333333, 0.5]
    assert unpack_graded(pack_graded(values), 4) == pytest.approx(values, abs=1e-5)
    with pytest.raises(ValueError, match="4 values don't belong to 5 rows"):
        unpack_graded(pack_graded(values), 5)
