"""`check`: checks a run's model, settings and files. The worker starts it before a job is queued.

Events go to stdout: CHECKING now and then, and at the end CHECKED or FAILED.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from heft_engine.commands.arguments import add_child_argument
from heft_engine.commands.child_process import (
    dump_stacks_on_signal,
    error_data,
    print_event,
    report_failures,
)
from heft_engine.commands.json_file import read_json_file
from heft_engine.config.run_file import CheckFile
from heft_engine.config.train import TrainConfig
from heft_engine.events import CheckedData, CheckingData, Event
from heft_engine.model.base_models import load_tokenizer
from heft_engine.preflight.check_rows import Limits
from heft_engine.preflight.prepare import Directories, Prepared, prepare


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run-file", type=Path, required=True, help="see heft_engine.config.run_file.CheckFile"
    )
    add_child_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Errors of single rows are part of CHECKED; everything else ends in FAILED."""
    dump_stacks_on_signal()
    with report_failures():
        check = read_json_file(args.run_file, CheckFile)
        prepared = _prepare_going_on(check) if check.start is not None else _prepare(check, check.config)
    print_event(_checked(prepared))


def _prepare(check: CheckFile, config: TrainConfig, **start: Any) -> Prepared:
    """Runs the checks. `start`: what `prepare` takes of a model that the run goes on from."""
    return prepare(
        config,
        check.files,
        Directories(out=check.out, model_dir=check.model_dir, cache_dir=check.cache_dir),
        limits=Limits(max_rows=check.max_rows, max_line_bytes=check.max_line_bytes),
        on_progress=_print_progress,
        **start,
    )


def _prepare_going_on(check: CheckFile) -> Prepared:
    """Runs the checks of a run that goes on from a fine-tuned model, by its base and what is inherited from it."""
    from heft_engine.bundle.assemble import resolve_base  # what trains takes seconds to import
    from heft_engine.bundle.start import read_start

    start = read_start(check.config.model, check.start, allow_paths=False)
    assert start is not None
    base = resolve_base(start.bundle, model_dir=check.model_dir, cache_dir=check.cache_dir, allow_paths=False)
    start.check_tokenizer(load_tokenizer(base.path))
    return _prepare(check, start.inherit(check.config), base=base, start_task=start.task)


def _print_progress(rows: int) -> None:
    print_event(Event(code="CHECKING", message=f"{rows:,} rows read", data=CheckingData(rows=rows)))


def _checked(prepared: Prepared) -> Event:
    error = prepared.report.error()
    data = CheckedData(
        report=prepared.to_json(),
        made={field: str(path) for field, path in prepared.written.items()},
        error=error_data(error) if error is not None else None,
    )
    return Event(code="CHECKED", message=error.message if error else "the files can be used", data=data)
