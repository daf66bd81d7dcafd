"""Fused layers of inference passes have the bits of the modules' own forward, hooks included."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from needs import needs_compiler
from probe_models import with_intervention
from torch import Tensor, nn

from heft_engine.cpu import fused_layers as fused_module
from heft_engine.cpu.backend import CpuBackend
from heft_engine.cpu.fused_layers import FusedLayers
from heft_engine.data.encoding import Example
from heft_engine.inference.scoring import score
from heft_engine.model.backend import TorchBackend
from heft_engine.model.packed_lm import PackedLM

pytestmark = [needs_compiler, pytest.mark.usefixtures("with_amx")]

QUICK = ("llama", "mistral", "qwen2", "qwen3")
OTHERS = ("gemma", "gemma2", "gemma3_text", "gpt_neox")
MakeModel = Callable[[str], Path]


def model(path: Path, dtype: torch.dtype = torch.bfloat16) -> PackedLM:
    return with_intervention(path, "l2", dtype)


class WithoutFusedLayers(CpuBackend):
    """Runs every layer by its module's own forward, on the same operators."""

    def inference_mode(self, *, one_token: bool = False) -> AbstractContextManager[None]:
        return TorchBackend.inference_mode(self, one_token=one_token)


def fused_layers(lm: PackedLM) -> FusedLayers:
    assert isinstance(lm.backend, CpuBackend)
    return lm.backend.fused_layers


def rows(count: int, *, branched: bool) -> list[Example]:
    chance = random.Random(1)
    examples = []
    for index in range(count):
        prompt = tuple(chance.randrange(5, 600) for _ in range(chance.randint(1, 90)))
        choices = ((7,), (8,)) if index % 3 or not branched else ((7, 9, 11), (8, 12))
        examples.append(Example(prompt=prompt, answers=choices, labels=("a", "b"), gold=0))
    return examples


def totals(lm: PackedLM, examples: list[Example]) -> list[tuple[float, ...]]:
    return [row_scores.totals for row_scores in score(lm, examples)]


@pytest.mark.parametrize("family", QUICK + OTHERS)
@pytest.mark.parametrize("branched", [False, True])
def test_scores_have_the_bits_of_the_modules_own(
    make_tiny_model: MakeModel, family: str, branched: bool
) -> None:
    examples = rows(12, branched=branched)
    quick, plain = model(make_tiny_model(family)), model(make_tiny_model(family))
    plain.backend = WithoutFusedLayers(plain.backend.layers)
    assert totals(quick, examples) == totals(plain, examples)
    assert len(fused_layers(quick)) == (quick.n_layers if family in QUICK else 0)


def test_without_amx_the_modules_own_forward_runs(make_tiny_model: MakeModel, without_amx: None) -> None:
    lm = model(make_tiny_model("llama"))
    totals(lm, rows(2, branched=False))
    assert len(fused_layers(lm)) == 0


def test_only_bfloat16_layers_are_quick(make_tiny_model: MakeModel) -> None:
    lm = model(make_tiny_model("llama"), torch.float32)
    totals(lm, rows(2, branched=False))
    assert len(fused_layers(lm)) == 0


def test_a_layer_that_is_not_what_it_looks_like_keeps_its_own_pass(
    make_tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = model(make_tiny_model("llama"))
    first: Any = lm.layers[0]
    forward = type(first).forward

    def other(self: Any, states: Tensor, **options: Any) -> Tensor:
        return forward(self, states, **options) * 2

    monkeypatch.setattr(type(first), "forward", other)
    expected = totals(lm, rows(3, branched=False))
    assert len(fused_layers(lm)) == 0
    assert totals(lm, rows(3, branched=False)) == expected


def test_hooks_on_layers_and_on_products_act(make_tiny_model: MakeModel) -> None:
    lm = model(make_tiny_model("llama"))
    examples = rows(3, branched=False)
    before = totals(lm, examples)
    seen: list[str] = []
    layer: Any = lm.layers[2]
    modules = {
        "layer": layer,
        "query": layer.self_attn.q_proj,
        "out": layer.self_attn.o_proj,
        "down": layer.mlp.down_proj,
    }
    for name, module in modules.items():
        module.register_forward_hook(lambda module, args, output, name=name: seen.append(name))
    doubled = layer.mlp.up_proj.register_forward_hook(lambda module, args, output: output * 2)
    assert totals(lm, examples) != before
    assert len(fused_layers(lm)) == lm.n_layers
    assert set(seen) == set(modules)
    doubled.remove()
    assert totals(lm, examples) == before


def test_layers_are_their_own_again_when_the_last_thread_has_left(make_tiny_model: MakeModel) -> None:
    lm = model(make_tiny_model("llama"))
    with lm.inference_mode():
        assert "forward" in lm.layers[0].__dict__
        ended = threading.Event()

        def other() -> None:
            with lm.inference_mode():
                ended.set()

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert ended.is_set()
        assert "forward" in lm.layers[0].__dict__
    assert "forward" not in lm.layers[0].__dict__


def test_a_family_asks_once_for_each_kind_of_layer(
    make_tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """qwen2's windows act on some layers only: options of one kind of layer must not be used for all."""
    kinds: list[str] = []
    options = fused_module._attention_options

    def watched(layer: nn.Module, kind: str, *rest: Any) -> Any:
        kinds.append(kind)
        return options(layer, kind, *rest)

    monkeypatch.setattr(fused_module, "_attention_options", watched)
    with model(make_tiny_model("qwen2")).inference_mode():
        assert sorted(kinds) == ["full_attention", "sliding_attention"]
