"""Files of answers that are resumed: no broken line, and no line from another input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from heft_engine.commands.resumable_output import RowsFile, resume_answers
from heft_engine.errors import ConfigError

SETTINGS: dict[str, Any] = {"model": "m", "scale": 1.0}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"b": 2}\r\n   \n{"c": 3}')
    return path


def write(
    out: Path, rows_file: RowsFile, *answers: dict[str, Any], settings: dict[str, Any] = SETTINGS
) -> int:
    """Returns the number of rows that were answered before."""
    with resume_answers(out, rows_file, settings) as file:
        done = file.done
        file.write(list(answers))
    return done


def test_rows_are_lines_that_are_not_blank(rows: Path) -> None:
    assert RowsFile.of(rows).rows == 3


def test_it_goes_on_behind_the_last_whole_line(rows: Path, tmp_path: Path) -> None:
    out, rows_file = tmp_path / "answers.jsonl", RowsFile.of(rows)
    assert write(out, rows_file, {"answer": "é"}) == 0
    whole = out.read_bytes()
    for torn in (b"{", b'{"answer": "y', '{"é'.encode()[:-1]):
        out.write_bytes(whole + torn)
        assert write(out, rows_file) == 1
        assert out.read_bytes() == whole
    assert write(out, rows_file, {"answer": 2}, {"answer": 3}) == 1
    assert [json.loads(line)["answer"] for line in out.read_text().splitlines()] == ["é", 2, 3]
    assert write(out, rows_file) == 3


def test_a_torn_first_line_is_no_answer(rows: Path, tmp_path: Path) -> None:
    out, rows_file = tmp_path / "answers.jsonl", RowsFile.of(rows)
    write(out, rows_file)
    out.write_bytes(b'{"answer"')
    assert write(out, rows_file, {"answer": 1}) == 0
    assert out.read_text() == '{"answer": 1}\n'


def test_answers_to_something_else_are_not_touched(rows: Path, tmp_path: Path) -> None:
    out, rows_file = tmp_path / "answers.jsonl", RowsFile.of(rows)
    write(out, rows_file, {"answer": 1})
    before = out.read_bytes()
    rows.write_bytes(rows.read_bytes() + b"\n")
    with pytest.raises(ConfigError, match="other rows"):
        write(out, RowsFile.of(rows))
    with pytest.raises(ConfigError, match="other options"):
        write(out, rows_file, settings=SETTINGS | {"scale": 0.5})
    assert out.read_bytes() == before
    stranger = tmp_path / "mine.jsonl"
    stranger.write_text("somebody's\n")
    with pytest.raises(ConfigError, match="other rows"):
        write(stranger, rows_file)
    assert stranger.read_text() == "somebody's\n"


def test_more_answers_than_rows_are_refused(rows: Path, tmp_path: Path) -> None:
    out, rows_file = tmp_path / "answers.jsonl", RowsFile.of(rows)
    write(out, rows_file, *[{"answer": 1}] * 4)
    with pytest.raises(ConfigError, match="more answers"):
        write(out, rows_file)


def test_two_at_once_are_one_too_many(rows: Path, tmp_path: Path) -> None:
    out, rows_file = tmp_path / "answers.jsonl", RowsFile.of(rows)
    with resume_answers(out, rows_file, SETTINGS), pytest.raises(ConfigError, match="another process"):
        write(out, rows_file)
