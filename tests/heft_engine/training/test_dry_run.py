"""Plans for a training worker's machine: without a GPU, and within the operator's limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_runs import config

from heft_engine.model.model_files import read_config
from heft_engine.training.dry_run import Machine, PlannedStage, Rows, plan_run

GB = 10**9
ROWS = Rows(count=200, tokens=100, longest=200)


@pytest.fixture
def planned(tiny_llama_dir: Path) -> Any:
    def planned(**machine: Any) -> list[PlannedStage]:
        settings = {"gpus": 0, "gpu_bytes": 0, "host_bytes": 8 * GB, **machine}
        return plan_run(
            config(tiny_llama_dir, "heft"), read_config(tiny_llama_dir), ROWS, Machine(**settings)
        )

    return planned


def test_without_a_gpu_all_is_in_the_machines_memory(planned: Any) -> None:
    lora, reft = planned()
    assert (lora.placement, lora.gpu_bytes, lora.fits, lora.steps) == ("CPU", None, True, 50)
    assert lora.host_bytes > lora.weight_bytes > 0
    assert reft.cache["bytes"] > 0
    (unfit, _) = planned(host_bytes=1_000)
    assert not unfit.fits
    assert "the machine has 0.0 GB for them" in unfit.error


def test_the_operators_limit_of_a_stage_is_beside_the_weights(planned: Any) -> None:
    free = planned()[0]
    needed = free.host_bytes - free.weight_bytes
    limited = planned(stage_bytes=needed)[0]
    assert limited.fits
    assert limited.host_bytes <= free.host_bytes
    assert not planned(stage_bytes=100_000)[0].fits


def test_the_operators_limit_of_caches_is_kept(planned: Any) -> None:
    assert planned(cache_memory_bytes=0)[1].cache["bytes"] == 0
