"""Checks of a job's files before training, line by line: faults, counts and warnings.

Only a hash and a line number of each row stay in memory, so that files may have millions of rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from heft_engine.config.run_file import FileField
from heft_engine.config.train import MAX_LINE_BYTES, TaskSettings
from heft_engine.data.encoding import Encoder, Example
from heft_engine.data.rows import Row, infer_task, scan_rows
from heft_engine.data.task import Task
from heft_engine.errors import RowError
from heft_engine.model.auto_settings import resolve_max_length
from heft_engine.model.base_models import load_tokenizer
from heft_engine.model.model_files import inspect
from heft_engine.preflight.duplicates import RowHashes
from heft_engine.preflight.report import Fault, FileReport, Report, Warn

_PROGRESS_ROWS = 10_000
_LISTED_LINES = 5
_UNBALANCED = 0.9
_LEAKED = "the model is trained on them, so its metrics on them are too high"
#: Files that should share no rows with this one, and why.
_DISJOINT_FROM: Mapping[FileField, Mapping[FileField, str]] = {
    "validation_file": {"training_file": _LEAKED},
    "test_file": {"training_file": _LEAKED, "validation_file": "training may have been tuned on them"},
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    max_rows: int = 5_000_000
    max_line_bytes: int = MAX_LINE_BYTES
    #: Faults that the report lists; all are counted.
    max_faults: int = 20


def check_files(
    train: Path,
    eval: Path | None = None,
    test: Path | None = None,
    *,
    model_path: Path,
    task: TaskSettings | None = None,
    start_task: Task | None = None,
    max_length: int | None = None,
    limits: Limits | None = None,
    on_progress: Callable[[int], None] = lambda rows: None,
) -> Report:
    """Reads the files as training does. `on_progress` is called with the number of rows every few thousand rows.

    start_task: of the fine-tuned model that the run goes on from.
    Faults of rows are in the report. Raises ConfigError and ModelError if task, length and model don't fit.
    """
    paths: dict[FileField, Path | None] = {"training_file": train, "validation_file": eval, "test_file": test}
    checker = _Checker(
        model_path, task or TaskSettings(), start_task, max_length, limits or Limits(), on_progress
    )
    for name, path in paths.items():
        if path is not None:
            checker.read(name, path)
    return checker.report()


class _Checker:
    """Reads one file after the other. The first valid row of the first file decides the task."""

    def __init__(
        self,
        model_path: Path,
        task: TaskSettings,
        start_task: Task | None,
        max_length: int | None,
        limits: Limits,
        on_progress: Callable[[int], None],
    ) -> None:
        self._settings = task
        self._start_task = start_task
        self._row_labels = Task.labels_of_rows(task, start_task)
        self._limits = limits
        self._on_progress = on_progress
        self._model_info = inspect(model_path)
        self._max_length = resolve_max_length(max_length, self._model_info.max_position_embeddings)
        self._tokenizer = load_tokenizer(model_path)
        self._encoder: Encoder | None = None
        self._kind: str | None = None
        self._rows = 0
        self._files: dict[FileField, FileReport] = {}
        self._hashes: dict[FileField, RowHashes] = {}
        self._faults: list[Fault] = []

    def read(self, name: FileField, path: Path) -> None:
        report, hashes, labels = FileReport(), RowHashes(), Counter[str]()
        self._files[name], self._hashes[name] = report, hashes
        scan = scan_rows(path, labels=self._row_labels, max_line_bytes=self._limits.max_line_bytes)
        for line, row in scan:
            self._rows += 1
            if self._rows % _PROGRESS_ROWS == 0:
                self._on_progress(self._rows)
            if report.rows + report.faults >= self._limits.max_rows:
                self._fault(name, RowError(f"the file has more than {self._limits.max_rows:,} rows"))
                break
            try:
                if isinstance(row, RowError):
                    raise row
                examples = self._encode(row)
            except RowError as error:
                error.line = line
                self._fault(name, error)
                continue
            hashes.add(row, line)
            _count(report, labels, row, examples)
        if not report.rows and not report.faults:
            self._fault(name, RowError("the file has no rows"))
        report.labels = dict(sorted(labels.items()))
        report.duplicates = len(hashes.repeated())

    def report(self) -> Report:
        return Report(
            task=self._encoder.task.type if self._encoder else None,
            max_length=self._max_length,
            files=self._files,
            faults=self._faults,
            warnings=[warning for name in self._files for warning in self._warnings(name)],
        )

    def _encode(self, row: Row) -> list[Example]:
        if self._encoder is None:
            task = Task.resolve(self._settings, infer_task([row]), self._start_task)
            vocab_size = self._model_info.vocab_size
            self._encoder = Encoder(self._tokenizer, task, self._max_length, vocab_size=vocab_size)
            self._kind = row.kind
        if row.kind != self._kind:
            raise RowError(f"all rows must have one format: this is a {row.kind} row after {self._kind} rows")
        return self._encoder.encode(row)

    def _fault(self, name: FileField, error: RowError) -> None:
        self._files[name].faults += 1
        if len(self._faults) < self._limits.max_faults:
            fault = Fault(file=name, line=error.line, field=error.param, reason=error.message)
            self._faults.append(fault)

    def _warnings(self, name: FileField) -> list[Warn]:
        report, messages = self._files[name], []
        if repeated := self._hashes[name].repeated():
            messages.append(("duplicates", f"{_rows_on(repeated)} repeat the question of an earlier line"))
        for other, why in _DISJOINT_FROM.get(name, {}).items():
            if other in self._hashes and (shared := self._hashes[name].also_in(self._hashes[other])):
                messages.append(("overlap", f"{_rows_on(shared)} are in {other} too: {why}"))
        if report.truncated:
            message = f"{report.truncated} of {report.rows} rows are longer than {self._max_length} tokens"
            messages.append(("truncation", f"{message}: their passages will be truncated"))
        label, most = max(report.labels.items(), key=lambda item: item[1], default=("", 0))
        if most > _UNBALANCED * report.rows:
            messages.append(("unbalanced", f"{most} of {report.rows} rows have the answer {label!r}"))
        return [Warn(code=code, file=name, message=message) for code, message in messages]


def _count(report: FileReport, labels: Counter[str], row: Row, examples: list[Example]) -> None:
    report.rows += 1
    report.examples += len(examples)
    report.supervised_tokens += sum(example.supervised_tokens for example in examples)
    lengths = [len(example.prompt) + example.supervised_tokens for example in examples]
    report.tokens += sum(lengths)
    report.longest = max(report.longest, *lengths)
    report.truncated += any(example.truncated for example in examples)
    if row.answer is None or row.kind not in ("yes_no", "choice"):
        return
    labels[f"choice {row.choices.index(row.answer) + 1}" if row.choices else row.answer] += 1


def _rows_on(lines: list[int]) -> str:
    listed = ", ".join(map(str, lines[:_LISTED_LINES])) + (", …" if len(lines) > _LISTED_LINES else "")
    return f"{len(lines)} rows (line {listed})"
