"""The check of a merge on a pretended GPU: its memory at the size of Llama-2-7B."""

from __future__ import annotations

from typing import Any

import torch
from pretended_gpu.build import requires_pretended_gpu
from pretended_gpu.child import run
from pretended_gpu.gpu import Gpu
from pretended_gpu.machine import Machine
from pretended_gpu.models import llama_2_7b

from heft_engine.adapters.registry import attach
from heft_engine.config.train import LoraStage
from heft_engine.data.encoding import Example

pytestmark = requires_pretended_gpu
#: As many tokens as one pass over probe rows has at most.
PROBES = [Example(prompt=(5,) * 256, answers=((7, 9),), labels=("",), gold=0)] * 8


def merges(gpu: Gpu, layers: int, modules: list[str]) -> dict[str, Any]:
    lm = llama_2_7b(layers)
    adapter = attach(lm, LoraStage(learning_rate=1e-3, target_modules=modules))
    before = torch.cuda.memory_allocated()
    gpu.memory.reset_peak()
    adapter.finish(PROBES)
    return {"peak": gpu.memory.peak["cuda:0"] - before}


def test_the_check_of_a_merge_takes_less_than_a_gigabyte_of_the_card() -> None:
    """Every linear module is adapted. One layer is enough: what is in float32 at a time is one weight."""
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    report = run(merges, Machine(memory=24 << 30), layers=1, modules=modules)
    assert report.mixed == {}
    assert 4 * 4_096 * 11_008 < report.values["peak"] < 10**9
