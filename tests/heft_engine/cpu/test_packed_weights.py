"""Packed weights are used only while the weight is unchanged, and change no bit of a product."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from heft_engine.cpu import operators
from heft_engine.cpu.amx import AmxOps
from heft_engine.cpu.packed_weights import bytes_to_pack, pack, packed_bytes, packed_copy, unpack
from heft_engine.data.encoding import Example
from heft_engine.evaluation import evaluate
from heft_engine.inference.scoring import score
from heft_engine.model.attention import IMPLEMENTATION
from heft_engine.model.base_models import load_model, resolve_path
from heft_engine.model.packed_lm import PackedLM
from heft_engine.serving.shared_copy import copy_sharing_weights, unique_bytes


def linear(outs: int, ins: int, *, bias: bool = False) -> nn.Linear:
    return nn.Linear(ins, outs, bias=bias, dtype=torch.bfloat16).requires_grad_(False)


def test_only_bfloat16_on_a_cpu_is_packed() -> None:
    single = nn.Linear(8, 8)
    pack([single])
    assert packed_copy(single.weight) is None
    assert bytes_to_pack([single]) == 0


@pytest.mark.usefixtures("with_amx")
def test_a_packed_copy_is_not_used_without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = linear(48, 64)
    pack([layer])
    assert packed_copy(layer.weight) is not None
    monkeypatch.setattr(operators, "amx_ops", lambda: None)
    assert packed_copy(layer.weight) is None


@pytest.mark.usefixtures("with_amx")
def test_a_weight_that_was_written_to_is_not_packed_any_more() -> None:
    layer = linear(32, 64)
    pack([layer])
    assert packed_copy(layer.weight) is not None
    layer.weight.mul_(2)
    assert packed_copy(layer.weight) is None
    pack([layer])
    assert packed_copy(layer.weight) is not None
    unpack([layer])
    assert packed_copy(layer.weight) is None


@pytest.mark.usefixtures("with_amx")
def test_packed_weights_are_counted_and_shared(make_tiny_model: Callable[[str], Path]) -> None:
    lm = PackedLM(
        load_model(resolve_path(make_tiny_model("llama")), dtype=torch.bfloat16, attention=IMPLEMENTATION)
    )
    plain, more = unique_bytes(lm), bytes_to_pack(lm.layers)
    assert more == sum(2 * m.weight.numel() for m in lm.layers.modules() if isinstance(m, nn.Linear))
    lm.pack(more - 1)
    assert bytes_to_pack(lm.layers) == more, "there was no room"
    lm.pack(more)
    assert bytes_to_pack(lm.layers) == 0
    assert unique_bytes(lm) == plain + more
    name = "model.layers.0.self_attn.q_proj"
    twin = PackedLM(copy_sharing_weights(lm.model, {name}))
    copied_weight = twin.model.get_submodule(name).weight
    assert packed_copy(copied_weight) is None
    assert bytes_to_pack(twin.layers) == 2 * copied_weight.numel(), "the others are packed already"
    twin.pack(1 << 20)
    assert unique_bytes(twin, beside=lm) == 2 * copied_weight.numel() + packed_bytes(copied_weight)


@pytest.mark.usefixtures("with_amx")
def test_a_copy_made_during_a_pass_runs_its_own_layers(make_tiny_model: Callable[[str], Path]) -> None:
    """Models are merged while the base answers."""
    lm = PackedLM(
        load_model(resolve_path(make_tiny_model("llama")), dtype=torch.bfloat16, attention=IMPLEMENTATION)
    )
    with lm.inference_mode():
        assert "forward" in lm.layers[0].__dict__
        twin = copy_sharing_weights(lm.model, {"model.layers.0.self_attn.q_proj"})
    assert not any("forward" in module.__dict__ for module in twin.modules())


@pytest.mark.usefixtures("with_amx")
def test_an_evaluation_packs_for_as_long_as_it_takes(
    make_tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = PackedLM(
        load_model(resolve_path(make_tiny_model("llama")), dtype=torch.bfloat16, attention=IMPLEMENTATION)
    )
    rows = [
        Example(prompt=(5, 9, 11) * 9, answers=((7,), (8,)), labels=("a", "b"), gold=0)
    ] * evaluate.WORTH_PACKING
    before = score(lm, rows)
    packed: list[bool] = []
    run = AmxOps.gated_mlp

    def gated_mlp(self: AmxOps, *operands: Any) -> torch.Tensor:
        packed.append(operands[3] is not None)
        return run(self, *operands)

    monkeypatch.setattr(AmxOps, "gated_mlp", gated_mlp)

    class Encoder:
        class task:
            type = "yes_no"

    evaluation = evaluate.evaluate(lm, Encoder, rows, max_new_tokens=1)  # type: ignore[arg-type]
    assert packed
    assert all(packed)
    assert list(evaluation.scores) == before
    assert bytes_to_pack(lm.layers) > 0
