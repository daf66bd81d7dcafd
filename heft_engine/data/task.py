"""What a model is asked and measured by: task, template, labels, metrics, with nothing left to infer.

It does NOT encode rows (heft_engine.data.encoding) or compute metrics (heft_engine.data.metrics).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from heft_engine.config.metric_names import METRICS, MetricName, TaskType, metrics_error
from heft_engine.config.train import TaskSettings
from heft_engine.errors import ConfigError

YES_NO_LABELS = ("yes", "no")
TEMPLATES: dict[TaskType, str] = {
    "yes_no": "{passage}\nQuestion: {question}\nAnswer:",
    "choice": "{passage}\nQuestion: {question}\nAnswer:",
    "text": "{prompt}",
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the model is asked, with nothing left to infer: this is what a bundle freezes."""

    type: TaskType
    template: str
    labels: tuple[str, ...] | None = None
    #: What answers are measured by; the first is what counts.
    metrics: tuple[MetricName, ...] = ()

    def __post_init__(self) -> None:
        # Bundles of before there was a choice have none.
        object.__setattr__(self, "metrics", self.metrics or METRICS[self.type][:1])

    @staticmethod
    def resolve(settings: TaskSettings, inferred: TaskType) -> Task:
        """The settings with their gaps filled. Raises ConfigError when the rows are of another type."""
        kind = settings.type or inferred
        if kind != inferred:
            raise ConfigError(f"the task is {kind}, but the rows are {inferred} rows", param="task.type")
        template = settings.template or TEMPLATES[kind]
        needed = "{prompt}" if kind == "text" else "{question}"
        if needed not in template:
            raise ConfigError(f"the template must hold {needed}", param="task.template")
        labels = YES_NO_LABELS if kind == "yes_no" else tuple(settings.labels) if settings.labels else None
        metrics = tuple(settings.metrics or ())
        if metrics and (reason := metrics_error(metrics, kind)):
            raise ConfigError(reason, param="task.metrics")
        return Task(type=kind, template=template, labels=labels, metrics=metrics)

    @property
    def row_labels(self) -> tuple[str, ...] | None:
        """What `heft_engine.data.rows` must know to read rows of this task: the labels of a `choice` task."""
        return self.labels if self.type == "choice" else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Task:
        labels, metrics = data.get("labels"), data.get("metrics")
        return Task(
            type=data["type"],
            template=data["template"],
            labels=tuple(labels) if labels else None,
            metrics=tuple(metrics or ()),
        )
