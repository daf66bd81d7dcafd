"""Limits of heft_engine.data.encoding: truncation, refused rows, and the positions of interventions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pyreft.dataset import get_intervention_locations
from transformers import AutoTokenizer

from heft_engine.config.metric_names import TaskType
from heft_engine.config.train import TaskSettings
from heft_engine.data.encoding import Encoder, intervened_positions
from heft_engine.data.rows import Row, parse_row
from heft_engine.data.task import Task
from heft_engine.errors import RowError

WORDS = "The sea is wide and the river is long, but 世界 is wider. "
ROW = parse_row({"question": "is the sea wide", "passage": WORDS * 20, "answer": True})


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama_dir)


def encoder(tokenizer: Any, max_length: int, kind: TaskType = "yes_no") -> Encoder:
    return Encoder(tokenizer, Task.resolve(TaskSettings(), kind), max_length)


def before_question(prompt: str) -> str:
    return prompt[: prompt.index("\nQuestion:")]


@pytest.mark.parametrize("max_length", range(60, 130))
def test_truncation_keeps_as_much_of_the_passage_as_fits_and_all_else(
    tokenizer: Any, max_length: int
) -> None:
    generous, tight = encoder(tokenizer, 2_000), encoder(tokenizer, max_length)
    whole, cut = generous.question(ROW), tight.question(ROW)
    assert (whole.truncated, cut.truncated) == (False, True)
    assert len(cut.prompt) + 1 <= max_length
    assert ROW.passage is not None
    passage = before_question(tokenizer.decode(cut.prompt))
    assert cut.prompt == generous.question(replace(ROW, passage=passage)).prompt
    # One token more of the passage would not have fitted.
    offsets = tokenizer(ROW.passage, return_offsets_mapping=True)["offset_mapping"]
    more = next(end for _, end in offsets if end > len(passage))
    assert ROW.passage.startswith(passage)
    assert len(generous.question(replace(ROW, passage=ROW.passage[:more])).prompt) + 1 > max_length


def test_truncation_leaves_room_for_the_longest_answer(tokenizer: Any) -> None:
    row = parse_row(
        {"question": "what", "passage": WORDS * 9, "choices": ["sea", "the longest river"], "answer": "sea"}
    )
    example = encoder(tokenizer, 70, "choice").question(row)
    longest = max(map(len, example.answers))
    assert longest > len(example.answers[0])
    assert 68 <= len(example.prompt) + longest <= 70


def test_a_row_that_fits_exactly_is_left_alone(tokenizer: Any) -> None:
    whole = encoder(tokenizer, 2_000).question(ROW)
    exact = encoder(tokenizer, len(whole.prompt) + 1).question(ROW)
    assert exact == whole
    assert encoder(tokenizer, len(whole.prompt)).question(ROW).truncated


def test_a_row_that_does_not_fit_even_without_its_passage_is_refused_by_its_field(tokenizer: Any) -> None:
    long = WORDS * 20
    cases: list[tuple[TaskType, dict[str, Any], str]] = [
        ("yes_no", {"question": long, "passage": WORDS, "answer": True}, "question"),
        ("yes_no", {"question": long, "answer": True}, "question"),
        ("choice", {"question": "what", "choices": ["a", long], "answer": "a"}, "question"),
        ("text", {"prompt": "a", "completion": long}, "prompt"),
        ("text", {"prompt": long, "completion": "a"}, "prompt"),
        (
            "text",
            {"messages": [{"role": "user", "content": long}, {"role": "assistant", "content": "a"}]},
            "messages",
        ),
    ]
    for kind, row, param in cases:
        with pytest.raises(RowError, match=r"tokens.*, more than max_length 64") as refused:
            encoder(tokenizer, 64, kind).encode(parse_row(row))
        assert refused.value.param == param


def test_the_length_named_in_a_refusal_is_what_would_do(tokenizer: Any) -> None:
    row = parse_row({"question": WORDS * 3, "answer": True})
    with pytest.raises(RowError) as refused:
        encoder(tokenizer, 32).question(row)
    needed = int(refused.value.message.split(" have ")[1].split()[0])
    assert encoder(tokenizer, needed).question(row).prompt
    with pytest.raises(RowError):
        encoder(tokenizer, needed - 1).question(row)


def test_rows_of_another_task_are_refused(tokenizer: Any) -> None:
    rows: dict[TaskType, Row] = {
        "yes_no": parse_row({"question": "so", "answer": True}),
        "choice": parse_row({"question": "so", "choices": ["a", "b"], "answer": "a"}),
        "text": parse_row({"prompt": "so", "completion": "a"}),
    }
    for kind in rows:
        for other, row in rows.items():
            if other != kind:
                with pytest.raises(RowError, match=f"the task is {kind}"):
                    encoder(tokenizer, 100, kind).question(row)


@pytest.mark.parametrize("positions", ["l1", "f1", "l3", "f1+l1", "f4+l2", "f5+l5"])
def test_positions_are_pyrefts_with_shared_weights(positions: str) -> None:
    first, last = (int(positions.partition(p)[2].partition("+")[0] or 0) for p in ("f", "l"))
    for length in range(1, 14):
        theirs = get_intervention_locations(
            last_position=length, positions=positions, num_interventions=1, share_weights=True
        )[0]
        padding = -1
        assert intervened_positions(length, first, last) == [p for p in theirs if p != padding]
