"""A trainer requests its GPU; the inference worker there evicts its models."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from worker_bench import Bench, eventually

from store.db.session import transaction
from store.db.states import JobState
from store.ops import workers
from worker.celery_app import Role
from worker.chores import gpu_handoff
from worker.chores.chore import run_chores
from worker.chores.gpu_handoff import CLAIMED, GpuRequest, gpu_requested, handoff_chores, visible_devices
from worker.chores.presence import registered
from worker.context import Context


class Pool:
    """A model pool that counts its evictions."""

    def __init__(self) -> None:
        self.bytes, self.evictions = 100, 0
        self.left_free: list[int] = []

    def evict_idle(self) -> None:
        self.bytes, self.evictions = 0, self.evictions + 1


def on_devices(bench: Bench, worker_id: str, *devices: str) -> Context:
    return replace(bench.context, worker_id=worker_id, devices=frozenset(devices))


def serve(stack: ExitStack, context: Context, pool: Pool) -> None:
    stack.enter_context(registered(context, Role.INFERENCE))
    stack.enter_context(run_chores(handoff_chores(context, pool.evict_idle, pool.left_free.append)))


def test_models_on_the_same_gpu_are_evicted_before_training(bench: Bench) -> None:
    here, elsewhere = Pool(), Pool()
    trainer = on_devices(bench, "train-1", "GPU-0", "GPU-7")
    with ExitStack() as stack:
        serve(stack, on_devices(bench, "inference-1", "GPU-0"), here)
        serve(stack, on_devices(bench, "inference-2", "GPU-1"), elsewhere)
        stack.enter_context(registered(trainer, Role.TRAIN))
        with gpu_requested(trainer, "job/1"):
            assert (here.bytes, elsewhere.bytes) == (0, 100)
            here.bytes = 50  # loaded again in the meantime
        with gpu_requested(trainer, "job/2"):
            assert here.bytes == 0
        assert (here.evictions, elsewhere.evictions) == (2, 0), "once for each request"


def test_what_trainers_claim_is_left_free_until_they_end(bench: Bench) -> None:
    pool, elsewhere = Pool(), Pool()
    first, second = (on_devices(bench, f"train-{number}", "GPU-0") for number in (1, 2))
    with ExitStack() as stack:
        serve(stack, on_devices(bench, "inference-1", "GPU-0"), pool)
        serve(stack, on_devices(bench, "inference-2", "GPU-1"), elsewhere)
        for trainer in (first, second):
            stack.enter_context(registered(trainer, Role.TRAIN))
        with gpu_requested(first, "job/1") as request:
            request.claim(10)
            eventually(lambda: pool.left_free == [10])
            request.claim(7)  # its next stage
            eventually(lambda: pool.left_free == [10, 7])
            with gpu_requested(second, "job/2") as other:
                other.claim(3)
                eventually(lambda: pool.left_free == [10, 7, 10])
            eventually(lambda: pool.left_free == [10, 7, 10, 7])
        eventually(lambda: pool.left_free == [10, 7, 10, 7, 0])
    assert elsewhere.left_free == []


def test_a_job_claims_what_each_of_its_stages_is_planned_to_take(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    claimed: list[int] = []
    monkeypatch.setattr(GpuRequest, "claim", lambda request, claimed_bytes: claimed.append(claimed_bytes))
    job_id = bench.queued([{"do": "stage", "memory_bytes": n} for n in (9, 4)])
    assert bench.run(job_id).state == JobState.SUCCEEDED
    assert claimed == [1, 9, 4], "the fake engine starts with a stage of its own"


def worker_info(context: Context) -> dict[str, Any]:
    with transaction(context.sessions) as session:
        return {key: value for row in workers.list_workers(session) for key, value in row.info.items()}


LISTING = """
GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-aaaa-1)
GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-bbbb-2)
  MIG 3g.40gb     Device  0: (UUID: MIG-cccc-3)
  MIG 3g.40gb     Device  1: (UUID: MIG-dddd-4)
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with NVIDIA's driver, whose nvidia-smi lists two GPUs. Returns the folder of nvidia-smi."""
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(gpu_handoff, "_DRIVER", tmp_path / "nvidiactl")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    script = tmp_path / "nvidia-smi"
    script.write_text(f"#!/bin/sh\ncat <<'END'{LISTING}END\n")
    script.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        (None, {"GPU-aaaa-1", "MIG-cccc-3", "MIG-dddd-4"}),
        ("0", {"GPU-aaaa-1"}),
        ("1", {"MIG-cccc-3", "MIG-dddd-4"}),
        ("0, 1", {"GPU-aaaa-1", "MIG-cccc-3", "MIG-dddd-4"}),
        ("GPU-aa", {"GPU-aaaa-1"}),
        ("GPU-bbbb-2", {"MIG-cccc-3", "MIG-dddd-4"}),
        ("MIG-dddd-4", {"MIG-dddd-4"}),
        ("", set()),
    ],
)
@pytest.mark.usefixtures("driver")
def test_gpus_are_known_by_their_uuid_however_they_are_named(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, uuids: set[str]
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_devices() == uuids


def test_numbers_of_unlike_gpus_are_known_in_the_order_of_their_buses_alone(
    driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA counts the fastest first unless it is told to count as nvidia-smi does."""
    listing = "GPU 0: NVIDIA T4 (UUID: GPU-aaaa)\nGPU 1: NVIDIA L4 (UUID: GPU-bbbb)\n"
    (driver / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{listing}END\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert visible_devices() == {"GPU-aaaa", "GPU-bbbb"}
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert visible_devices() == {"GPU-aaaa"}


def test_without_nvidia_smi_all_gpus_of_a_host_have_one_name(
    driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (driver / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    (name,) = visible_devices()
    assert name.endswith("/all")


def test_without_a_gpu_nothing_is_requested(bench: Bench) -> None:
    assert handoff_chores(bench.context, lambda: None, lambda _: None) == []
    with gpu_requested(bench.context, "job/1") as request:
        request.claim(5)
    assert CLAIMED not in worker_info(bench.context)
    job_id = bench.queued([{"do": "metrics", "step": 1}])
    assert bench.run(job_id).state == JobState.SUCCEEDED
