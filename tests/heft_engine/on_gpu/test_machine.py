"""The engine's choices on a pretended machine with GPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pretended_gpu.build import requires_pretended_gpu
from pretended_gpu.child import run
from pretended_gpu.gpu import Gpu
from pretended_gpu.machine import Machine

from heft_engine.config.train import Dtype
from heft_engine.runtime.devices import choose_device, choose_dtype, reserved_bytes
from heft_engine.runtime.random_state import RandomState

pytestmark = requires_pretended_gpu


def chooses(gpu: Gpu, dtype: Dtype) -> dict[str, Any]:
    device = choose_device()
    return {
        "device": device,
        "dtype": str(choose_dtype(dtype, device)),
        "reserved": reserved_bytes(torch.device(device)),
    }


def keeps_random_states(gpu: Gpu) -> dict[str, Any]:
    restored: list[int] = []
    torch.cuda.set_rng_state = lambda state, device="cuda": restored.append(device)
    tensors = RandomState.current().to_tensors()
    RandomState.from_tensors(tensors).restore()
    return {"names": sorted(tensors), "restored": restored}


@pytest.mark.parametrize(
    ("capability", "requested", "dtype"),
    [((9, 0), "auto", "bfloat16"), ((7, 5), "auto", "float16"), ((7, 5), "bfloat16", "bfloat16")],
)
def test_bfloat16_is_chosen_where_the_hardware_multiplies_it(
    capability: tuple[int, int], requested: Dtype, dtype: str
) -> None:
    report = run(chooses, Machine(gpus=2, memory=24 << 30, capability=capability), dtype=requested)
    assert report.values == {"device": "cuda", "dtype": f"torch.{dtype}", "reserved": 2 << 30}


def test_a_checkpoint_has_the_random_state_of_every_gpu() -> None:
    report = run(keeps_random_states, Machine(gpus=2))
    assert report.values == {"names": ["rng", "rng/cuda/0", "rng/cuda/1"], "restored": [0, 1]}
