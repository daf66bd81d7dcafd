"""A file of answers that an interrupted command continues: one line for each row of its input, in the input's order.

answers.jsonl               the answers; an incomplete last line was cut off, and its row is answered again
answers.jsonl.about         the SHA-256 of the input, and the settings of the command that answered it
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
class RowsFile:
    """A file of rows: the SHA-256 of its bytes, and the number of lines that are not blank."""

    sha256: str
    rows: int

    @staticmethod
    def of(path: Path) -> RowsFile:
        """Raises OSError."""
        total, rows = hashlib.sha256(), 0
        with path.open("rb") as lines:
            for line in lines:
                total.update(line)
                rows += bool(line.strip())
        return RowsFile(sha256=total.hexdigest(), rows=rows)


class AnswerFile:
    """An open file of answers. `done`: the number of answers in it."""

    def __init__(self, file: BinaryIO, done: int) -> None:
        self._file = file
        self.done = done

    def write(self, answers: Sequence[Mapping[str, Any]]) -> None:
        """Appends the next rows' answers; they are in the file when this returns."""
        lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        self._file.write(lines.encode())
        self._file.flush()
        self.done += len(answers)


@contextmanager
def resume_answers(out: Path, rows_file: RowsFile, settings: Mapping[str, Any]) -> Iterator[AnswerFile]:
    """Opens `out` behind its last complete line, and creates it if it does not exist.

    `settings`: everything else that the answers depend on. Raises ConfigError when `out` has answers to other rows or
    of other settings, or another process writes it; OSError.
    """
    about = out.with_name(out.name + ".about")
    record = {"input_sha256": rows_file.sha256, "asked": dict(settings)}
    with open(os.open(out, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        _lock(file, out)
        if os.fstat(file.fileno()).st_size == 0:
            about.write_text(json.dumps(record, indent=1))
        elif _read(about) != record:
            raise ConfigError(
                f"{out} has answers to other rows, of another model or with other options: choose another file, or "
                f"remove this one",
                param="out",
            )
        done = _cut_incomplete_line(file)
        if done > rows_file.rows:
            raise ConfigError(f"{out} has more answers than there are rows", param="out")
        yield AnswerFile(file, done)


def _lock(file: BinaryIO, out: Path) -> None:
    """Locks the file until it is closed. Raises ConfigError if another process has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        raise ConfigError(f"another process is writing {out}", param="out") from error


def _read(about: Path) -> Any:
    try:
        return json.loads(about.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _cut_incomplete_line(file: BinaryIO) -> int:
    """Truncates the file after its last line end and returns the number of lines."""
    lines = end = position = 0
    while chunk := file.read(_CHUNK):
        lines += chunk.count(b"\n")
        if (last := chunk.rfind(b"\n")) >= 0:
            end = position + last + 1
        position += len(chunk)
    file.truncate(end)
    file.seek(end)
    return lines
