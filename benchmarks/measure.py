"""Runs one measurement, in a process of its own because of its peak memory, and prints one line of JSON."""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from benchmarks import agreement, heft, memory_prediction, profile, rows
from heft_engine.config.flops import CacheLevel
from heft_engine.config.train import Auto, LoraStage, ReftStage
from heft_engine.model.auto_settings import auto_layer
from heft_engine.model.base_models import BaseModel
from heft_engine.model.packing import packed_length
from heft_engine.runtime.devices import choose_dtype

KINDS = (
    "stage1-heft",
    "stage1-baseline",
    "stage2-heft",
    "stage2-states",
    "stage2-plain",
    "stage2-baseline",
    "job-heft",
    "job-baseline",
    "losses",
    "reuse",
    "profile",
    "memory",
)
COMPILE: dict[str, bool | Auto] = {"auto": "auto", "yes": True, "no": False}
LEVELS: dict[str, CacheLevel] = {"stage2-states": CacheLevel.HIDDEN_STATES, "stage2-plain": CacheLevel.NONE}


def matrix_rate(dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Floating-point operations per second of a large square product on this machine."""
    a = torch.randn(4_096, 4_096).to(dtype)
    a @ a
    started_at, count = time.perf_counter(), 0
    while time.perf_counter() - started_at < seconds:
        a @ a
        count += 1
    return float(2 * 4_096**3 * count / (time.perf_counter() - started_at))


def base_layers(base: BaseModel) -> int:
    return int(AutoConfig.from_pretrained(base.path).num_hidden_layers)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    base = rows.base_model(options.model)
    examples = rows.examples(base, options.data, options.rows, options.length)
    dtype = choose_dtype("auto", "cpu")
    lora = LoraStage(
        n_epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=5e-4,
        rank=options.rank * 2,
        target_modules=["q_proj", "v_proj"],
    )
    reft = ReftStage(
        n_epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=2e-3,
        rank=options.rank,
        layers=[options.layer or auto_layer(base_layers(base))],
    )
    if options.kind == "losses":
        return agreement.losses(base, lora, reft, examples)
    if options.kind == "memory":
        settings = {"max_length": options.length, "compile": COMPILE[options.compile]}
        training_rows = rows.read(options.data, options.rows)
        return {
            "stages": memory_prediction.job(
                options.model, [lora, reft], training_rows, settings, options.level
            )
        }
    if options.kind == "reuse":
        return agreement.reuse(options.model, lora, reft, rows.read(options.data, options.rows))
    if options.kind == "profile":
        return profile.shares(base, lora, examples)
    rates = [matrix_rate(dtype)]
    kind = options.kind
    stages: list[dict[str, Any]] = []
    if kind.endswith("-baseline"):
        from benchmarks import baselines

        model = baselines.load(base.path, dtype)
        if not kind.startswith("stage2"):
            model, result = baselines.train_lora(model, base.path, lora, examples)
            stages.append(result)
        if not kind.startswith("stage1"):
            stages.append(baselines.train_reft(model, base.path, reft, examples))
    else:
        lm = rows.packed_model(base)
        if not kind.startswith("stage2"):
            stages.append(heft.train(lm, lora, examples, compiled=COMPILE[options.compile]))
        if not kind.startswith("stage1"):
            stages.append(heft.train(lm, reft, examples, LEVELS.get(kind, CacheLevel.KV)))
    rates.append(matrix_rate(dtype))
    return {
        "kind": kind,
        "stages": stages,
        "tokens": sum(map(packed_length, examples)),
        "rows": len(examples),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "matrix_rate": sum(rates) / 2,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1_024,
    }


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks.measure", description=__doc__)
    top.add_argument("kind", choices=KINDS)
    top.add_argument("--model", default="smollm2-135m")
    top.add_argument("--data", type=Path, help="JSONL file of rows; default: the sample `passages`")
    top.add_argument("--rows", type=int, default=64)
    top.add_argument("--epochs", type=int, default=1)
    top.add_argument("--batch-size", type=int, default=8)
    top.add_argument("--rank", type=int, default=4, help="LoReFT's rank; LoRA's is twice as large")
    top.add_argument("--layer", type=int)
    top.add_argument("--length", type=int, help="tokens of every prompt; default: unchanged")
    top.add_argument("--compile", default="auto", choices=COMPILE, help="compile the layers in stage 1")
    top.add_argument(
        "--cache-level",
        dest="level",
        default="keys_values",
        choices=memory_prediction.BYTES_PER_ROW,
        help="of `memory`",
    )
    return top


if __name__ == "__main__":
    print(json.dumps(measure(parser().parse_args())))
