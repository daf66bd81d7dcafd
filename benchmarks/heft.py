"""HEFT's side of a comparison: a stage as a run trains it, without evaluation and files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from benchmarks.single_stage import single_stage
from heft_engine.adapters.lora import peft_layers as lora
from heft_engine.adapters.lora.adapter import LoraAdapter
from heft_engine.config.flops import CacheLevel
from heft_engine.config.train import LoraStage, ReftStage
from heft_engine.data.encoding import Example
from heft_engine.events import Event
from heft_engine.model.packed_lm import PackedLM
from heft_engine.training.memory.memory_plan import peak


def train(
    lm: PackedLM,
    stage: LoraStage | ReftStage,
    rows: Sequence[Example],
    level: CacheLevel = CacheLevel.KV,
    compiled: bool | Literal["auto"] = "auto",
) -> dict[str, Any]:
    """Trains a stage.

    Returns seconds (of planning and compiling, of the prefill, of each epoch), the loss of each step, and bytes (of the
    cache; of the process, estimated and at its peak).
    """
    losses: list[float] = []
    ends: list[float] = []
    started_at = time.perf_counter()
    listen = _listener(losses, ends)
    with (
        peak(lm.device) as peak_bytes,
        single_stage(lm, stage, rows, listen, level=level, compile=compiled) as single,
    ):
        preparing = time.perf_counter() - started_at
        forward = single.forward()
        prefill = time.perf_counter() - started_at - preparing
        single.train(forward)
        held_bytes = peak_bytes()
    plan, adapter = single.plan, single.inputs.adapter
    starts = [started_at + preparing + prefill, *ends[:-1]]
    epochs = [end - start for start, end in zip(starts, ends, strict=True)]
    if isinstance(stage, LoraStage) and isinstance(adapter, LoraAdapter):
        assert stage.target_modules != "auto"
        weights = lora.extract(adapter.peft_model, stage, stage.target_modules)
        lora.detach(adapter.peft_model)
        weights.merge_into(lm.model)
    return {
        "preparing": preparing,
        "prefill": prefill,
        "epochs": epochs,
        "losses": losses,
        "rung": plan.cache.level,
        "compiled": plan.compiled,
        "cache_bytes": plan.cache.bytes,
        "estimated_bytes": plan.memory_bytes,
        "held_bytes": held_bytes,
    }


def _listener(losses: list[float], ends: list[float]) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        if event.code == "METRICS":
            losses.append(event.data["loss"])
        elif event.code == "EPOCH_COMPLETE":
            ends.append(time.perf_counter())

    return listen
