"""Comparisons of arms: accuracies, corrected p-values, and sentences that claim no more than the numbers."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from heft_engine.studies.accuracy import accuracy_of
from heft_engine.studies.arms import Arm, RowValues, paired_differences
from heft_engine.studies.compare import compare_arms


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> Iterator[None]:
    """Freezes the heap: statsmodels' Holm collects garbage at each call, which is slow with torch loaded."""
    gc.freeze()
    yield
    gc.unfreeze()


def outcome(seed: int, right: int, rows: int = 100, first: int = 0) -> RowValues:
    """The values of a run that is right on `right` rows from row `first` on."""
    return RowValues(seed=seed, values=np.roll(np.arange(rows) < right, first))


def arm(name: str, *rights: int, rows: int = 100, seeds: int | None = None) -> Arm:
    runs = [outcome(seed, right, rows) for seed, right in enumerate(rights, 1)]
    return Arm(name=name, seeds=list(range(1, (seeds or len(rights)) + 1)), runs=runs)


def test_graded_arms_are_judged_like_others() -> None:
    rng = np.random.default_rng(5)
    base = rng.beta(2, 3, 200)

    def graded(name: str, shift: float) -> Arm:
        rows = [np.clip(base + shift + rng.normal(0, 0.05, 200), 0, 1) for _ in range(3)]
        return Arm(
            name=name,
            seeds=[1, 2, 3],
            runs=[RowValues(seed=i, values=values) for i, values in enumerate(rows, 1)],
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
        Arm(name=arm, seeds=[1], runs=[RowValues(seed=1, values=base * k)])
        for arm, k in (("a", 1.0), ("b", 0.9))
    ]
    assert "a sign-flip test" in compare_arms(alone)["comparisons"][0]["sentence"]


# -- arms -------------------------------------------------------------------------------------------------------------


def test_one_seed_has_wilsons_interval() -> None:
    accuracy = accuracy_of(arm("heft", 80))
    assert accuracy is not None
    wilson = stats.binomtest(80, 100).proportion_ci(method="wilson")
    assert accuracy.interval_95 == pytest.approx((wilson.low, wilson.high))
    assert (accuracy.covers, accuracy.over_seeds, accuracy.deviation) == ("rows", None, None)


def test_several_seeds_have_both_intervals_in_one() -> None:
    accuracy = accuracy_of(arm("heft", 80, 84, 85))
    assert accuracy is not None
    assert accuracy.over_seeds is not None
    t = stats.t.interval(0.95, 2, loc=0.83, scale=stats.sem([0.80, 0.84, 0.85]))
    assert accuracy.over_seeds == pytest.approx(t)
    assert accuracy.interval_95[0] < t[0] < t[1] < accuracy.interval_95[1]
    assert [seed["correct"] for seed in accuracy.per_seed] == [80, 84, 85]


def test_an_arm_that_is_always_right_is_not_certain() -> None:
    accuracy = accuracy_of(arm("heft", 100, 100))
    assert accuracy is not None
    assert accuracy.interval_95[0] < 0.98
    assert accuracy.interval_95[1] == 1


def test_pairs_are_of_the_same_rows() -> None:
    other = Arm(name="b", seeds=[1], runs=[RowValues(seed=1, values=np.ones(4, bool), rows_sha256="b")])
    mine = Arm(name="a", seeds=[1], runs=[RowValues(seed=1, values=np.ones(4, bool), rows_sha256="a")])
    with pytest.raises(ValueError, match="different rows"):
        paired_differences(mine, other)
    comparison = compare_arms([mine, other])["comparisons"][0]
    assert comparison["sentence"] == "a and b can't be compared: they were evaluated on different rows."
    assert comparison["p_value"] is None


# -- the verdict ------------------------------------------------------------------------------------------------------


def only(verdict: dict) -> dict:
    (comparison,) = verdict["comparisons"]
    return comparison


def test_three_seeds_that_do_not_suffice() -> None:
    comparison = only(
        compare_arms(
            [arm("LoRA alone", 2420, 2500, 2510, rows=3270), arm("HEFT 3+3", 2530, 2490, 2560, rows=3270)]
        )
    )
    assert comparison["question"] == "methods"
    assert not comparison["separable"]
    assert comparison["interval_95"][0] < comparison["difference"] < comparison["interval_95"][1]
    needed = comparison["seeds_needed"]
    low, high = (f"{100 * abs(end):.1f}" for end in reversed(comparison["interval_95"]))
    assert comparison["sentence"] == (
        f"HEFT 3+3 is 1.5 points above LoRA alone (95 % confidence interval −{low} to {high}): "
        f"not significant with 3 seeds; about {needed} seeds would be needed."
    )
    assert [model["seed"] for model in comparison["models"]] == [1, 2, 3]


def test_a_difference_that_is_there() -> None:
    comparison = only(compare_arms([arm("a", 900, 905, 902, rows=1000), arm("b", 700, 701, 706, rows=1000)]))
    assert comparison["separable"]
    assert comparison["sentence"].startswith("a is 20.0 points above b (95 % confidence interval ")
    assert (
        comparison["sentence"].endswith(": significant with 3 seeds (p < 0.001).")
        or "p = 0.0" in comparison["sentence"]
    )


def test_one_seed_compares_models_alone_and_says_so() -> None:
    comparison = only(compare_arms([arm("a", 90), arm("b", 60)]))
    assert comparison["question"] == "models"
    assert comparison["sentence"].startswith(
        "With one common seed only models can be compared, not methods: with seed 1 "
    )
    assert "the model of a is 30.0 points above that of b" in comparison["sentence"]
    assert comparison["separable"]


def test_a_seed_that_failed_is_named() -> None:
    comparison = only(compare_arms([arm("a", 90, 91, 92), arm("b", 60, 61, seeds=3)]))
    assert comparison["seeds"] == 2
    assert "2 seeds (b lacks seed 3)" in comparison["sentence"]


def test_a_failed_arm_is_not_compared() -> None:
    verdict = compare_arms([arm("a", 90, 91), arm("b", seeds=2)])
    comparison = only(verdict)
    assert (
        comparison["sentence"] == "a and b can't be compared: they have no common seed (b lacks seeds 1, 2)."
    )
    assert (comparison["question"], comparison["difference"], comparison["separable"]) == (None, None, False)
    assert verdict["arms"][1]["accuracy"] is None


def test_no_difference_is_not_called_one() -> None:
    comparison = only(compare_arms([arm("a", 80, 82), arm("b", 80, 82)]))
    assert comparison["sentence"].startswith(
        "a and b differ by less than 0.1 points (95 % confidence interval −"
    )
    assert comparison["sentence"].endswith("not significant with 2 seeds; there is no difference to detect.")


def test_many_arms_are_corrected_by_holm_in_two_families() -> None:
    arms = [arm(name, *rights, rows=1000) for name, rights in
            {"a": (900, 890, 910), "b": (880, 850, 870), "c": (700, 720, 710)}.items()]  # fmt: skip
    comparisons = compare_arms(arms)["comparisons"]
    assert [(comparison["a"], comparison["b"]) for comparison in comparisons] == [
        ("a", "b"),
        ("a", "c"),
        ("b", "c"),
    ]
    expected = multipletests([comparison["p_value"] for comparison in comparisons], method="holm")[1]
    assert [comparison["p_adjusted"] for comparison in comparisons] == pytest.approx(list(expected))
    models = [model for comparison in comparisons for model in comparison["models"]]
    expected = multipletests([model["p_value"] for model in models], method="holm")[1]
    assert [model["p_adjusted"] for model in models] == pytest.approx(list(expected))


def test_a_baseline_narrows_the_comparisons() -> None:
    arms = [arm(name, 80 + i, 82) for i, name in enumerate("abc")]
    comparisons = compare_arms(arms, baseline="b")["comparisons"]
    assert [(comparison["a"], comparison["b"]) for comparison in comparisons] == [("a", "b"), ("c", "b")]


def test_too_few_rows_are_named_as_the_limit() -> None:
    comparison = only(compare_arms([arm("a", 84, 84, 84), arm("b", 82, 82, 82)]))
    assert "no number of seeds would suffice with 100 test rows, about " in comparison["sentence"]
    assert comparison["seeds_needed"] is None
    assert comparison["rows_needed"] > 100
