"""The task of a model: type, template, labels and metrics, with every default filled in."""

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
    """A resolved task, as a bundle stores it."""

    type: TaskType
    template: str
    labels: tuple[str, ...] | None = None
    #: All are computed; the first is the primary one.
    metrics: tuple[MetricName, ...] = ()

    def __post_init__(self) -> None:
        # Older bundles store no metrics.
        object.__setattr__(self, "metrics", self.metrics or METRICS[self.type][:1])

    @staticmethod
    def resolve(settings: TaskSettings, inferred: TaskType) -> Task:
        """Fills in the defaults of `settings`. Raises ConfigError if they don't fit rows of the inferred type."""
        if settings.type not in (None, inferred):
            raise ConfigError(
                f"task.type is {settings.type}, but the rows are {inferred} rows", param="task.type"
            )
        template = settings.template or TEMPLATES[inferred]
        placeholder = "{prompt}" if inferred == "text" else "{question}"
        if placeholder not in template:
            raise ConfigError(f"the template must contain {placeholder}", param="task.template")
        labels = tuple(settings.labels) if settings.labels else None
        if inferred == "yes_no":
            labels = YES_NO_LABELS
        metrics = tuple(settings.metrics or ())
        if metrics and (reason := metrics_error(metrics, inferred)):
            raise ConfigError(reason, param="task.metrics")
        return Task(type=inferred, template=template, labels=labels, metrics=metrics)

    @property
    def row_labels(self) -> tuple[str, ...] | None:
        """The labels for `heft_engine.data.rows.parse_row`: those of a `choice` task."""
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
