"""Datasets of the hub that are known by name: their task, template and metrics, their configurations and splits.

    hub:<org>/<name>[:<config>][:<split>]

What a reference leaves out is filled in here. It does NOT read datasets (heft_engine.data.hub does), and imports
nothing heavy: the service refuses with it what can't be, before anything is queued.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from heft_engine.config.metric_names import MetricName, TaskType, metrics_error
from heft_engine.config.train import TaskSettings

#: Of the job's files, which split stands behind a dataset's bare name.
SPLITS: Mapping[str, str] = {"training_file": "train", "validation_file": "validation", "test_file": "test"}
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REFERENCE = re.compile(
    rf"(?P<repository>{_NAME}/{_NAME})"
    r"(:(?P<config>[A-Za-z0-9._+-]+)(?=:))?"
    r"(:(?P<split>[A-Za-z0-9._-]+(\[[0-9:%-]*\])?))?"
)


class DatasetError(ValueError):
    """What can't be said of a known dataset; `param` is the field at fault."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, kw_only=True)
class KnownDataset:
    """`columns`: what its rows must have. `configs`: the first is meant where none is named; `choose` asks for one.

    `splits`: which of its splits stands behind each of a job's files; a file that is not there must name one.
    """

    type: TaskType
    columns: tuple[str, ...]
    metrics: tuple[MetricName, ...] = ("accuracy",)
    template: str | None = None
    configs: tuple[str, ...] = ()
    choose: bool = False
    splits: Mapping[str, str] = field(default_factory=lambda: SPLITS)


@dataclass(frozen=True, kw_only=True)
class HubReference:
    """Where rows are. `config` None: the dataset has one alone, or its own default."""

    repository: str
    config: str | None
    split: str | None

    @property
    def known(self) -> KnownDataset | None:
        return _KNOWN.get(self.repository.lower())


STORY_COLUMNS = tuple(f"input_sentence_{number}" for number in range(1, 5))
ENDING_COLUMNS = ("sentence_quiz1", "sentence_quiz2", "answer_right_ending")
SENTENCE_COLUMNS = tuple(f"sentence{number}" for number in range(1, 6))

_TRAIN_AND_TEST = {"training_file": "train", "test_file": "test"}
_TEST_ALONE = {"test_file": "test"}
_CLOZE = KnownDataset(type="choice", columns=(*STORY_COLUMNS, *ENDING_COLUMNS), splits=_TEST_ALONE)
#: StoryCloze has no rows for training: its validation rows are trained on, as everybody does.
_CLOZE_SPLITS = {"training_file": "validation", "test_file": "test"}
_STORIES = KnownDataset(
    type="text", columns=SENTENCE_COLUMNS, metrics=("rouge_l", "f1"), splits={"training_file": "train"}
)
_STRATEGY = KnownDataset(type="yes_no", columns=("question", "answer"), splits=_TRAIN_AND_TEST)
KNOWN_DATASETS: Mapping[str, KnownDataset] = {
    "google/boolq": KnownDataset(
        type="yes_no",
        columns=("question", "passage", "answer"),
        splits={**SPLITS, "test_file": "validation"},  # its test answers were never published
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
        choose=True,
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
_KNOWN = {name.lower(): task for name, task in KNOWN_DATASETS.items()}


def parse_reference(text: str, file: str | None = None) -> HubReference:
    """What stands behind `hub:` with every gap filled that can be; `file` is the field of the job that names it.

    Raises DatasetError where it is no reference, or leaves out what can't be guessed.
    """
    match = _REFERENCE.fullmatch(text)
    param = file or "training_file"
    if match is None:
        raise DatasetError(f"{text!r} is no dataset: write hub:<org>/<name>[:<config>][:<split>]", param)
    found = HubReference(repository=match["repository"], config=match["config"], split=match["split"])
    known = found.known
    if known is None:
        return replace(found, split=found.split or SPLITS.get(param))
    if found.config is None and found.split in known.configs:
        found = replace(found, config=found.split, split=None)
    if found.config is None and known.configs:
        if known.choose:
            these = " or ".join(known.configs)
            raise DatasetError(f"say which of {found.repository} is meant: {these}", param)
        found = replace(found, config=known.configs[0])
    if found.split is None and param not in known.splits:
        others = list(dict.fromkeys(known.splits.values()))
        part = f"hub:{text}:{others[0]}[:10%]"
        message = (
            f"{found.repository} has no split for {param}, only {', '.join(others)}: say which, as in {part}"
        )
        raise DatasetError(message, param)
    return replace(found, split=found.split or known.splits[param])


def with_dataset_defaults(task: TaskSettings, training_file: str) -> TaskSettings:
    """The task with what its training data is known for, where its user has not said otherwise.

    `training_file` is a reference of any kind. Raises DatasetError where both can't be.
    """
    source, _, rest = training_file.partition(":")
    if source != "hub" or (known := parse_reference(rest).known) is None:
        return task
    if task.type not in (None, known.type):
        raise DatasetError(f"{rest} holds rows of a {known.type} task, not {task.type}", "task.type")
    if task.labels is not None:
        raise DatasetError(f"the rows of {rest} bring answers of their own", "task.labels")
    if task.metrics is not None and (reason := metrics_error(task.metrics, known.type)):
        raise DatasetError(reason, "task.metrics")
    metrics = task.metrics if task.metrics is not None else list(known.metrics)
    template = task.template if task.template is not None else known.template
    return TaskSettings(type=known.type, metrics=metrics, template=template)
