"""The device that is chosen, with GPUs that are only said to be there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from heft_engine.commands.main import main
from heft_engine.errors import ConfigError
from heft_engine.runtime import devices
from heft_engine.runtime.devices import choose_device


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (1, "cuda"), (2, "cuda"), (8, "cuda")])
def test_of_several_gpus_one_is_used(monkeypatch: pytest.MonkeyPatch, gpus: int, device: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert choose_device() == device


def test_a_model_is_spread_over_all_gpus_on_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == "auto"
    assert choose_device("cpu") == "cpu"


@pytest.fixture
def gpu_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with NVIDIA's driver whose GPU torch does not find."""
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(devices, "_DRIVER", tmp_path / "nvidiactl")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("HEFT_DEVICE", raising=False)


@pytest.mark.usefixtures("gpu_out_of_reach")
def test_a_gpu_that_cant_be_used_is_an_error_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(ConfigError, match="is built without CUDA, install torch's build for CUDA") as raised:
        choose_device()
    assert (raised.value.code, raised.value.param) == ("gpu_unusable", "device")

    def refuse() -> None:
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 11040).\nPlease update"
        )

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", refuse)
    with pytest.raises(
        ConfigError, match=r"driver on your system is too old \(found version 11040\)\. \(torch .* CUDA 13"
    ):
        choose_device()


@pytest.mark.usefixtures("gpu_out_of_reach")
@pytest.mark.parametrize(
    ("variable", "value"),
    [("HEFT_DEVICE", "cpu"), ("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1")],
)
def test_whoever_wants_the_cpu_gets_it(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    assert choose_device() == "cpu"


@pytest.mark.usefixtures("gpu_out_of_reach")
def test_the_command_devices_says_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert main(["devices"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["gpus"] == []
    assert "built without CUDA" in report["unusable"]
