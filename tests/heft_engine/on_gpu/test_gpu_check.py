"""The parts of `gpu-check` run through on a pretended GPU, with all that they ask of CUDA alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from pretended_gpu.build import requires_pretended_gpu
from pretended_gpu.child import run_all
from pretended_gpu.gpu import Gpu
from pretended_gpu.machine import Machine

from heft_engine.gpu_check import training
from heft_engine.gpu_check.part import Target
from heft_engine.gpu_check.parts import PARTS
from heft_engine.training.loop import TrainLoop
from heft_engine.training.memory.cache_plan import CachePlace

pytestmark = requires_pretended_gpu
MEMORY = 24 << 30
#: `agreement` and `job` compare numbers, of which there are none; `machine` measures rates alone.
NAMES = ("attention", "training", "cache", "serving", "memory")


def runs_a_part(gpu: Gpu, name: str) -> dict[str, Any]:
    part = next(part for part in PARTS if part.name == name)
    TrainLoop._check_trains = lambda loop: None  # type: ignore[method-assign]  # it compares numbers
    _pretend_more(gpu)
    training.PLACES = (CachePlace.HOST,)  # mapped files can't be pretended
    return part.result(Target(device=torch.device("cuda"), small=True))


def _pretend_more(gpu: Gpu) -> None:
    """Stands in for what these parts alone ask of CUDA."""

    def cap(fraction: float, device: torch.device) -> None:
        gpu.memory.limits["cuda:0"] = int(fraction * MEMORY)

    torch._C._cuda_set_sync_debug_mode = lambda mode: None  # type: ignore[attr-defined]
    torch.cuda.set_per_process_memory_fraction = cap


@pytest.mark.slow
def test_every_part_runs_through() -> None:
    scenarios = [partial(runs_a_part, name=name) for name in NAMES]
    for report in run_all(scenarios, Machine(memory=MEMORY)):
        assert not report.error, report.error
        assert report.values.get("error") is None, report.values["error"]
