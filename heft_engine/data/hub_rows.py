"""Conversion of hub datasets' rows to the formats of heft_engine.data.rows, by the dataset's name or its columns."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from heft_engine.config.known_datasets import ENDING_COLUMNS, SENTENCE_COLUMNS, STORY_COLUMNS, HubReference
from heft_engine.errors import RowError

Fields = Mapping[str, Any]
Converter = Callable[[Fields], dict[str, Any]]

_ENDING_QUESTION = "How does the story end?"
#: GSM8K's calculator annotations: `48/2 = <<48/2=24>>24`.
_CALCULATION = re.compile(r"<<[^<>]*>>")


def row_converter(dataset: HubReference, columns: Sequence[str]) -> Converter:
    """Returns the function that converts rows with these columns; it ignores other columns (ids, sources).

    Raises RowError with the expected and the actual columns if no format fits.
    """
    actual = ", ".join(columns)
    if (known := dataset.known) is not None:
        if set(known.columns) - set(columns):
            expected = ", ".join(known.columns)
            raise RowError(f"{dataset.repository} must have the columns {expected}; it has {actual}")
        if dataset.repository.lower() in _BY_NAME:
            return _BY_NAME[dataset.repository.lower()]
    for required, converter in _BY_COLUMNS:
        if required <= set(columns):
            return converter
    raise RowError(
        f"the columns {actual} fit none of the formats: question and answer (with passage or choices), question, "
        "choices and answerKey, prompt and completion, messages, input_sentence_1 to 4 with sentence_quiz1, "
        "sentence_quiz2 and answer_right_ending, or sentence1 to sentence5"
    )


def _chat(fields: Fields) -> dict[str, Any]:
    """A conversation with its tools, which many datasets hold as JSON text, because tables give all tools the same
    fields and fill those of other tools with nulls."""
    tools = fields.get("tools")
    if isinstance(tools, str):
        tools = json.loads(tools)
    return {"messages": fields["messages"], **({"tools": _without_nulls(tools)} if tools else {})}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _only(*columns: str) -> Converter:
    """For rows that have the format already, among other columns."""
    return lambda fields: {column: fields[column] for column in columns}


def _keyed_choices(fields: Fields) -> dict[str, Any]:
    """Choices with labels ("A" or "1") and the right label, as in ARC and CommonsenseQA. Drops duplicate choices."""
    choices = fields["choices"]
    answer = choices["text"][choices["label"].index(fields["answerKey"])]
    return {
        "question": fields["question"],
        "choices": list(dict.fromkeys(choices["text"])),
        "answer": answer,
    }


def _choices(fields: Fields) -> dict[str, Any]:
    """A list of choices, and the right one or its index, as in MMLU."""
    answer = fields["answer"]
    if isinstance(answer, int):
        answer = fields["choices"][answer]
    return {**_question(fields), "choices": fields["choices"], "answer": answer}


def _question_answer(fields: Fields) -> dict[str, Any]:
    """A yes/no row if the answer is a boolean, "yes" or "no", else prompt and completion."""
    answer = fields["answer"]
    if isinstance(answer, str) and answer.strip().lower() not in ("yes", "no"):
        return {"prompt": fields["question"], "completion": answer}
    return {**_question(fields), "answer": answer}


def _question(fields: Fields) -> dict[str, Any]:
    passage = fields.get("passage") or None
    return {"question": fields["question"], **({"passage": passage} if passage else {})}


def _gsm8k(fields: Fields) -> dict[str, Any]:
    """The worked solution without calculator annotations; it ends in `#### 42`."""
    return {"prompt": fields["question"], "completion": _CALCULATION.sub("", fields["answer"])}


def _story_ending(fields: Fields) -> dict[str, Any]:
    """StoryCloze: four sentences, two endings, and the number (1 or 2) of the right one."""
    endings = [fields["sentence_quiz1"], fields["sentence_quiz2"]]
    number = int(fields["answer_right_ending"])
    if number not in (1, 2):
        raise ValueError(f"answer_right_ending must be 1 or 2, not {number}")
    return {
        "question": _ENDING_QUESTION,
        "passage": " ".join(fields[name].strip() for name in STORY_COLUMNS),
        "choices": endings,
        "answer": endings[number - 1],
    }


def _story(fields: Fields) -> dict[str, Any]:
    """ROCStories: four sentences as the prompt, the fifth as the completion."""
    *beginning, ending = (fields[name].strip() for name in SENTENCE_COLUMNS)
    return {"prompt": " ".join(beginning), "completion": ending}


_BY_NAME: Mapping[str, Converter] = {"openai/gsm8k": _gsm8k}
_BY_COLUMNS: tuple[tuple[set[str], Converter], ...] = (
    ({"messages"}, _chat),
    ({"prompt", "completion"}, _only("prompt", "completion")),
    ({*STORY_COLUMNS, *ENDING_COLUMNS}, _story_ending),
    (set(SENTENCE_COLUMNS), _story),
    ({"question", "choices", "answerKey"}, _keyed_choices),
    ({"question", "choices", "answer"}, _choices),
    ({"question", "answer"}, _question_answer),
)
