"""Rows: the fields of each format, and errors that name their field and their line."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heft_engine.config.train import TaskSettings
from heft_engine.data.rows import Row, RowKind, infer_task, parse_row, read_rows, scan_rows
from heft_engine.data.task import Task
from heft_engine.errors import RowError

QUESTION = {"question": "is it so", "passage": "It is.", "answer": True}
CHOICE = {"question": "which", "choices": ["a", "b"], "answer": "b"}
PROMPT = {"prompt": "say it", "completion": "it"}
USER = {"role": "user", "content": "hello"}
ASSISTANT = {"role": "assistant", "content": "hi"}


def write(path: Path, *lines: bytes | dict[str, Any]) -> Path:
    path.write_bytes(
        b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    )
    return path


def test_a_yes_no_row() -> None:
    assert parse_row(QUESTION) == Row(kind="yes_no", question="is it so", passage="It is.", answer="yes")


@pytest.mark.parametrize(
    ("written", "read"),
    [(True, "yes"), (False, "no"), ("yes", "yes"), ("No", "no"), ("YES ", "yes")],
)
def test_every_way_to_write_yes_and_no(written: object, read: str) -> None:
    assert parse_row({"question": "q", "answer": written}).answer == read


@pytest.mark.parametrize("passage", [None, "", "  "])
def test_a_passage_that_says_nothing_is_none(passage: str | None) -> None:
    assert parse_row({"question": "q", "passage": passage, "answer": "no"}).passage is None


def test_choices_of_the_row_come_before_the_labels_of_the_task() -> None:
    row = parse_row(CHOICE, labels=["x", "y"])
    assert (row.kind, row.choices, row.answer) == ("choice", ("a", "b"), "b")


def test_labels_of_the_task_make_a_choice_row() -> None:
    row = parse_row({"question": "q", "answer": "good"}, labels=["good", "bad"])
    assert (row.kind, row.choices, row.answer) == ("choice", None, "good")


def test_the_labels_yes_and_no_are_the_yes_no_task() -> None:
    assert parse_row({"question": "q", "answer": True}, labels=["yes", "no"]).kind == "yes_no"


def test_a_question_needs_no_answer_but_may_have_one() -> None:
    assert parse_row({"question": "q"}, need_answer=False).answer is None
    assert parse_row(QUESTION, need_answer=False).answer == "yes"
    assert parse_row({"prompt": "p"}, need_answer=False).answer is None


@pytest.mark.parametrize(
    ("obj", "param", "words"),
    [
        ([], None, "an array"),
        ({}, None, "unknown row format"),
        ({"text": "x"}, "text", "unknown row format"),
        ({"question": "q"}, "answer", "missing"),
        ({"answer": True}, "question", "missing"),
        ({"question": " ", "answer": True}, "question", "empty"),
        ({"question": 3, "answer": True}, "question", "a number"),
        ({"question": "q", "passage": ["p"], "answer": True}, "passage", "an array"),
        ({"question": "q", "answer": 1}, "answer", "a number"),
        ({"question": "q", "answer": "maybe"}, "answer", "'maybe'"),
        ({"question": "q", "anwser": True}, "anwser", "unknown field"),
        ({"question": "\ud800", "answer": True}, "question", "surrogate"),
        ({**CHOICE, "answer": "c"}, "answer", "not one of the row's choices"),
        ({**CHOICE, "choices": "ab"}, "choices", "a string"),
        ({**CHOICE, "choices": ["a"]}, "choices", "2 to 100 items, not 1"),
        ({**CHOICE, "choices": ["a", "a"]}, "choices", "unique"),
        ({**CHOICE, "choices": ["a", 2]}, "choices[1]", "a number"),
        ({"prompt": "p"}, "completion", "missing"),
        ({"completion": "c"}, "prompt", "missing"),
        ({"prompt": "p", "completion": ""}, "completion", "empty"),
        ({**PROMPT, "answer": True}, "answer", "unknown field"),
    ],
)
def test_faults_name_their_field(obj: object, param: str | None, words: str) -> None:
    with pytest.raises(RowError, match=words) as caught:
        parse_row(obj)
    assert caught.value.param == param
    assert caught.value.code == "invalid_training_file"


def test_an_unknown_label_is_named() -> None:
    with pytest.raises(RowError, match="not one of the task's labels") as caught:
        parse_row({"question": "q", "answer": "ugly"}, labels=["good", "bad"])
    assert caught.value.param == "answer"


@pytest.mark.parametrize(("answer", "shown"), [(True, "true"), (False, "false"), ("Yes", "'Yes'")])
def test_yes_no_rows_after_a_model_with_labels_are_told_to_name_their_type(
    answer: bool | str, shown: str
) -> None:
    start = Task(type="choice", template="{question}", labels=("good", "bad"))
    row = {"question": "q", "answer": answer}
    with pytest.raises(RowError) as caught:
        parse_row(row, labels=Task.labels_of_rows(TaskSettings(), start))
    assert caught.value.message == (
        f"answer {shown} is not one of the task's labels (good, bad). "
        'Yes/no rows need task.type "yes_no", which inherits no labels'
    )
    named = TaskSettings(type="yes_no")
    parsed = parse_row(row, labels=Task.labels_of_rows(named, start))
    assert Task.resolve(named, infer_task([parsed]), start).labels == ("yes", "no")


def test_a_boolean_is_none_of_a_rows_choices() -> None:
    with pytest.raises(RowError, match=r"answer true is not one of the row's choices$"):
        parse_row({"question": "q", "choices": ["a", "b"], "answer": True}, labels=["good", "bad"])


FIELDS = st.sampled_from(
    [
        "question",
        "passage",
        "answer",
        "choices",
        "prompt",
        "completion",
        "messages",
        "tools",
        "role",
        "content",
        "tool_calls",
        "function",
        "weight",
        "x\0",
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=4),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(obj=JSON, need_answer=st.booleans(), labels=st.none() | st.just(["a", "b"]))
def test_any_json_is_a_row_or_a_row_error(obj: object, need_answer: bool, labels: list[str] | None) -> None:
    with suppress(RowError):
        assert parse_row(obj, need_answer=need_answer, labels=labels).kind in get_args(RowKind)


def test_the_task_follows_from_the_rows() -> None:
    assert infer_task([parse_row(QUESTION)]) == "yes_no"
    assert infer_task([parse_row(CHOICE)]) == "choice"
    assert infer_task([parse_row(PROMPT)]) == "text"
    assert infer_task([parse_row({"messages": [USER, ASSISTANT]})]) == "text"
    with pytest.raises(RowError, match="prompt, yes_no"):
        infer_task([parse_row(QUESTION), parse_row(PROMPT)])
    with pytest.raises(RowError, match="no rows"):
        infer_task([])


def test_a_file_with_a_byte_order_mark_and_blank_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.jsonl", b"\xef\xbb\xbf" + json.dumps(QUESTION).encode(), b"", b"  \r", QUESTION, b""
    )
    assert [line for line, _ in scan_rows(path)] == [1, 4]
    assert len(read_rows(path, param="data")) == 2


def test_the_one_bad_row_of_5000_is_named_by_its_line(tmp_path: Path) -> None:
    rows: list[bytes | dict[str, Any]] = [QUESTION] * 5_000
    rows[4_321] = {"question": "q", "answer": "perhaps"}
    with pytest.raises(RowError, match=r"line 4322: answer must be .* not 'perhaps'") as caught:
        read_rows(write(tmp_path / "rows.jsonl", *rows), param="data")
    assert (caught.value.line, caught.value.param) == (4_322, "answer")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"not json", "not valid JSON"),
        (b'{"question": "q", "answer": true', "not valid JSON"),
        (b'{"question": "\xff", "answer": true}', "not valid UTF-8 at byte 15"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"question": ' + b"9" * 5_000 + b"}", "too long a number"),
        (b'"' + b"x" * 2_000 + b'"', "longer than 1,000 bytes"),
        (b"[1]", "an array"),
    ],
)
def test_a_bad_line_is_reported_and_the_next_one_read(tmp_path: Path, line: bytes, words: str) -> None:
    limit = 1_000 if "longer" in words else 200_000
    path = write(tmp_path / "rows.jsonl", QUESTION, line, PROMPT)
    rows_by_line = dict(scan_rows(path, max_line_bytes=limit))
    assert sorted(rows_by_line) == [1, 2, 3]
    error = rows_by_line[2]
    assert isinstance(error, RowError)
    assert words in error.message
    assert error.line == 2
    assert isinstance(rows_by_line[3], Row)


def test_a_line_just_as_long_as_allowed(tmp_path: Path) -> None:
    line = json.dumps(QUESTION).encode()
    path = write(tmp_path / "rows.jsonl", line, line)
    assert all(isinstance(row, Row) for _, row in scan_rows(path, max_line_bytes=len(line)))
    assert all(isinstance(row, RowError) for _, row in scan_rows(path, max_line_bytes=len(line) - 1))


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RowError, match="has no rows"):
        read_rows(write(tmp_path / "rows.jsonl", b"", b""), param="data")


def test_a_file_that_cannot_be_read_is_named_with_its_parameter(tmp_path: Path) -> None:
    with pytest.raises(RowError, match=r"none\.jsonl can't be read: No such file") as caught:
        read_rows(tmp_path / "none.jsonl", param="data")
    assert caught.value.param == "data"
