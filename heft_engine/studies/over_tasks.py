"""Comparison of two methods over several tasks: a t interval over the tasks' mean differences.

Each task is one observation. The variance from its own rows and seeds is added as in `intervals`: Student's t alone
would be overconfident for two or three tasks that happen to agree. The result generalises to other tasks only as far as
these are a random sample of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from heft_engine.studies import intervals


@dataclass(frozen=True, kw_only=True)
class TaskComparison:
    tasks: int
    per_task: dict[str, float]
    difference: float
    interval_95: tuple[float, float]
    p_value: float


def compare_over_tasks(differences: Mapping[str, NDArray[np.float64]]) -> TaskComparison:
    """Compares two methods by a's row values minus b's, (seeds, rows), of each task. Raises ValueError for one task."""
    tasks = len(differences)
    if tasks < 2:
        raise ValueError("a comparison over tasks needs at least two tasks")
    per_task = {name: float(of_task.mean()) for name, of_task in differences.items()}
    means = np.array(list(per_task.values()))
    between = float(means.var(ddof=1)) / tasks
    within = sum(_variance(of_task) for of_task in differences.values()) / tasks**2
    rows = sum(of_task.shape[-1] for of_task in differences.values())
    difference = float(means.mean())
    half_width = float(intervals.half_width(between, within, tasks, rows))
    return TaskComparison(
        tasks=tasks,
        per_task=per_task,
        difference=difference,
        interval_95=(max(-1.0, difference - half_width), min(1.0, difference + half_width)),
        p_value=intervals.p_value(difference, between, within, tasks, rows),
    )


def _variance(differences: NDArray[np.float64]) -> float:
    """Variance of a task's mean difference: of its rows, and of its seeds if there are several."""
    of_rows = float(intervals.row_variance(differences.mean(axis=0)))
    return of_rows + (float(intervals.seed_variance(differences)) if len(differences) > 1 else 0.0)
