"""Names of tasks and of their metrics; heft_engine.data.metrics computes them. Imports nothing else of the project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

TaskType = Literal["yes_no", "choice", "text"]
MetricName = Literal["accuracy", "exact_match", "final_number", "f1", "rouge_l"]

#: The metrics of each task; the first is its default.
METRICS: Mapping[TaskType, tuple[MetricName, ...]] = {
    "yes_no": ("accuracy",),
    "choice": ("accuracy",),
    "text": ("exact_match", "final_number", "f1", "rouge_l"),
}
#: Metrics with any value from 0 to 1 for a row; the others are 0 or 1.
GRADED: tuple[MetricName, ...] = ("f1", "rouge_l")


def metrics_error(metrics: Sequence[MetricName], task: TaskType | None) -> str | None:
    """Returns why a task (None: every task) can't have these metrics, or None if it can."""
    if len(set(metrics)) < len(metrics):
        return "metrics must be unique"
    tasks = [task] if task is not None else list(METRICS)
    if any(set(metrics) <= set(METRICS[candidate]) for candidate in tasks):
        return None
    if task is None:
        return f"no task has all of the metrics {', '.join(metrics)}"
    unknown = next(name for name in metrics if name not in METRICS[task])
    return f"{unknown} is not a metric of {task} tasks, which have {', '.join(METRICS[task])}"
