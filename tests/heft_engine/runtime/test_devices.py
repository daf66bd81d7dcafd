"""The device that is chosen, with GPUs that are only said to be there."""

from __future__ import annotations

import pytest
import torch

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
