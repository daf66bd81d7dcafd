"""`python -m heft_engine`.

Exit codes: 0 done, 1 refused or failed, 2 unusable arguments, 75 stopped (STOPPED), 76 a process of the run was lost
(RANK_LOST).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module

from heft_engine.commands.child_process import RANK_LOST, STOPPED, die_with_parent, error_data
from heft_engine.errors import EngineError, RankLost, Stopped

#: Each in a module of its name, with `add_arguments(parser)` and `run(args)`. Only the module of the command that runs
#: is imported: most import torch, which takes seconds.
COMMANDS = {
    "train": "train and write a bundle; one JSON event a line on stdout",
    "evaluate": "accuracy of a bundle on rows with answers",
    "predict": "answers for rows on stdin or in a file, one JSON line each",
    "export": "write a bundle as merged weights, as a peft adapter or as pyreft's directory",
    "diagnose": "measure what a bundle's stages did to weights, hidden states and curvature",
    "import-pyreft": "make a bundle of an intervention that pyreft trained and saved",
    "gpu-check": "run a HEFT job on a random model of Llama-2-7B's shape, on a GPU",
    "plan": "memory, cache and arithmetic of a run on a GPU, from a model's configuration alone",
    "devices": "the GPUs that torch can use, or why it can't; one JSON line",
    "models": "list the base models on this machine, one JSON line each",
    "check": "check a run's model, settings and files before it is trained",
    "compare": "test the differences between arms of several runs",
    "suggest": "suggest the next points of a search",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; an EngineError is printed as one JSON line on stderr."""
    arguments = sys.argv[1:] if arguments is None else arguments
    prog = "python -m heft_engine"
    parser = argparse.ArgumentParser(prog=prog, description="Fine-tune with HEFT, without the service")
    subparsers = parser.add_subparsers(required=True, metavar="command", dest="command")
    for name, help_text in COMMANDS.items():
        subparsers.add_parser(name, help=help_text, add_help=False)
    command: str = parser.parse_args(arguments[:1]).command
    module = import_module(f"heft_engine.commands.{command.replace('-', '_')}")
    parser = argparse.ArgumentParser(prog=f"{prog} {command}", description=COMMANDS[command])
    module.add_arguments(parser)
    args = parser.parse_args(arguments[1:])
    if getattr(args, "die_with_parent", False):
        die_with_parent()
    try:
        module.run(args)
    except Stopped:
        return STOPPED
    except EngineError as error:
        print(json.dumps({"error": error_data(error)}), file=sys.stderr)
        return RANK_LOST if isinstance(error, RankLost) else 1
    return 0
