"""`check`: checks a run's model, settings and files. The worker starts it before a job is queued.

Events go to stdout: CHECKING now and then, and at the end CHECKED or FAILED.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heft_engine.commands.arguments import add_child_argument
from heft_engine.commands.child_process import (
    dump_stacks_on_signal,
    error_data,
    print_event,
    report_failures,
)
from heft_engine.commands.json_file import read_json_file
from heft_engine.config.run_file import CheckFile, MachineSettings
from heft_engine.config.train import TrainConfig
from heft_engine.events import CheckedData, CheckingData, Event
from heft_engine.model.base_models import load_tokenizer
from heft_engine.model.model_files import read_config
from heft_engine.preflight.check_rows import Limits
from heft_engine.preflight.prepare import Directories, Prepared, prepare

if TYPE_CHECKING:
    from heft_engine.bundle.start import StartModel


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
        start = _read_start(check)
        config = check.config if start is None else start.inherit(check.config)
        prepared = _prepare(check, config, start)
        plan = None
        if check.machine is not None and prepared.report.error() is None:
            plan = _plan(prepared, config, start, check.machine)
    print_event(_checked(prepared, plan))


def _read_start(check: CheckFile) -> StartModel | None:
    """Reads the fine-tuned model that the run goes on from, if it goes on from one."""
    if check.start is None:
        return None
    from heft_engine.bundle.start import read_start  # what trains takes seconds to import

    return read_start(check.config.model, check.start, allow_paths=False)


def _prepare(check: CheckFile, config: TrainConfig, start: StartModel | None) -> Prepared:
    """Runs the checks; of a run that goes on from a fine-tuned model by its base and what is inherited from it."""
    inherited: dict[str, Any] = {}
    if start is not None:
        from heft_engine.bundle.assemble import resolve_base

        base = resolve_base(
            start.bundle, model_dir=check.model_dir, cache_dir=check.cache_dir, allow_paths=False
        )
        start.check_tokenizer(load_tokenizer(base.path))
        inherited = {"base": base, "start_task": start.task}
    return prepare(
        config,
        check.files,
        Directories(out=check.out, model_dir=check.model_dir, cache_dir=check.cache_dir),
        limits=Limits(max_rows=check.max_rows, max_line_bytes=check.max_line_bytes),
        on_progress=_print_progress,
        **inherited,
    )


def _plan(
    prepared: Prepared, config: TrainConfig, start: StartModel | None, machine: MachineSettings
) -> list[dict[str, Any]]:
    """Returns the plan of each stage for the machine, from the lengths of the checked rows."""
    from heft_engine.training.dry_run import Machine, Rows, plan_run

    training = prepared.report.files["training_file"]
    rows = Rows(
        count=training.examples, tokens=max(2, training.tokens // training.examples), longest=training.longest
    )
    stages = plan_run(
        config,
        read_config(prepared.base.path),
        rows,
        Machine(**machine.model_dump()),
        start=None if start is None else start.bundle,
    )
    return [stage.to_json() for stage in stages]


def _print_progress(rows: int) -> None:
    print_event(Event(code="CHECKING", message=f"{rows:,} rows read", data=CheckingData(rows=rows)))


def _checked(prepared: Prepared, plan: list[dict[str, Any]] | None) -> Event:
    error = prepared.report.error()
    data = CheckedData(
        report=prepared.to_json(),
        made={field: str(path) for field, path in prepared.written.items()},
        error=error_data(error) if error is not None else None,
        plan=plan,
    )
    return Event(code="CHECKED", message=error.message if error else "the files can be used", data=data)
