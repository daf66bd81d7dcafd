"""Metrics of generated answers: by hand and against their library."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from torchmetrics.functional.text import rouge_score, squad

from heft_engine.config.train import TaskSettings
from heft_engine.data.metrics import final_number, measure
from heft_engine.data.task import Task
from heft_engine.errors import ConfigError

SENTENCES = [
    ("the cat sat on the mat", "a cat is on the mat"),
    ("She won the race!", "she won a race"),
    ("nothing alike", "quite different words"),
    ("", "something"),
    ("The End.", "the end"),
]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It takes 2/2 = 1 bolt.\n#### 3", 3),
        ("#### 1,234", 1234),
        ("48/2 = <<48/2=24>>24 clips.\n#### 72 clips in 2 months", 72),
        ("#### -$5.50.", Fraction(-11, 2)),
        ("The answer is 576.", 576),
        ("She pays $1,000.00 each", 1000),
        ("3 - 4 = -1", -1),
        ("pages 3-4", 4),
        ("(−7)", -7),
        ("he ate 1/2", Fraction(1, 2)),
        ("half: .5", Fraction(1, 2)),
        ("5/0", 5),
        ("-1,000,000%", -1_000_000),
        ("0", 0),
        ("either 10,20", 20),
        ("x5 is a name", None),
        ("#### none of the 3", 3),
        ("none", None),
        ("", None),
    ],
)
def test_the_final_number(text: str, number: object) -> None:
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("name", "written", "reference", "value"),
    [
        ("exact_match", " a b\n", "a b", 1),
        ("exact_match", "A b", "a b", 0),
        ("final_number", "so it is 42.0", "40+2=42\n#### 42", 1),
        ("final_number", "#### 1234", "#### 1,234", 1),
        ("final_number", "1/3", "2/3", 0),
        ("final_number", "no idea", "#### 0", 0),
        ("f1", "The cat sat!", "a cat", 2 / 3),  # one word of two, one of one
        ("f1", "to be or not", "not to be or", 1),
        ("rouge_l", "the cat sat on the mat", "a cat is on the mat", 4 / 6),  # cat on the mat
        ("rouge_l", "to be or not", "not to be or", 3 / 4),
        ("rouge_l", "one", "one two three", 0.5),  # precision 1, recall 1/3
    ],
)
def test_metrics_by_hand(name: Any, written: str, reference: str, value: float) -> None:
    assert measure(name, [written], [reference]) == [pytest.approx(value, abs=1e-6)]


def test_f1_and_rouge_are_the_librarys() -> None:
    written, references = zip(*SENTENCES, strict=True)
    theirs = squad(
        [{"prediction_text": text, "id": str(i)} for i, text in enumerate(written)],
        [
            {"answers": {"answer_start": [0], "text": [text]}, "id": str(i)}
            for i, text in enumerate(references)
        ],
    )
    assert 100 * np.mean(measure("f1", written, references)) == pytest.approx(float(theirs["f1"]), abs=1e-4)
    rouge = rouge_score(list(written), list(references), rouge_keys="rougeL")["rougeL_fmeasure"]
    assert np.mean(measure("rouge_l", written, references)) == pytest.approx(float(rouge), abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "location", "words"),
    [
        ({"type": "text", "metrics": ["bleu"]}, ("metrics", 0), "exact_match"),
        ({"type": "text", "metrics": ["accuracy"]}, ("metrics",), "not a metric of text tasks"),
        ({"type": "yes_no", "metrics": ["f1"]}, ("metrics",), "which have accuracy"),
        ({"labels": ["a", "b"], "metrics": ["rouge_l"]}, ("metrics",), "not a metric of choice tasks"),
        ({"metrics": ["accuracy", "f1"]}, ("metrics",), "no task has all of"),
        ({"metrics": ["f1", "f1"]}, ("metrics",), "metrics must be unique"),
        ({"metrics": []}, ("metrics",), "at least 1"),
    ],
)
def test_metrics_that_cant_be_are_refused(
    settings: dict[str, Any], location: tuple[Any, ...], words: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        TaskSettings(**settings)
    (fault,) = refused.value.errors()
    assert fault["loc"] == location
    assert words in fault["msg"]


def test_metrics_are_checked_against_the_task_that_rows_imply() -> None:
    with pytest.raises(ConfigError, match="not a metric of yes_no tasks") as refused:
        Task.resolve(TaskSettings(metrics=["final_number"]), "yes_no")
    assert refused.value.param == "task.metrics"
    assert Task.resolve(TaskSettings(metrics=["f1", "rouge_l"]), "text").metrics == ("f1", "rouge_l")
    assert Task.resolve(TaskSettings(), "choice").metrics == ("accuracy",)
    older = {"type": "text", "template": "{prompt}", "labels": None}
    assert Task.from_json(older).metrics == ("exact_match",)
