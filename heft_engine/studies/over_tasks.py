"""Is one method better than another over several tasks? A task is one case: its difference is the mean over its seeds.

A t interval over the tasks' differences, with the noise that each of them has from its own rows and seeds added as
`intervals` adds it: t alone would take two or three tasks that happen to agree for certain. The tasks stand for tasks
like them only as far as they were chosen so; nothing here knows how they were. It does NOT compare within a task.
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
    """From a's rows minus b's, (seeds, rows) of each task. Raises ValueError for one task, which tells of no other."""
    tasks = len(differences)
    if tasks < 2:
        raise ValueError("tasks are compared over two or more")
    per_task = {name: float(found.mean()) for name, found in differences.items()}
    means = np.array(list(per_task.values()))
    between = float(means.var(ddof=1)) / tasks
    within = sum(_noise(found) for found in differences.values()) / tasks**2
    rows = sum(found.shape[-1] for found in differences.values())
    difference = float(means.mean())
    half = float(intervals.half_width(between, within, tasks, rows))
    return TaskComparison(
        tasks=tasks,
        per_task=per_task,
        difference=difference,
        interval_95=(max(-1.0, difference - half), min(1.0, difference + half)),
        p_value=intervals.p_value(difference, between, within, tasks, rows),
    )


def _noise(differences: NDArray[np.float64]) -> float:
    """Variance of a task's mean difference: of its seeds, where there are several, and of its rows."""
    of_rows = float(intervals.row_variance(differences.mean(axis=0)))
    return of_rows + (float(intervals.seed_variance(differences)) if len(differences) > 1 else 0.0)
