"""`plan`: memory, cache and arithmetic of a run's stages on a GPU, from a model's configuration alone."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

from heft_engine.bundle.start import read_start
from heft_engine.commands.arguments import add_set_argument
from heft_engine.commands.train_config import config_from_settings
from heft_engine.errors import ConfigError
from heft_engine.model.base_models import model_description
from heft_engine.model.model_files import read_config
from heft_engine.training.dry_run import Machine, PlannedStage, Rows, plan_run

_METHODS = ["heft", "lora", "reft", "heft_reversed", "heft_interleaved"]
_UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        help="a directory with a config.json, smollm2-135m, a hub id org/name, or a bundle",
    )
    parser.add_argument("--method", default="heft", choices=_METHODS)
    add_set_argument(parser, "lora.rank=8, base_quantization=nf4 …")
    parser.add_argument("--rows", type=_positive, required=True, help="training rows")
    parser.add_argument("--row-tokens", type=_positive, required=True, help="mean tokens of a row")
    parser.add_argument(
        "--longest-row", type=_positive, help="tokens of the longest; default: four times the mean"
    )
    parser.add_argument("--gpu", type=_size, required=True, metavar="24GB", help="memory of a GPU")
    parser.add_argument("--gpus", type=_positive, default=1, help="GPUs of the machine; default: 1")
    parser.add_argument(
        "--host-memory", type=_size, required=True, metavar="64GB", help="the machine's free memory"
    )
    parser.add_argument(
        "--tflops",
        type=_rate,
        metavar="X",
        help="10^12 operations a second that one GPU keeps up, for the time",
    )
    parser.add_argument("--model-dir", type=Path, help="a folder of base models, by name")
    parser.add_argument("--cache-dir", type=Path, help="where converted and downloaded models are stored")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Prints the plan. Raises EngineError for a model or settings that can't be; a stage that does not fit is none."""
    config = config_from_settings(args.model, args.method, args.set, seed=0)
    start = read_start(config.model, None, allow_paths=True)
    base = config.model
    if start is not None:
        config, base = start.inherit(config), start.info.base_model.reference
    directory = model_description(base, model_dir=args.model_dir, cache_dir=args.cache_dir)
    longest = args.longest_row or 4 * args.row_tokens
    if longest < args.row_tokens:
        raise ConfigError("the longest row has fewer tokens than the mean", param="longest_row")
    stages = plan_run(
        config,
        read_config(directory),
        Rows(count=args.rows, tokens=max(2, args.row_tokens), longest=max(2, longest)),
        Machine(gpu_bytes=args.gpu, gpus=args.gpus, host_bytes=args.host_memory),
        start=None if start is None else start.bundle,
        flops_per_second=None if args.tflops is None else args.tflops * 1e12,
    )
    if args.json:
        fits = all(stage.fits for stage in stages)
        print(json.dumps({"fits": fits, "stages": [stage.to_json() for stage in stages]}))
    else:
        print(_table(stages))


def _table(stages: Sequence[PlannedStage]) -> str:
    return "\n".join(_line(stage) for stage in stages)


def _line(stage: PlannedStage) -> str:
    weights = f"{stage.weight_bytes / 1e9:.1f} GB of weights"
    if stage.gpu_bytes is None or stage.cache is None or stage.flops is None:
        return f"{stage.type}: does not fit ({weights}). {stage.error}"
    cache = "no cache"
    if stage.cache["bytes"]:
        cache = (
            f"cache of {stage.cache['level']} {stage.cache['bytes'] / 1e9:.1f} GB ({stage.cache['place']})"
        )
    passes = f"passes of {stage.token_budget} tokens" + (", checkpointed" if stage.checkpointing else "")
    time = "" if stage.seconds is None else f", {stage.seconds / 3600:.1f} hours"
    return (
        f"{stage.type}: {stage.gpu_bytes / 1e9:.1f} GB a GPU ({stage.placement}, {weights}), {cache}, {passes}, "
        f"{stage.flops:.1e} operations{time}"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return rate


def _size(text: str) -> int:
    """Returns bytes: "24GB" is 24·10⁹, "24GiB" 24·2³⁰."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if match is None or match[2].upper() not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write it as 24GB or 24GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
