"""What a check of a job's files found, as it is stored with the job and shown to its user.

It does NOT know how rows are read: that is `heft_engine.preflight.check_rows`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from heft_engine.config.metric_names import TaskType
from heft_engine.config.run_file import FileField
from heft_engine.errors import RowError


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A row that can't be used. `line` 0 is the file itself."""

    file: FileField
    line: int
    field: str | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class Warn:
    """Something that works and is seldom meant: duplicates, overlap, truncation, unbalanced."""

    code: str
    file: FileField
    message: str


@dataclass(kw_only=True)
class FileReport:
    """Counts of one file. `tokens` are all that is read, `supervised_tokens` those that are learned."""

    rows: int = 0
    faults: int = 0
    examples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    truncated: int = 0
    duplicates: int = 0
    #: Rows of each label; of each position, where every row has choices of its own; empty for text.
    labels: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What is known of a job's files. `faults` lists the first, each file counts all of its own."""

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
        """The fault that the job fails with, or None if it may be trained."""
        if not self.faults:
            return None
        first, others = self.faults[0], self.fault_count - 1
        where = f"{first.file}, line {first.line}" if first.line else first.file
        more = f" ({others} more faults)" if others > 1 else " (one more fault)" if others else ""
        return RowError(f"{where}: {first.reason}{more}", param=first.file, line=first.line)
