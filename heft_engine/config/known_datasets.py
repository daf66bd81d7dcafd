"""Known datasets of the hub: their task, template, metrics, columns, configurations and splits.

    hub:<org>/<name>[:<config>][:<split>]

Fills in the parts that a reference leaves out. heft_engine.data.hub reads the datasets themselves; the API refuses
faulty references with this module before a job is queued.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from heft_engine.config.metric_names import MetricName, TaskType, metrics_error
from heft_engine.config.train import TaskSettings

#: The default split for each of a job's files.
SPLITS: Mapping[str, str] = {"training_file": "train", "validation_file": "validation", "test_file": "test"}
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REFERENCE = re.compile(
    rf"(?P<repository>{_NAME}/{_NAME})"
    r"(:(?P<config>[A-Za-z0-9._+-]+)(?=:))?"
    r"(:(?P<split>[A-Za-z0-9._-]+(\[[0-9:%-]*\])?))?"
)


class DatasetError(ValueError):
    """A reference, or a task setting, that does not fit a known dataset; `param` is the field at fault."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, kw_only=True)
class KnownDataset:
    """The properties of a known dataset.

    columns: its rows must have these.
    configs: the first is the default, unless `config_required`.
    splits: the default split for each of a job's files; a reference for any other file must name a split.
    """

    type: TaskType
    columns: tuple[str, ...]
    metrics: tuple[MetricName, ...] = ("accuracy",)
    template: str | None = None
    configs: tuple[str, ...] = ()
    config_required: bool = False
    splits: Mapping[str, str] = field(default_factory=lambda: SPLITS)


@dataclass(frozen=True, kw_only=True)
class HubReference:
    """A parsed `hub:` reference. `config` None: the dataset's only or default configuration."""

    repository: str
    config: str | None
    split: str | None

    @property
    def known(self) -> KnownDataset | None:
        return _BY_LOWER_NAME.get(self.repository.lower())


STORY_COLUMNS = tuple(f"input_sentence_{number}" for number in range(1, 5))
ENDING_COLUMNS = ("sentence_quiz1", "sentence_quiz2", "answer_right_ending")
SENTENCE_COLUMNS = tuple(f"sentence{number}" for number in range(1, 6))

_TRAIN_AND_TEST = {"training_file": "train", "test_file": "test"}
_TEST_ONLY = {"test_file": "test"}
_CLOZE = KnownDataset(type="choice", columns=(*STORY_COLUMNS, *ENDING_COLUMNS), splits=_TEST_ONLY)
#: StoryCloze has no training rows; by convention its validation rows are trained on.
_CLOZE_SPLITS = {"training_file": "validation", "test_file": "test"}
_STORIES = KnownDataset(
    type="text", columns=SENTENCE_COLUMNS, metrics=("rouge_l", "f1"), splits={"training_file": "train"}
)
_STRATEGY = KnownDataset(type="yes_no", columns=("question", "answer"), splits=_TRAIN_AND_TEST)
KNOWN_DATASETS: Mapping[str, KnownDataset] = {
    "google/boolq": KnownDataset(
        type="yes_no",
        columns=("question", "passage", "answer"),
        splits={**SPLITS, "test_file": "validation"},  # the answers of its test split were never published
    ),
    "ChilleD/StrategyQA": _STRATEGY,
    "wics/strategy-qa": replace(_STRATEGY, splits={"training_file": "test"}),
    "openai/gsm8k": KnownDataset(
        type="text",
        columns=("question", "answer"),
        metrics=("final_number", "exact_match"),
        template="Question: {prompt}\nAnswer:",
        configs=("main", "socratic"),
        splits=_TRAIN_AND_TEST,
    ),
    "allenai/ai2_arc": KnownDataset(
        type="choice",
        columns=("question", "choices", "answerKey"),
        configs=("ARC-Easy", "ARC-Challenge"),
        config_required=True,
    ),
    "LSDSem/story_cloze": replace(_CLOZE, configs=("2016", "2018"), splits=_CLOZE_SPLITS),
    "MoE-UNC/story_cloze": replace(_CLOZE, splits=_CLOZE_SPLITS),
    "gimmaru/story_cloze-2016": _CLOZE,
    "juletxara/xstory_cloze": replace(
        _CLOZE,
        configs=("en", "ar", "es", "eu", "hi", "id", "my", "ru", "sw", "te", "zh"),
        splits={"training_file": "train", "test_file": "eval"},
    ),
    "wza/roc_stories": _STORIES,
    "igormorgado/ROCStories2018": _STORIES,
}
_BY_LOWER_NAME = {name.lower(): dataset for name, dataset in KNOWN_DATASETS.items()}


def parse_reference(text: str, file: str | None = None) -> HubReference:
    """Parses the part after `hub:` and fills in defaults. `file` is the job's field that holds it.

    Raises DatasetError for malformed references and for parts that are missing and have no default.
    """
    match = _REFERENCE.fullmatch(text)
    param = file or "training_file"
    if match is None:
        message = f"{text!r} is not a dataset reference: it must have the form hub:<org>/<name>[:<config>][:<split>]"
        raise DatasetError(message, param)
    reference = HubReference(repository=match["repository"], config=match["config"], split=match["split"])
    known = reference.known
    if known is None:
        return replace(reference, split=reference.split or SPLITS.get(param))
    if reference.config is None and reference.split in known.configs:
        reference = replace(reference, config=reference.split, split=None)
    if reference.config is None and known.configs:
        if known.config_required:
            configs = " or ".join(known.configs)
            raise DatasetError(f"{reference.repository} needs a configuration: {configs}", param)
        reference = replace(reference, config=known.configs[0])
    if reference.split is None and param not in known.splits:
        splits = list(dict.fromkeys(known.splits.values()))
        message = (
            f"{reference.repository} has no default split for {param}, only {', '.join(splits)}: "
            f"name a split, for example hub:{text}:{splits[0]}[:10%]"
        )
        raise DatasetError(message, param)
    return replace(reference, split=reference.split or known.splits[param])


def with_dataset_defaults(task: TaskSettings, training_file: str) -> TaskSettings:
    """Returns the task with type, metrics and template of a known training dataset where its user set none.

    `training_file` is a reference of any kind. Raises DatasetError where a setting does not fit the dataset.
    """
    source, _, rest = training_file.partition(":")
    if source != "hub" or (known := parse_reference(rest).known) is None:
        return task
    if task.type not in (None, known.type):
        raise DatasetError(f"{rest} is a {known.type} dataset, but task.type is {task.type}", "task.type")
    if task.labels is not None:
        raise DatasetError(f"labels can't be set: the rows of {rest} have their own answers", "task.labels")
    if task.metrics is not None and (reason := metrics_error(task.metrics, known.type)):
        raise DatasetError(reason, "task.metrics")
    metrics = task.metrics if task.metrics is not None else list(known.metrics)
    template = task.template if task.template is not None else known.template
    return TaskSettings(type=known.type, metrics=metrics, template=template)
