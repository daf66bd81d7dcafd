"""Known datasets of the hub: their rows become prompts and answers, with task and metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from heft_engine.config.known_datasets import (
    KNOWN_DATASETS,
    DatasetError,
    HubReference,
    parse_reference,
    with_dataset_defaults,
)
from heft_engine.config.metric_names import METRICS
from heft_engine.config.train import TaskSettings
from heft_engine.data.encoding import Encoder
from heft_engine.data.hub_rows import row_converter
from heft_engine.data.rows import infer_task, parse_row
from heft_engine.data.task import Task
from heft_engine.errors import RowError
from heft_engine.model.base_models import load_tokenizer

BOOLQ = {"question": "is pie a food", "answer": True, "passage": "Pie is a baked dish."}
STRATEGY = {
    "qid": "4fd64bb6ce5b78ab20b6",
    "term": "Mixed martial arts",
    "description": "full contact combat sport",
    "question": "Is Mixed martial arts totally original from Roman Colosseum games?",
    "answer": False,
}
GSM8K = {
    "question": "Weng earns $1,200 an hour. How much in 2 hours?",
    "answer": "He earns 1200*2 = $<<1200*2=2400>>2,400.\n#### 2,400",
}
ARC = {
    "id": "Mercury_7220990",
    "question": "Which factor will most likely cause a fever?",
    "choices": {
        "text": ["a relaxed leg", "bacteria in the blood", "viral particles", "carbohydrates"],
        "label": ["A", "B", "C", "D"],
    },
    "answerKey": "B",
}
NUMBERED = {**ARC, "choices": {**ARC["choices"], "label": ["1", "2", "3", "4"]}, "answerKey": "4"}  # type: ignore[dict-item]
TWICE = {
    **ARC,
    "choices": {"text": ["soil", "air", "soil"], "label": ["A", "B", "C"]},
    "answerKey": "C",
}
CLOZE = {
    "story_id": "138d5bfb-05cc-41e3-bf2c-fa85ebad14e2",
    "input_sentence_1": "Rick grew up in a troubled household.",
    "input_sentence_2": "He never found good support in family.",
    "input_sentence_3": "He turned to gangs.",
    "input_sentence_4": "He was shot in a robbery. ",
    "sentence_quiz1": "He is happy now.",
    "sentence_quiz2": "He joined a gang.",
    "answer_right_ending": 1,
}
STORY = {
    "storyid": "8bbe6d11-1e2e-413c-bf81-eaea05f4f1bd",
    "storytitle": "David Drops the Weight",
    "sentence1": "David noticed he had put on weight.",
    "sentence2": "He examined his habits.",
    "sentence3": "He'd been eating too much fast food.",
    "sentence4": "He stopped going to burger places.",
    "sentence5": "After two weeks, he felt much better.",
}
_STORY_PROMPT = (
    "David noticed he had put on weight. He examined his habits. He'd been eating too much fast food. "
    "He stopped going to burger places.\n"
)
_CLOZE_PROMPT = (
    "Rick grew up in a troubled household. He never found good support in family. He turned to gangs. "
    "He was shot in a robbery.\nQuestion: How does the story end?\nAnswer:"
)
_ARC_PROMPT = "Question: Which factor will most likely cause a fever?\nAnswer:"
_STRATEGY_PROMPT = "Question: Is Mixed martial arts totally original from Roman Colosseum games?\nAnswer:"

#: A reference, one of its rows, and the resulting prompt, right answer and metrics.
TEMPLATES: list[tuple[str, dict[str, Any], str, str, tuple[str, ...]]] = [
    (
        "google/boolq",
        BOOLQ,
        "Pie is a baked dish.\nQuestion: is pie a food?\nAnswer:",
        " yes",
        ("accuracy",),
    ),
    ("ChilleD/StrategyQA", {**STRATEGY, "facts": "Some."}, _STRATEGY_PROMPT, " no", ("accuracy",)),
    (
        "wics/strategy-qa",
        {**STRATEGY, "facts": ["Some."], "decomposition": ["Which?"]},
        _STRATEGY_PROMPT,
        " no",
        ("accuracy",),
    ),
    (
        "openai/gsm8k",
        GSM8K,
        "Question: Weng earns $1,200 an hour. How much in 2 hours?\nAnswer:\n",
        "He earns 1200*2 = $2,400.\n#### 2,400",
        ("final_number", "exact_match"),
    ),
    ("allenai/ai2_arc:ARC-Easy", ARC, _ARC_PROMPT, " bacteria in the blood", ("accuracy",)),
    ("allenai/ai2_arc:ARC-Challenge:train", NUMBERED, _ARC_PROMPT, " carbohydrates", ("accuracy",)),
    ("allenai/ai2_arc:ARC-Challenge", TWICE, _ARC_PROMPT, " soil", ("accuracy",)),
    ("LSDSem/story_cloze", CLOZE, _CLOZE_PROMPT, " He is happy now.", ("accuracy",)),
    (
        "juletxara/xstory_cloze",
        {**CLOZE, "answer_right_ending": 2},
        _CLOZE_PROMPT,
        " He joined a gang.",
        ("accuracy",),
    ),
    ("wza/roc_stories", STORY, _STORY_PROMPT, STORY["sentence5"], ("rouge_l", "f1")),
    ("igormorgado/ROCStories2018", STORY, _STORY_PROMPT, STORY["sentence5"], ("rouge_l", "f1")),
]


@pytest.mark.parametrize(("reference", "fields", "prompt", "answer", "metrics"), TEMPLATES)
def test_a_row_of_the_hub_becomes_prompt_and_answer(
    tiny_llama_dir: Path,
    reference: str,
    fields: dict[str, Any],
    prompt: str,
    answer: str,
    metrics: tuple[str, ...],
) -> None:
    hub_reference = parse_reference(reference)
    row = parse_row(row_converter(hub_reference, list(fields))(fields))
    task = Task.resolve(with_dataset_defaults(TaskSettings(), f"hub:{reference}"), infer_task([row]))
    tokenizer = load_tokenizer(tiny_llama_dir)
    encoder = Encoder(tokenizer, task)
    (example,) = encoder.encode(row)
    assert list(example.prompt[-len(encoder.text(prompt)) :]) == encoder.text(prompt)
    assert len(example.prompt) - len(encoder.text(prompt)) <= 1  # a BOS token at most
    expected = encoder.continuation(answer) + ([tokenizer.eos_token_id] if task.type == "text" else [])
    assert list(example.supervised().answers[0]) == expected
    assert task.metrics == metrics


@pytest.mark.parametrize(
    ("text", "file", "expected"),
    [
        ("google/boolq", "training_file", (None, "train")),
        ("google/boolq", "test_file", (None, "validation")),
        ("Google/BoolQ", "test_file", (None, "validation")),
        ("openai/gsm8k", "training_file", ("main", "train")),
        ("openai/gsm8k", "test_file", ("main", "test")),
        ("openai/gsm8k:socratic", "test_file", ("socratic", "test")),
        ("openai/gsm8k:test[:50]", "test_file", ("main", "test[:50]")),
        ("openai/gsm8k:socratic:train[:50]", "training_file", ("socratic", "train[:50]")),
        ("allenai/ai2_arc:ARC-Challenge", "validation_file", ("ARC-Challenge", "validation")),
        ("wics/strategy-qa", "training_file", (None, "test")),
        ("juletxara/xstory_cloze", "test_file", ("en", "eval")),
        ("LSDSem/story_cloze:2018", "training_file", ("2018", "validation")),
        ("org/other", "validation_file", (None, "validation")),
        ("org/other:part:x", "test_file", ("part", "x")),
    ],
)
def test_what_a_reference_leaves_out_is_filled_in(
    text: str, file: str, expected: tuple[str | None, str | None]
) -> None:
    reference = parse_reference(text, file)
    assert (reference.config, reference.split) == expected


@pytest.mark.parametrize(
    ("text", "file", "words"),
    [
        ("allenai/ai2_arc", "training_file", "ARC-Easy or ARC-Challenge"),
        ("allenai/ai2_arc:train", "training_file", "ARC-Easy or ARC-Challenge"),
        ("openai/gsm8k", "validation_file", "only train, test"),
        ("gimmaru/story_cloze-2016", "training_file", "only test"),
        ("gsm8k", "training_file", "hub:<org>/<name>"),
    ],
)
def test_what_cant_be_guessed_must_be_said(text: str, file: str, words: str) -> None:
    with pytest.raises(DatasetError, match=words) as refused:
        parse_reference(text, file)
    assert refused.value.param == file


@pytest.mark.parametrize(
    ("task", "param"),
    [
        ({"type": "choice"}, "task.type"),
        ({"labels": ["a", "b"]}, "task.labels"),
        ({"metrics": ["accuracy"]}, "task.metrics"),
    ],
)
def test_a_task_that_the_data_is_not_for_is_refused(task: dict[str, Any], param: str) -> None:
    with pytest.raises(DatasetError) as refused:
        with_dataset_defaults(TaskSettings(**task), "hub:openai/gsm8k:main:train")
    assert refused.value.param == param


def test_what_the_user_says_stands() -> None:
    said = TaskSettings(metrics=["exact_match"], template="{prompt}")
    assert with_dataset_defaults(said, "hub:openai/gsm8k") == said.model_copy(update={"type": "text"})
    for reference in ("file-abc", "sample:passages", "hub:org/other", "/rows.jsonl"):
        assert with_dataset_defaults(TaskSettings(), reference) == TaskSettings()


def test_columns_that_dont_match_are_told_beside_those_expected() -> None:
    arc = HubReference(repository="allenai/ai2_arc", config=None, split=None)
    with pytest.raises(RowError, match=r"columns question, choices, answerKey; it has question, answer$"):
        row_converter(arc, ["question", "answer"])
    with pytest.raises(RowError, match=r"sentence, label fit none .* answer_right_ending"):
        row_converter(HubReference(repository="org/odd", config=None, split=None), ["sentence", "label"])


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({**CLOZE, "answer_right_ending": 0}, ValueError),
        ({**ARC, "answerKey": ""}, ValueError),
        ({**CLOZE, "input_sentence_2": None}, AttributeError),
    ],
)
def test_rows_that_are_not_like_the_others(fields: dict[str, Any], fault: type[Exception]) -> None:
    read = row_converter(HubReference(repository="org/some", config=None, split=None), list(fields))
    with pytest.raises(fault):
        read(fields)


def test_every_known_dataset_has_a_task_that_can_be() -> None:
    for name, known in KNOWN_DATASETS.items():
        assert set(known.metrics) <= set(METRICS[known.type]), name
        assert (
            with_dataset_defaults(TaskSettings(), f"hub:{name}:{(known.configs or ('x',))[0]}:train").type
            == known.type
        )
