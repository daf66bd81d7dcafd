"""The time of a step of stage 1 by operation, from torch's profiler, with layers compiled and not."""

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
    """Returns the percentages of a step's time by operation, with layers compiled and not."""
    lm = benchmark_rows.packed_model(base)
    trainable = LoraAdapter.attach(lm, stage)
    trainable.train(False)
    step = range(stage.batch_size)
    forward = FullPass(lm=lm, examples=rows)

    def run() -> None:
        summed_loss(forward, SupervisedObjective(), step).backward()  # type: ignore[no-untyped-call]

    result: dict[str, Any] = {"tokens": sum(packed_length(rows[index]) for index in step)}
    result["not compiled"] = _profile(run)
    with compiled_layers(lm, 0, run, None) as failure:
        if failure is None:
            result["compiled"] = _profile(run)
    return result


def _profile(run: Any) -> dict[str, float]:
    run()
    run()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    attention = sum(event.cpu_time_total for event in events if event.key in _ATTENTION)
    products = sum(event.self_cpu_time_total for event in events if event.key in _PRODUCTS)
    kernels = sum(event.self_cpu_time_total for event in events if "CompiledFxGraph" in event.key)
    parts = {
        "matrix products of the layers and the head": products,
        "attention": attention,
        "compiled kernels": kernels,
        "the rest (norms, rotary, activations, residuals, copies, calls)": total
        - products
        - attention
        - kernels,
    }
    return {"milliseconds": total / 1e3} | {name: 100 * time / total for name, time in parts.items()}
