"""A training process: a whole run, or one rank of it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from heft_engine.bundle.format import read_info
from heft_engine.bundle.start import start_path
from heft_engine.commands.child_process import print_event, report_failures
from heft_engine.commands.stage_exchange import RequestedStages
from heft_engine.config.run_file import FileField, RunFile
from heft_engine.data.rows import Row, read_rows
from heft_engine.data.task import Task
from heft_engine.errors import EngineError, FailedElsewhere, RankLost
from heft_engine.runtime.distributed import SINGLE_PROCESS, Ranks
from heft_engine.runtime.rendezvous import process_group
from heft_engine.training.activation_store import MAX_BYTES, ActivationStore
from heft_engine.training.run import train
from heft_engine.training.stage_cache import StageStore
from heft_engine.training.stage_store import LocalStages


def train_in_process(run_file: RunFile, stop: threading.Event) -> None:
    """Trains, with events on stdout: those of rank 0, and one rank's if it fails."""
    with ExitStack() as stack:
        # Until the ranks have met, each tells its own failure.
        with report_failures(lambda error: _is_reporter(error, SINGLE_PROCESS)):
            ranks = stack.enter_context(process_group())
        stack.enter_context(report_failures(lambda error: _is_reporter(error, ranks)))
        try:
            _train(run_file, stop, ranks)
        except RankLost as lost:
            failure = ranks.failure_elsewhere()
            if failure is None:
                raise
            raise failure from lost


def _is_reporter(error: EngineError, ranks: Ranks) -> bool:
    if isinstance(error, RankLost):
        return False  # the process that started the ranks knows more
    return isinstance(error, FailedElsewhere) or ranks.is_first_failure(error)


def _train(run_file: RunFile, stop: threading.Event, ranks: Ranks) -> None:
    labels = _row_labels(run_file)
    train(
        run_file.config,
        _read("training_file", run_file.train, run_file, labels),
        _read("validation_file", run_file.eval, run_file, labels),
        run_file.out,
        print_event,
        test_rows=_read("test_file", run_file.test, run_file, labels),
        options=run_file,
        stage_store=_stage_store(run_file, stop),
        activations=_activation_store(run_file),
        should_stop=stop.is_set,
        ranks=ranks,
    )


def _stage_store(run_file: RunFile, stop: threading.Event) -> StageStore | None:
    if run_file.stage_dir is None:
        return None
    if run_file.stages_on_request:
        return RequestedStages(directory=run_file.stage_dir, on_event=print_event, should_stop=stop.is_set)
    return LocalStages(directory=run_file.stage_dir)


def _activation_store(run_file: RunFile) -> ActivationStore | None:
    if run_file.activation_dir is None or run_file.activation_bytes == 0:
        return None
    return ActivationStore(
        directory=run_file.activation_dir,
        max_bytes=run_file.activation_bytes or MAX_BYTES,
        owner=run_file.owner,
    )


def _row_labels(run_file: RunFile) -> Sequence[str] | None:
    """Returns the labels of rows without choices of their own. Raises BundleError for a bad bundle to start from."""
    config = run_file.config
    start = start_path(config.model, run_file.start, allow_paths=run_file.allow_paths)
    start_task = None if start is None else Task.from_json(read_info(start).task)
    return Task.labels_of_rows(config.task, start_task)


def _read(field: FileField, path: Path | None, run_file: RunFile, labels: Sequence[str] | None) -> list[Row]:
    """Returns the rows of a file, none for None. Raises RowError."""
    if path is None:
        return []
    return read_rows(path, param=field, labels=labels, max_line_bytes=run_file.max_line_bytes)
