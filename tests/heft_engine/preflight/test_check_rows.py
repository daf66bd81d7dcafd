"""The report on a job's files: every fault with its place, exact counts, warnings for likely mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest

from heft_engine.config.train import TaskSettings
from heft_engine.data.encoding import Encoder
from heft_engine.data.rows import read_rows
from heft_engine.data.task import Task
from heft_engine.errors import ConfigError
from heft_engine.model.base_models import load_tokenizer
from heft_engine.preflight.check_rows import Limits, check_files
from heft_engine.preflight.report import Fault


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def question(number: int, answer: object = True, passage: str = "It is so.") -> dict[str, object]:
    return {"question": f"is it {number}", "passage": passage, "answer": answer}


def test_a_good_file_is_counted(tmp_path: Path, tiny_llama_dir: Path) -> None:
    rows = [question(n, n % 4 == 0) for n in range(40)]
    path = write(tmp_path / "rows.jsonl", rows)
    report = check_files(path, model_path=tiny_llama_dir)
    counts = report.files["training_file"]
    encoder = Encoder(load_tokenizer(tiny_llama_dir), Task.resolve(TaskSettings(), "yes_no"), 512)
    examples = [example for row in read_rows(path, param="data") for example in encoder.encode(row)]
    assert (report.task, report.max_length) == ("yes_no", 512)
    assert (counts.rows, counts.examples, counts.faults) == (40, 40, 0)
    assert counts.labels == {"no": 30, "yes": 10}
    assert counts.supervised_tokens == sum(example.supervised_tokens for example in examples)
    assert counts.tokens == counts.supervised_tokens + sum(len(example.prompt) for example in examples)
    assert report.error() is None
    assert report.warnings == []


def test_faults_are_listed_to_a_limit_and_all_counted(tmp_path: Path, tiny_llama_dir: Path) -> None:
    rows: list[Any] = [question(n) for n in range(100)]
    rows[7] = {"question": "q"}
    rows[11] = "not json"
    rows[12] = {"prompt": "p", "completion": "c"}
    rows[40:90] = [question(n, "maybe") for n in range(50)]
    report = check_files(write(tmp_path / "rows.jsonl", rows), model_path=tiny_llama_dir)
    assert len(report.faults) == 20
    assert report.fault_count == report.files["training_file"].faults == 53
    assert report.faults[0] == Fault(file="training_file", line=8, field="answer", reason="answer is missing")
    assert [(fault.line, fault.field) for fault in report.faults[1:4]] == [
        (12, None),
        (13, None),
        (41, "answer"),
    ]
    assert "this is a prompt row after yes_no rows" in report.faults[2].reason
    error = report.error()
    assert error is not None
    assert error.message == "training_file, line 8: answer is missing (52 more faults)"
    assert (error.code, error.param) == ("invalid_training_file", "training_file")
    assert json.loads(json.dumps(report.to_json()))["fault_count"] == 53


def test_the_one_bad_row_of_5000(tmp_path: Path, tiny_llama_dir: Path) -> None:
    rows = [question(n) for n in range(5_000)]
    rows[3_210]["passage"] = 7
    error = check_files(write(tmp_path / "rows.jsonl", rows), model_path=tiny_llama_dir).error()
    assert error is not None
    assert error.message == "training_file, line 3211: passage must be a string, not a number"


def test_each_file_has_its_own_faults(tmp_path: Path, tiny_llama_dir: Path) -> None:
    good = write(tmp_path / "good.jsonl", [question(1)])
    other = write(tmp_path / "other.jsonl", [{"question": "q", "choices": ["a", "b"], "answer": "a"}])
    empty = write(tmp_path / "empty.jsonl", ["", ""])
    report = check_files(good, other, empty, model_path=tiny_llama_dir)
    assert [(fault.file, fault.line) for fault in report.faults] == [("validation_file", 1), ("test_file", 0)]
    assert "has no rows" in report.faults[1].reason


def test_long_rows(tmp_path: Path, tiny_llama_dir: Path) -> None:
    rows = [question(1), question(2, passage="word " * 400), {"question": "why " * 400, "answer": True}]
    report = check_files(write(tmp_path / "rows.jsonl", rows), model_path=tiny_llama_dir, max_length=64)
    assert report.files["training_file"].truncated == 1
    assert [warning.code for warning in report.warnings if warning.code == "truncation"] == ["truncation"]
    assert [(fault.line, fault.field) for fault in report.faults] == [(3, "question")]


def test_duplicates_and_rows_in_two_files(tmp_path: Path, tiny_llama_dir: Path) -> None:
    train = write(
        tmp_path / "train.jsonl",
        [question(1), question(2, False), question(1, False), question(3), question(2)],
    )
    held_out = write(
        tmp_path / "eval.jsonl", [question(8), question(3, False), question(9, False), question(2)]
    )
    report = check_files(train, held_out, held_out, model_path=tiny_llama_dir)
    warnings = {(warning.file, warning.code): warning.message for warning in report.warnings}
    assert report.files["training_file"].duplicates == 2
    assert warnings["training_file", "duplicates"].startswith("2 rows (line 3, 5) repeat")
    assert warnings["validation_file", "overlap"].startswith("2 rows (line 2, 4) are in training_file too")
    shared = [
        warning.message
        for warning in report.warnings
        if (warning.file, warning.code) == ("test_file", "overlap")
    ]
    assert [message.partition(" too")[0] for message in shared] == [
        "2 rows (line 2, 4) are in training_file",
        "4 rows (line 1, 2, 3, 4) are in validation_file",
    ]
    assert report.error() is None


def test_one_answer_nearly_always(tmp_path: Path, tiny_llama_dir: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [question(n, n > 0) for n in range(30)])
    report = check_files(path, model_path=tiny_llama_dir)
    assert [(w.code, w.message) for w in report.warnings] == [
        ("unbalanced", "29 of 30 rows have the answer 'yes'")
    ]


def test_choices_are_balanced_by_position(tmp_path: Path, tiny_llama_dir: Path) -> None:
    rows = [{"question": f"q{n}", "choices": ["a", "b", "c"], "answer": "abc"[n % 3]} for n in range(9)]
    report = check_files(write(tmp_path / "rows.jsonl", rows), model_path=tiny_llama_dir)
    assert report.task == "choice"
    assert report.files["training_file"].labels == {"choice 1": 3, "choice 2": 3, "choice 3": 3}


def test_labels_of_the_task(tmp_path: Path, tiny_llama_dir: Path) -> None:
    task = TaskSettings(type="choice", labels=["good", "bad"])
    path = write(
        tmp_path / "rows.jsonl", [{"question": "q", "answer": "good"}, {"question": "r", "answer": "ugly"}]
    )
    report = check_files(path, model_path=tiny_llama_dir, task=task)
    assert report.files["training_file"].labels == {"good": 1}
    assert [(fault.line, fault.field) for fault in report.faults] == [(2, "answer")]


def test_conversations_count_every_supervised_turn(tmp_path: Path, tiny_llama_dir: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 3
    turns[3] = {"role": "assistant", "content": "b", "weight": 0}  # type: ignore[dict-item]
    report = check_files(write(tmp_path / "rows.jsonl", [{"messages": turns}]), model_path=tiny_llama_dir)
    counts = report.files["training_file"]
    assert (report.task, counts.rows, counts.examples, counts.labels) == ("text", 1, 2, {})


def test_bounds_on_rows_and_lines(tmp_path: Path, tiny_llama_dir: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [question(n) for n in range(9)])
    report = check_files(path, model_path=tiny_llama_dir, limits=Limits(max_rows=5))
    assert [fault.reason for fault in report.faults] == ["the file has more than 5 rows"]
    long = write(tmp_path / "long.jsonl", [question(1), question(2, passage="x" * 2_000)])
    report = check_files(long, model_path=tiny_llama_dir, limits=Limits(max_line_bytes=1_000))
    assert [(fault.line, fault.reason) for fault in report.faults] == [
        (2, "the line is longer than 1,000 bytes")
    ]


def test_a_task_that_the_rows_are_not_for(tmp_path: Path, tiny_llama_dir: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [question(1)])
    with pytest.raises(ConfigError, match=r"task\.type is text") as caught:
        check_files(path, model_path=tiny_llama_dir, task=TaskSettings(type="text"))
    assert caught.value.param == "task.type"
