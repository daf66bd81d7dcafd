"""A trainer requests its GPU; the inference worker there evicts its models."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from worker_bench import Bench

from store.db.states import JobState
from worker.celery_app import Role
from worker.chores import gpu_handoff
from worker.chores.chore import run_chores
from worker.chores.gpu_handoff import gpu_requested, handoff_chores, visible_devices
from worker.chores.presence import registered
from worker.context import Context


class Pool:
    """A model pool that counts its evictions."""

    def __init__(self) -> None:
        self.bytes, self.evictions = 100, 0

    def evict_idle(self) -> None:
        self.bytes, self.evictions = 0, self.evictions + 1


def on_devices(bench: Bench, worker_id: str, *devices: str) -> Context:
    return replace(bench.context, worker_id=worker_id, devices=frozenset(devices))


def serve(stack: ExitStack, context: Context, pool: Pool) -> None:
    stack.enter_context(registered(context, Role.INFERENCE))
    stack.enter_context(run_chores(handoff_chores(context, pool.evict_idle)))


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
    assert handoff_chores(bench.context, lambda: None) == []
    with gpu_requested(bench.context, "job/1"):
        pass
    job_id = bench.queued([{"do": "metrics", "step": 1}])
    assert bench.run(job_id).state == JobState.SUCCEEDED
