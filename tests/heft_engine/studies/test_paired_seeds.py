"""Comparison of methods over paired seeds, and its power."""

from __future__ import annotations

import numpy as np
import pytest
from random_differences import random_differences
from scipy import stats
from statsmodels.stats.power import TTestPower

from heft_engine.studies.intervals import half_width, p_value, row_variance, seed_variance
from heft_engine.studies.paired_seeds import compare_methods
from heft_engine.studies.power import Noise, power, rows_needed, seeds_needed


def test_seeds_that_vary_give_the_paired_t_test() -> None:
    """With infinitely many rows their variance vanishes, which leaves scipy's paired t-test."""
    differences = np.array([0.03, 0.01, 0.06, -0.01])
    p = p_value(float(differences.mean()), float(differences.var(ddof=1) / 4), 0.0, 4, float("inf"))
    assert p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, rel=1e-6)


def test_seeds_that_agree_leave_the_noise_of_the_rows() -> None:
    row = random_differences()[0]
    comparison = compare_methods(np.stack([row, row, row]))
    assert (comparison.seed_deviation, comparison.cohens_dz) == (0.0, None)
    padded = np.concatenate([row, [1.0, -1.0]])
    expected = (abs(comparison.difference) - 0.5 / len(row)) / (padded.std() / len(padded) ** 0.5)
    assert comparison.p_value == pytest.approx(2 * stats.norm.sf(expected), rel=1e-6)
    # Three equal seeds are worth no more than one.
    assert comparison.p_value == pytest.approx(compare_methods(np.stack([row, row])).p_value)


def test_a_handful_of_rows_all_one_way_is_no_certainty() -> None:
    row = np.zeros(1_000)
    row[:4] = 1
    comparison = compare_methods(np.stack([row, row]))
    assert comparison.p_value > 0.05
    assert comparison.interval_95[0] < 0 < comparison.interval_95[1]


def test_methods_without_any_difference() -> None:
    comparison = compare_methods(np.zeros((3, 40)))
    assert (
        comparison.difference,
        comparison.p_value,
        comparison.seeds_needed(0.05),
        comparison.rows_needed(0.05),
    ) == (
        0,
        1,
        None,
        None,
    )
    assert comparison.interval_95[0] < 0 < comparison.interval_95[1]


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_p_and_interval_agree(seeds: int) -> None:
    differences = random_differences(seeds, shift=0.1)
    comparison = compare_methods(differences)
    assert (comparison.p_value < 0.05) == (comparison.interval_95[0] > 0 or comparison.interval_95[1] < 0)
    of_seeds, of_rows = float(seed_variance(differences)), float(row_variance(differences.mean(axis=0)))
    touching = float(half_width(of_seeds, of_rows, seeds, comparison.rows, comparison.p_value))
    assert touching == pytest.approx(abs(comparison.difference), rel=1e-6)


def test_one_seed_compares_no_methods() -> None:
    with pytest.raises(ValueError, match="two seeds"):
        compare_methods(np.zeros((1, 10)))


def noise(seed: float, row: float = 0.0, residual: float = 0.0, rows: int = 1_000_000) -> Noise:
    return Noise(rows=rows, seed=seed**2, row=row, residual=residual)


@pytest.mark.parametrize("seeds", [3, 6, 12])
def test_power_is_that_of_the_paired_t_test_where_rows_do_not_matter(seeds: int) -> None:
    expected = TTestPower().power(effect_size=1.2, nobs=seeds, alpha=0.05)
    assert power(0.012, noise(0.01), seeds) == pytest.approx(
        expected, abs=2e-3
    )  # statsmodels counts rejections in the wrong direction too


def test_seeds_needed_is_the_first_number_that_reaches_the_power() -> None:
    needed = seeds_needed(0.01, noise(0.01, row=0.01, residual=0.05, rows=1_000))
    assert needed is not None
    assert power(0.01, noise(0.01, row=0.01, residual=0.05, rows=1_000), needed) >= 0.8
    assert power(0.01, noise(0.01, row=0.01, residual=0.05, rows=1_000), needed - 1) < 0.8
    assert seeds_needed(0.01, noise(0.01)) == int(
        np.ceil(TTestPower().solve_power(1.0, power=0.8, alpha=0.05))
    )


@pytest.mark.parametrize("effect", [0.002, 0.01, 0.05, 0.3])
def test_more_seeds_never_have_less_power(effect: float) -> None:
    """scipy's noncentral t is NaN in places."""
    powers = [
        power(effect, noise(0.03, row=0.01, residual=0.1, rows=1_000), seeds) for seeds in range(2, 200)
    ]
    assert np.all(np.diff(powers) > -5e-3)


def test_no_number_of_seeds_makes_up_for_few_rows() -> None:
    few = noise(0.01, row=0.1, rows=200)
    assert seeds_needed(0.01, few) is None
    rows = rows_needed(0.01, few)
    assert rows == pytest.approx((1.96 + 0.8416) ** 2 * 0.1 / 0.01**2, rel=1e-3)
