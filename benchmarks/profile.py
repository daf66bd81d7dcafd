"""Where a step of stage 1 spends its time, by torch's profiler, layers compiled and not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks import rows as benchmark_rows
from heft_engine.adapters.lora.adapter import LoraAdapter
from heft_engine.config.train import LoraStage
from heft_engine.data.encoding import Example
from heft_engine.model.base_models import BaseModel
from heft_engine.model.packing import packed_length
from heft_engine.objectives.supervised import SupervisedObjective
from heft_engine.training.compile import compiled_layers
from heft_engine.training.forward_pass import FullPass, summed_loss

_ATTENTION = ("CausalAttention", "CausalAttentionBackward")
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_")


def shares(base: BaseModel, stage: LoraStage, rows: Sequence[Example]) -> dict[str, Any]:
    """Of one step's time, in percent, by what was computed; compiled and not."""
    lm = benchmark_rows.packed_model(base)
    trainable = LoraAdapter.attach(lm, stage)
    trainable.train(False)
    step = range(stage.batch_size)
    forward = FullPass(lm=lm, examples=rows)

    def run() -> None:
        summed_loss(forward, SupervisedObjective(), step).backward()  # type: ignore[no-untyped-call]

    found: dict[str, Any] = {"tokens": sum(packed_length(rows[index]) for index in step)}
    found["as they are"] = _measured(run)
    with compiled_layers(lm, 0, run, None) as failure:
        if failure is None:
            found["compiled"] = _measured(run)
    return found


def _measured(run: Any) -> dict[str, float]:
    run()
    run()
    with profile(activities=[ProfilerActivity.CPU]) as measured:
        run()
    events = measured.key_averages()
    whole = sum(event.self_cpu_time_total for event in events)
    attention = sum(event.cpu_time_total for event in events if event.key in _ATTENTION)
    products = sum(event.self_cpu_time_total for event in events if event.key in _PRODUCTS)
    kernels = sum(event.self_cpu_time_total for event in events if "CompiledFxGraph" in event.key)
    parts = {
        "matrix products of the layers and the head": products,
        "attention": attention,
        "compiled kernels": kernels,
        "the rest (norms, rotary, activations, residuals, copies, calls)": whole
        - products
        - attention
        - kernels,
    }
    return {"milliseconds": whole / 1e3} | {name: 100 * spent / whole for name, spent in parts.items()}
