"""The parts `training` and `cache`: speed and memory of both stages on a model of Llama-2-7B's shape."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from heft_engine.config.flops import CacheLevel
from heft_engine.errors import TrainingError
from heft_engine.gpu_check.machine import matmul_rate
from heft_engine.gpu_check.part import Findings, Target
from heft_engine.gpu_check.stages import (
    detach,
    lora_stage,
    random_lengths,
    reft_stage,
    stage_inputs,
    train,
)
from heft_engine.objectives.registry import create
from heft_engine.training.activation_cache import size_of
from heft_engine.training.memory import memory_plan
from heft_engine.training.memory.cache_plan import CacheBudget, CachePlace, CachePlan
from heft_engine.training.memory.memory_plan import peak_footprint
from heft_engine.training.plan import plan_stage
from heft_engine.training.stage_inputs import StageInputs, StageOptions

_STEPS, _BATCH = 10, 16
PLACES = tuple(CachePlace)
#: Of predicted over measured memory, beside the model's (docs/gpu.md).
_LOWEST_RATIO, _HIGHEST_RATIO = 0.9, 1.6
#: Rows of so many tokens, and whether their passes get too little memory to run without gradient checkpointing.
_MEMORY_CASES = ((1_536, False), (4_096, False), (8_192, True), (16_384, True))


def check_training(target: Target, findings: Findings) -> None:
    """Trains ten steps of stage 1, and compares planned with allocated memory in passes of several lengths."""
    lm, rate = target.lm, matmul_rate(target)
    lengths = random_lengths(_STEPS * _BATCH, target.size(148, 12))
    inputs = stage_inputs(lm, lora_stage(lm, batch_size=_BATCH), lengths)
    with plan_stage(inputs, StageOptions(cache=CacheBudget(memory=0), compile=False)) as plan:
        speed = train(inputs, plan).tokens_per_second
        findings.figures["stage_1"] = {
            "tokens_per_second": round(speed),
            "share_of_matmul_rate": round(4 * target.shape.parameters() * speed / rate, 3),
            "token_budget": plan.token_budget,
        }
    detach(inputs)
    if target.device.type == "cuda":
        findings.figures["memory"] = cases = []
        for tokens, checkpointing in _MEMORY_CASES:
            cases.append(_memory(target, tokens, checkpointing, findings))


def _memory(
    target: Target, tokens: int, checkpointing: bool, findings: Findings
) -> dict[str, float | bool | str]:
    """Compares the planned with the allocated memory of a stage whose rows have so many tokens."""
    lm = target.lm
    torch.cuda.empty_cache()
    inputs = stage_inputs(lm, lora_stage(lm, batch_size=1), [tokens - 1] * 2)
    before = torch.cuda.memory_allocated()
    options = StageOptions(
        cache=CacheBudget(memory=0),
        compile=False,
        memory_bytes=_between(inputs, tokens) if checkpointing else None,
    )
    try:
        with plan_stage(inputs, options) as plan:
            findings.check(plan.checkpointing == checkpointing, f"{tokens} tokens: {plan}")
            torch.cuda.reset_peak_memory_stats()
            train(inputs, plan)
            allocated = torch.cuda.max_memory_allocated() - before
            ratio = (plan.memory_bytes - before) / allocated
    except TrainingError as error:
        if error.code != "out_of_memory":
            raise
        return {"tokens": tokens, "does_not_fit": error.message}
    finally:
        detach(inputs)
    findings.check(
        _LOWEST_RATIO <= ratio <= _HIGHEST_RATIO,
        f"{tokens} tokens: planned over allocated memory is {ratio:.2f}",
    )
    return {
        "tokens": tokens,
        "checkpointing": checkpointing,
        "allocated_gb": round(allocated / 1e9, 2),
        "planned_over_allocated": round(ratio, 2),
    }


def _between(inputs: StageInputs, tokens: int) -> int:
    """Returns bytes in which one row's pass fits with gradient checkpointing and does not fit without."""
    lm = inputs.lm
    plain, recomputed = (
        peak_footprint(lm, lm.n_layers, checkpointing=flag).of([tokens]) for flag in (False, True)
    )
    fixed = memory_plan.gradient_bytes(list(inputs.adapter.parameters().values()))
    loss = create(inputs.stage.objective).loss_bytes(lm, 1)
    return fixed + int(memory_plan.overhead(lm.device) * ((plain * recomputed) ** 0.5 + loss))


def check_cache(target: Target, findings: Findings) -> None:
    """Trains stage 2 with its activations on every level and place."""
    lm = target.lm
    stage = reft_stage(lm, batch_size=_BATCH)
    lengths = random_lengths(6 * _BATCH, target.size(148, 12))
    for level in (CacheLevel.NONE, CacheLevel.HIDDEN_STATES, CacheLevel.KV):
        for place in PLACES:
            if level == CacheLevel.NONE and place != CachePlace.HOST:
                continue
            inputs = stage_inputs(lm, stage, lengths)
            boundary = inputs.adapter.boundary()
            size = 0 if level == CacheLevel.NONE else size_of(lm, boundary, inputs.examples, level)
            cache = CachePlan(level=level, place=place, bytes=size)
            nothing = CachePlan(level=CacheLevel.NONE)
            options = StageOptions(cache=CacheBudget(memory=0), compile=False)
            try:
                with (
                    tempfile.TemporaryDirectory(prefix="heft-gpu-check-") as folder,
                    plan_stage(inputs, options, caches=(cache, nothing)) as plan,
                ):
                    speed = train(inputs, plan, Path(folder)).tokens_per_second
            finally:
                detach(inputs)
            name = level.value if level == CacheLevel.NONE else f"{level.value} ({place.value})"
            findings.figures[name] = {"tokens_per_second": round(speed), "cache_gb": round(size / 1e9, 2)}
