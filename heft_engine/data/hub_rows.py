"""How a row of a hub's dataset becomes one of ours: by the dataset's name, else by its columns.

It does NOT download or judge datasets: see heft_engine.data.hub.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from heft_engine.config.known_datasets import ENDING_COLUMNS, SENTENCE_COLUMNS, STORY_COLUMNS, HubReference
from heft_engine.errors import RowError

Fields = Mapping[str, Any]
Reader = Callable[[Fields], dict[str, Any]]

_ENDING_QUESTION = "How does the story end?"
#: GSM8K's notes to a calculator: `48/2 = <<48/2=24>>24`.
_CALCULATION = re.compile(r"<<[^<>]*>>")


def reader_of(where: HubReference, columns: Sequence[str]) -> Reader:
    """How rows with these columns become ours; columns that no format has (ids, sources) are left out.

    Raises RowError that tells the columns that were expected and those that are there.
    """
    found = ", ".join(columns)
    if (known := where.known) is not None:
        if set(known.columns) - set(columns):
            expected = ", ".join(known.columns)
            raise RowError(f"{where.repository} should have the columns {expected}; it has {found}")
        if where.repository.lower() in _BY_NAME:
            return _BY_NAME[where.repository.lower()]
    for needed, reader in _BY_COLUMNS:
        if needed <= set(columns):
            return reader
    raise RowError(
        f"the columns {found} fit none of the formats: question and answer (with passage or choices), question, "
        "choices and answerKey, prompt and completion, messages, input_sentence_1 to 4 with sentence_quiz1, "
        "sentence_quiz2 and answer_right_ending, or sentence1 to sentence5"
    )


def _messages(fields: Fields) -> dict[str, Any]:
    return {"messages": fields["messages"]}


def _completion(fields: Fields) -> dict[str, Any]:
    return {"prompt": fields["prompt"], "completion": fields["completion"]}


def _keyed_choices(fields: Fields) -> dict[str, Any]:
    """Choices with labels of their own ("A" or "1") and the label of the right one, as in ARC and CommonsenseQA.

    Where the same choice stands there twice, once is enough.
    """
    choices = fields["choices"]
    answer = choices["text"][choices["label"].index(fields["answerKey"])]
    return {
        "question": fields["question"],
        "choices": list(dict.fromkeys(choices["text"])),
        "answer": answer,
    }


def _choices(fields: Fields) -> dict[str, Any]:
    """A list of choices; the right one by itself, or as its number, as in MMLU."""
    answer = fields["answer"]
    if isinstance(answer, int):
        answer = fields["choices"][answer]
    return {**_question(fields), "choices": fields["choices"], "answer": answer}


def _question_answer(fields: Fields) -> dict[str, Any]:
    """True, false, yes or no; any other text is an answer to be written."""
    answer = fields["answer"]
    if isinstance(answer, str) and answer.strip().lower() not in ("yes", "no"):
        return {"prompt": fields["question"], "completion": answer}
    return {**_question(fields), "answer": answer}


def _question(fields: Fields) -> dict[str, Any]:
    passage = fields.get("passage") or None
    return {"question": fields["question"], **({"passage": passage} if passage else {})}


def _gsm8k(fields: Fields) -> dict[str, Any]:
    """The worked answer without its notes to a calculator, which nobody reads here; it ends in `#### 42`."""
    return {"prompt": fields["question"], "completion": _CALCULATION.sub("", fields["answer"])}


def _story_ending(fields: Fields) -> dict[str, Any]:
    """StoryCloze: four sentences, two endings, and the number (1 or 2) of the right one."""
    endings = [fields["sentence_quiz1"], fields["sentence_quiz2"]]
    number = int(fields["answer_right_ending"])
    if number not in (1, 2):
        raise ValueError(f"answer_right_ending is {number}, neither 1 nor 2")
    return {
        "question": _ENDING_QUESTION,
        "passage": " ".join(fields[name].strip() for name in STORY_COLUMNS),
        "choices": endings,
        "answer": endings[number - 1],
    }


def _story(fields: Fields) -> dict[str, Any]:
    """ROCStories: the fifth sentence is to be written behind the four before it."""
    *told, ending = (fields[name].strip() for name in SENTENCE_COLUMNS)
    return {"prompt": " ".join(told), "completion": ending}


_BY_NAME: Mapping[str, Reader] = {"openai/gsm8k": _gsm8k}
_BY_COLUMNS: tuple[tuple[set[str], Reader], ...] = (
    ({"messages"}, _messages),
    ({"prompt", "completion"}, _completion),
    ({*STORY_COLUMNS, *ENDING_COLUMNS}, _story_ending),
    (set(SENTENCE_COLUMNS), _story),
    ({"question", "choices", "answerKey"}, _keyed_choices),
    ({"question", "choices", "answer"}, _choices),
    ({"question", "answer"}, _question_answer),
)
