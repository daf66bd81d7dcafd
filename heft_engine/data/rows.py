"""Rows: reads and validates the JSON objects that users train on and ask.

Four formats: yes/no questions, questions with choices, prompt and completion, chat messages (`chat_rows`).
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from heft_engine.config.metric_names import TaskType
from heft_engine.config.train import MAX_LINE_BYTES
from heft_engine.data.chat_rows import Message, parse_conversation
from heft_engine.data.row_fields import json_type, printable, refuse_unknown, text, without_nulls
from heft_engine.data.tool_rows import Tool
from heft_engine.errors import RowError

RowKind = Literal["yes_no", "choice", "prompt", "messages"]
MAX_CHOICES = 100
_YES_NO = ("yes", "no")
_TASKS: dict[RowKind, TaskType] = {
    "yes_no": "yes_no",
    "choice": "choice",
    "prompt": "text",
    "messages": "text",
}
_FORMATS = (
    'a row is {"question", "passage", "answer"}, {"question", "choices", "answer"}, {"prompt", "completion"} '
    'or {"messages"}'
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A validated row. Its `kind` decides which fields are set; `answer` is None in a row to be answered.

    yes_no: question, passage (may be None), answer "yes" or "no".
    choice: question, passage, choices (None: the task's labels), answer (one of them).
    prompt: prompt, answer (the completion).
    messages: messages, tools; the assistant turns with weight 1 are the answers.
    """

    kind: RowKind
    question: str | None = None
    passage: str | None = None
    choices: tuple[str, ...] | None = None
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    tools: tuple[Tool, ...] = ()
    answer: str | None = None


def parse_row(obj: Any, *, labels: Sequence[str] | None = None, need_answer: bool = True) -> Row:
    """Returns a JSON object as a Row. A null field counts as absent, a blank passage as None.

    `labels`: the task's labels, for rows without choices; ("yes", "no") makes it a yes/no row.
    `need_answer`: False makes the answer optional; it is validated if present.
    Raises RowError with `param` set to the field at fault.
    """
    fields = without_nulls(obj, "a row")
    if "messages" in fields:
        conversation = parse_conversation(fields, need_answer=need_answer)
        return Row(kind="messages", messages=conversation.messages, tools=conversation.tools)
    if "prompt" in fields or "completion" in fields:
        refuse_unknown(fields, ("prompt", "completion"))
        completion = fields.get("completion")
        answer = text(completion, "completion") if need_answer or completion is not None else None
        return Row(kind="prompt", prompt=text(fields.get("prompt"), "prompt", empty=True), answer=answer)
    if "question" in fields or "answer" in fields:
        return _question_row(fields, labels, need_answer)
    first = next(iter(fields), None)
    raise RowError(f"unknown row format: {_FORMATS}", param=None if first is None else printable(first))


def infer_task(rows: Iterable[Row]) -> TaskType:
    """Returns the task type of rows. Raises RowError for no rows or several formats."""
    kinds = sorted({row.kind for row in rows})
    if not kinds:
        raise RowError("there are no rows")
    if len(kinds) > 1:
        raise RowError(f"all rows of a file must have one format, but it has {', '.join(kinds)}")
    return _TASKS[kinds[0]]


def read_rows(
    path: Path,
    *,
    param: str,
    labels: Sequence[str] | None = None,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> list[Row]:
    """Returns all rows of a JSONL file.

    Raises RowError for its first invalid row, if it is empty, and (with `param`) if it can't be read.
    """
    rows = []
    try:
        for line, row in scan_rows(path, labels=labels, max_line_bytes=max_line_bytes):
            if isinstance(row, RowError):
                raise RowError(f"line {line}: {row.message}", param=row.param, line=line)
            rows.append(row)
    except OSError as error:
        raise RowError(f"{path} can't be read: {error.strerror}", param=param) from error
    if not rows:
        raise RowError("the file has no rows")
    return rows


def scan_rows(
    path: Path,
    *,
    labels: Sequence[str] | None = None,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Iterator[tuple[int, Row | RowError]]:
    """Yields (line number, row or its error) for every row of a JSONL file; lines are counted from 1.

    Holds one line in memory, of at most `max_line_bytes`. Skips blank lines and a byte order mark.
    """
    with path.open("rb") as stream:
        if stream.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            stream.seek(0)
        for number, line in enumerate(_lines(stream, max_line_bytes), start=1):
            if line is not None and not line.strip():
                continue
            try:
                if line is None:
                    raise RowError(f"the line is longer than {max_line_bytes:,} bytes")
                yield number, parse_row(_decode(line), labels=labels)
            except RowError as error:
                error.line = number
                yield number, error


def _lines(stream: BinaryIO, limit: int) -> Iterator[bytes | None]:
    """Yields lines of at most `limit` bytes, and None for each longer one, which is skipped in pieces."""
    while line := stream.readline(limit + 1):
        if len(line) <= limit or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(1024**2)
        yield None


def _decode(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError(f"the line is not valid UTF-8 at byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        raise RowError(f"the line is not valid JSON: {error.msg} at character {error.pos + 1}") from error
    except (RecursionError, ValueError) as error:
        raise RowError("the line's JSON is nested too deeply, or has too long a number") from error


def _question_row(fields: dict[str, object], labels: Sequence[str] | None, need_answer: bool) -> Row:
    refuse_unknown(fields, ("question", "passage", "choices", "answer"))
    question = text(fields.get("question"), "question")
    passage = text(fields["passage"], "passage", empty=True) if "passage" in fields else ""
    choices = _choices(fields["choices"]) if "choices" in fields else None
    allowed = choices or (tuple(labels) if labels and tuple(labels) != _YES_NO else None)
    raw_answer = fields.get("answer")
    if raw_answer is None and need_answer:
        raise RowError("answer is missing", param="answer")
    answer = None
    if raw_answer is not None:
        answer = _choice(raw_answer, allowed, of_row=choices is not None) if allowed else _yes_no(raw_answer)
    return Row(
        kind="choice" if allowed else "yes_no",
        question=question,
        passage=passage if passage.strip() else None,
        choices=choices,
        answer=answer,
    )


def _choices(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise RowError(f"choices must be an array, not {json_type(value)}", param="choices")
    if not 2 <= len(value) <= MAX_CHOICES:
        raise RowError(f"choices must have 2 to {MAX_CHOICES} items, not {len(value)}", param="choices")
    choices = tuple(text(item, f"choices[{index}]") for index, item in enumerate(value))
    if len(set(choices)) != len(choices):
        raise RowError("choices must be unique", param="choices")
    return choices


def _choice(value: object, allowed: tuple[str, ...], *, of_row: bool) -> str:
    answer = None if isinstance(value, bool) else text(value, "answer")
    if answer in allowed:
        return answer
    shown = json.dumps(value) if answer is None else repr(answer[:80])
    if of_row:
        raise RowError(f"answer {shown} is not one of the row's choices", param="answer")
    message = f"answer {shown} is not one of the task's labels ({', '.join(allowed)})"
    if answer is None or answer.strip().lower() in _YES_NO:
        # The labels may be inherited from the model that training goes on from, and never have been set by this user.
        message += '. Yes/no rows need task.type "yes_no", which inherits no labels'
    raise RowError(message, param="answer")


def _yes_no(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str) and value.strip().lower() in _YES_NO:
        return value.strip().lower()
    shown = repr(value[:80]) if isinstance(value, str) else json_type(value)
    raise RowError(
        f'answer must be true, false, "yes" or "no", not {shown} (for other labels use choices or task.labels)',
        param="answer",
    )
