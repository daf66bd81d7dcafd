"""Methods over several tasks: compared within each task, with one statement over all tasks and its error rate."""

from __future__ import annotations

import numpy as np
import pytest

from heft_engine.studies.arms import Arm, RowValues
from heft_engine.studies.compare import compare_arms
from heft_engine.studies.over_tasks import compare_over_tasks


def arm(method: str, task: str, *rights: int, rows: int = 200, seeds: int = 2) -> Arm:
    runs = [
        RowValues(seed=seed, values=np.arange(rows) < right, rows_sha256=task)
        for seed, right in enumerate(rights, 1)
    ]
    return Arm(name=f"{method} on {task}", seeds=range(1, seeds + 1), runs=runs, task=task, method=method)


def verdict_of(*accuracies: tuple[int, int], baseline: str | None = None) -> dict:
    arms = [
        task_arm
        for number, (lora, heft) in enumerate(accuracies)
        for task_arm in (
            arm("LoRA", f"t{number}", lora, lora + 2),
            arm("HEFT", f"t{number}", heft, heft + 2),
        )
    ]
    return compare_arms(arms, baseline=baseline)


def test_arms_are_compared_within_their_task_alone() -> None:
    verdict = verdict_of((150, 160), (120, 126), (100, 104))
    pairs = [(comparison["a"], comparison["b"]) for comparison in verdict["comparisons"]]
    assert pairs == [(f"LoRA on t{n}", f"HEFT on t{n}") for n in range(3)]
    named = verdict_of((150, 160), (120, 126), baseline="LoRA")
    assert [(comparison["a"], comparison["b"]) for comparison in named["comparisons"]] == [
        (f"HEFT on t{n}", f"LoRA on t{n}") for n in range(2)
    ]
    assert [(comparison["a"], comparison["b"]) for comparison in named["over_tasks"]] == [("HEFT", "LoRA")]


def test_over_tasks_a_task_is_one_case() -> None:
    (comparison,) = verdict_of((150, 160), (120, 126), (100, 104))["over_tasks"]
    assert comparison["tasks"] == 3
    assert comparison["per_task"] == pytest.approx({"t0": -0.05, "t1": -0.03, "t2": -0.02})
    assert comparison["difference"] == pytest.approx(-0.1 / 3)
    means = np.array(list(comparison["per_task"].values()))
    t_alone = 4.303 * means.std(ddof=1) / 3**0.5
    low, high = comparison["interval_95"]
    assert (high - low) / 2 > t_alone
    assert comparison["sentence"].startswith("On average over 3 tasks, HEFT is 3.3 points above LoRA (95 %")
    assert comparison["sentence"].endswith(": not significant.")
    assert not comparison["separable"]


def test_two_tasks_that_happen_to_agree_prove_nothing() -> None:
    """A t-test alone would be certain: both tasks differ by exactly 1 point."""
    (comparison,) = verdict_of((150, 152), (120, 122))["over_tasks"]
    assert comparison["p_value"] > 0.05
    assert not comparison["separable"]


def test_one_task_gives_no_statement_over_tasks() -> None:
    assert verdict_of((150, 160))["over_tasks"] == []
    assert compare_arms([arm("LoRA", "t0", 100, 102), arm("HEFT", "t1", 100, 102)])["comparisons"] == []
    with pytest.raises(ValueError, match="at least two tasks"):
        compare_over_tasks({"t0": np.zeros((2, 50))})


def test_tasks_where_a_method_has_nothing_are_left_out() -> None:
    arms = [arm(m, t, 150, 152) for m in ("LoRA", "HEFT") for t in ("a", "b")]
    (comparison,) = compare_arms([*arms, arm("LoRA", "c", 150, 152), arm("HEFT", "c")])["over_tasks"]
    assert list(comparison["per_task"]) == ["a", "b"]


@pytest.mark.parametrize(("tasks", "spread"), [(2, 0.0), (2, 0.05), (4, 0.0), (4, 0.02)])
def test_equal_methods_are_called_different_in_no_more_than_5_of_100_cases(tasks: int, spread: float) -> None:
    rng = np.random.default_rng(7)
    runs, seeds, rows = 200, 3, 200
    wrong = 0
    for _ in range(runs):
        gains = spread * rng.standard_normal(tasks)
        comparison = compare_over_tasks(
            {
                str(number): (rng.random((seeds, rows)) < 0.75 + gain).astype(float)
                - (rng.random((seeds, rows)) < 0.75)
                for number, gain in enumerate(gains)
            }
        )
        low, high = comparison.interval_95
        assert (comparison.p_value < 0.05) == (not low <= 0 <= high)
        wrong += comparison.p_value < 0.05
    assert wrong / runs <= 0.05
