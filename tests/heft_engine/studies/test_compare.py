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
    """statsmodels' Holm collects garbage each time, and torch lies on the heap of this process."""
    gc.freeze()
    yield
    gc.unfreeze()


def outcome(seed: int, right: int, rows: int = 100, first: int = 0) -> RowValues:
    """Right on `right` rows from row `first` on."""
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
            runs=[RowValues(seed=i, values=one) for i, one in enumerate(rows, 1)],
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


def test_pairs_are_of_the_same_rows() -> None:
    other = Arm(name="b", seeds=[1], runs=[RowValues(seed=1, values=np.ones(4, bool), rows_sha256="b")])
    mine = Arm(name="a", seeds=[1], runs=[RowValues(seed=1, values=np.ones(4, bool), rows_sha256="a")])
    with pytest.raises(ValueError, match="different rows"):
        paired_differences(mine, other)
    told = compare_arms([mine, other])["comparisons"][0]
    assert told["sentence"] == "a and b can't be compared: they were evaluated on different rows."
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
        f"HEFT 3+3 is 1.5 points above LoRA alone (95 % confidence interval −{low} to {high}): "
        f"not significant with 3 seeds; about {needed} seeds would be needed."
    )
    assert [one["seed"] for one in told["models"]] == [1, 2, 3]


def test_a_difference_that_is_there() -> None:
    told = only(compare_arms([arm("a", 900, 905, 902, rows=1000), arm("b", 700, 701, 706, rows=1000)]))
    assert told["separable"]
    assert told["sentence"].startswith("a is 20.0 points above b (95 % confidence interval ")
    assert (
        told["sentence"].endswith(": significant with 3 seeds (p < 0.001).") or "p = 0.0" in told["sentence"]
    )


def test_one_seed_compares_models_alone_and_says_so() -> None:
    told = only(compare_arms([arm("a", 90), arm("b", 60)]))
    assert told["question"] == "models"
    assert told["sentence"].startswith(
        "With one common seed only models can be compared, not methods: with seed 1 "
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
    assert told["sentence"] == "a and b can't be compared: they have no common seed (b lacks seeds 1, 2)."
    assert (told["question"], told["difference"], told["separable"]) == (None, None, False)
    assert verdict["arms"][1]["accuracy"] is None


def test_no_difference_is_not_called_one() -> None:
    told = only(compare_arms([arm("a", 80, 82), arm("b", 80, 82)]))
    assert told["sentence"].startswith("a and b differ by less than 0.1 points (95 % confidence interval −")
    assert told["sentence"].endswith("not significant with 2 seeds; there is no difference to detect.")


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
    assert "no number of seeds would suffice with 100 test rows, about " in told["sentence"]
    assert told["seeds_needed"] is None
    assert told["rows_needed"] > 100
