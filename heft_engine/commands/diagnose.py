"""`diagnose`: writes a report and plots of what a bundle's stages did. See heft_engine.diagnostics.report."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from heft_engine.bundle.format import read_bundle
from heft_engine.commands.arguments import add_child_argument, add_machine_arguments
from heft_engine.commands.child_process import errors_on_stdout, print_event
from heft_engine.data.rows import read_rows
from heft_engine.data.task import Task
from heft_engine.diagnostics.report import PARTS, REPORT, Options, diagnose
from heft_engine.errors import ConfigError
from heft_engine.events import Pulse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="rows of the task with their answers")
    parser.add_argument("--out", type=Path, required=True, help="a new folder for diagnostics.json and plots")
    parser.add_argument(
        "--part", action="append", dest="parts", metavar="NAME", help="repeated; default: all of them"
    )
    parser.add_argument("--rows", type=int, default=256, help="rows for hidden states")
    parser.add_argument("--curvature-rows", type=int, default=64, help="rows for curvature and descent")
    parser.add_argument("--target", type=float, help="loss to descend to; default: the lowest both reach")
    parser.add_argument("--general", type=Path, help="a text to measure forgetting on")
    add_machine_arguments(parser)
    add_child_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Prints WORKING events while it computes; then one JSON line: {"out", "report", "plots"} or {"error"}."""
    with errors_on_stdout():
        _diagnose(args)


def _diagnose(args: argparse.Namespace) -> None:
    task = Task.from_json(read_bundle(args.bundle).info.task)
    rows = read_rows(args.data, param="data", labels=task.row_labels)
    try:
        general = args.general.read_text() if args.general is not None else None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{args.general} can't be read: {error}", param="general") from error
    unknown = [part for part in args.parts or () if part not in PARTS]
    if unknown:
        raise ConfigError(f"there is no part {unknown[0]}; there are {', '.join(PARTS)}", param="parts")
    diagnose(
        args.bundle,
        rows,
        args.out,
        Options(
            parts=tuple(part for part in PARTS if not args.parts or part in args.parts),
            rows=args.rows,
            curvature_rows=args.curvature_rows,
            target=args.target,
            general=general,
        ),
        on_forward=Pulse(print_event),
        model_dir=args.model_dir,
        cache_dir=args.cache_dir,
        device=args.device,
    )
    plots = sorted(path.name for path in args.out.glob("*.png"))
    print(json.dumps({"out": str(args.out), "report": REPORT, "plots": plots}), flush=True)
