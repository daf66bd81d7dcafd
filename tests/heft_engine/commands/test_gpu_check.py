"""`gpu-check`: a full run with a tiny shape on the CPU, and its output without a GPU."""

from __future__ import annotations

import math
import re
from pathlib import Path

import psutil
import pytest
import torch
from transformers import LlamaForCausalLM

from heft_engine.commands.gpu_check import LLAMA_2_7B, WEIGHTS_SHARE, Shape, check, fitting, write_model
from heft_engine.commands.main import main
from heft_engine.errors import TrainingError
from heft_engine.model.model_files import inspect

TINY = Shape(layers=4, hidden=64, intermediate=128, heads=4, vocabulary=1_000)


def test_the_job_goes_through_and_says_what_was_seen(capsys: pytest.CaptureFixture[str]) -> None:
    check(TINY, "cpu")
    said = capsys.readouterr().out
    assert "CPU" in said.splitlines()[0]
    assert "4 layers\n" in said
    assert re.search(r"merge: float32 \d\.\de-\d\d \(limit 0\.001\)", said)
    for stage in ("lora", "reft"):
        assert re.search(rf"{stage}: [\d,]+ tokens/s, loss \d\.\d{{3}}", said)
        assert f"After {stage}: " in said
    assert "32 of 32 scores have the same bits alone and together; they differ by at most 0.0e+00" in said
    assert "serving: " in said
    assert said.endswith("all checks passed\n")


def test_without_a_gpu_it_says_so_and_is_content(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu-check"]) == 0
    assert capsys.readouterr().out == "torch finds no GPU on this machine: there is nothing to check\n"


def test_the_shape_is_llama_2_7bs() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LLAMA_2_7B.config())
    assert sum(p.numel() for p in model.parameters()) == LLAMA_2_7B.parameters() == 6_738_415_616


def test_a_written_model_is_what_the_hub_would_hold(tmp_path: Path) -> None:
    write_model(TINY, tmp_path / "model")
    info = inspect(tmp_path / "model")
    assert (info.model_type, info.n_layers, info.parameters) == ("llama", 4, TINY.parameters())


def test_fewer_layers_where_memory_is_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def available(n: int) -> None:
        memory = psutil.virtual_memory()._replace(available=n)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)

    three = Shape(layers=3, hidden=64, intermediate=128, heads=4, vocabulary=1_000)
    needed = math.ceil(2 * TINY.parameters() / WEIGHTS_SHARE)
    available(needed)
    assert fitting(TINY, "cpu", tmp_path) == TINY
    available(needed - 2)
    assert fitting(TINY, "cpu", tmp_path) == three
    available(1_000)
    with pytest.raises(TrainingError, match="not even two layers"):
        fitting(TINY, "cpu", tmp_path)
