"""The doctor's check of a GPU, with commands that stand in for the engine's."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from cli.doctor import gpu as gpu_module
from cli.doctor.finding import State
from cli.doctor.gpu import gpu


@pytest.fixture(autouse=True)
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "nvidiactl"
    path.touch()
    monkeypatch.setattr(gpu_module, "DRIVER", path)
    return path


def answering(**report: Any) -> list[str]:
    """Returns a command that prints this report."""
    values = {"gpus": [], "cuda": "13.0", "unusable": None, **report}
    return [sys.executable, "-c", f"print({json.dumps(values)!r})"]


def test_a_usable_gpu_is_named() -> None:
    card = {"name": "NVIDIA L4", "memory_bytes": 24 * 10**9, "compute_capability": "8.9"}
    finding = gpu(answering(gpus=[card]))
    assert finding.state is State.OK
    assert finding.found == "NVIDIA L4 (24 GB, compute capability 8.9); torch for CUDA 13.0"


def test_a_gpu_that_cant_be_used_is_wrong_and_says_why() -> None:
    finding = gpu(answering(unusable="the driver is too old"))
    assert finding.state is State.WRONG
    assert "can't be used: the driver is too old" in finding.found
    assert "HEFT_DEVICE=cpu" in finding.advice


def test_a_machine_without_the_engine_is_warned() -> None:
    finding = gpu([sys.executable, "-c", "raise SystemExit('No module named torch')"])
    assert finding.state is State.WARNING
    assert "No module named torch" in finding.found


def test_hidden_and_absent_gpus_are_no_fault(driver: Path) -> None:
    assert gpu(answering()).state is State.OK
    driver.unlink()
    assert gpu(["never run"]).found == "none on this machine"


def test_a_gpu_that_the_operator_does_without_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEFT_DEVICE", "cpu")
    finding = gpu(answering(unusable="the driver is too old"))
    assert (finding.state, finding.found) == (State.OK, "there is one, HEFT_DEVICE=cpu does without it")
