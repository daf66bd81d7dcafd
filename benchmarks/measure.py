"""One measurement in a process of its own, so that its peak memory is its own: one JSON line on stdout."""

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
    "stage1-ours",
    "stage1-peer",
    "stage2-ours",
    "stage2-states",
    "stage2-plain",
    "stage2-peer",
    "job-ours",
    "job-peer",
    "losses",
    "reuse",
    "profile",
    "memory",
)
COMPILE: dict[str, bool | Auto] = {"auto": "auto", "yes": True, "no": False}
LEVELS: dict[str, CacheLevel] = {"stage2-states": CacheLevel.HIDDEN_STATES, "stage2-plain": CacheLevel.NONE}


def matrix_rate(dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Floating-point operations a second of a large square product, here and now."""
    a = torch.randn(4_096, 4_096).to(dtype)
    a @ a
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        a @ a
        count += 1
    return float(2 * 4_096**3 * count / (time.perf_counter() - began))


def base_layers(base: BaseModel) -> int:
    return int(AutoConfig.from_pretrained(base.path).num_hidden_layers)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    base = rows.base_model(options.model)
    found = rows.examples(base, options.data, options.rows, options.length)
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
        return agreement.losses(base, lora, reft, found)
    if options.kind == "memory":
        settings = {"max_length": options.length, "compile": COMPILE[options.compile]}
        found_rows = rows.read(options.data, options.rows)
        return {
            "stages": memory_prediction.job(options.model, [lora, reft], found_rows, settings, options.level)
        }
    if options.kind == "reuse":
        return agreement.reuse(options.model, lora, reft, rows.read(options.data, options.rows))
    if options.kind == "profile":
        return profile.shares(base, lora, found)
    rates = [matrix_rate(dtype)]
    kind = options.kind
    stages: list[dict[str, Any]] = []
    if kind.endswith("-peer"):
        from benchmarks import baselines as peers

        model = peers.load(base.path, dtype)
        if not kind.startswith("stage2"):
            model, result = peers.train_lora(model, base.path, lora, found)
            stages.append(result)
        if not kind.startswith("stage1"):
            stages.append(peers.train_reft(model, base.path, reft, found))
    else:
        lm = rows.packed_model(base)
        if not kind.startswith("stage2"):
            stages.append(heft.train(lm, lora, found, compiled=COMPILE[options.compile]))
        if not kind.startswith("stage1"):
            stages.append(heft.train(lm, reft, found, LEVELS.get(kind, CacheLevel.KV)))
    rates.append(matrix_rate(dtype))
    return {
        "kind": kind,
        "stages": stages,
        "tokens": sum(map(packed_length, found)),
        "rows": len(found),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "matrix_rate": sum(rates) / 2,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1_024,
    }


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks.measure", description=__doc__)
    top.add_argument("kind", choices=KINDS)
    top.add_argument("--model", default="smollm2-135m")
    top.add_argument("--data", type=Path, help="rows, JSON lines; default: the sample `passages`")
    top.add_argument("--rows", type=int, default=64)
    top.add_argument("--epochs", type=int, default=1)
    top.add_argument("--batch-size", type=int, default=8)
    top.add_argument("--rank", type=int, default=4, help="of LoReFT; LoRA's is twice that")
    top.add_argument("--layer", type=int)
    top.add_argument("--length", type=int, help="tokens of every prompt; default: as it is")
    top.add_argument("--compile", default="auto", choices=COMPILE, help="our stage 1")
    top.add_argument(
        "--cache-level",
        dest="level",
        default="keys_values",
        choices=memory_prediction.BYTES_A_ROW,
        help="of `memory`",
    )
    return top


if __name__ == "__main__":
    print(json.dumps(measure(parser().parse_args())))
