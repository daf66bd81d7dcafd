"""The pretended GPU: it counts what is known of a few operations, and answers as the machine that it is told to be."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended_gpu.build import requires_pretended_gpu
from pretended_gpu.child import run, run_all
from pretended_gpu.gpu import Gpu
from pretended_gpu.machine import Machine

from heft_engine.model.base_models import load_model, resolve_path

pytestmark = requires_pretended_gpu
MB = 1 << 20


def some_operations(gpu: Gpu) -> dict[str, Any]:
    x = torch.ones(1024, 1024, device="cuda")
    y = torch.empty(1024, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gpu.watch.clear()
    y.mul(2).sum().backward()
    float(x.sum())
    x[0].tolist()
    torch.tensor([1, 2], device="cuda")
    torch.tensor([1, 2]).to("cuda", non_blocking=True)
    return {"live": torch.cuda.memory_allocated("cuda:0"), "free": torch.cuda.mem_get_info(0)[0]}


def over_two_gpus(gpu: Gpu) -> None:
    x = torch.ones(8, device="cuda:1")
    x[torch.tensor([1], device="cuda:0")]


def adds_over_two_gpus(gpu: Gpu) -> None:
    torch.ones(8, device="cuda:1") + torch.ones(8, device="cuda:0")


def until_it_is_full(gpu: Gpu) -> dict[str, Any]:
    tensors = []
    try:
        while True:
            tensors.append(torch.empty(MB, dtype=torch.uint8, device="cuda:1"))
    except torch.OutOfMemoryError:
        before = len(tensors)
    del tensors[4:]
    tensors.append(torch.empty(MB, dtype=torch.uint8, device="cuda:1"))
    gpu.memory.limits["cuda:1"] = 5 * MB
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1, device="cuda:1")
    return {"before": before, "names": sorted(gpu.memory.now)}


def facts(gpu: Gpu) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(1)
    return {
        "count": torch.cuda.device_count(),
        "capability": torch.cuda.get_device_capability(),
        "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
        "emulated": torch.cuda.is_bf16_supported(),
        "total": properties.total_memory,
        "uuid": str(properties.uuid),
    }


def loads(gpu: Gpu, path: str, room: int | None = None) -> dict[str, Any]:
    if room is not None:
        gpu.memory.limits["cuda:0"] = room
    model = load_model(resolve_path(Path(path)), dtype=torch.bfloat16, device="cuda")
    places = {str(parameter.device) for parameter in model.parameters()}
    kinds = {str(parameter.dtype) for parameter in model.parameters()}
    return {"places": list(places), "kinds": list(kinds), "bytes": gpu.memory.now["cuda:0"]}


def test_launches_synchronisations_and_bytes_of_a_few_operations() -> None:
    report = run(some_operations, Machine(memory=100 * MB))
    assert report.values == {"live": 8 * MB, "free": 92 * MB}  # x, y and its gradient
    assert report.peak_bytes["cuda:0"] >= 8 * MB
    # mul, sum, the gradient of the sum is a view, ones_like, mul; sum; two copies to the GPU and one from it.
    assert report.launches["mul"] == 2
    assert report.launches["sum"] == 2
    assert report.launches["_to_copy"] == 3
    kinds = [place.split(" at ")[0] for place in report.synchronisations]
    assert sorted(kinds) == ["_local_scalar_dense", "cpu to cuda", "cuda to cpu"]
    assert report.mixed == {}


def test_devices_limits_and_facts_are_those_of_the_machine() -> None:
    machine = Machine(gpus=2, memory=8 * MB, capability=(7, 5))
    scenarios = (over_two_gpus, adds_over_two_gpus, until_it_is_full, facts)
    index, addition, full, answers = run_all([partial(scenario) for scenario in scenarios], machine)
    assert [place.split(" at ")[0] for place in index.mixed] == ["index of cuda:1 by cuda:0"]
    assert "on the same device" in addition.error
    assert full.values == {"before": 8, "names": ["cuda:1"]}
    assert full.peak_bytes == {"cuda:1": 8 * MB}
    assert answers.values == {
        "count": 2,
        "capability": [7, 5],
        "bfloat16": False,
        "emulated": True,
        "total": 8 * MB,
        "uuid": "00000000-0000-0000-0000-000000000002",
    }


def test_models_load_onto_it(tiny_llama_dir: Path) -> None:
    report, too_small = run_all(
        [partial(loads, path=str(tiny_llama_dir)), partial(loads, path=str(tiny_llama_dir), room=1_000)]
    )
    assert not report.error, report.error
    assert report.values["places"] == ["cuda:0"]
    assert report.values["kinds"] == ["torch.bfloat16"]
    assert 50_000 < report.values["bytes"] < 200_000
    assert "out of memory" in too_small.error
