"""Thirty steps have the losses of the plain computation, on every cache level and however the passes run."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import LORA, REFT, but
from tiny_models import FAMILIES
from torch._dynamo.utils import counters

from benchmarks.single_stage import single_stage
from heft_engine.config.flops import CacheLevel
from heft_engine.config.train import LoraStage, ReftStage
from heft_engine.data.encoding import Example
from heft_engine.events import Event
from heft_engine.model.attention import IMPLEMENTATION
from heft_engine.model.base_models import load_model, resolve_path
from heft_engine.model.packed_lm import PackedLM
from heft_engine.training import compile as compiled

MakeModel = Callable[[str], Path]
KINDS: dict[str, Any] = {
    "layer 2, l1": {"layers": [2], "positions": "l1"},
    "layers 0 and 2, l1": {"layers": [0, 2], "positions": "l1"},
    "layer 1, l3": {"layers": [1], "positions": "l3"},
    "layers 1 and 3, f1+l1": {"layers": [1, 3], "positions": "f1+l1"},
}


def examples() -> list[Example]:
    """Prompts of 1 to 60 tokens, answers of 1 to 7."""
    chance = random.Random(5)
    rows = []
    for number in range(12):
        prompt, answer = chance.choice((1, 2, 9, 30, 60)) + number % 3, 1 + number % 4 * 2
        ids = [chance.randrange(5, 600) for _ in range(prompt + answer)]
        rows.append(Example(prompt=tuple(ids[:prompt]), answers=(tuple(ids[prompt:]),), labels=("",), gold=0))
    return rows


def losses(
    path: Path, stage: LoraStage | ReftStage, level: CacheLevel = CacheLevel.NONE, **changes: Any
) -> list[float]:
    """The losses of 30 steps in float32."""
    lm = PackedLM(load_model(resolve_path(path), dtype=torch.float32, attention=IMPLEMENTATION))
    step_losses: list[float] = []

    def listen(event: Event) -> None:
        if event.code == "METRICS":
            step_losses.append(event.data["loss"])

    compile, cache_dir = changes.pop("compile", False), changes.pop("cache_dir", None)
    with single_stage(
        lm, stage, examples(), listen, level=level, compile=compile, cache_dir=cache_dir
    ) as single:
        assert (single.plan.cache.level, single.plan.compiled) == (level, compile)
        lm.checkpointing = changes.pop("checkpointing", False)
        single.train(single.forward(), **changes)
    assert len(step_losses) == 30
    return step_losses


@pytest.mark.parametrize("kind", KINDS)
def test_every_cache_level_trains_alike(make_tiny_model: MakeModel, kind: str) -> None:
    stage = but(REFT, **KINDS[kind], n_epochs=10, batch_size=4, learning_rate=1e-2, rank=3)
    for family in ("llama", "gemma2"):
        path = make_tiny_model(family)
        plain = losses(path, stage)
        levels: list[CacheLevel] = (
            [CacheLevel.HIDDEN_STATES] if "f1" in kind else [CacheLevel.HIDDEN_STATES, CacheLevel.KV]
        )
        for level in levels:
            assert losses(path, stage, level) == pytest.approx(plain, rel=1e-5)
        assert sum(plain[-3:]) < sum(plain[:3]), "it learns"


def lora(path: Path, **changes: Any) -> list[float]:
    lm = PackedLM(load_model(resolve_path(path), dtype=torch.float32, attention=IMPLEMENTATION))
    stage = but(LORA, n_epochs=10, batch_size=4, target_modules=list(lm.family.attention))
    return losses(path, stage, "nothing", **changes)


def test_passes_of_any_size_and_layers_that_run_twice_train_alike(tiny_llama_dir: Path) -> None:
    plain = lora(tiny_llama_dir)
    assert lora(tiny_llama_dir, token_budget=40) == pytest.approx(plain, rel=1e-5)
    assert lora(tiny_llama_dir, checkpointing=True) == pytest.approx(plain, rel=1e-5)


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.skipif(not compiled.can_compile(), reason="there is no C++ compiler")
def test_traced_layers_train_alike(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers run as Dynamo traces them, without the half minute that compiling machine code takes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    graphs = counters["stats"]["unique_graphs"]
    compiled_losses = lora(tiny_llama_dir, compile=True, cache_dir=tmp_path)
    assert compiled_losses == pytest.approx(lora(tiny_llama_dir), rel=1e-5)
    assert counters["stats"]["unique_graphs"] > graphs, "layers were traced"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.skipif(not compiled.can_compile(), reason="there is no C++ compiler")
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_layers_train_alike(
    make_tiny_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    path = make_tiny_model(family)
    graphs = counters["stats"]["unique_graphs"]
    assert lora(path, compile=True, cache_dir=tmp_path) == pytest.approx(lora(path), rel=1e-5)
    assert counters["stats"]["unique_graphs"] > graphs, "layers were compiled"
    if family == "llama":  # others' kernels may be equal to those that this process has loaded
        assert list((tmp_path / "compiled").rglob("*.so")), "machine code was made, in its own place"
