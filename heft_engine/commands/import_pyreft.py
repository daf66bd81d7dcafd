"""`import-pyreft`: makes a bundle of a directory that pyreft saved."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from heft_engine.commands.arguments import add_machine_arguments, add_set_argument
from heft_engine.commands.train_config import config_from_settings
from heft_engine.config.run_file import RunOptions
from heft_engine.config.train import recipe
from heft_engine.data.rows import read_rows
from heft_engine.errors import ConfigError
from heft_engine.training.pyreft_import import import_pyreft


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--directory", type=Path, required=True, help="written by pyreft's save(); it is unpickled"
    )
    parser.add_argument("--model", required=True, help="the base it was trained on, as for train")
    parser.add_argument("--rows", type=Path, required=True, help="a few rows of the task with their answers")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--positions",
        action="append",
        help="l1, f1+l1, …; repeated, one for each intervention. Default: as written by an export of this engine",
    )
    add_set_argument(parser, "task.template=…, max_length=512, dtype=…")
    add_machine_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Prints {"layers", "out"} as one JSON line."""
    config = config_from_settings(args.model, "reft", args.set, seed=0)
    if config.stages != recipe("reft"):
        raise ConfigError(
            "the directory defines the intervention: only task, max_length and dtype may be set"
        )
    if config.base_quantization is not None:
        raise ConfigError("pyreft trained on the whole base, not on one in 4 bits", param="base_quantization")
    positions = args.positions
    bundle = import_pyreft(
        args.directory,
        config,
        read_rows(args.rows, param="rows", labels=config.task.labels),
        args.out,
        positions=positions[0] if positions and len(positions) == 1 else positions,
        options=RunOptions(model_dir=args.model_dir, cache_dir=args.cache_dir, device=args.device),
    )
    print(json.dumps({"layers": [placed.layer for placed in bundle.interventions], "out": str(args.out)}))
