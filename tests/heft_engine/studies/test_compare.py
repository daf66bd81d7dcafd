"""The statistics of studies: figures held against scipy and statsmodels, and sentences that claim no more."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from heft_engine.evaluation.row_values import pack_correctness, unpack_correctness
from heft_engine.studies import Arm, RowValues, accuracy_of, compare_arms, compare_methods, compare_models
from heft_engine.studies.arms import paired
from heft_engine.studies.intervals import half_width, p_value, row_variance, seed_variance
from heft_engine.studies.mcnemar import sign_flips
from heft_engine.studies.power import Noise, power, rows_needed, seeds_needed


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> Iterator[None]:
    """statsmodels' Holm collects garbage each time, and torch lies on the heap of this process."""
    gc.freeze()
    yield
    gc.unfreeze()


def outcome(seed: int, right: int, rows: int = 100, first: int = 0) -> RowValues:
    """Right on `right` rows from row `first` on."""
    return RowValues(seed=seed, right=np.roll(np.arange(rows) < right, first))


def arm(name: str, *rights: int, rows: int = 100, seeds: int | None = None) -> Arm:
    outcomes = [outcome(seed, right, rows) for seed, right in enumerate(rights, 1)]
    return Arm(name=name, seeds=list(range(1, (seeds or len(rights)) + 1)), outcomes=outcomes)


def random_differences(seeds: int = 3, rows: int = 300, shift: float = 0.05) -> np.ndarray:
    rng = np.random.default_rng(seeds + rows)
    difficulty = rng.normal(size=rows)
    a = difficulty + 0.4 * rng.normal(size=(seeds, rows)) < 0.8 + shift
    b = difficulty + 0.4 * rng.normal(size=(seeds, rows)) < 0.8
    return a.astype(float) - b


# -- models -----------------------------------------------------------------------------------------------------------


def test_mcnemar_is_that_of_statsmodels() -> None:
    row = random_differences()[0]
    found = compare_models(row)
    b, c = int((row > 0).sum()), int((row < 0).sum())
    assert (found.only_a, found.only_b) == (b, c)
    assert found.p_value == pytest.approx(mcnemar([[0, b], [c, 0]], exact=True).pvalue)
    assert found.p_value == pytest.approx(stats.binomtest(b, b + c).pvalue)


def test_the_bootstrap_is_that_of_scipy() -> None:
    row = random_differences(rows=400)[0]
    mine = compare_models(row).interval_95
    theirs = stats.bootstrap(
        (row,), np.mean, method="percentile", rng=np.random.default_rng(7)
    ).confidence_interval
    assert mine == pytest.approx((theirs.low, theirs.high), abs=1 / 400)  # a row's worth: the draws differ


def test_equal_models_are_not_told_apart() -> None:
    found = compare_models(np.zeros(50))
    assert (found.difference, found.p_value, found.interval_95) == (0.0, 1.0, (0.0, 0.0))


def test_graded_rows_are_compared_by_flipping_signs_as_scipy_does() -> None:
    few = np.array([0.3, 0.2, -0.1, 0.25, 0.4, 0.0, 0.15, 0.0, 0.05, -0.02])
    found = compare_models(few)
    theirs = stats.permutation_test((few,), np.sum, permutation_type="samples", n_resamples=10_000)
    assert found.p_value == pytest.approx(theirs.pvalue)
    assert (found.test, found.only_a, found.only_b) == ("a sign-flip test", 6, 2)
    assert found.difference == pytest.approx(few.mean())
    assert found.interval_95[0] < found.difference < found.interval_95[1]
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
    """Models that are alike: no more than 5 of 100 are called different, with few rows that differ or many."""
    rng = np.random.default_rng(11)
    for rows, differ in ((60, 0.1), (60, 0.4), (300, 0.9)):
        moved = rng.random((2_000, rows)) < differ
        drawn = moved * rng.choice([-1, 1], (2_000, rows)) * rng.beta(2, 3, (2_000, rows))
        called = np.mean([sign_flips(one) < 0.05 for one in drawn[:400]])
        assert called <= 0.05 + 2 * (0.05 * 0.95 / 400) ** 0.5


def test_graded_arms_are_judged_like_others() -> None:
    rng = np.random.default_rng(5)
    base = rng.beta(2, 3, 200)

    def graded(name: str, shift: float) -> Arm:
        rows = [np.clip(base + shift + rng.normal(0, 0.05, 200), 0, 1) for _ in range(3)]
        return Arm(
            name=name,
            seeds=[1, 2, 3],
            outcomes=[RowValues(seed=i, right=one) for i, one in enumerate(rows, 1)],
        )

    verdict = compare_arms([graded("high", 0.1), graded("low", 0.0)])
    high, low = verdict["arms"]
    assert high["per_seed"][0]["correct"] is None
    assert high["interval_95"][0] < high["accuracy"] < high["interval_95"][1]
    assert high["accuracy"] - low["accuracy"] == pytest.approx(0.1, abs=0.02)
    (compared,) = verdict["comparisons"]
    assert (compared["question"], compared["separable"]) == ("methods", True)
    assert compared["models"][0]["test"] == "a sign-flip test"
    alone = [
        Arm(name=arm, seeds=[1], outcomes=[RowValues(seed=1, right=base * k)])
        for arm, k in (("a", 1.0), ("b", 0.9))
    ]
    assert "a sign-flip test" in compare_arms(alone)["comparisons"][0]["sentence"]


# -- methods ----------------------------------------------------------------------------------------------------------


def test_seeds_that_vary_give_the_paired_t_test() -> None:
    """With endless rows the rows' part vanishes: what is left is scipy's."""
    differences = np.array([0.03, 0.01, 0.06, -0.01])
    p = p_value(float(differences.mean()), float(differences.var(ddof=1) / 4), 0.0, 4, float("inf"))
    assert p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, rel=1e-6)


def test_seeds_that_agree_leave_the_noise_of_the_rows() -> None:
    row = random_differences()[0]
    found = compare_methods(np.stack([row, row, row]))
    assert (found.seed_deviation, found.cohens_dz) == (0.0, None)
    padded = np.concatenate([row, [1.0, -1.0]])
    expected = (abs(found.difference) - 0.5 / len(row)) / (padded.std() / len(padded) ** 0.5)
    assert found.p_value == pytest.approx(2 * stats.norm.sf(expected), rel=1e-6)
    # Three equal seeds are worth no more than one.
    assert found.p_value == pytest.approx(compare_methods(np.stack([row, row])).p_value)


def test_a_handful_of_rows_all_one_way_is_no_certainty() -> None:
    row = np.zeros(1_000)
    row[:4] = 1
    found = compare_methods(np.stack([row, row]))
    assert found.p_value > 0.05
    assert found.interval_95[0] < 0 < found.interval_95[1]


def test_methods_without_any_difference() -> None:
    found = compare_methods(np.zeros((3, 40)))
    assert (found.difference, found.p_value, found.seeds_needed(0.05), found.rows_needed(0.05)) == (
        0,
        1,
        None,
        None,
    )
    assert found.interval_95[0] < 0 < found.interval_95[1]


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_p_and_interval_agree(seeds: int) -> None:
    differences = random_differences(seeds, shift=0.1)
    found = compare_methods(differences)
    assert (found.p_value < 0.05) == (found.interval_95[0] > 0 or found.interval_95[1] < 0)
    of_seeds, of_rows = float(seed_variance(differences)), float(row_variance(differences.mean(axis=0)))
    touching = float(half_width(of_seeds, of_rows, seeds, found.rows, found.p_value))
    assert touching == pytest.approx(abs(found.difference), rel=1e-6)


def test_one_seed_compares_no_methods() -> None:
    with pytest.raises(ValueError, match="two seeds"):
        compare_methods(np.zeros((1, 10)))


# -- power ------------------------------------------------------------------------------------------------------------


def noise(seed: float, row: float = 0.0, residual: float = 0.0, rows: int = 1_000_000) -> Noise:
    return Noise(rows=rows, seed=seed**2, row=row, residual=residual)


@pytest.mark.parametrize("seeds", [3, 6, 12])
def test_power_is_that_of_the_paired_t_test_where_rows_do_not_matter(seeds: int) -> None:
    expected = TTestPower().power(effect_size=1.2, nobs=seeds, alpha=0.05)
    assert power(0.012, noise(0.01), seeds) == pytest.approx(
        expected, abs=2e-3
    )  # theirs counts the wrong way round too


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


# -- arms -------------------------------------------------------------------------------------------------------------


def test_one_seed_has_wilsons_interval() -> None:
    found = accuracy_of(arm("heft", 80))
    assert found is not None
    wilson = stats.binomtest(80, 100).proportion_ci(method="wilson")
    assert found.interval_95 == pytest.approx((wilson.low, wilson.high))
    assert (found.covers, found.over_seeds, found.deviation) == ("rows", None, None)


def test_several_seeds_have_both_intervals_in_one() -> None:
    found = accuracy_of(arm("heft", 80, 84, 85))
    assert found is not None
    assert found.over_seeds is not None
    t = stats.t.interval(0.95, 2, loc=0.83, scale=stats.sem([0.80, 0.84, 0.85]))
    assert found.over_seeds == pytest.approx(t)
    assert found.interval_95[0] < t[0] < t[1] < found.interval_95[1]
    assert [one["correct"] for one in found.per_seed] == [80, 84, 85]


def test_an_arm_that_is_always_right_is_not_certain() -> None:
    found = accuracy_of(arm("heft", 100, 100))
    assert found is not None
    assert found.interval_95[0] < 0.98
    assert found.interval_95[1] == 1


def test_rows_survive_being_packed() -> None:
    right = [True, False, True] * 7
    assert unpack_correctness(pack_correctness(right), 21).tolist() == right
    with pytest.raises(ValueError, match="don't hold 25 rows"):
        unpack_correctness(pack_correctness(right), 25)


def test_pairs_are_of_the_same_rows() -> None:
    other = Arm(name="b", seeds=[1], outcomes=[RowValues(seed=1, right=np.ones(4, bool), rows_sha256="b")])
    mine = Arm(name="a", seeds=[1], outcomes=[RowValues(seed=1, right=np.ones(4, bool), rows_sha256="a")])
    with pytest.raises(ValueError, match="different rows"):
        paired(mine, other)
    told = compare_arms([mine, other])["comparisons"][0]
    assert told["sentence"] == "a and b were measured on different rows: nothing can be compared."
    assert told["p_value"] is None


# -- the verdict ------------------------------------------------------------------------------------------------------


def only(verdict: dict) -> dict:
    (comparison,) = verdict["comparisons"]
    return comparison


def test_three_seeds_that_do_not_suffice() -> None:
    told = only(
        compare_arms(
            [arm("LoRA alone", 2420, 2500, 2510, rows=3270), arm("HEFT 3+3", 2530, 2490, 2560, rows=3270)]
        )
    )
    assert told["question"] == "methods"
    assert not told["separable"]
    assert told["interval_95"][0] < told["difference"] < told["interval_95"][1]
    needed = told["seeds_needed"]
    low, high = (f"{100 * abs(end):.1f}" for end in reversed(told["interval_95"]))
    assert told["sentence"] == (
        f"HEFT 3+3 is 1.5 points above LoRA alone, 95 % interval −{low} to {high}: not separable with 3 seeds; "
        f"about {needed} would be needed."
    )
    assert [one["seed"] for one in told["models"]] == [1, 2, 3]


def test_a_difference_that_is_there() -> None:
    told = only(compare_arms([arm("a", 900, 905, 902, rows=1000), arm("b", 700, 701, 706, rows=1000)]))
    assert told["separable"]
    assert told["sentence"].startswith("a is 20.0 points above b, 95 % interval ")
    assert told["sentence"].endswith(": separable with 3 seeds (p < 0.001).") or "p = 0.0" in told["sentence"]


def test_one_seed_compares_models_alone_and_says_so() -> None:
    told = only(compare_arms([arm("a", 90), arm("b", 60)]))
    assert told["question"] == "models"
    assert told["sentence"].startswith(
        "With one seed in common only models can be compared, not methods: with seed 1 "
    )
    assert "the model of a is 30.0 points above that of b" in told["sentence"]
    assert told["separable"]


def test_a_seed_that_failed_is_named() -> None:
    told = only(compare_arms([arm("a", 90, 91, 92), arm("b", 60, 61, seeds=3)]))
    assert told["seeds"] == 2
    assert "2 seeds (b lacks seed 3)" in told["sentence"]


def test_an_arm_that_failed_is_compared_with_nobody() -> None:
    verdict = compare_arms([arm("a", 90, 91), arm("b", seeds=2)])
    told = only(verdict)
    assert told["sentence"] == "a and b have no seed in common (b lacks seeds 1, 2): nothing can be compared."
    assert (told["question"], told["difference"], told["separable"]) == (None, None, False)
    assert verdict["arms"][1]["accuracy"] is None


def test_no_difference_is_not_called_one() -> None:
    told = only(compare_arms([arm("a", 80, 82), arm("b", 80, 82)]))
    assert told["sentence"].startswith("a and b differ by less than 0.1 points, 95 % interval −")
    assert told["sentence"].endswith("not separable with 2 seeds; there is no difference to look for.")


def test_many_arms_are_corrected_by_holm_in_two_families() -> None:
    arms = [arm(name, *rights, rows=1000) for name, rights in
            {"a": (900, 890, 910), "b": (880, 850, 870), "c": (700, 720, 710)}.items()]  # fmt: skip
    told = compare_arms(arms)["comparisons"]
    assert [(one["a"], one["b"]) for one in told] == [("a", "b"), ("a", "c"), ("b", "c")]
    expected = multipletests([one["p_value"] for one in told], method="holm")[1]
    assert [one["p_adjusted"] for one in told] == pytest.approx(list(expected))
    models = [model for one in told for model in one["models"]]
    expected = multipletests([model["p_value"] for model in models], method="holm")[1]
    assert [model["p_adjusted"] for model in models] == pytest.approx(list(expected))


def test_a_baseline_narrows_the_comparisons() -> None:
    arms = [arm(name, 80 + i, 82) for i, name in enumerate("abc")]
    told = compare_arms(arms, baseline="b")["comparisons"]
    assert [(one["a"], one["b"]) for one in told] == [("a", "b"), ("c", "b")]


def test_few_rows_are_named_as_what_is_missing() -> None:
    told = only(compare_arms([arm("a", 84, 84, 84), arm("b", 82, 82, 82)]))
    assert "no number of seeds would be enough on 100 test rows, about " in told["sentence"]
    assert told["seeds_needed"] is None
    assert told["rows_needed"] > 100
