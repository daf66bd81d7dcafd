"""A stage's plan: its caches take of the memory that they lie in, and of no other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from small_runs import load_inputs, reft, yes_no_rows

from heft_engine.config.flops import CacheLevel
from heft_engine.training import plan
from heft_engine.training.memory.cache_plan import CachePlace, CachePlan
from heft_engine.training.memory.memory_plan import Footprint
from heft_engine.training.stage_inputs import StageInputs, attach_stage

#: More than any card has.
HUGE = 10**12


@pytest.fixture
def stage(tiny_llama_dir: Path) -> StageInputs:
    return attach_stage(load_inputs(tiny_llama_dir, [reft()], yes_no_rows()), 0)


@pytest.mark.parametrize("place", CachePlace)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_cache_takes_of_a_gpu_nothing_and_of_a_cpu_what_is_no_file(
    stage: StageInputs, device: str, place: CachePlace
) -> None:
    placed = replace(
        stage,
        lm=cast(
            Any, SimpleNamespace(device=torch.device(device), layers=stage.lm.layers, dtype=stage.lm.dtype)
        ),
    )
    cache = CachePlan(level=CacheLevel.KV, place=place, bytes=HUGE)
    without = plan._fixed_bytes(placed, CachePlan(level=CacheLevel.NONE))
    assert without > 0
    expected = HUGE if (device, place) == ("cpu", CachePlace.HOST) else 0
    assert plan._fixed_bytes(placed, cache) - without == expected
    expected = HUGE if (device, place) == ("cuda", CachePlace.HOST) else 0
    assert plan._host_bytes(placed.lm.device, cache) == expected


def test_a_gpu_gathers_cached_keys_and_values_once_more(stage: StageInputs) -> None:
    """varlen attention keeps each layer's gathered keys and values for the gradient, beside the padded ones."""
    footprint = Footprint(fixed=0, per_token=0, per_square=0)

    def pass_bytes(device: str) -> float:
        lm = stage.lm
        kv = {"kv_shape": lm.kv_shape, "n_layers": lm.n_layers, "dtype": lm.dtype}
        placed = replace(stage, lm=cast(Any, SimpleNamespace(device=torch.device(device), **kv)))
        passes = plan._Passes(inputs=placed, boundary=stage.adapter.boundary(), level=CacheLevel.KV)
        return passes._pass_bytes(footprint, range(3))

    assert pass_bytes("cpu") > 0
    assert pass_bytes("cuda") == 2 * pass_bytes("cpu")
