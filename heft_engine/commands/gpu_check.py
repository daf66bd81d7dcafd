"""`gpu-check`: checks and measures the engine on a GPU, part by part, in five minutes at most.

Models have random weights that are made on the GPU: nothing is downloaded. One JSON line a part, then a report.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch

from heft_engine.errors import ConfigError, TrainingError
from heft_engine.gpu_check.part import Target
from heft_engine.gpu_check.parts import PARTS
from heft_engine.gpu_check.report import gpu_name, markdown
from heft_engine.gpu_check.runner import run_parts
from heft_engine.runtime.devices import choose_device

_NAMES = [part.name for part in PARTS]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", nargs="+", choices=_NAMES, default=_NAMES, help="default: all")
    parser.add_argument("--out", type=Path, help="a folder for the report, which gets the GPU's name")
    parser.add_argument("--part", choices=_NAMES, help="run one part in this process and print its result")
    parser.add_argument("--device", help="default: the GPU")
    parser.add_argument(
        "--small", action="store_true", help="tiny sizes: to try the check itself, on a CPU too"
    )


def run(args: argparse.Namespace) -> None:
    """Runs the parts on the first GPU, if there is one. Raises TrainingError when one of them has not passed."""
    device = args.device or choose_device()
    if device == "auto":
        raise ConfigError("gpu-check checks one GPU: name it (cuda, cuda:1)", param="device")
    if args.part is not None:
        part = next(part for part in PARTS if part.name == args.part)
        print(json.dumps(part.result(Target(device=torch.device(device), small=args.small))), flush=True)
        return
    if device == "cpu" and not args.small:
        reason = "the CPU was chosen" if torch.cuda.is_available() else "torch finds no GPU on this machine"
        print(f"{reason}: there is nothing to check")
        return
    parts = [part for part in PARTS if part.name in args.parts]
    arguments = ["--device", device, *(["--small"] if args.small else [])]
    results = []
    for result in run_parts(parts, arguments):
        print(json.dumps(result), flush=True)
        results.append(result)
    report = markdown(results, PARTS, "python -m heft_engine gpu-check" + (" --small" if args.small else ""))
    print(report)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^a-z0-9]+", "-", (gpu_name(results) or device).lower()).strip("-")
        (args.out / f"{name}.md").write_text(report)
    failed = [result["part"] for result in results if result["status"] != "passed"]
    if failed:
        raise TrainingError(f"these parts have not passed: {', '.join(failed)}", code="gpu_check_failed")
