"""The task of a model: type, template, labels and metrics, with every default filled in."""

from __future__ import annotations

from collections.abc import Sequence
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
    #: EOS ends each label of a row where one label's tokens begin with another's. Older bundles were trained without.
    eos_after_prefix_labels: bool = False

    def __post_init__(self) -> None:
        # Older bundles store no metrics.
        object.__setattr__(self, "metrics", self.metrics or METRICS[self.type][:1])

    @staticmethod
    def resolve(settings: TaskSettings, inferred: TaskType, start: Task | None = None) -> Task:
        """Fills in the defaults of `settings`. Raises ConfigError if they don't fit rows of the inferred type.

        start: the task of the model that a run goes on from. If it has the same type, its template, labels and metrics
        are the defaults.
        """
        defaults = start if start is not None and start.type == inferred else Task.default(inferred)
        if settings.type not in (None, inferred):
            raise ConfigError(
                f"task.type is {settings.type}, but the rows are {inferred} rows", param="task.type"
            )
        template = settings.template or defaults.template
        placeholder = "{prompt}" if inferred == "text" else "{question}"
        if placeholder not in template:
            raise ConfigError(f"the template must contain {placeholder}", param="task.template")
        labels = tuple(settings.labels) if settings.labels else defaults.labels
        if inferred == "yes_no":
            labels = YES_NO_LABELS
        metrics = tuple(settings.metrics or defaults.metrics)
        if metrics and (reason := metrics_error(metrics, inferred)):
            raise ConfigError(reason, param="task.metrics")
        return Task(
            type=inferred,
            template=template,
            labels=labels,
            metrics=metrics,
            eos_after_prefix_labels=inferred == "choice",
        )

    @staticmethod
    def default(type: TaskType) -> Task:
        """Returns the task of a type without settings."""
        return Task(type=type, template=TEMPLATES[type], labels=YES_NO_LABELS if type == "yes_no" else None)

    @staticmethod
    def labels_of_rows(settings: TaskSettings, start: Task | None = None) -> Sequence[str] | None:
        """Returns the labels of rows without choices of their own, before the rows have been read.

        They are those of `settings`, or else of `start` as in `resolve`, unless `settings` name another type.
        """
        if settings.labels is None and start is not None and settings.type in (None, "choice"):
            return start.row_labels
        return settings.labels

    @property
    def row_labels(self) -> tuple[str, ...] | None:
        """The labels for `heft_engine.data.rows.parse_row`: those of a `choice` task."""
        return self.labels if self.type == "choice" else None

    def to_json(self) -> dict[str, Any]:
        fields = asdict(self)
        if not self.eos_after_prefix_labels:
            del fields["eos_after_prefix_labels"]
        return fields

    @staticmethod
    def from_json(data: dict[str, Any]) -> Task:
        labels, metrics = data.get("labels"), data.get("metrics")
        return Task(
            type=data["type"],
            template=data["template"],
            labels=tuple(labels) if labels else None,
            metrics=tuple(metrics or ()),
            eos_after_prefix_labels=data.get("eos_after_prefix_labels", False),
        )
