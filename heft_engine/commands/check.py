"""`check`: a run's model, settings and files, judged before anything is trained. For the worker: a run file in,
events out, CHECKING now and then and at the end CHECKED or FAILED.
"""

from __future__ import annotations

import argparse

from heft_engine.commands.child_process import die_with_parent, dump_stacks_on_signal
from heft_engine.commands.telling import print_event, telling_faults
from heft_engine.config.run_file import CheckFile
from heft_engine.events import Event
from heft_engine.preflight.check_rows import Limits
from heft_engine.preflight.prepare import Directories, Prepared, prepare


def run(options: argparse.Namespace) -> None:
    """Faults of single rows are in CHECKED; what is no matter of rows ends in FAILED."""
    if options.die_with_parent:
        die_with_parent()
    dump_stacks_on_signal()
    order = CheckFile.model_validate_json(options.run_file.read_text())
    with telling_faults():
        prepared = prepare(
            order.config,
            order.files,
            Directories(out=order.out, model_dir=order.model_dir, cache_dir=order.cache_dir),
            limits=Limits(max_rows=order.max_rows, max_line_bytes=order.max_line_bytes),
            on_progress=_progress,
        )
    print_event(_outcome(prepared))


def _progress(rows: int) -> None:
    print_event(Event(code="CHECKING", message=f"{rows:,} rows read", data={"rows": rows}))


def _outcome(prepared: Prepared) -> Event:
    fault = prepared.report.error()
    data = {
        "report": prepared.to_json(),
        "made": {field: str(path) for field, path in prepared.written.items()},
        "error": fault and {"code": fault.code, "message": fault.message, "param": fault.param},
    }
    return Event(code="CHECKED", message=fault.message if fault else "the files can be used", data=data)
