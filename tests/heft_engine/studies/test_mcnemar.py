"""Comparison of single models."""

from __future__ import annotations

import numpy as np
import pytest
from random_differences import random_differences
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from heft_engine.studies.mcnemar import compare_models, sign_flips


def test_mcnemar_is_that_of_statsmodels() -> None:
    row = random_differences()[0]
    comparison = compare_models(row)
    b, c = int((row > 0).sum()), int((row < 0).sum())
    assert (comparison.only_a, comparison.only_b) == (b, c)
    assert comparison.p_value == pytest.approx(mcnemar([[0, b], [c, 0]], exact=True).pvalue)
    assert comparison.p_value == pytest.approx(stats.binomtest(b, b + c).pvalue)


def test_the_bootstrap_is_that_of_scipy() -> None:
    row = random_differences(rows=400)[0]
    mine = compare_models(row).interval_95
    theirs = stats.bootstrap(
        (row,), np.mean, method="percentile", rng=np.random.default_rng(7)
    ).confidence_interval
    assert mine == pytest.approx((theirs.low, theirs.high), abs=1 / 400)  # a row's worth: the draws differ


def test_equal_models_do_not_differ() -> None:
    comparison = compare_models(np.zeros(50))
    assert (comparison.difference, comparison.p_value, comparison.interval_95) == (0.0, 1.0, (0.0, 0.0))


def test_graded_rows_are_compared_by_flipping_signs_as_scipy_does() -> None:
    few = np.array([0.3, 0.2, -0.1, 0.25, 0.4, 0.0, 0.15, 0.0, 0.05, -0.02])
    comparison = compare_models(few)
    theirs = stats.permutation_test((few,), np.sum, permutation_type="samples", n_resamples=10_000)
    assert comparison.p_value == pytest.approx(theirs.pvalue)
    assert (comparison.test, comparison.only_a, comparison.only_b) == ("a sign-flip test", 6, 2)
    assert comparison.difference == pytest.approx(few.mean())
    assert comparison.interval_95[0] < comparison.difference < comparison.interval_95[1]
    many = np.random.default_rng(3).normal(0.02, 0.1, size=80)
    theirs = stats.permutation_test(
        (many,), np.sum, permutation_type="samples", n_resamples=9_999, rng=np.random.default_rng(1)
    )
    assert compare_models(many).p_value == pytest.approx(theirs.pvalue, abs=0.02)
    assert compare_models(np.full(5, 0.25)).p_value == pytest.approx(2 / 2**5)


@pytest.mark.parametrize(("a", "b"), [(5, 0), (9, 2), (30, 14), (100, 60)])
def test_sign_flips_of_right_and_wrong_are_mcnemars(a: int, b: int) -> None:
    row = np.array([1.0] * a + [-1.0] * b + [0.0] * 50)
    exact = mcnemar([[0, a], [b, 0]], exact=True).pvalue
    corrected = mcnemar([[0, a], [b, 0]], exact=False, correction=True).pvalue
    assert sign_flips(row) == pytest.approx(exact if a + b <= 16 else corrected)
    assert sign_flips(row) == pytest.approx(exact, rel=0.1)


def test_sign_flips_keep_their_level() -> None:
    """At most 5 of 100 pairs of equal models are called different, with few differing rows or many."""
    rng = np.random.default_rng(11)
    for rows, differ in ((60, 0.1), (60, 0.4), (300, 0.9)):
        moved = rng.random((2_000, rows)) < differ
        drawn = moved * rng.choice([-1, 1], (2_000, rows)) * rng.beta(2, 3, (2_000, rows))
        called = np.mean([sign_flips(row) < 0.05 for row in drawn[:400]])
        assert called <= 0.05 + 2 * (0.05 * 0.95 / 400) ** 0.5
