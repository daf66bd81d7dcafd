"""The metrics that a task may name, and which task each belongs to. It does NOT compute them:
heft_engine.data.metrics does.

It imports nothing, so that the service can refuse a name before anything is queued.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

TaskType = Literal["yes_no", "choice", "text"]
MetricName = Literal["accuracy", "exact_match", "final_number", "f1", "rouge_l"]

#: What each task can be measured by; the first is what it is measured by unless its user says otherwise.
METRICS: Mapping[TaskType, tuple[MetricName, ...]] = {
    "yes_no": ("accuracy",),
    "choice": ("accuracy",),
    "text": ("exact_match", "final_number", "f1", "rouge_l"),
}
#: Metrics by which an answer is more or less right, from 0 to 1; by the others it is right or wrong.
GRADED: tuple[MetricName, ...] = ("f1", "rouge_l")


def metrics_error(metrics: Sequence[MetricName], task: TaskType | None) -> str | None:
    """Why these can't be the metrics of a task (None: of any one task); None where they can."""
    if len(set(metrics)) < len(metrics):
        return "each metric once"
    kinds = [task] if task is not None else list(METRICS)
    if any(set(metrics) <= set(METRICS[kind]) for kind in kinds):
        return None
    if task is None:
        return f"no task has all of {', '.join(metrics)}"
    wrong = next(name for name in metrics if name not in METRICS[task])
    return f"{wrong} is no metric of a {task} task; it has {', '.join(METRICS[task])}"
