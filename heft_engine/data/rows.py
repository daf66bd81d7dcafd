"""Training and question rows: what a JSON object must hold, and the one record the rest of the engine sees.

Four formats: yes/no questions, questions with choices, prompt and completion, chat messages (`chat_rows`).
It does NOT know tokens, prompts or models: that is `heft_engine.data.encoding`.
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
from heft_engine.data.chat_rows import Message, parse_messages
from heft_engine.data.row_fields import json_type, refuse_unknown, text, without_nulls
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
    """One row, checked. Which fields are set depends on `kind`; `answer` is None where a question is asked.

    yes_no: question, passage (may be None), answer "yes" or "no".
    choice: question, passage, choices (None where the task's labels are meant), answer (one of them).
    prompt: prompt, answer (the completion).
    messages: messages; the assistant's turns with weight 1 are the answers.
    """

    kind: RowKind
    question: str | None = None
    passage: str | None = None
    choices: tuple[str, ...] | None = None
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    answer: str | None = None


def parse_row(obj: Any, *, labels: Sequence[str] | None = None, need_answer: bool = True) -> Row:
    """One JSON object as a Row. A field that is null counts as absent; a blank passage as none.

    `labels` are the task's, for rows that bring no choices of their own; ("yes", "no") makes it a yes/no row.
    `need_answer` False is for questions: an answer may be there and is checked, but need not.
    Raises RowError with `param` set to the field at fault.
    """
    fields = without_nulls(obj, "a row")
    if "messages" in fields:
        return Row(kind="messages", messages=parse_messages(fields, need_answer=need_answer))
    if "prompt" in fields or "completion" in fields:
        refuse_unknown(fields, ("prompt", "completion"))
        completion = fields.get("completion")
        answer = text(completion, "completion") if need_answer or completion is not None else None
        return Row(kind="prompt", prompt=text(fields.get("prompt"), "prompt"), answer=answer)
    if "question" in fields or "answer" in fields:
        return _question_row(fields, labels, need_answer)
    raise RowError(f"no known format: {_FORMATS}", param=next(iter(fields), None))


def infer_task(rows: Iterable[Row]) -> TaskType:
    """The task that these rows are for. Raises RowError when they are of several formats, or none."""
    kinds = sorted({row.kind for row in rows})
    if not kinds:
        raise RowError("there are no rows")
    if len(kinds) > 1:
        raise RowError(f"rows of several formats in one file: {', '.join(kinds)}")
    return _TASKS[kinds[0]]


def read_rows(
    path: Path,
    *,
    labels: Sequence[str] | None = None,
    need_answer: bool = True,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> list[Row]:
    """All rows of a JSONL file. Raises RowError with the line of the first bad one, or if none is there."""
    rows = []
    scan = scan_rows(path, labels=labels, need_answer=need_answer, max_line_bytes=max_line_bytes)
    for line, row in scan:
        if isinstance(row, RowError):
            raise RowError(f"line {line}: {row.message}", param=row.param, line=line)
        rows.append(row)
    if not rows:
        raise RowError("the file holds no rows")
    return rows


def scan_rows(
    path: Path,
    *,
    labels: Sequence[str] | None = None,
    need_answer: bool = True,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Iterator[tuple[int, Row | RowError]]:
    """Every row of a JSONL file with its line, counted from 1; a bad one as its error, and the next goes on.

    Reads one line at a time and no line beyond its bound; blank lines and a byte order mark are skipped.
    """
    with path.open("rb") as stream:
        if stream.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            stream.seek(0)
        for number, line in enumerate(_lines(stream, max_line_bytes), start=1):
            if line is not None and not line.strip():
                continue
            try:
                if line is None:
                    raise RowError(f"this line is longer than {max_line_bytes:,} bytes")
                yield number, parse_row(_decode(line), labels=labels, need_answer=need_answer)
            except RowError as error:
                error.line = number
                yield number, error


def _lines(stream: BinaryIO, limit: int) -> Iterator[bytes | None]:
    """Lines of at most `limit` bytes; None in place of a longer one, which is passed over in pieces."""
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
        raise RowError(f"not UTF-8: byte {error.start + 1} of this line") from error
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON: {error.msg} at character {error.pos + 1}") from error
    except (RecursionError, ValueError) as error:
        raise RowError("JSON nested too deeply, or a number too long") from error


def _question_row(fields: dict[str, object], labels: Sequence[str] | None, need_answer: bool) -> Row:
    refuse_unknown(fields, ("question", "passage", "choices", "answer"))
    question = text(fields.get("question"), "question")
    passage = text(fields["passage"], "passage", empty=True) if "passage" in fields else ""
    choices = _choices(fields["choices"]) if "choices" in fields else None
    allowed = choices or (tuple(labels) if labels and tuple(labels) != _YES_NO else None)
    given = fields.get("answer")
    if given is None and need_answer:
        raise RowError("answer is missing", param="answer")
    kind: RowKind = "choice" if allowed else "yes_no"
    answer = None
    if given is not None:
        answer = _choice(given, allowed, own=choices is not None) if allowed else _yes_no(given)
    return Row(
        kind=kind,
        question=question,
        passage=passage if passage.strip() else None,
        choices=choices,
        answer=answer,
    )


def _choices(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise RowError(f"choices must be an array, not {json_type(value)}", param="choices")
    if not 2 <= len(value) <= MAX_CHOICES:
        raise RowError(f"{len(value)} choices; there must be 2 to {MAX_CHOICES}", param="choices")
    choices = tuple(text(item, f"choices[{index}]") for index, item in enumerate(value))
    if len(set(choices)) != len(choices):
        raise RowError("two choices are the same", param="choices")
    return choices


def _choice(value: object, allowed: tuple[str, ...], *, own: bool) -> str:
    answer = text(value, "answer")
    if answer not in allowed:
        known = "the row's choices" if own else f"the task's labels ({', '.join(allowed)})"
        raise RowError(f"answer {answer[:80]!r} is none of {known}", param="answer")
    return answer


def _yes_no(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str) and value.strip().lower() in _YES_NO:
        return value.strip().lower()
    shown = repr(value[:80]) if isinstance(value, str) else json_type(value)
    raise RowError(
        f'answer is {shown}; it must be true, false, "yes" or "no" (other labels: choices or task.labels)',
        param="answer",
    )
