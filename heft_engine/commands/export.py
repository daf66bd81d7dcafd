"""`export`: writes a bundle as merged weights, as a peft adapter or as pyreft's directory."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from heft_engine.bundle.export import export
from heft_engine.commands.arguments import add_child_argument, add_machine_arguments
from heft_engine.commands.child_process import errors_on_stdout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--format", choices=["merged", "peft", "pyreft"], required=True)
    parser.add_argument("--out", type=Path, required=True)
    add_machine_arguments(parser)
    add_child_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Prints {"format", "out"} or {"error"} as one JSON line."""
    with errors_on_stdout():
        export(args.bundle, args.format, args.out, model_dir=args.model_dir, cache_dir=args.cache_dir)
    print(json.dumps({"format": args.format, "out": str(args.out)}))
