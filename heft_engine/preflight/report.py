"""The report of a check of a job's files, as it is stored with the job and shown to its user."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from heft_engine.config.metric_names import TaskType
from heft_engine.config.run_file import FileField
from heft_engine.errors import RowError


@dataclass(frozen=True, kw_only=True)
class Fault:
    """An invalid row. `line` 0 is the file itself."""

    file: FileField
    line: int
    field: str | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class Warn:
    """Something that can be trained on but is rarely intended: duplicates, overlap, truncation, unbalanced labels."""

    code: str
    file: FileField
    message: str


@dataclass(kw_only=True)
class FileReport:
    """Counts of a file. `tokens`: of prompts and answers; `supervised_tokens`: of answers; `longest`: of an example."""

    rows: int = 0
    faults: int = 0
    examples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0
    truncated: int = 0
    duplicates: int = 0
    #: Rows of each label, or of each position of the right choice where rows have their own choices; empty for text.
    labels: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Report:
    """The report of all files. `faults` lists the first few; each FileReport counts all of its file."""

    task: TaskType | None
    max_length: int
    files: Mapping[FileField, FileReport]
    faults: list[Fault]
    warnings: list[Warn]

    @property
    def fault_count(self) -> int:
        return sum(report.faults for report in self.files.values())

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "fault_count": self.fault_count}

    def error(self) -> RowError | None:
        """Returns the error of the job, or None if its files are valid."""
        if not self.faults:
            return None
        first, others = self.faults[0], self.fault_count - 1
        location = f"{first.file}, line {first.line}" if first.line else first.file
        more = f" ({others} more faults)" if others > 1 else " (one more fault)" if others else ""
        return RowError(f"{location}: {first.reason}{more}", param=first.file, line=first.line)
