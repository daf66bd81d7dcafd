"""`diagnose`: what a bundle's stages did, as a report and plots. See heft_engine.diagnostics.report."""

from __future__ import annotations

import argparse
import json

from heft_engine.bundle.format import read_bundle
from heft_engine.commands.child_process import die_with_parent
from heft_engine.commands.telling import print_event
from heft_engine.data.rows import read_rows
from heft_engine.data.task import Task
from heft_engine.diagnostics.report import PARTS, REPORT, Options, diagnose
from heft_engine.errors import ConfigError, EngineError, RowError
from heft_engine.events import Pulse


def run(options: argparse.Namespace) -> None:
    """WORKING events while it computes; then one JSON line: {"out", "report", "plots"} or {"error"}."""
    if options.die_with_parent:
        die_with_parent()
    try:
        _diagnose(options)
    except EngineError as error:
        fault = {"code": error.code, "message": error.message, "param": error.param}
        print(json.dumps({"error": fault}), flush=True)
        raise


def _diagnose(options: argparse.Namespace) -> None:
    task = Task.from_json(read_bundle(options.bundle).info.task)
    try:
        rows = read_rows(options.data, labels=task.row_labels)
        general = options.general.read_text() if options.general is not None else None
    except (OSError, UnicodeDecodeError) as error:
        raise RowError(f"a file can't be read: {error}", param="data") from error
    unknown = [part for part in options.parts or () if part not in PARTS]
    if unknown:
        raise ConfigError(f"there is no part {unknown[0]}; there are {', '.join(PARTS)}", param="parts")
    wanted = Options(
        parts=tuple(part for part in PARTS if not options.parts or part in options.parts),
        rows=options.rows,
        curvature_rows=options.curvature_rows,
        target=options.target,
        general=general,
    )
    places = {"model_dir": options.model_dir, "cache_dir": options.cache_dir, "device": options.device}
    diagnose(options.bundle, rows, options.out, wanted, on_forward=Pulse(print_event), **places)
    plots = sorted(path.name for path in options.out.glob("*.png"))
    print(json.dumps({"out": str(options.out), "report": REPORT, "plots": plots}), flush=True)
