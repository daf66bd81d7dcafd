"""`models`: the base models that work on this machine without a network, and a description of it, as JSON lines."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from heft_engine.commands.arguments import add_child_argument, add_machine_arguments
from heft_engine.errors import ModelError
from heft_engine.model.base_models import available, describe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_machine_arguments(parser)
    add_child_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Prints {"id", "source", "revision", "info"} of each model, then {"machine"} (heft_engine.runtime.devices).

    A model that can't be used is named on stderr and left out.
    """
    for name in available(args.model_dir):
        try:
            source, revision, info = describe(name, model_dir=args.model_dir)
        except ModelError as error:
            print(f"{name} is left out: {error.message}", file=sys.stderr)
            continue
        line = {"id": name, "source": source, "revision": revision, "info": asdict(info)}
        print(json.dumps(line), flush=True)
    from heft_engine.runtime.devices import (
        machine,
    )  # torch takes seconds to import, and the models are known before

    print(json.dumps({"machine": machine()}), flush=True)
