"""`import-pyreft`: a directory that pyreft saved becomes a bundle."""

from __future__ import annotations

import argparse
import json

from heft_engine.commands.train import configure
from heft_engine.config.run_file import RunOptions
from heft_engine.config.train import recipe
from heft_engine.data.rows import read_rows
from heft_engine.errors import ConfigError
from heft_engine.training.pyreft_import import import_pyreft


def run(options: argparse.Namespace) -> None:
    """Prints {"layers", "out"} as one JSON line."""
    config = configure(options.model, "reft", options.set, seed=0)
    if config.stages != recipe("reft"):
        raise ConfigError("the directory says what the intervention is: set task, max_length or dtype alone")
    given = options.positions
    bundle = import_pyreft(
        options.directory,
        config,
        read_rows(options.rows, labels=config.task.labels),
        options.out,
        positions=given[0] if given and len(given) == 1 else given,
        options=RunOptions(model_dir=options.model_dir, cache_dir=options.cache_dir, device=options.device),
    )
    print(
        json.dumps(
            {"layers": [intervention.layer for intervention in bundle.interventions], "out": str(options.out)}
        )
    )
