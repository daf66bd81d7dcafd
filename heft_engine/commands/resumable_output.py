"""A file of answers that an interrupted run goes on with: one line for each row of its input, in the input's order.

    answers.jsonl               the answers; a last line that is not whole was cut off, and is asked again
    answers.jsonl.about         what they answer: the SHA-256 of the input, and what was asked of whom

It does NOT know how answers are had.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from heft_engine.errors import ConfigError

_CHUNK = 1024**2


@dataclass(frozen=True, kw_only=True)
class Input:
    """A file of rows: SHA-256 of its bytes, and how many lines are not blank."""

    sha256: str
    rows: int

    @staticmethod
    def of(path: Path) -> Input:
        """Raises OSError."""
        total, rows = hashlib.sha256(), 0
        with path.open("rb") as lines:
            for line in lines:
                total.update(line)
                rows += bool(line.strip())
        return Input(sha256=total.hexdigest(), rows=rows)


class Answers:
    """An open file of answers. `done`: rows that it holds."""

    def __init__(self, file: BinaryIO, done: int) -> None:
        self._file = file
        self.done = done

    def write(self, answers: Sequence[Mapping[str, Any]]) -> None:
        """The next rows' answers; they are in the file when this returns."""
        lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        self._file.write(lines.encode())
        self._file.flush()
        self.done += len(answers)


@contextmanager
def resumed(out: Path, given: Input, asked: Mapping[str, Any]) -> Iterator[Answers]:
    """`out` behind its last whole line, made if it is not there.

    `asked`: whatever else decides the answers. Raises ConfigError when `out` has answers to something else, or another
    process writes it; OSError.
    """
    about = out.with_name(out.name + ".about")
    record = {"input_sha256": given.sha256, "asked": dict(asked)}
    with open(os.open(out, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        _lock(file, out)
        if os.fstat(file.fileno()).st_size == 0:
            about.write_text(json.dumps(record, indent=1))
        elif _read(about) != record:
            raise ConfigError(
                f"{out} holds answers to other rows, of another model or with other options: name another file, or "
                f"remove it",
                param="out",
            )
        done = _to_last_whole_line(file)
        if done > given.rows:
            raise ConfigError(f"{out} holds more answers than there are rows", param="out")
        yield Answers(file, done)


def _lock(file: BinaryIO, out: Path) -> None:
    """Until the file is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        raise ConfigError(f"another process writes {out}", param="out") from error


def _read(about: Path) -> Any:
    try:
        return json.loads(about.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _to_last_whole_line(file: BinaryIO) -> int:
    """Cuts off what stands behind the last line's end; the number of lines."""
    lines = end = position = 0
    while chunk := file.read(_CHUNK):
        lines += chunk.count(b"\n")
        if (last := chunk.rfind(b"\n")) >= 0:
            end = position + last + 1
        position += len(chunk)
    file.truncate(end)
    file.seek(end)
    return lines
